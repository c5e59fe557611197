"""Residual guidance and the stages of a stream: the authors' own numbers, and what the formulas must give by themselves."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler

from diffusers_ext.pipelines.stream_stages import GUIDANCES, StreamRow, StreamStages, advance, entering
from diffusers_ext.schedulers.residual_guidance import (
    boundary_scalings,
    guided_noise,
    next_residual,
    predicted_data,
    skip_probability,
    strength_indices,
)


SCHEDULE: dict[str, Any] = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1,
    "set_alpha_to_one": False, "clip_sample": False,
}  # fmt: skip
WORDS, NO_WORDS = {"w": 0.6}, {"w": -0.4}


@pytest.fixture(scope="module")
def file(golden) -> Any:
    return golden("rolling/streamdiffusion_batch.npz")


def network(weight: torch.Tensor) -> Any:
    def predict(latents: torch.Tensor, timesteps: torch.Tensor, conditions: Sequence[Any]) -> torch.Tensor:
        level = (timesteps.to(latents.dtype) / 1000).view(-1, 1, 1, 1)
        words = latents.new_tensor([condition["w"] for condition in conditions]).view(-1, 1, 1, 1)
        mixed = torch.einsum("oc,bchw->bohw", weight, latents)
        return torch.tanh(mixed) * (1 + level) + words * level

    return predict


def official_stages(file: Any) -> StreamStages:
    config = LCMScheduler(**{**SCHEDULE, "timestep_scaling": 0.002}).config
    return StreamStages.from_config(config, 50, tuple(int(index) for index in file["t_index_list"]), "lcm")


def test_the_stages_are_those_of_the_authors(file) -> None:
    stages = official_stages(file)
    assert list(stages.timesteps) == file["timesteps"].tolist()
    for found, name in ((stages.alphas, "alphas"), (stages.sigmas, "sigmas")):
        assert found[:-1] == pytest.approx(file[name].tolist(), abs=1e-6)
    assert [pair[0] for pair in stages.scalings] == pytest.approx(file["c_skip"].tolist(), rel=1e-5)
    assert [pair[1] for pair in stages.scalings] == pytest.approx(file["c_out"].tolist(), rel=1e-5)


@pytest.mark.parametrize("guidance", GUIDANCES)
@pytest.mark.parametrize("staggered", [True, False])
def test_every_guidance_gives_the_results_of_the_authors(file, guidance: str, staggered: bool) -> None:
    stages, noise, predict = official_stages(file), file.tensor("init_noise"), network(file.tensor("weight"))
    found, rows = [], []
    for data in file.tensor("x_in"):
        rows.insert(0, entering(data[None], stages, noise, WORDS, NO_WORDS))
        for _ in range(1 if staggered else len(stages)):
            rows = advance(rows, stages, noise, predict, guidance, 1.7, 0.8)
        if rows[-1].stage == len(stages):
            found.append(rows.pop().latents)
    expected = file.tensor(f"out_{guidance}")
    torch.testing.assert_close(torch.cat(found[: len(expected)]), expected, atol=1e-6, rtol=1e-6)


def test_the_guidances_differ(file) -> None:
    results = [file.tensor(f"out_{guidance}") for guidance in GUIDANCES]
    for place, one in enumerate(results):
        assert all(float((one - other).abs().max()) > 0.01 for other in results[:place])


@pytest.mark.parametrize("guidance", ["self", "initialize"])
@pytest.mark.parametrize("update", ["ddim", "lcm"])
def test_the_residual_is_the_noise_held_if_the_picture_had_not_changed(guidance: str, update: str) -> None:
    stages = StreamStages.from_config(DDIMScheduler(**SCHEDULE).config, 10, (3, 5, 8), update)
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(1, 4, 3, 2, generator=generator, dtype=torch.float64)
    noise = torch.randn(stages.noises, 4, 3, 2, generator=generator, dtype=torch.float64)
    weight = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    row = entering(data, stages, noise, WORDS, NO_WORDS)
    assert row.residual is not None and torch.equal(row.residual, noise[:1])
    for stage in (1, 2):
        (row,) = advance([row], stages, noise, network(weight), guidance, 1.5)
        if guidance == "self":
            expected = (row.latents - stages.alphas[stage] * data) / stages.sigmas[stage]
            torch.testing.assert_close(row.residual, expected, atol=1e-6, rtol=1e-6)
        assert row.residual is not None and row.residual.shape == data.shape


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("guidance", ["none", "full"])
@pytest.mark.parametrize("update", ["ddim", "lcm"])
def test_stages_are_the_steps_of_the_schedulers_of_diffusers(kind: str, guidance: str, update: str) -> None:
    scheduler: Any = (DDIMScheduler if update == "ddim" else LCMScheduler)(**SCHEDULE, prediction_type=kind)
    stages = StreamStages.from_config(scheduler.config, 8, strength_indices(8, 0.6), update)
    scheduler.set_timesteps(8)
    generator = torch.Generator().manual_seed(1)
    data = torch.randn(1, 4, 3, 2, generator=generator)
    noise = torch.randn(stages.noises, 4, 3, 2, generator=generator)
    predict = network(0.3 * torch.randn(4, 4, generator=generator))
    row = entering(data, stages, noise, WORDS, NO_WORDS)
    expected = row.latents
    scheduler.set_begin_index(8 - len(stages)) if update == "lcm" else None
    draws = torch.Generator()
    for place, timestep in enumerate(stages.timesteps):
        (row,) = advance([row], stages, noise, predict, guidance, 2.5)
        output = predict(expected, torch.tensor([timestep]), [WORDS])
        if guidance == "full":
            output = guided_noise(output, predict(expected, torch.tensor([timestep]), [NO_WORDS]), 2.5)
        if update == "ddim":
            expected = scheduler.step(output, timestep, expected).prev_sample
        else:
            made = scheduler.step(output, timestep, expected, generator=draws)
            expected = made.denoised
            if place + 1 < len(stages):
                expected = (
                    stages.alphas[place + 1] * expected + stages.sigmas[place + 1] * noise[place + 1 : place + 2]
                )
        torch.testing.assert_close(row.latents, expected, atol=2e-5, rtol=1e-5)
    assert row.stage == len(stages)


def test_pictures_of_a_batch_do_not_see_each_other() -> None:
    stages = StreamStages.from_config(DDIMScheduler(**SCHEDULE).config, 6, (2, 3, 4, 5), "ddim")
    noise, weight = torch.randn(1, 4, 3, 2).double(), torch.randn(4, 4).double()
    rows = [
        StreamRow(torch.randn(1, 4, 3, 2).double(), WORDS, NO_WORDS, stage, torch.randn(1, 4, 3, 2).double())
        for stage in (0, 3, 1, 2, 0)
    ]
    for guidance in GUIDANCES:
        together = advance(rows, stages, noise, network(weight), guidance, 1.4)
        for row, moved in zip(rows, together, strict=True):
            (alone,) = advance([row], stages, noise, network(weight), guidance, 1.4)
            torch.testing.assert_close(moved.latents, alone.latents)
            assert (moved.residual is None) == (alone.residual is None)


def test_guidance_costs_what_it_says() -> None:
    stages = StreamStages.from_config(DDIMScheduler(**SCHEDULE).config, 6, (2, 3, 4, 5), "ddim")
    counted = []

    def predict(latents: torch.Tensor, timesteps: torch.Tensor, conditions: Sequence[Any]) -> torch.Tensor:
        assert len(latents) == len(timesteps) == len(conditions)
        counted.append(len(latents))
        return latents

    rows = [StreamRow(torch.zeros(1, 4, 2, 2), WORDS, NO_WORDS, stage) for stage in range(4)]
    for guidance in GUIDANCES:
        advance(rows, stages, torch.zeros(1, 4, 2, 2), predict, guidance, 1.4)
    assert dict(zip(GUIDANCES, counted, strict=True)) == {"self": 4, "initialize": 5, "full": 8, "none": 4}


def test_a_guidance_scale_of_one_is_no_guidance() -> None:
    noise, other = torch.randn(2, 3), torch.randn(2, 3)
    torch.testing.assert_close(guided_noise(noise, other, 1.0, 0.7), noise)
    assert torch.equal(guided_noise(noise, other, 0.0), other)


def test_boundary_scalings_are_those_of_the_scheduler() -> None:
    scheduler = LCMScheduler()
    for timestep in (0, 1, 259, 999):
        assert boundary_scalings(timestep) == pytest.approx(
            scheduler.get_scalings_for_boundary_condition_discrete(timestep), rel=1e-12
        )
    sample, noise = torch.randn(2, 3), torch.randn(2, 3)
    assert torch.equal(predicted_data(sample, noise, 0.6, 0.8, *boundary_scalings(0)), sample)


def test_a_right_prediction_leaves_the_residual_as_it_is() -> None:
    noise = torch.randn(1, 4, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(next_residual(noise, noise, noise, (0.6, 0.8), (0.8, 0.6)), noise)


@pytest.mark.parametrize(("steps", "strength"), [(8, 0.5), (50, 0.8), (10, 1.0), (3, 0.34), (50, 0.02)])
def test_strength_leaves_the_steps_that_diffusers_makes(steps: int, strength: float) -> None:
    from diffusers import StableDiffusionImg2ImgPipeline as Stock

    scheduler = DDIMScheduler(**SCHEDULE)
    scheduler.set_timesteps(steps)
    stand_in = type("Pipe", (), {"scheduler": scheduler})()
    expected, _ = Stock.get_timesteps(stand_in, steps, strength, "cpu")
    indices = strength_indices(steps, strength)
    assert [int(scheduler.timesteps[index]) for index in indices] == expected.tolist()


@pytest.mark.parametrize("strength", [0.0, 0.1])
def test_a_strength_without_steps_is_refused(strength: float) -> None:
    with pytest.raises(ValueError, match=r"strength=0.* leaves no step; give a strength of at least 0.125"):
        strength_indices(8, strength)


@pytest.mark.parametrize(("similarity", "expected"), [(1.0, 1.0), (0.99, 0.5), (0.98, 0.0), (-1.0, 0.0), (1.1, 1.0)])
def test_the_more_alike_the_likelier_left_out(similarity: float, expected: float) -> None:
    assert skip_probability(similarity, 0.98) == pytest.approx(expected)
