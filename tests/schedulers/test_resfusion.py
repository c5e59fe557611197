"""ResfusionScheduler against the authors' own code, and against the DDPM scheduler of diffusers."""

from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler

from diffusers_ext.schedulers import ResfusionScheduler
from diffusers_ext.schedulers.scheduling_resfusion import truncated_betas
from tests.helpers.golden import golden


DATA = golden("mr_sampler/resfusion.npz")
HEADS = {"epsilon": "resnoise", "sample": "sample", "residual": "residual"}
TABLES = sorted({name.rsplit("|", 1)[0] for name in DATA if name.endswith("|betas")})


def noise() -> torch.Tensor:
    return golden("mr_sampler/inputs.npz").tensor("noise", torch.float32)


@pytest.mark.parametrize("name", TABLES)
def test_the_cut_schedule_is_that_of_the_authors(name: str) -> None:
    kind, count = name.split("|")
    betas = truncated_betas({"LinearPro": "linear_pro", "CosinePro": "cosine_pro"}[kind], int(count))
    steps = int(DATA[f"{name}|T_acc"])
    assert len(betas) == steps
    torch.testing.assert_close(
        torch.from_numpy(betas).float(), DATA.tensor(f"{name}|betas")[:steps], rtol=2e-5, atol=1e-6
    )


@pytest.mark.parametrize("head", HEADS)
def test_a_run_is_that_of_the_authors(head: str) -> None:
    scheduler = ResfusionScheduler(prediction_type=HEADS[head])
    scheduler.set_timesteps(5)
    degraded, draws = DATA.tensor("Xhat", torch.float32), noise()
    states = DATA.tensor(f"run|{head}|T12|states", torch.float32)
    sample = scheduler.prepare_initial(degraded, noise=draws[0])
    torch.testing.assert_close(sample, states[0], rtol=0, atol=2e-6)
    for index, timestep in enumerate(scheduler.timesteps):
        output = DATA.tensor(f"run|{head}|T12|model_out", torch.float32)[index]
        sample = scheduler.step(output, timestep, sample, degraded, variance_noise=draws[1 + index]).prev_sample
        torch.testing.assert_close(sample, states[index + 1], rtol=0, atol=5e-6)


def test_the_resnoise_step_is_that_of_ddpm() -> None:
    ours = ResfusionScheduler()
    ours.set_timesteps()
    stock = DDPMScheduler(
        num_train_timesteps=5, trained_betas=ours._betas, variance_type="fixed_small", clip_sample=False
    )
    stock.set_timesteps(5)
    draws = noise()
    a = b = draws[0]
    for index, timestep in enumerate(ours.timesteps):
        generators = [torch.Generator().manual_seed(index) for _ in range(2)]
        a = ours.step(draws[10 + index], timestep, a, generator=generators[0]).prev_sample
        b = stock.step(draws[10 + index], timestep, b, generator=generators[1]).prev_sample
        torch.testing.assert_close(a, b, rtol=0, atol=5e-6)


@pytest.mark.parametrize("head", HEADS.values())
def test_a_perfect_network_recovers_the_clean_picture(head: str) -> None:
    scheduler = ResfusionScheduler(prediction_type=head)
    scheduler.set_timesteps()
    draws = noise()
    clean, degraded = draws[3].clamp(-1, 1), (0.5 * draws[3]).clamp(-1, 1) - 0.2
    sample = scheduler.prepare_initial(degraded, noise=draws[0])
    last = len(scheduler.timesteps) - 1
    torch.testing.assert_close(
        sample, scheduler.add_noise(clean, draws[0], torch.tensor([last, last]), degraded), rtol=0, atol=1e-6
    )
    for timestep in scheduler.timesteps:
        row = torch.stack([timestep, timestep])
        # the noise that is in the sample, so that the answer is true
        bars, _ = scheduler._tables(row, sample)
        inside = (sample - bars.sqrt() * clean - (1 - bars.sqrt()) * (degraded - clean)) / (1 - bars).sqrt()
        answer = scheduler.get_target(clean, inside, row, degraded)
        generator = torch.Generator().manual_seed(int(timestep))
        sample = scheduler.step(answer, timestep, sample, degraded, generator=generator).prev_sample
    torch.testing.assert_close(sample, clean, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beta_schedule": "linear"}, "beta_schedule='linear' is not known"),
        ({"num_train_timesteps": 1}, "num_train_timesteps=1 is not usable"),
    ],
)
def test_a_wrong_setting_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ResfusionScheduler(**arguments)


def test_a_wrong_call_is_named() -> None:
    scheduler, draws = ResfusionScheduler(prediction_type="residual"), noise()
    with pytest.raises(ValueError, match="num_inference_steps=10 is not possible.*use 5"):
        scheduler.set_timesteps(10)
    with pytest.raises(ValueError, match="call set_timesteps first"):
        scheduler.step(draws[0], 4, draws[1], draws[2])
    scheduler.set_timesteps()
    with pytest.raises(ValueError, match="mean=None is missing"):
        scheduler.step(draws[0], 4, draws[1])
    with pytest.raises(ValueError, match="timestep=9 is not one of the 5"):
        scheduler.step(draws[0], 9, draws[1], draws[2])
    with pytest.raises(ValueError, match="starts at 4; use strength=1"):
        scheduler.prepare_initial(draws[0], timestep=3)
    with pytest.raises(ValueError, match="prediction_type='epsilon' is not known; use one of resnoise"):
        bad = ResfusionScheduler(prediction_type="epsilon")
        bad.set_timesteps()
        bad.step(draws[0], 4, draws[1], draws[2])
