"""DDIM in both directions: against diffusers, against the authors, and against itself."""

import pytest
import torch
from diffusers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DConditionModel,
)
from hypothesis import given
from hypothesis import strategies as st

from diffusers_ext.inversion import DDIMLadder, ddim_inversion_states, ddim_step, epsilon_from_v, v_from_epsilon


SD = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False,
    "set_alpha_to_one": False, "steps_offset": 1,
}  # fmt: skip
levels = st.floats(1e-3, 0.999).map(lambda level: torch.tensor(level, dtype=torch.float64))
kinds = st.sampled_from(["epsilon", "v_prediction"])


def noise(seed: int) -> torch.Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def toy(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return torch.sin(z + t / 1000)


@given(a=levels, b=levels, kind=kinds)
def test_a_step_there_and_back_is_exact_for_the_same_prediction(a, b, kind):
    z, epsilon = noise(0).double(), noise(1).double()
    output = epsilon if kind == "epsilon" else v_from_epsilon(epsilon, z, a)
    there = ddim_step(output, z, a, b, kind)
    back = epsilon if kind == "epsilon" else v_from_epsilon(epsilon, there, b)
    torch.testing.assert_close(ddim_step(back, there, b, a, kind), z, atol=1e-9, rtol=1e-9)


@given(a=levels)
def test_epsilon_and_v_are_two_names_of_one_prediction(a):
    z, epsilon = noise(0).double(), noise(1).double()
    torch.testing.assert_close(epsilon_from_v(v_from_epsilon(epsilon, z, a), z, a), epsilon)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [1, 7, 10, 50, 333])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_sampling_is_that_of_the_stock_scheduler_to_the_last_bit(kind, steps, spacing):
    if spacing == "trailing" and 1000 % steps:
        pytest.skip("the stock scheduler computes the previous timestep, which is off where steps do not divide 1000")
    scheduler = DDIMScheduler(**SD, prediction_type=kind, timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    ladder = DDIMLadder.from_scheduler_config(scheduler.config, steps)
    assert torch.equal(ladder.timesteps, scheduler.timesteps)
    z = expected = noise(0)
    for i, t in enumerate(ladder.timesteps):
        z = ddim_step(toy(z, t), z, *ladder.sampling_levels(i), ladder.prediction_type)
        expected = scheduler.step(toy(expected, t), t, expected).prev_sample
        assert torch.equal(z, expected), i


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("offset", [0, 1])
def test_matched_inversion_is_that_of_the_stock_inverse_scheduler(kind, offset):
    config = {**SD, "steps_offset": offset, "prediction_type": kind}
    ladder = DDIMLadder.from_scheduler_config(DDIMScheduler(**config).config, 10)
    inverse = DDIMInverseScheduler(**config)
    inverse.set_timesteps(10)
    expected = noise(0)
    states = ddim_inversion_states(toy, expected, ladder)
    assert torch.equal(next(states), expected)
    for t, state in zip(inverse.timesteps, states, strict=True):
        expected = inverse.step(toy(expected, t), t, expected).prev_sample
        torch.testing.assert_close(state, expected, atol=1e-5, rtol=1e-5)


def test_official_inversion_is_that_of_the_authors(golden, tiny_sd_path):
    file = golden("editing/guide_and_rescale_nonstyle.npz")
    unet = UNet2DConditionModel.from_pretrained(tiny_sd_path / "unet", dtype=torch.float32)
    words, expected = file.tensor("context")[1:2], file.tensor("inv_latents")
    ladder = DDIMLadder.from_scheduler_config(DDIMScheduler(**{**SD, "steps_offset": 0}).config, 10)
    assert ladder.timesteps.tolist() == file["timesteps"].tolist()
    with torch.no_grad():
        states = list(ddim_inversion_states(lambda z, t: unet(z, t, words)[0], expected[0], ladder, "official"))
    torch.testing.assert_close(torch.stack(states), expected, atol=2e-5, rtol=1e-5)


def test_matched_inversion_ends_where_sampling_starts_and_official_one_step_beyond():
    ladder = DDIMLadder.from_scheduler_config(DDIMScheduler(**SD).config, 50)
    start, _ = ladder.sampling_levels(0)
    assert ladder.inversion_levels(49, "matched")[1] == start
    assert ladder.inversion_levels(49, "official") == (start, DDIMScheduler(**SD).alphas_cumprod[999])
    for step in range(50):
        assert ladder.inversion_levels(step) == ladder.sampling_levels(49 - step)[::-1]


def test_any_scheduler_of_the_model_lends_its_config():
    euler = EulerDiscreteScheduler(**{k: v for k, v in SD.items() if k.startswith("beta")}, steps_offset=1)
    ladder = DDIMLadder.from_scheduler_config(
        {**euler.config, "timestep_spacing": "leading", "set_alpha_to_one": False}, 10
    )
    expected = DDIMLadder.from_scheduler_config(DDIMScheduler(**SD).config, 10)
    assert torch.equal(ladder.timesteps, expected.timesteps)
    assert torch.equal(ladder.alpha_bars, expected.alpha_bars)


def test_clipping_of_a_config_is_left_out():
    config = DDIMScheduler(**{**SD, "clip_sample": True}).config
    ladder = DDIMLadder.from_scheduler_config(config, 10)
    z = 10 * noise(0)
    states = list(ddim_inversion_states(lambda z, t: torch.zeros_like(z), z, ladder))
    torch.testing.assert_close(states[-1], z * (ladder.alpha_bars[-1] / ladder.alpha_bars[0]) ** 0.5)


@pytest.mark.parametrize(
    "config, steps, answer",
    [
        (DDIMScheduler(**SD).config, 0, "num_inference_steps=0 is out of range; this model allows 1 to 1000"),
        (DDIMScheduler(**SD).config, 2000, "num_inference_steps=2000 is out of range"),
        (DDIMScheduler(**SD).config, 1000, "asks for timestep 1000, but the model knows 0 to 999"),
        (DDIMScheduler(**SD, prediction_type="sample").config, 10, "prediction_type='sample'"),
        (FlowMatchEulerDiscreteScheduler().config, 10, "FlowMatchEulerDiscreteScheduler has no beta_schedule"),
    ],
)
def test_what_cannot_be_inverted_is_said(config, steps, answer):
    with pytest.raises(ValueError, match=answer):
        DDIMLadder.from_scheduler_config({"_class_name": "FlowMatchEulerDiscreteScheduler", **config}, steps)


def test_unknown_words_are_answered_with_the_known_ones():
    ladder = DDIMLadder.from_scheduler_config(DDIMScheduler(**SD).config, 10)
    with pytest.raises(ValueError, match="alignment='mached' is not one of matched, official"):
        ladder.inversion_levels(0, "mached")
    with pytest.raises(ValueError, match="prediction_type='x0' is not one of epsilon, v_prediction"):
        ddim_step(noise(0), noise(0), torch.tensor(0.1), torch.tensor(0.2), "x0")
