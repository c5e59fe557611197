"""Gamma-sampling against DDIM, multistep consistency sampling and the exact jump of a Gaussian."""

import math
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler, StableDiffusionPipeline

from diffusers_ext.schedulers import CTMScheduler
from tests.helpers.tiny_models import tiny_stable_diffusion


SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
MEAN, DEVIATION = 0.4, 0.6
KINDS = ["epsilon", "sample", "v_prediction"]


def draw(seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def network(sample: torch.Tensor, timestep: Any) -> torch.Tensor:
    return 0.3 * torch.sin(sample + 0.001 * float(timestep))


def predicted(clean: torch.Tensor, x: torch.Tensor, alpha: float, sigma: float, kind: str) -> torch.Tensor:
    """A clean sample in the terms of a prediction type."""
    noise = (x - alpha * clean) / sigma
    return {
        "sample": clean, "epsilon": noise, "v_prediction": alpha * noise - sigma * clean, "flow_prediction": noise - clean
    }[kind]  # fmt: skip


def level(scheduler: CTMScheduler, node: float) -> tuple[float, float]:
    if scheduler.config.prediction_type == "flow_prediction":
        return 1.0 - node, node
    alpha = 1.0 / math.sqrt(1.0 + node**2)
    return alpha, node * alpha


def exact_jump(scheduler: CTMScheduler, x: torch.Tensor, index: int) -> torch.Tensor:
    """What a perfect network answers on N(0.4, 0.6^2), for which the ODE keeps the standardised sample."""
    alpha, sigma = level(scheduler, float(scheduler.sigmas[index].double()))
    following = level(scheduler, float(scheduler.sigmas[index + 1].double()))
    t, s = sigma / alpha if alpha else math.inf, following[1] / following[0]
    u = math.sqrt(1.0 - scheduler.config.gamma**2) * s
    noisy = x / alpha
    landed = MEAN + math.sqrt((DEVIATION**2 + u**2) / (DEVIATION**2 + t**2)) * (noisy - MEAN)
    clean = (landed - u / t * noisy) / (1.0 - u / t)
    return predicted(clean, x, alpha, sigma, scheduler.config.prediction_type)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("to_one", [True, False])
def test_without_fresh_noise_a_network_that_is_not_told_its_target_is_sampled_by_ddim(
    kind: str, spacing: str, to_one: bool
) -> None:
    config = {**SCHEDULE, "prediction_type": kind, "timestep_spacing": spacing}
    ours = CTMScheduler(**config, final_sigmas_type="zero" if to_one else "sigma_min")
    theirs = DDIMScheduler(**config, set_alpha_to_one=to_one, clip_sample=False)
    theirs.set_timesteps(5)  # counts back by a fifth, which only then leads to its next timestep
    ours.set_timesteps(timesteps=theirs.timesteps.tolist())
    mine = stock = draw()
    for timestep in theirs.timesteps:
        mine, clean = ours.step(network(mine, timestep), timestep, mine, return_dict=False)
        there = theirs.step(network(stock, timestep), timestep, stock)
        stock = there.prev_sample
        torch.testing.assert_close(clean, there.pred_original_sample, rtol=1e-5, atol=2e-5)
        torch.testing.assert_close(mine, stock, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_all_noise_fresh_is_the_sampling_of_the_stock_lcm_scheduler(kind: str) -> None:
    # far from timestep 0 its boundary condition leaves the prediction as it is; a large scaling makes that all timesteps
    theirs = LCMScheduler(**SCHEDULE, prediction_type=kind, timestep_scaling=1e6, clip_sample=False)
    theirs.set_timesteps(4)
    ours = CTMScheduler(**SCHEDULE, prediction_type=kind, gamma=1.0)
    ours.set_timesteps(timesteps=theirs.timesteps.tolist())
    assert ours.target_timesteps.tolist() == [0.0] * 4
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    mine = stock = draw()
    for timestep in theirs.timesteps:
        mine = ours.step(network(mine, timestep), timestep, mine, generator=generators[0]).prev_sample
        stock = theirs.step(network(stock, timestep), timestep, stock, generator=generators[1]).prev_sample
        torch.testing.assert_close(mine, stock, rtol=1e-5, atol=1e-5)
    assert torch.equal(generators[0].get_state(), generators[1].get_state()), "the last step draws nothing"


@pytest.mark.parametrize("kind", [*KINDS, "flow_prediction"])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_exact_jumps_end_at_the_end_of_the_ode_in_any_number_of_steps(kind: str, steps: int) -> None:
    scheduler = CTMScheduler(**SCHEDULE, prediction_type=kind)
    # a flow that starts at time 1 has no signal to divide by
    scheduler.set_timesteps(timesteps=[999.0 - 190 * i for i in range(steps)])
    x = draw(dtype=torch.float64)
    alpha, sigma = level(scheduler, float(scheduler.sigmas[0].double()))
    end = MEAN + DEVIATION * (x - alpha * MEAN) / math.sqrt(alpha**2 * DEVIATION**2 + sigma**2)
    for index, timestep in enumerate(scheduler.timesteps):
        x = scheduler.step(exact_jump(scheduler, x, index), timestep, x).prev_sample
    torch.testing.assert_close(x, end, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [*KINDS, "flow_prediction"])
@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.8, 1.0])
def test_exact_jumps_keep_the_distribution_at_every_level_whatever_gamma(kind: str, gamma: float) -> None:
    scheduler = CTMScheduler(**SCHEDULE, prediction_type=kind, gamma=gamma)
    scheduler.set_timesteps(timesteps=[990, 700, 300, 40])
    for index, timestep in enumerate(scheduler.timesteps):
        alpha, sigma = level(scheduler, float(scheduler.sigmas[index].double()))
        # a step is affine in the sample and in the noise: three points give its mean and variance
        x = torch.tensor([alpha * MEAN, alpha * MEAN + 1.0, alpha * MEAN], dtype=torch.float64)[:, None]
        fresh = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)[:, None]
        output = exact_jump(scheduler, x, index)
        scheduler.set_timesteps(timesteps=scheduler.timesteps)
        landed = scheduler.step(output, timestep, x, variance_noise=fresh).prev_sample.flatten()
        of_sample, of_noise = float(landed[1] - landed[0]), float(landed[2] - landed[0])
        variance = of_sample**2 * (alpha**2 * DEVIATION**2 + sigma**2) + of_noise**2
        alpha, sigma = level(scheduler, float(scheduler.sigmas[index + 1].double()))
        assert float(landed[0]) == pytest.approx(alpha * MEAN, abs=1e-6)
        assert variance == pytest.approx(alpha**2 * DEVIATION**2 + sigma**2, rel=1e-5)


