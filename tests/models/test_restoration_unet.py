"""The UNet of restoration: any size, what the time and the statistics do, gradients, files, and wrong arguments."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusers_ext.models import RestorationUNet2DModel
from diffusers_ext.models.restoration_unet_2d import log_statistics
from tests.helpers.fresh_process import digest, facts, run_fresh


def network(**settings: Any) -> RestorationUNet2DModel:
    sizes = {"block_out_channels": (8, 12), "layers_per_block": (1, 2), "embedding_dim": 16, **settings}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return RestorationUNet2DModel(**sizes).eval()


def pictures(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1))


def test_statistics_are_logarithms_of_mean_and_deviation() -> None:
    rows = torch.tensor([1.0, 3.0, 1.0, 3.0]).reshape(1, 1, 2, 2)
    expected = [math.log(2.0 + 1e-3) + 2.0, math.log(1.0 + 1e-3) + 2.0]
    torch.testing.assert_close(
        log_statistics(torch.cat([rows, -rows], 1))[0], torch.tensor(expected).repeat_interleave(2)
    )
    # darkness by a factor is a shift, and black pictures are finite
    darker = log_statistics(rows) - log_statistics(0.1 * rows)
    torch.testing.assert_close(darker, torch.full((1, 2), math.log(10.0)), atol=1e-2, rtol=0)
    assert log_statistics(0.0 * rows).isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("size", [(2, 2), (6, 10), (30, 44)])
def test_the_answer_has_the_size_of_the_picture(size: tuple[int, int]) -> None:
    answer = network()(pictures(2, 6, *size), 40.0)
    assert answer.sample.shape == (2, 3, *size) and answer.sample.isfinite().all()


@torch.no_grad()
def test_a_picture_is_answered_alike_alone_and_in_a_batch() -> None:
    model, seen = network(), pictures(3, 6, 8, 12)
    times = torch.tensor([3.0, 40.0, 99.5])
    together = model(seen, times, return_dict=False)[0]
    for row in range(3):
        torch.testing.assert_close(
            together[row], model(seen[row : row + 1], times[row]).sample[0], atol=1e-6, rtol=1e-5
        )


@torch.no_grad()
def test_the_time_and_the_whole_picture_change_every_pixel() -> None:
    model, seen = network(), pictures(1, 6, 64, 64)
    answer = model(seen, 10.0).sample
    assert (model(seen, 90.0).sample - answer).abs().amin() > 0
    # the far corner is out of reach of the convolutions, but not of the statistics
    brighter = seen.clone()
    brighter[..., :8, :8] += 1.0
    changed = (model(brighter, 10.0).sample - answer).abs()[..., -8:, -8:]
    assert (changed > 0).float().mean() > 0.9


def test_checkpointed_gradients_are_the_plain_ones() -> None:
    gradients = []
    for checkpointed in (False, True):
        model = network()
        if checkpointed:
            model.enable_gradient_checkpointing()
        model.train()(pictures(2, 6, 8, 8), 20.0).sample.square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(plain, other) and plain.abs().sum() > 0 for plain, other in zip(*gradients, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision_answers_nearly_the_same(dtype: torch.dtype) -> None:
    model, seen = network(), pictures(1, 6, 16, 16)
    expected = model(seen, 30.0).sample
    found = model.to(dtype)(seen.to(dtype), torch.tensor(30.0)).sample
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, atol=0.03 * float(expected.std()) + 0.01, rtol=0.05)


@torch.no_grad()
def test_a_fresh_process_loads_it(tmp_path: Path) -> None:
    model = network()
    model.save_pretrained(tmp_path)
    code = f"""
import torch
from tests.helpers.fresh_process import digest
from tests.helpers.placement import in_own_memory
model = in_own_memory(_loaded("models").RestorationUNet2DModel.from_pretrained({str(tmp_path)!r}))
print("layers", model.config.layers_per_block)
with torch.no_grad():
    print("digest", digest(model(torch.rand(1, 6, 8, 8, generator=torch.Generator().manual_seed(1)), 7.0).sample))
"""
    found = facts(run_fresh(code))
    assert found == {"digest": digest(model(pictures(1, 6, 8, 8), 7.0).sample), "layers": "[1, 2]"}


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"block_out_channels": ()}, r"block_out_channels=\(\) is not usable"),
        ({"block_out_channels": (8, 0)}, r"block_out_channels=\(8, 0\) is not usable; give ints of at least 1"),
        (
            {"layers_per_block": (1,)},
            r"layers_per_block=\[1\] is not one number for each of block_out_channels=\[8, 12\]",
        ),
        ({"layers_per_block": 0}, "layers_per_block"),
        ({"embedding_dim": 2.5}, "embedding_dim"),
        ({"embedding_dim": True}, "embedding_dim"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        network(**settings)


@pytest.mark.parametrize(
    "sample, timestep, error, message",
    [
        (None, 1.0, TypeError, "sample is NoneType; give a tensor of floats"),
        (torch.zeros(1, 6, 8, 8, dtype=torch.int64), 1.0, TypeError, "sample is torch.int64"),
        (torch.zeros(1, 3, 8, 8), 1.0, ValueError, r"\(1, 3, 8, 8\); this network needs \(batch, 6, H, W\)"),
        (torch.zeros(1, 6, 8, 7), 1.0, ValueError, "with sides that 2 divides"),
        (torch.zeros(0, 6, 8, 8), 1.0, ValueError, r"\(0, 6, 8, 8\)"),
        (torch.zeros(2, 6, 8, 8), torch.tensor([1.0, 2.0, 3.0]), ValueError, r"timestep of shape \(3,\) does not fit"),
        (torch.zeros(2, 6, 8, 8), float("nan"), ValueError, "timestep=nan is not finite"),
        (torch.zeros(2, 6, 8, 8), "7", ValueError, "timestep='7' is not a number"),
    ],
)
def test_wrong_arguments_are_named(sample: Any, timestep: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        network()(sample, timestep)
