"""The per-frame update against diffusers and Diffusion Forcing, its history, and the answers to wrong calls."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from diffusers_ext.schedulers import RollingLadderScheduler
from diffusers_ext.schedulers.frame_updates import second_order_weight, update_coefficients
from tests.helpers.golden import golden


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
CHUNK = {"window_length": 6, "ladder_step": 6}


def noise(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*(shape or (2, 6, 3)), generator=torch.Generator().manual_seed(seed)).to(dtype)


def network(sample: torch.Tensor, timestep: Any) -> torch.Tensor:
    return 0.7 * torch.sin(1.3 * sample + 0.01 * float(timestep))


def run_both(ours: Any, theirs: Any, tolerance: float = 1e-6) -> None:
    sample = other = noise(0)
    assert torch.allclose(ours.timesteps.float(), theirs.timesteps.float())
    for t in ours.timesteps:
        frames = t.expand(2, 6)
        generators = [torch.Generator().manual_seed(int(t)) for _ in range(2)]
        drawn = [{}, {}] if not isinstance(theirs, DDPMScheduler) else [{"generator": g} for g in generators]
        sample = ours.step(network(sample, t), frames, sample, **drawn[0]).prev_sample
        other = theirs.step(network(other, t), t, other, **drawn[1]).prev_sample
        assert float((sample - other).abs().max()) < tolerance * max(1.0, float(other.abs().max())), f"at {t}"


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_all_frames_at_one_level_are_ddim(kind: str) -> None:
    theirs = DDIMScheduler(**BETAS, prediction_type=kind, timestep_spacing="trailing", clip_sample=False)
    ours = RollingLadderScheduler(**BETAS, prediction_type=kind, base="ddim", **CHUNK)
    ours.set_timesteps(10)
    theirs.set_timesteps(10)
    run_both(ours, theirs)


def test_all_frames_at_one_level_are_ddim_from_pure_noise() -> None:
    settings = {**BETAS, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    theirs = DDIMScheduler(**settings, timestep_spacing="trailing", clip_sample=False)
    ours = RollingLadderScheduler(**settings, base="ddim", **CHUNK)
    ours.set_timesteps(10)
    theirs.set_timesteps(10)
    run_both(ours, theirs)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_all_frames_at_one_level_are_ddpm(kind: str) -> None:
    theirs = DDPMScheduler(**BETAS, prediction_type=kind, timestep_spacing="trailing", clip_sample=False)
    ours = RollingLadderScheduler(**BETAS, prediction_type=kind, base="ddpm", **CHUNK)
    ours.set_timesteps(10)
    theirs.set_timesteps(10)
    run_both(ours, theirs)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_all_frames_at_one_level_are_flow_match_euler(shift: float) -> None:
    theirs = FlowMatchEulerDiscreteScheduler(shift=shift)
    ours = RollingLadderScheduler.from_config(theirs.config, base="flow_match_euler", **CHUNK)
    ours.set_timesteps(12)
    theirs.set_timesteps(sigmas=[i / 12 for i in range(12, 0, -1)])
    run_both(ours, theirs)


def test_all_frames_at_one_level_are_dpm_solver_of_order_two() -> None:
    theirs = DPMSolverMultistepScheduler(**BETAS, timestep_spacing="trailing", final_sigmas_type="zero")
    ours = RollingLadderScheduler(**BETAS, **CHUNK)
    ours.set_timesteps(20)
    theirs.set_timesteps(20)
    run_both(ours, theirs, tolerance=1e-5)  # which rounds its levels to float32 before it takes logarithms


def test_mixed_levels_are_an_update_of_diffusion_forcing() -> None:
    official = golden("rolling/diffusion_forcing_official.npz")
    bars = np.concatenate([[1.0], official["alphas_cumprod"].astype(np.float64)])
    scheduler = RollingLadderScheduler(
        trained_betas=(1 - bars[1:] / bars[:-1]).tolist(), prediction_type="sample", base="ddim", window_length=6, ladder_step=6
    )  # fmt: skip
    scheduler.set_timesteps(20)
    frames, weights = official.tensor("x_in"), official.tensor("W")
    times = torch.from_numpy(official["real_steps"])
    now, following = times[official.tensor("cur_level")], times[official.tensor("next_level")]
    seen_at = torch.where(now < 0, 9, now)
    scale = torch.where(now < 0, scheduler.alphas_cumprod[9].sqrt(), 1.0)
    data = torch.cos(seen_at / 1000)[..., None] * torch.einsum("gf,fbc->gbc", weights, frames * scale[..., None])
    first = scheduler.step(
        data.transpose(0, 1), now.T, frames.transpose(0, 1), next_timestep=following.T
    ).prev_sample.transpose(0, 1)
    torch.testing.assert_close(first, official.tensor("x_out_ddim_eta0"), atol=1e-5, rtol=0)
    held = now == following
    assert held.any() and torch.equal(first[held], frames[held])
    # one level down is what follows without being named
    second = scheduler.step(data.transpose(0, 1), now.T, frames.transpose(0, 1)).prev_sample.transpose(0, 1)
    assert torch.equal(first, second)


def test_a_frame_does_not_depend_on_the_levels_of_others() -> None:
    scheduler = RollingLadderScheduler(prediction_type="sample", beta_schedule="cosine", window_length=4)
    sample, order = noise(1, 1, 4, 2), torch.tensor([[2, 0, 3, 1]])
    runs = []
    for flip in (False, True):
        scheduler.set_timesteps(8)
        frames, states = sample[:, order[0]] if flip else sample, []
        for timesteps in scheduler.window_timesteps:
            times = timesteps[None][:, order[0]] if flip else timesteps[None]
            frames = scheduler.step(0.5 * torch.tanh(frames), times, frames).prev_sample
            states.append(frames)
        runs.append(torch.stack(states))
    assert torch.equal(runs[0][:, :, order[0]], runs[1])


def test_history_rolls_with_the_frames() -> None:
    # a long window denoised as a whole, and a rolling one whose frames take the same path: order 2 only if history moves along
    rolling = RollingLadderScheduler(prediction_type="sample", beta_schedule="cosine", window_length=4, ladder_step=2)
    rolling.set_timesteps(4)
    alone = RollingLadderScheduler(prediction_type="sample", beta_schedule="cosine", window_length=1)
    entering = noise(2, 1, 12, 3)

    def predicted(frames: torch.Tensor) -> torch.Tensor:
        return torch.tanh(2.0 * frames)

    alone.set_timesteps(4)
    expected = entering
    for t in alone.timesteps:
        expected = alone.step(predicted(expected), t, expected).prev_sample
    window, emitted = entering[:, :4], []
    rows = torch.cat([rolling.warmup_timesteps, rolling.window_timesteps[:1]])
    for now, following in zip(rows, rows[1:], strict=False):
        window = rolling.step(predicted(window), now[None], window, next_timestep=following[None]).prev_sample
    for roll in range(6):
        for timesteps in rolling.window_timesteps:
            window = rolling.step(predicted(window), timesteps[None, : window.shape[1]], window).prev_sample
        new = entering[:, 4 + 2 * roll : 6 + 2 * roll]
        frames, window = rolling.roll(window, new if new.shape[1] else None)
        emitted.append(frames)
    assert window.shape == (1, 0, 3)
    assert torch.equal(torch.cat(emitted, 1), expected)


def test_video_latents_have_their_frames_elsewhere() -> None:
    settings: dict[str, Any] = {"prediction_type": "sample", "beta_schedule": "cosine", "window_length": 4}
    flat, video = RollingLadderScheduler(**settings), RollingLadderScheduler(**settings, frame_dim=2)
    sample = noise(3, 2, 4, 15)
    latents = sample.reshape(2, 4, 3, 5).permute(0, 2, 1, 3)[..., None]
    for scheduler in (flat, video):
        scheduler.set_timesteps(8)
    for timesteps in flat.window_timesteps:
        sample = flat.step(sample.tanh(), timesteps[None], sample).prev_sample
        latents = video.step(latents.tanh(), timesteps[None], latents).prev_sample
    first, rest = video.roll(latents, torch.zeros(2, 3, 1, 5, 1))
    assert torch.equal(first[..., 0].permute(0, 2, 1, 3).reshape(2, 1, 15), flat.roll(sample)[0])
    assert rest.shape == latents.shape


def test_emitted_frames_do_not_hold_the_window() -> None:
    scheduler = RollingLadderScheduler(window_length=4)
    emitted, _ = scheduler.roll(noise(0, 1, 4, 2), noise(1, 1, 1, 2))
    assert emitted.untyped_storage().nbytes() == emitted.numel() * 4


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_an_update_keeps_the_variance_of_a_frame_that_is_known(eta: float) -> None:
    # z = a x + s n with the true x: the update must give a' x plus noise of variance s'^2.
    angles = np.linspace(0.0, np.pi / 2, 9)
    alpha, sigma = np.cos(angles), np.sin(angles)
    alpha[-1] = 0.0
    of_sample, of_data, of_noise = update_coefficients(alpha[1:], sigma[1:], alpha[:-1], sigma[:-1], eta)
    np.testing.assert_allclose(of_sample * alpha[1:] + of_data, alpha[:-1], atol=1e-12)
    np.testing.assert_allclose((of_sample * sigma[1:]) ** 2 + of_noise**2, sigma[:-1] ** 2, atol=1e-12)


def test_second_order_is_used_only_between_finite_levels() -> None:
    inf = math.inf
    before, now, after = (
        np.array([-inf, -2.0, -2.0, 1.0]),
        np.array([-2.0, -1.0, 1.0, 1.0]),
        np.array([0.0, inf, 2.0, 2.0]),
    )
    np.testing.assert_allclose(second_order_weight(before, now, after), [0.0, 0.0, 1.0 / 6.0, 0.0])


def test_noise_is_added_and_velocity_taken_per_frame() -> None:
    scheduler = RollingLadderScheduler(beta_schedule="cosine", prediction_type="v_prediction")
    clean, eps = noise(4, 2, 3, 5, dtype=torch.float64), noise(5, 2, 3, 5, dtype=torch.float64)
    times = torch.tensor([[-1, 499, 999], [0, 10, 249]])
    angle = ((times + 1) / 1000 * math.pi / 2).double()[..., None]
    torch.testing.assert_close(scheduler.add_noise(clean, eps, times), angle.cos() * clean + angle.sin() * eps)
    torch.testing.assert_close(scheduler.get_velocity(clean, eps, times), angle.cos() * eps - angle.sin() * clean)
    assert torch.equal(scheduler.add_noise(clean, eps, times)[0, 0], clean[0, 0])
    assert torch.equal(scheduler.add_noise(clean, eps, times)[0, 2], eps[0, 2])
    flow = RollingLadderScheduler(prediction_type="flow_prediction")
    torch.testing.assert_close(
        flow.add_noise(clean, eps, torch.tensor([250.0, 0.0]))[0], 0.75 * clean[0] + 0.25 * eps[0]
    )
    assert torch.equal(flow.get_velocity(clean, eps, torch.tensor(3.0)), eps - clean)


def test_levels_and_tables_agree() -> None:
    scheduler = RollingLadderScheduler(window_length=8, ladder_step=4)
    scheduler.set_timesteps(6)
    assert scheduler.evaluations_per_roll == 3 and scheduler.nfe_per_frame == 0.75
    assert scheduler.timesteps.tolist() == [999, 832, 666, 499, 332, 166]
    table = torch.stack([scheduler.timesteps_at(e) for e in range(6)])
    assert torch.equal(table, torch.cat([scheduler.warmup_timesteps, scheduler.window_timesteps]))
    assert torch.equal(scheduler.timesteps_at(6, start_frame=4), scheduler.window_timesteps[0])
    assert scheduler.level_at(0, 6) == 0 and scheduler.level_at([0, 11], 4).tolist() == [2, 6]
    scheduler.set_timesteps(timesteps=[900, 100])
    assert scheduler.window_timesteps.tolist() == [[100] * 4 + [900] * 4]


@pytest.mark.parametrize("mode", ["rolling", "ladder", "independent", "init", "mixed"])
@pytest.mark.parametrize("kind", ["sample", "flow_prediction"])
def test_training_timesteps_are_the_models_own(mode: str, kind: str) -> None:
    scheduler = RollingLadderScheduler(prediction_type=kind, window_length=6, ladder_step=3, flow_shift=2.0)
    drawn = scheduler.sample_training_timesteps(64, mode, generator=torch.Generator().manual_seed(0))
    assert drawn.shape == (64, 6) and drawn.min() >= 0 and drawn.max() <= (1000 if kind != "sample" else 999)
    assert torch.equal(
        drawn, scheduler.sample_training_timesteps(64, mode, generator=torch.Generator().manual_seed(0))
    )
    scheduler.add_noise(torch.zeros(64, 6, 1), torch.zeros(64, 6, 1), drawn)
    descending = (drawn.diff(dim=1) >= 0).all()
    assert bool(descending) == (mode != "independent")
    if mode == "ladder":
        assert torch.equal(drawn[:, 0], drawn[:, 2]) and (drawn[:, 3] > drawn[:, 2]).all()


def test_steps_of_a_ladder_meet_the_timesteps_it_was_trained_on() -> None:
    # at a whole moment of the roll, the continuous draw gives the very timesteps of sampling
    scheduler = RollingLadderScheduler(window_length=10, ladder_step=2)
    scheduler.set_timesteps(10)
    share = (torch.arange(10) // 2 + 1) / 5 - torch.tensor([0.0, 0.1])[:, None]
    expected = torch.ceil((share.double() * 1000).round()).long() - 1
    assert torch.equal(scheduler.window_timesteps, expected)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"ladder_step": 3}, "ladder_step=3 does not divide window_length=20; use one of 1, 2, 4, 5, 10, 20"),
    ({"base": "dpm"}, "base='dpm' is not known; use one of ddim"),
    ({"prediction_type": "eps"}, "prediction_type='eps' is not known"),
    ({"rescale_betas_zero_snr": True}, "prediction_type='epsilon' says nothing of a frame that is pure noise"),
    ({"base": "flow_match_euler"}, "prediction_type='epsilon'"),
    ({"base": "flow_match_euler", "prediction_type": "v_prediction"}, "prediction_type='v_prediction'"),
    ({"beta_schedule": "cosin"}, "beta_schedule='cosin' is not known"),
    ({"beta_end": 1.5}, "beta_end=1.5"),
    ({"flow_shift": 0.0}, "flow_shift=0.0"),
    ({"context_length": -1}, "context_length=-1"),
    ({"context_timestep": 1000}, "context_timestep=1000 is out of range; use timesteps from -1"),
    ({"context_timestep": 0.5}, "context_timestep=0.5 is not whole"),
    ({"window_length": 2.5}, "window_length=2.5"),
]


@pytest.mark.parametrize(("settings", "message"), WRONG)
def test_a_wrong_setting_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RollingLadderScheduler(**settings)


def test_a_wrong_call_is_named_and_leaves_the_run_as_it_was() -> None:
    scheduler = RollingLadderScheduler(prediction_type="sample", beta_schedule="cosine", window_length=4)
    sample = noise(0, 2, 4, 3)
    with pytest.raises(ValueError, match="call set_timesteps first"):
        scheduler.step(sample, 999, sample)
    with pytest.raises(ValueError, match="num_inference_steps=6 is not a multiple of the 4 rungs.*use 4 or 8"):
        scheduler.set_timesteps(6)
    scheduler.set_timesteps(8)
    row = scheduler.window_timesteps[0][None]
    expected = scheduler.step(sample.tanh(), row, sample).prev_sample
    calls: list[tuple[dict[str, Any], str]] = [
        ({"timestep": row[:, :3]}, r"timestep of shape \(1, 3\) does not fit sample of shape \(2, 4, 3\)"),
        ({"timestep": 500}, "timestep=500 is not in this run"),
        ({"timestep": math.nan}, "timestep=nan is not a finite number"),
        ({"timestep": "999"}, "timestep='999'"),
        ({"timestep": None}, "timestep=None"),
        ({"next_timestep": 999}, "next_timestep=999 is noisier than timestep"),
        ({"model_output": sample * math.nan}, "model_output is not finite"),
        ({"model_output": sample[:, :2]}, "model_output of shape"),
        (
            {"sample": noise(0, 2, 5, 3), "model_output": noise(0, 2, 5, 3), "timestep": 999},
            "does not continue the run",
        ),
    ]
    for changes, message in calls:
        with pytest.raises(ValueError, match=message):
            scheduler.step(**{"model_output": sample, "timestep": row, "sample": sample, **changes})
    second = scheduler.step(expected.tanh(), scheduler.window_timesteps[1][None], expected).prev_sample
    scheduler.set_timesteps(8)
    again = scheduler.step(sample.tanh(), row, sample).prev_sample
    assert torch.equal(again, expected)
    assert torch.equal(scheduler.step(again.tanh(), scheduler.window_timesteps[1][None], again).prev_sample, second)


def test_wrong_frames_and_draws_are_named() -> None:
    scheduler = RollingLadderScheduler(base="ddpm", window_length=4)
    scheduler.set_timesteps(4)
    sample = noise(0, 2, 4, 3)
    with pytest.raises(ValueError, match=r"variance_noise=\(1, 4, 3\) does not fit"):
        scheduler.step(sample, 999, sample, variance_noise=sample[:1])
    with pytest.raises(ValueError, match="generator is a list of 1 for a batch of 2"):
        scheduler.step(sample, 999, sample, generator=[torch.Generator()])
    with pytest.raises(TypeError, match="generator=5"):
        scheduler.step(sample, 999, sample, generator=5)
    with pytest.raises(ValueError, match=r"new_noise of shape \(2, 1, 4\) does not fit"):
        scheduler.roll(sample, noise(0, 2, 1, 4))
    with pytest.raises(TypeError, match="sample is list"):
        scheduler.roll([1.0])
    with pytest.raises(ValueError, match="mode='steady' is not known"):
        scheduler.sample_training_timesteps(2, "steady")
    with pytest.raises(ValueError, match="batch_size=0"):
        scheduler.sample_training_timesteps(0)
    with pytest.raises(ValueError, match="init_probability=2"):
        scheduler.sample_training_timesteps(2, init_probability=2)
    with pytest.raises(ValueError, match="frame_index=-1"):
        scheduler.level_at(-1, 0)
    with pytest.raises(ValueError, match="timesteps=.* are not usable; give a list of descending timesteps"):
        scheduler.set_timesteps(timesteps=[1, 2])
    with pytest.raises(ValueError, match=r"timesteps=1000 is out of range"):
        scheduler.add_noise(sample, sample, 1000)