def test_the_target_of_a_jump_is_the_timestep_of_its_level() -> None:
    scheduler = CTMScheduler(**SCHEDULE, gamma=0.6)
    scheduler.set_timesteps(5)
    bars = scheduler.alphas_cumprod.double()
    table = ((1 - bars) / bars).sqrt()
    for following, target in zip(scheduler.sigmas[1:-1].double(), scheduler.target_timesteps):
        low, share = int(target), float(target) % 1
        reached = table[low].log() * (1 - share) + table[low + 1].log() * share
        assert float(reached.exp()) == pytest.approx(0.8 * float(following), rel=1e-4)
    assert scheduler.target_timesteps[-1] == 0


def test_without_fresh_noise_the_target_is_the_next_timestep() -> None:
    scheduler = CTMScheduler(**SCHEDULE)
    scheduler.set_timesteps(5)
    assert scheduler.target_timesteps.tolist() == [*scheduler.timesteps.tolist()[1:], 0]
    flow = CTMScheduler(prediction_type="flow_prediction", flow_shift=3.0)
    flow.set_timesteps(5)
    torch.testing.assert_close(flow.target_timesteps, torch.cat([flow.timesteps[1:], torch.zeros(1)]))


def test_a_flow_jumps_to_a_share_of_its_ratio_of_noise_to_signal() -> None:
    flow = CTMScheduler(prediction_type="flow_prediction", gamma=0.6)
    flow.set_timesteps(timesteps=[900, 500])
    # half noise is a ratio of 1; the jump ends at 0.8, which is at 0.8 / 1.8 of the time
    assert flow.target_timesteps.tolist() == pytest.approx([1000 * 0.8 / 1.8, 0.0])


