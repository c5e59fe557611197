"""Edit-friendly inversion: the authors' noises, the stock sampler's step, and what the noises are like."""

from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from diffusers_ext.inversion import Denoiser, edit_friendly_inversion, regenerate, stochastic_step
from tests.inversion.subjects import SD, gaussian, ladder, pictures
from tests.inversion.trained import run_unet, tiny_denoiser, tiny_ladder


FILE = "editing/edit_friendly_ddpm.npz"


def test_noises_and_states_and_edit_are_those_of_the_authors(golden, tiny_sd_path):
    file, steps = golden(FILE), tiny_ladder()
    start, states = file.tensor("w0"), file.tensor("xts_sampled")[:, None]
    levels = steps.alpha_bars[1:].reshape(-1, 1, 1, 1, 1)
    noise = (states[1:] - levels**0.5 * start) / (1 - levels) ** 0.5
    inverted = edit_friendly_inversion(tiny_denoiser(), start, steps, last_noise=False, noise=noise)
    zs = file.tensor("zs")[:, None]
    assert float(zs[0].abs().max()) == 0 and float(inverted.noise_maps[0].abs().max()) == 0
    torch.testing.assert_close(inverted.noise_maps, zs, atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(inverted.latents[1:], file.tensor("xts_corrected")[1:, None], atol=1e-4, rtol=0)
    back = regenerate(tiny_denoiser(), inverted, steps)
    torch.testing.assert_close(back, file.tensor("reconstruction"), atol=1e-3, rtol=0)

    pipe = StableDiffusionPipeline.from_pretrained(tiny_sd_path, dtype=torch.float32, safety_checker=None)
    target, null = pipe.encode_prompt(str(file["target_prompt"]), "cpu", 1, True)
    edit = regenerate(
        Denoiser(run_unet, target, null), inverted, steps, guidance_scale=9.0, source=False, skip=int(file["skip"])
    )
    torch.testing.assert_close(edit, file.tensor("edited"), atol=5e-3, rtol=0)


def test_the_last_noise_makes_a_trained_network_lead_back_exactly(golden):
    start = golden(FILE).tensor("w0")
    generator = torch.Generator().manual_seed(0)
    inverted = edit_friendly_inversion(tiny_denoiser(), start, tiny_ladder(), generator=generator)
    back = regenerate(tiny_denoiser(), inverted, tiny_ladder())
    torch.testing.assert_close(back, start, atol=2e-5, rtol=0)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_a_step_is_that_of_the_stock_scheduler_with_its_noise_given(kind, eta):
    scheduler = DDIMScheduler(**SD, prediction_type=kind)
    scheduler.set_timesteps(10)
    steps = replace(ladder(10, kind), alpha_bars=ladder(10, kind).alpha_bars.float())
    output, sample, noise = (pictures(2, seed).float() for seed in range(3))
    for i, t in enumerate(scheduler.timesteps):
        mean, spread = stochastic_step(output, sample, *steps.sampling_levels(i), eta, kind)
        expected = scheduler.step(output, t, sample, eta=eta, variance_noise=noise).prev_sample
        torch.testing.assert_close(mean + spread * noise, expected, atol=1e-5, rtol=1e-5)


def test_a_last_step_to_the_clean_picture_is_exact_although_it_has_no_noise():
    steps = ladder(6, set_alpha_to_one=True)
    assert steps.alpha_bars[0] == 1
    inverted = edit_friendly_inversion(gaussian(), pictures(), steps, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(regenerate(gaussian(), inverted, steps), pictures(), atol=1e-9, rtol=0)


def test_noises_are_larger_than_those_of_the_sampler_and_repeat_with_a_seed():
    maps = [
        edit_friendly_inversion(
            gaussian(400), pictures(400), ladder(20), generator=torch.Generator().manual_seed(seed)
        ).noise_maps
        for seed in (0, 0, 1)
    ]
    assert torch.equal(maps[0], maps[1]) and not torch.equal(maps[0], maps[2])
    # Independent states are further apart than neighbours of one trajectory: that is the paper's point.
    assert float(maps[0][5:].var()) > 1.2
