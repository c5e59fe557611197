import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from diffusers_ext.training.autoencoding import new_autoencoder, normalise_latents, reconstruction_loss
from diffusers_ext.training.checkpoints import list_checkpoints

from .conftest import load_script, log_entries


TINY = [
    "--resolution=16", "--crop_size=8", "--block_out_channels", "8", "8", "--train_batch_size=4", "--num_threads=1",
    "--report_to=none", "--num_validation_images=4", "--logging_steps=1",
]  # fmt: skip


@pytest.fixture
def train(picture_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """Runs train_autoencoder.py in this process and returns its folder."""
    script = load_script("train_autoencoder")

    def run(name: str, *arguments: str) -> Path:
        output_dir = tmp_path / name
        given = [*TINY, f"--train_data_dir={picture_folder}", f"--output_dir={output_dir}", *arguments]
        script.main(script.parse_args(given))
        return output_dir

    return run


def pictures(n: int = 8) -> torch.Tensor:
    return torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2.0 - 1.0


@torch.no_grad()
def test_normalised_latents_have_unit_statistics_and_pictures_stay_the_same():
    torch.manual_seed(0)
    vae, images = new_autoencoder((8, 8)).eval(), pictures()
    before = vae.encode(images).latent_dist
    restored = vae.decode(before.mode()).sample
    mean, std = before.mode().mean((0, 2, 3)), before.mode().std((0, 2, 3))
    normalise_latents(vae, mean, std)
    after = vae.encode(images).latent_dist
    torch.testing.assert_close(after.mode().mean((0, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(after.mode().std((0, 2, 3)), torch.ones(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(after.std, before.std / std[:, None, None], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(vae.decode(after.mode()).sample, restored, atol=1e-5, rtol=1e-5)
    assert vae.config.scaling_factor == 1.0


def test_a_latent_channel_that_never_varies_is_reported():
    with pytest.raises(ValueError, match="must be above 0 in every channel"):
        normalise_latents(new_autoencoder((8, 8)), torch.zeros(4), torch.tensor([1.0, 1.0, 0.0, 1.0]))


def test_loss_of_a_shifted_picture_has_its_closed_form():
    # shift .5: |.| .5, squared .25, no gradient error; posterior N(1, 1): KL = 1/2
    images, zeros = torch.zeros(2, 3, 8, 8), torch.zeros(2, 4, 4, 4)
    loss = reconstruction_loss(images, images + 0.5, zeros + 1.0, zeros, kl_weight=0.1)
    assert float(loss) == pytest.approx(0.5 + 0.25 + 0.1 * 0.5)


def test_loss_of_a_lost_edge_has_its_closed_form():
    images = torch.zeros(1, 1, 4, 4)
    images[..., 2:] = 1.0  # one step in each of four rows: a gradient error of 1 in 4 of 12 differences across
    zeros = torch.zeros(1, 4, 2, 2)
    loss = reconstruction_loss(images, torch.zeros_like(images), zeros, zeros, kl_weight=1.0)
    assert float(loss) == pytest.approx(0.5 + 0.5 + 0.5 * 4 / 12)


def test_crops_are_the_windows_asked_for():
    crops = load_script("train_autoencoder").random_crops
    images = pictures(2)
    corners = torch.tensor([[[0, 0], [3, 8]], [[8, 8], [1, 2]]])
    cut = crops(images, corners, 8)
    assert torch.equal(cut[1], images[0, :, 3:11, 8:16]) and torch.equal(cut[3], images[1, :, 1:9, 2:10])


def test_the_trained_folder_is_a_stock_autoencoder_with_card_and_metrics(train: Callable[..., Path]):
    folder = train("run", "--max_train_steps=40", "--lr_warmup_steps=0", "--validation_steps=20")
    vae = AutoencoderKL.from_pretrained(folder)
    latents = vae.encode(pictures()).latent_dist.mode()
    assert latents.shape == (8, 4, 8, 8) and vae.config.scaling_factor == 1.0
    metrics = json.loads((folder / "metrics.json").read_text())
    entries = log_entries(folder)
    assert [entry["psnr"] for entry in entries if "psnr" in entry][-1] == metrics["psnr"]
    assert entries[0]["loss"] > 1.1 * [entry for entry in entries if "loss" in entry][-1]["loss"]
    assert f"{metrics['psnr']:.2f} dB" in (folder / "README.md").read_text()
    assert (folder / "samples" / "step-0000020.png").is_file()
    assert [step for step, _ in list_checkpoints(folder)] == [40]


def test_a_frozen_encoder_keeps_its_latents_to_the_bit(train: Callable[..., Path], vae_folder: Path):
    folder = train("decoder", f"--pretrained_vae={vae_folder}", "--freeze_encoder", "--max_train_steps=3")
    before, after = AutoencoderKL.from_pretrained(vae_folder), AutoencoderKL.from_pretrained(folder)
    images = pictures()
    assert torch.equal(before.encode(images).latent_dist.mode(), after.encode(images).latent_dist.mode())
    assert after.config.scaling_factor == before.config.scaling_factor
    assert not torch.equal(before.decoder.conv_in.weight, after.decoder.conv_in.weight)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--crop_size=32"], "a crop cannot be larger than the picture"),
        (["--crop_size=9"], "must be multiples of 2"),
        (["--freeze_encoder"], "give it with --pretrained_vae"),
        (["--dataset_name=emoji-scenes"], "give exactly one of --dataset_name and --train_data_dir"),
        (["--objects", "apple"], "--vendors and --objects belong to --dataset_name"),
        (["--learning_rate=-1"], "-1 must be a number above 0"),
        (["--max_train_steps=0"], "0 must be a whole number, 1 or more"),
        (["--ema_decay=1"], "1 must be at least 0 and less than 1"),
        (["--epochs=3"], "unrecognized arguments: --epochs=3"),
    ],
)
def test_a_wrong_argument_is_answered_in_one_sentence(train, capsys, arguments: list[str], message: str):
    with pytest.raises(SystemExit) as stopped:
        train("run", *arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_widths_that_do_not_fit_the_groups_are_named():
    with pytest.raises(ValueError, match=r"block_out_channels=\[8, 9\] must be multiples of norm_num_groups=2"):
        new_autoencoder((8, 9))