def test_noise_is_drawn_only_where_some_is_added() -> None:
    for gamma, drawn in ((0.0, [False, False]), (0.5, [True, False])):
        scheduler = CTMScheduler(**SCHEDULE, gamma=gamma)
        scheduler.set_timesteps(2)
        generator, x = torch.Generator().manual_seed(0), draw()
        for timestep, wanted in zip(scheduler.timesteps, drawn):
            before = generator.get_state()
            x = scheduler.step(network(x, timestep), timestep, x, generator=generator).prev_sample
            assert torch.equal(before, generator.get_state()) is not wanted


def test_a_list_of_generators_gives_each_sample_its_own_noise() -> None:
    def step(generator: Any, x: torch.Tensor) -> torch.Tensor:
        scheduler = CTMScheduler(**SCHEDULE, gamma=0.5)
        scheduler.set_timesteps(3)
        return scheduler.step(network(x, 999), 999, x, generator=generator).prev_sample

    together = step([torch.Generator().manual_seed(i) for i in range(2)], draw())
    for i in range(2):
        torch.testing.assert_close(together[i : i + 1], step(torch.Generator().manual_seed(i), draw()[i : i + 1]))


def test_a_stock_pipeline_samples_with_it() -> None:
    pipe = tiny_stable_diffusion()
    assert isinstance(pipe, StableDiffusionPipeline)
    pictures = []
    for scheduler in (CTMScheduler, DDIMScheduler):
        settings = {"final_sigmas_type": "sigma_min"} if scheduler is CTMScheduler else {"clip_sample": False}
        pipe.scheduler = scheduler.from_config(
            pipe.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=False, **settings
        )
        generator = torch.Generator().manual_seed(0)
        pictures.append(pipe("a", num_inference_steps=3, generator=generator, output_type="pt").images)
    torch.testing.assert_close(*pictures, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gamma": 1.5}, "gamma=1.5 is out of range; use a number from 0 to 1; 0 is deterministic"),
        ({"gamma": True}, "gamma=True is out of range"),
        ({"gamma": math.nan}, "gamma=nan is out of range"),
        ({"final_sigmas_type": "one"}, "final_sigmas_type='one' is not known; use one of zero, sigma_min"),
    ],
)
def test_a_wrong_setting_is_answered_in_one_sentence(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CTMScheduler(**settings)


def test_a_wrong_step_changes_nothing() -> None:
    scheduler = CTMScheduler(**SCHEDULE, gamma=0.5)
    x = draw()
    with pytest.raises(ValueError, match="call set_timesteps first"):
        scheduler.step(x, 999, x)
    scheduler.set_timesteps(3)
    with pytest.raises(ValueError, match=r"variance_noise of shape \(2,\) does not fit; give \(2, 4, 8, 8\)"):
        scheduler.step(x, 999, x, variance_noise=torch.zeros(2))
    with pytest.raises(TypeError, match="generator='seed' is not a torch.Generator"):
        scheduler.step(x, 999, x, generator="seed")
    with pytest.raises(ValueError, match="generator is a list of 1 for a batch of 2; give one for each"):
        scheduler.step(x, 999, x, generator=[torch.Generator()])
    assert scheduler.step_index is None
    assert scheduler.step(network(x, 999), 999, x, generator=torch.Generator()).prev_sample.isfinite().all()
