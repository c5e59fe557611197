"""Null-text inversion: the authors' numbers, closed forms, and what happens when it goes wrong."""

from dataclasses import replace

import pytest
import torch

from diffusers_ext.inversion import (
    INVERSIONS,
    Denoiser,
    InversionProgress,
    InversionStoppedError,
    Inverted,
    ddim_inversion,
    null_text_inversion,
    regenerate,
    regenerate_states,
    sampling_factors,
)
from tests.inversion.subjects import counted, ladder, linear, pictures
from tests.inversion.trained import FILE, picture, rmse, tiny_denoiser, tiny_ladder, unet


# Forward and backward passes of the original for a step, each counted as one: the source prompt's, ten rounds, and two more
# evaluations with what was found.
ORIGINAL_PASSES = 1 + 10 * 2 + 2


@pytest.fixture(scope="module")
def official() -> tuple[Inverted, list[InversionProgress]]:
    reports: list[InversionProgress] = []
    inverted = null_text_inversion(
        tiny_denoiser(), picture(), tiny_ladder(), schedule="official", callback=reports.append
    )
    return inverted, [report for report in reports if report.stage == "optimisation"]


@pytest.fixture(scope="module")
def fast() -> tuple[Inverted, Denoiser]:
    return null_text_inversion(tiny_denoiser(), picture(), tiny_ladder()), tiny_denoiser()


def test_losses_of_every_round_are_those_of_the_authors(official, golden):
    losses = golden(FILE)["losses"]
    for report in official[1]:
        assert report.loss == pytest.approx(losses[report.step, report.round], rel=2e-2)
    assert len(official[1]) == losses.size


def test_embeddings_of_the_first_steps_are_those_of_the_authors(official, golden):
    expected = golden(FILE).tensor("uncond_embeddings_first_steps")
    found = official[0].null_embeddings.flip(0)[:3]
    moved = expected - tiny_denoiser().null_embeddings
    # Adam divides a gradient by its size, so a gradient near zero turns rounding (another number of threads, another processor)
    # into part of a step of 0.01: single values may differ by that, their mean square hardly.
    assert (found - expected).square().mean().sqrt() <= 2e-3 * moved.square().mean().sqrt()
    torch.testing.assert_close(found, expected, atol=1e-2, rtol=0)


def test_the_way_back_is_that_of_the_authors(official, golden):
    file = golden(FILE)
    states = list(regenerate_states(tiny_denoiser(), official[0], tiny_ladder()))
    torch.testing.assert_close(official[0].latents, file.tensor("ddim_latents"), atol=5e-5, rtol=0)
    torch.testing.assert_close(torch.stack(states[1:]), file.tensor("rec_latents"), atol=1e-2, rtol=0)
    assert rmse(states[-1], picture()) == pytest.approx(rmse(file.tensor("rec_nti"), picture()), abs=1e-3)


def test_rounds_end_where_those_of_the_authors_do(golden):
    file, reports = golden(FILE), []
    null_text_inversion(
        tiny_denoiser(), picture(), tiny_ladder(), schedule="official", early_stop=float(file["early_stop_eps"]),
        callback=reports.append,
    )  # fmt: skip
    rounds = [sum(r.stage == "optimisation" and r.step == step for r in reports) for step in range(10)]
    # A loss close to the threshold may fall to either side of it.
    assert all(abs(a - b) <= 1 for a, b in zip(rounds, file["early_stop_inner_steps"].tolist(), strict=True))
    assert rounds[:5] == [1, 1, 2, 10, 10]


def test_the_default_is_as_good_at_less_than_half_the_passes(fast, official, golden):
    back = regenerate(fast[1], fast[0], tiny_ladder())
    assert rmse(back, picture()) <= rmse(golden(FILE).tensor("rec_nti"), picture()) <= 0.081
    # Even with the passes of DDIM inversion, which the original makes before those.
    spent = fast[0].forward_passes + fast[0].backward_passes
    assert 2 * spent <= 10 * ORIGINAL_PASSES
    assert (fast[0].forward_passes, fast[0].backward_passes) == INVERSIONS["null_text"].passes(10)
    worse = regenerate(fast[1], replace(fast[0], null_embeddings=None), tiny_ladder())
    assert rmse(worse, picture()) > 0.3


def test_gradient_checkpointing_changes_nothing():
    steps, settings = tiny_ladder(3), {"inner_steps": 4}
    plain = null_text_inversion(tiny_denoiser(), picture(), steps, **settings)
    unet(torch.float32).enable_gradient_checkpointing()
    try:
        checkpointed = null_text_inversion(tiny_denoiser(), picture(), steps, **settings)
    finally:
        unet(torch.float32).disable_gradient_checkpointing()
    assert plain.backward_passes == checkpointed.backward_passes == 3
    assert torch.equal(plain.null_embeddings, checkpointed.null_embeddings)


def test_parameters_get_no_gradients():
    weights = next(unet(torch.float32).parameters()).requires_grad_(True)
    try:
        null_text_inversion(tiny_denoiser(), picture(), tiny_ladder(2), inner_steps=4)
        assert weights.grad is None
    finally:
        weights.requires_grad_(False)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("schedule", ["fast", "official"])
def test_embeddings_that_can_express_the_trajectory_reach_it(kind, schedule):
    denoiser, start, steps = linear(shift=0.2), pictures(), ladder(6, kind)
    # Adam ends within about a step of the optimum, so the way that has no jump to it needs small ones, and more.
    rounds, rate = (300, 0.02) if schedule == "fast" else (600, 0.005)
    inverted = null_text_inversion(
        denoiser, start, steps, schedule=schedule, inner_steps=rounds, learning_rate=rate, early_stop=0.0
    )
    states = torch.stack(list(regenerate_states(denoiser, inverted, steps))).flip(0)
    torch.testing.assert_close(states, inverted.latents, atol=3e-2, rtol=0)
    # f is linear in the embeddings, so the first step's are known: u = (target - A z - B w source) / (B (1 - w)) - slope z.
    z, target = inverted.latents[-1], inverted.latents[-2]
    a, b = steps.sampling_levels(0)
    kept, predicted = sampling_factors(a, b, kind)
    null = ((target - kept * z) / predicted - 7.5 * denoiser.source(z, steps.timesteps[0])) / (1 - 7.5)
    torch.testing.assert_close(inverted.null_embeddings[-1][:, 0], null - 0.4 * z, atol=2e-2, rtol=0)


def test_the_first_jump_goes_as_far_towards_the_source_prompt_as_the_loss_falls():
    denoiser, steps = linear(batch=1, shift=0.2), ladder(1)
    inverted = null_text_inversion(denoiser, pictures(1), steps, inner_steps=2, early_stop=0.0)
    assert (inverted.forward_passes, inverted.backward_passes) == (1 + 1 + 2, 0)
    z, target = inverted.latents[-1], inverted.latents[-2]
    kept, predicted = sampling_factors(*steps.sampling_levels(0), "epsilon")
    null, source = denoiser.null(z, steps.timesteps[0]), denoiser.source(z, steps.timesteps[0])
    residual = kept * z + predicted * (null + 7.5 * (source - null)) - target
    change = predicted * (1 - 7.5) * (source - null)
    share = -(residual * change).sum() / change.square().sum() / 1.02  # of the way; the ridge takes 2 %
    expected = denoiser.null_embeddings + share * (denoiser.source_embeddings - denoiser.null_embeddings)
    torch.testing.assert_close(inverted.null_embeddings[0], expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("rounds", [1, 2, 3, 4, 7])
def test_rounds_before_and_after_jumps_take_no_gradient(rounds):
    denoiser, counter = counted(linear(batch=1))
    inverted = null_text_inversion(denoiser, pictures(1), ladder(1), inner_steps=rounds, early_stop=0.0)
    assert (counter.forward, counter.backward) == (inverted.forward_passes, inverted.backward_passes)
    assert (counter.forward, counter.backward) == (2 + rounds, max(rounds - 3, 0))


def test_a_loss_that_is_low_enough_at_once_costs_one_round():
    denoiser, counter = counted(linear(shift=0.0))
    inverted = null_text_inversion(denoiser, pictures(), ladder(200), early_stop=1.0)
    assert (counter.forward, counter.backward) == (2 * 200 * 3, 0)
    assert inverted.null_embeddings.count_nonzero() == 0


class TurnsBad:
    """A network that answers NaN from one evaluation on."""

    def __init__(self, good: Denoiser, after: int) -> None:
        self.network, self.left = good.network, after

    def __call__(self, latents: torch.Tensor, *args: torch.Tensor) -> torch.Tensor:
        self.left -= 1
        return self.network(latents, *args) * (1.0 if self.left >= 0 else float("nan"))


def test_nan_stops_with_the_step_named_and_the_best_kept():
    good, start, steps = linear(), pictures(), ladder(4)
    # Four passes to invert the batch; picture 0 has 4 steps of 1 + 3; picture 1 breaks in the second round of its third step.
    bad = replace(good, network=TurnsBad(good, 4 + 4 * 4 + 2 * 4 + 2))
    settings = {"inner_steps": 3, "early_stop": 0.0}
    with pytest.raises(
        InversionStoppedError, match=r"picture 1 stopped in step 3 of 4 \(timestep 251\), round 2: its loss is nan"
    ) as caught:
        null_text_inversion(bad, start, steps, **settings)
    best, whole = caught.value.best, null_text_inversion(good, start, steps, **settings)
    assert torch.equal(best.null_embeddings[:, 0], whole.null_embeddings[:, 0])
    assert torch.equal(best.null_embeddings[2:, 1], whole.null_embeddings[2:, 1])
    assert torch.equal(best.null_embeddings[0, 1], best.null_embeddings[1, 1])
    assert torch.isfinite(best.null_embeddings).all()
    back = regenerate(good, best, steps)
    plain = regenerate(good, ddim_inversion(good, start, steps), steps, guidance_scale=7.5)
    assert (back - start)[1].norm() < (plain - start)[1].norm()


def test_nan_in_the_last_evaluation_is_seen_too():
    good = linear(batch=1)
    bad = replace(good, network=TurnsBad(good, 2 + 1 + 3))
    with pytest.raises(InversionStoppedError, match="step 1 of 2"):
        null_text_inversion(bad, pictures(1), ladder(2), schedule="official", inner_steps=3, early_stop=0.0)


def test_a_callback_that_raises_ends_it():
    def stop(progress: InversionProgress) -> None:
        if progress.stage == "optimisation":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        null_text_inversion(linear(), pictures(), ladder(3), callback=stop)
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
