"""The FlowChef schedulers: the parents without an objective, closed forms with one, and wrong calls."""

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    UniPCMultistepScheduler,
)

from diffusers_ext.schedulers import (
    FlowChefDPMSolverMultistepScheduler,
    FlowChefHeunScheduler,
    FlowChefLCMScheduler,
    FlowChefScheduler,
    FlowChefUniPCMultistepScheduler,
)
from diffusers_ext.schedulers.flow_steering import adam_steps, estimate_variance, renoise, repaint
from diffusers_ext.steering import InpaintMask, LatentMaskObjective, MeasurementObjective, SuperResolution


FLOW: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
PARENTS = {
    FlowChefScheduler: FlowMatchEulerDiscreteScheduler,
    FlowChefHeunScheduler: FlowMatchHeunDiscreteScheduler,
    FlowChefLCMScheduler: FlowMatchLCMScheduler,
    FlowChefDPMSolverMultistepScheduler: DPMSolverMultistepScheduler,
    FlowChefUniPCMultistepScheduler: UniPCMultistepScheduler,
}
every_class = pytest.mark.parametrize("cls", PARENTS, ids=lambda cls: cls.__name__)
SHAPE = (2, 4, 8, 8)


def settings_of(cls: type) -> dict[str, Any]:
    return dict(FLOW) if "Multistep" in cls.__name__ else {}


def noise(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def network(sample: torch.Tensor, timestep: Any) -> torch.Tensor:
    return (0.5 * sample.float() + 0.3 * torch.sin(3 * sample.float() + 0.01 * float(timestep))).to(sample.dtype)


def walk(scheduler: Any, sample: torch.Tensor, seed: int = 7, **arguments: Any) -> list[torch.Tensor]:
    """The states of a run that is already laid; noise comes from the global generator."""
    torch.manual_seed(seed)
    states = []
    for timestep in scheduler.timesteps:
        sample = scheduler.step(network(sample, timestep), timestep, sample, **arguments).prev_sample
        states.append(sample)
    return states


def assert_same_runs(ours: Any, parent: Any, sample: torch.Tensor, lay: dict[str, Any], **arguments: Any) -> None:
    for scheduler in (ours, parent):
        scheduler.set_timesteps(**lay)
    assert torch.equal(ours.timesteps, parent.timesteps) and torch.equal(ours.sigmas, parent.sigmas)
    for here, there in zip(walk(ours, sample, **arguments), walk(parent, sample, **arguments), strict=True):
        assert torch.equal(here, there) and here.dtype == there.dtype


# -- without an objective it is the parent -----------------------------------------------------------------------------

EULER: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"num_inference_steps": 10}),
    ({"shift": 3.0}, {"num_inference_steps": 10}),
    ({"use_dynamic_shifting": True}, {"num_inference_steps": 10, "mu": 0.7}),
    ({"use_dynamic_shifting": True, "time_shift_type": "linear"}, {"num_inference_steps": 10, "mu": 1.7}),
    ({"shift_terminal": 0.1}, {"num_inference_steps": 10}),
    ({"use_karras_sigmas": True}, {"num_inference_steps": 10}),
    ({"use_exponential_sigmas": True, "shift": 2.0}, {"num_inference_steps": 10}),
    ({"use_beta_sigmas": True}, {"num_inference_steps": 10}),
    ({"stochastic_sampling": True}, {"num_inference_steps": 10}),
    ({"invert_sigmas": True}, {"num_inference_steps": 10}),
    ({"shift": 3.0}, {"sigmas": [1.0, 0.8, 0.3, 0.1]}),
    ({}, {"timesteps": [900.0, 500.0, 20.0]}),
    ({}, {"timesteps": [900.0, 500.0, 20.0], "sigmas": [0.9, 0.4, 0.1]}),
    ({}, {"num_inference_steps": 1}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("config", "lay"), EULER, ids=str)
def test_without_an_objective_euler_is_the_parent(config: dict[str, Any], lay: dict[str, Any], dtype: Any) -> None:
    parent = FlowMatchEulerDiscreteScheduler(**config)
    assert_same_runs(FlowChefScheduler.from_config(parent.config), parent, noise().to(dtype), lay)


def test_without_an_objective_tokens_of_their_own_times_are_the_parents() -> None:
    times = torch.tensor([[1000.0, 600.0, 0.0], [500.0, 100.0, 900.0]])
    results = []
    for cls in (FlowChefScheduler, FlowMatchEulerDiscreteScheduler):
        scheduler = cls()
        scheduler.set_timesteps(10)
        step = scheduler.step(
            noise(1, (2, 3, 4)), scheduler.timesteps[0], noise(0, (2, 3, 4)), per_token_timesteps=times
        )
        results.append(step.prev_sample)
    assert torch.equal(*results)


OTHERS: list[tuple[type, dict[str, Any], dict[str, Any]]] = [
    (FlowChefHeunScheduler, {"shift": 3.0}, {"num_inference_steps": 6}),
    (FlowChefLCMScheduler, {"shift": 3.0}, {"num_inference_steps": 4}),
    (FlowChefLCMScheduler, {"use_dynamic_shifting": True}, {"sigmas": [1.0, 0.6, 0.2], "mu": 0.5}),
    (FlowChefDPMSolverMultistepScheduler, {**FLOW, "flow_shift": 3.0}, {"num_inference_steps": 10}),
    (FlowChefDPMSolverMultistepScheduler, {**FLOW, "solver_order": 3, "solver_type": "heun"}, {"num_inference_steps": 20}),
    (FlowChefDPMSolverMultistepScheduler, {**FLOW, "algorithm_type": "sde-dpmsolver++"}, {"num_inference_steps": 10}),
    (FlowChefDPMSolverMultistepScheduler, {**FLOW, "use_dynamic_shifting": True}, {"num_inference_steps": 8, "mu": 0.5}),
    (FlowChefUniPCMultistepScheduler, {**FLOW, "flow_shift": 3.0}, {"num_inference_steps": 10}),
    (FlowChefUniPCMultistepScheduler, {**FLOW, "solver_order": 3, "solver_type": "bh1", "final_sigmas_type": "sigma_min"},
     {"num_inference_steps": 10}),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("cls", "config", "lay"), OTHERS, ids=str)
def test_without_an_objective_the_others_are_their_parents(
    cls: Any, config: dict[str, Any], lay: dict[str, Any]
) -> None:
    for dtype in (torch.float32, torch.float16):
        parent = PARENTS[cls](**config)
        assert_same_runs(cls.from_config(parent.config), parent, noise().to(dtype), lay)


@every_class
def test_settings_that_do_not_steer_leave_the_parent_too(cls: Any) -> None:
    parent = PARENTS[cls](**settings_of(cls))
    objective = LatentMaskObjective(torch.ones(8, 8).tril(), noise(3))
    for change in ({"learning_rate": 0.0}, {"steer_start": 0.999, "steer_stop": 1.0}):
        ours = cls.from_config(parent.config, **change)
        ours.set_objective(objective)
        for scheduler in (ours, parent):
            scheduler.set_timesteps(8)
        pairs = list(zip(walk(ours, noise()), walk(parent, noise()), strict=True))
        # all steps, or all but the last
        for here, there in pairs if "learning_rate" in change else pairs[: -ours._evaluations_per_step]:
            assert torch.equal(here, there)
    ours.set_objective(None)
    ours.set_timesteps(8)
    parent.set_timesteps(8)
    assert torch.equal(walk(ours, noise())[-1], walk(parent, noise())[-1])


# -- closed forms ------------------------------------------------------------------------------------------------------


def one_step(
    scheduler: Any, index: int, velocity: torch.Tensor, sample: torch.Tensor, **arguments: Any
) -> torch.Tensor:
    scheduler.set_begin_index(index)
    return scheduler.step(velocity, scheduler.timesteps[index], sample, **arguments).prev_sample


def small_problem() -> tuple[MeasurementObjective, torch.Tensor, torch.Tensor]:
    objective = MeasurementObjective(SuperResolution(2), noise(5, (2, 4, 4, 4)), noise_std=0.3)
    return objective, noise(6), noise(7)


def test_a_gradient_step_moves_the_state_and_keeps_the_velocity() -> None:
    objective, sample, velocity = small_problem()
    scheduler = FlowChefScheduler(data_step="grad", learning_rate=0.7, optimization_steps=2, shift=2.0)
    scheduler.set_objective(objective)
    scheduler.set_timesteps(10)
    sigma, following = scheduler.sigmas[4:6]
    state = sample
    for _ in range(2):
        residual = SuperResolution(2).A(state - sigma * velocity) - objective.measurement
        state = state - 0.7 / 0.25 * SuperResolution(2).adjoint(residual)
    expected = state + (following - sigma) * velocity
    torch.testing.assert_close(one_step(scheduler, 4, velocity, sample), expected)


@pytest.mark.parametrize("kind", ["prox", "project"])
@pytest.mark.parametrize("cls", [FlowChefScheduler, FlowChefDPMSolverMultistepScheduler, FlowChefUniPCMultistepScheduler],
                         ids=lambda cls: cls.__name__)  # fmt: skip
def test_a_chosen_estimate_goes_into_the_step_and_the_state_stays(cls: Any, kind: str) -> None:
    objective, sample, velocity = small_problem()
    change = {"renoise": 0.0} if "renoise" in cls._get_init_keys(cls) else {}
    scheduler = cls(**settings_of(cls), data_step=kind, learning_rate=0.8, **change)
    scheduler.set_objective(objective)
    scheduler.set_timesteps(10)
    sigma, following = scheduler.sigmas[4:6]
    clean = sample - sigma * velocity
    extra = (float(sigma**2 / (sigma**2 + (1 - sigma) ** 2)),) if kind == "prox" else ()
    chosen = clean + 0.8 * (getattr(objective, kind)(clean, *extra) - clean)
    # DDIM of a flow: the noise is what the state holds beside the new estimate. All three are it in their first step.
    noise_of_state = (sample - (1 - sigma) * chosen) / sigma
    expected = (1 - following) * chosen + following * noise_of_state
    torch.testing.assert_close(one_step(scheduler, 4, velocity, sample), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("share", [1.0, 0.6])
@pytest.mark.parametrize("cls", [FlowChefScheduler, FlowChefDPMSolverMultistepScheduler], ids=lambda cls: cls.__name__)
def test_renoising_exchanges_a_share_of_the_noise(cls: Any, share: float) -> None:
    objective, sample, velocity = small_problem()
    scheduler = cls(**settings_of(cls), data_step="prox", renoise=share)
    scheduler.set_objective(objective, generator=torch.Generator().manual_seed(11))
    scheduler.set_timesteps(10)
    sigma, following = scheduler.sigmas[4:6]
    chosen = objective.prox(sample - sigma * velocity, estimate_variance(float(sigma)))
    kept, drawn = (sample - (1 - sigma) * chosen) / sigma, noise(11)
    mixed = math.sqrt(1 - share**2) * kept + share * drawn
    expected = (1 - following) * chosen + following * mixed
    torch.testing.assert_close(one_step(scheduler, 4, velocity, sample), expected, rtol=1e-4, atol=1e-5)


def test_stochastic_sampling_starts_from_the_chosen_estimate() -> None:
    objective, sample, velocity = small_problem()
    scheduler = FlowChefScheduler(stochastic_sampling=True)
    scheduler.set_objective(objective, generator=torch.Generator().manual_seed(11))
    scheduler.set_timesteps(10)
    sigma, following = scheduler.sigmas[4:6]
    chosen = objective.prox(sample - sigma * velocity, estimate_variance(float(sigma)))
    torch.testing.assert_close(
        one_step(scheduler, 4, velocity, sample),
        (1 - following) * chosen + following * noise(11),
        rtol=1e-4,
        atol=1e-5,
    )


def test_lcm_starts_from_the_chosen_estimate() -> None:
    objective, sample, velocity = small_problem()
    scheduler = FlowChefLCMScheduler()
    scheduler.set_objective(objective, generator=torch.Generator().manual_seed(11))
    scheduler.set_timesteps(4)
    sigma, following = scheduler.sigmas[1:3]
    chosen = objective.prox(sample - sigma * velocity, estimate_variance(float(sigma)))
    torch.testing.assert_close(
        one_step(scheduler, 1, velocity, sample),
        (1 - following) * chosen + following * noise(11),
        rtol=1e-4,
        atol=1e-5,
    )


def test_repainting_puts_the_noised_reference_where_it_is_known() -> None:
    mask, reference = torch.ones(8, 8).tril(), noise(3)
    scheduler = FlowChefScheduler(data_step="repaint")
    scheduler.set_objective(LatentMaskObjective(mask, reference))
    scheduler.set_timesteps(10)
    sample, velocity, following = noise(6), noise(7), scheduler.sigmas[5]
    state = one_step(scheduler, 4, velocity, sample, generator=torch.Generator().manual_seed(11))
    plain = sample + (following - scheduler.sigmas[4]) * velocity
    known = (1 - following) * reference + following * noise(11)
    torch.testing.assert_close(state, mask * known + (1 - mask) * plain, rtol=1e-4, atol=1e-5)
    last = one_step(scheduler, 9, velocity, sample) if scheduler.set_timesteps(10) is None else None
    torch.testing.assert_close(mask * last, mask * reference)


def test_heun_integrates_the_chosen_estimates_of_both_velocities() -> None:
    objective, sample, first = small_problem()
    scheduler = FlowChefHeunScheduler(data_step="prox", renoise=0.0)
    scheduler.set_objective(objective)
    scheduler.set_timesteps(6)
    start, end = float(scheduler.sigmas[0]), float(scheduler.sigmas[1])

    def pulled(velocity: torch.Tensor, state: torch.Tensor, level: float) -> torch.Tensor:
        return (state - objective.prox(state - level * velocity, estimate_variance(level))) / level

    v = pulled(first, sample, start)
    there = scheduler.step(first, scheduler.timesteps[0], sample).prev_sample
    torch.testing.assert_close(there, sample + (end - start) * v, rtol=1e-4, atol=1e-5)
    second = noise(8)
    w = pulled(second, there, end)
    following = scheduler.step(second, scheduler.timesteps[1], there).prev_sample
    torch.testing.assert_close(following, sample + (end - start) * (v + w) / 2, rtol=1e-4, atol=1e-5)


def test_inverted_levels_are_steered_as_upright_ones() -> None:
    # Mochi counts from 0 to 1 and predicts x0 - eps.
    objective, sample, velocity = small_problem()
    for change in (
        {"data_step": "grad"},
        {"data_step": "prox"},
        {"data_step": "prox", "renoise": 0.3},
        {"data_step": "project"},
    ):
        results = []
        for inverted in (False, True):
            scheduler = FlowChefScheduler(invert_sigmas=inverted, **change)
            scheduler.set_objective(objective, generator=torch.Generator().manual_seed(1))
            scheduler.set_timesteps(sigmas=[1.0, 0.7, 0.5, 0.2])
            results.append(one_step(scheduler, 2, -velocity if inverted else velocity, sample))
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_tokens_of_their_own_times_are_steered_by_the_gradient() -> None:
    keep, reference = torch.ones(1, 3, 1), noise(3, (2, 3, 4))
    objective = MeasurementObjective(InpaintMask(keep), reference, noise_std=0.0)
    scheduler = FlowChefScheduler(learning_rate=1.0)
    scheduler.set_objective(objective)
    scheduler.set_timesteps(10)
    times = torch.tensor([[1000.0, 600.0, 0.0], [500.0, 100.0, 900.0]])
    sample, velocity = noise(6, (2, 3, 4)), noise(7, (2, 3, 4))
    step = scheduler.step(velocity, scheduler.timesteps[3], sample, per_token_timesteps=times).prev_sample
    parent = FlowMatchEulerDiscreteScheduler()
    parent.set_timesteps(10)
    state = sample - (sample - times[..., None] / 1000 * velocity - reference)
    expected = parent.step(velocity, parent.timesteps[3], state, per_token_timesteps=times).prev_sample
    torch.testing.assert_close(step, expected)
    scheduler = FlowChefScheduler(data_step="prox")
    scheduler.set_objective(objective)
    scheduler.set_timesteps(10)
    with pytest.raises(ValueError, match="data_step='prox' with per_token_timesteps"):
        scheduler.step(velocity, scheduler.timesteps[3], sample, per_token_timesteps=times)


def test_the_pure_functions_have_their_closed_forms() -> None:
    assert estimate_variance(1.0) == 1.0 and estimate_variance(0.5) == 0.5 and estimate_variance(0.0) == 0.0
    clean, eps, new = noise(1), noise(2), noise(3)
    state = 0.4 * clean + 0.6 * eps
    torch.testing.assert_close(renoise(state, clean, 0.6, 0.0, new), state)
    torch.testing.assert_close(renoise(state, clean, 0.6, 1.0, new), 0.4 * clean + 0.6 * new)
    torch.testing.assert_close(renoise(state, clean, 0.6, 0.8, new), 0.4 * clean + 0.6 * (0.6 * eps + 0.8 * new))
    # (I - P) x + (1 - t) A^+ y + t P n, for an operator that is no mask
    objective = MeasurementObjective(SuperResolution(2), noise(5, (2, 4, 4, 4)))
    operator = objective.operator
    expected = (
        state - operator.pinv(operator.A(state)) + 0.7 * operator.pinv(objective.measurement)
        + 0.3 * operator.pinv(operator.A(new))
    )  # fmt: skip
    torch.testing.assert_close(repaint(state, objective.project, 0.3, new), expected, rtol=1e-4, atol=1e-5)


def test_adam_is_that_of_torch() -> None:
    target = noise(2)
    leaf = noise(1).requires_grad_(True)
    optimiser = torch.optim.Adam([leaf], lr=0.1)
    for _ in range(4):
        optimiser.zero_grad()
        (leaf - target).square().sum().backward()
        optimiser.step()
    found = adam_steps(noise(1), lambda state: 2 * (state - target), 0.1, 4)
    torch.testing.assert_close(found, leaf.detach(), rtol=1e-5, atol=1e-6)


class Counting:
    """An objective that pulls nothing and notes where it was asked."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def grad(self, clean: torch.Tensor) -> torch.Tensor:
        self.rates.append(0.0)
        return torch.ones_like(clean)


@every_class
@pytest.mark.parametrize(("start", "stop", "steps"), [(0.0, 1.0, range(10)), (0.2, 0.5, range(2, 5)), (0.5, 0.55, range(5, 6)),
                                                      (0.0, 0.3, range(3))])  # fmt: skip
def test_the_steered_part_is_counted_in_steps(cls: Any, start: float, stop: float, steps: range) -> None:
    scheduler, objective = cls(**settings_of(cls), steer_start=start, steer_stop=stop, data_step="grad"), Counting()
    scheduler.set_objective(objective)
    scheduler.set_timesteps(10)
    asked, sample = set(), noise()
    for index, timestep in enumerate(scheduler.timesteps):
        before = len(objective.rates)
        sample = scheduler.step(noise(1), timestep, sample).prev_sample
        if len(objective.rates) > before:
            asked.add(index // scheduler._evaluations_per_step)
    assert asked == set(steps) and len(objective.rates) == len(steps)


def test_a_ramp_lets_the_learning_rate_rise_from_pure_noise() -> None:
    scheduler = FlowChefScheduler(learning_rate=2.0, learning_rate_ramp=0.5, data_step="grad")
    scheduler.set_objective(Counting())
    sample, velocity = noise(), noise(1)
    moved = []
    for index in range(4):
        scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
        sigma, following = scheduler.sigmas[index : index + 2]
        moved.append(
            float((sample + (following - sigma) * velocity - one_step(scheduler, index, velocity, sample)).mean())
        )
    assert moved == pytest.approx([0.0, 1.0, 2.0, 2.0], abs=1e-5)


# -- numbers, copies, files --------------------------------------------------------------------------------------------


@every_class
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_corrected_in_float32(cls: Any, dtype: torch.dtype) -> None:
    objective = LatentMaskObjective(torch.ones(8, 8).tril(), noise(3))
    finals = []
    for kind in (dtype, torch.float32):
        scheduler = cls(**settings_of(cls), data_step="grad", steer_stop=0.7)
        scheduler.set_objective(objective)
        scheduler.set_timesteps(10)
        finals.append(walk(scheduler, noise().to(kind))[-1])
    assert finals[0].dtype == dtype
    torch.testing.assert_close(finals[0].float(), finals[1], rtol=0, atol=0.05 if dtype == torch.float16 else 0.4)


def test_a_correction_below_half_an_ulp_of_half_precision_is_not_lost() -> None:
    # One move of 1e-4 is lost on values near 1 in half precision; a hundred of them in a step are not.
    class Drift:
        def grad(self, clean: torch.Tensor) -> torch.Tensor:
            return torch.full_like(clean, 1e-4)

    scheduler = FlowChefScheduler(data_step="grad", optimization_steps=100)
    scheduler.set_objective(Drift())
    scheduler.set_timesteps(10)
    sample = torch.ones(SHAPE, dtype=torch.float16)
    moved = scheduler.step(torch.zeros_like(sample), scheduler.timesteps[0], sample).prev_sample
    assert abs(float(moved.mean()) - 0.99) < 1e-3


@every_class
def test_the_objective_is_not_saved_and_settings_are(cls: Any, tmp_path: Path) -> None:
    scheduler = cls(**settings_of(cls), learning_rate=0.25, steer_stop=0.5, data_step="grad")
    scheduler.set_objective(LatentMaskObjective(torch.ones(8, 8).tril(), noise(3)))
    scheduler.save_pretrained(tmp_path)
    assert "objective" not in (tmp_path / "scheduler_config.json").read_text()
    loaded = cls.from_pretrained(tmp_path)
    assert loaded.objective is None and loaded.config.learning_rate == 0.25 and loaded.config.steer_stop == 0.5
    assert PARENTS[cls].from_config(loaded.config).config.num_train_timesteps == 1000


@every_class
def test_copies_keep_the_objective_and_step_alike(cls: Any) -> None:
    scheduler = cls(**settings_of(cls))
    scheduler.set_objective(LatentMaskObjective(torch.ones(8, 8).tril(), noise(3)))
    finals = []
    for copied in (scheduler, copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):
        copied.set_timesteps(6)
        finals.append(walk(copied, noise())[-1])
    assert torch.equal(finals[0], finals[1]) and torch.equal(finals[0], finals[2])


@every_class
def test_a_generator_makes_a_run_repeatable(cls: Any) -> None:
    finals = []
    for seed in (1, 1, 2):
        scheduler = cls(**settings_of(cls))
        scheduler.set_objective(
            LatentMaskObjective(torch.ones(8, 8).tril(), noise(3)), generator=torch.Generator().manual_seed(seed)
        )
        scheduler.set_timesteps(6)
        finals.append(walk(scheduler, noise(), seed=len(finals))[-1])
    assert torch.equal(finals[0], finals[1])
    assert torch.equal(finals[0], finals[2]) == (cls is FlowChefUniPCMultistepScheduler)  # which draws nothing


def test_multistep_solvers_take_the_config_of_a_flow_matching_scheduler() -> None:
    for cls in (FlowChefDPMSolverMultistepScheduler, FlowChefUniPCMultistepScheduler):
        scheduler = cls.from_config(FlowMatchEulerDiscreteScheduler(shift=3.0).config, learning_rate=0.5)
        assert scheduler.config.flow_shift == 3.0 and scheduler.config.learning_rate == 0.5


# -- wrong calls -------------------------------------------------------------------------------------------------------


class Answers:
    """An objective with one answer."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def grad(self, clean: torch.Tensor) -> Any:
        return self.answer(clean)

    def project(self, clean: torch.Tensor) -> Any:
        return self.answer(clean)


@every_class
@pytest.mark.parametrize(("answer", "message"), [
    (lambda clean: clean * math.nan, "grad returned values that are not finite at step 0; check the objective"),
    (lambda clean: clean[:1], r"grad returned shape \(1, 4, 8, 8\) at step 0; it must return \(2, 4, 8, 8\)"),
    (lambda clean: None, "grad returned NoneType at step 0"),
])  # fmt: skip
def test_an_unsound_answer_is_named_and_the_scheduler_stays_usable(cls: Any, answer: Any, message: str) -> None:
    scheduler = cls(**settings_of(cls))
    scheduler.set_timesteps(6)
    scheduler.set_objective(Answers(answer))
    with pytest.raises(ValueError, match=f"objective=Answers: {message}"):
        scheduler.step(noise(1), scheduler.timesteps[0], noise())
    scheduler.set_objective(None)
    parent = PARENTS[cls](**settings_of(cls))
    parent.set_timesteps(6)
    assert torch.equal(walk(scheduler, noise())[-1], walk(parent, noise())[-1])


@every_class
@pytest.mark.parametrize(("change", "message"), [
    ({"steer_start": 0.5, "steer_stop": 0.5}, "steer_start=0.5, steer_stop=0.5 is no part of a run; give shares"),
    ({"steer_start": -0.1}, "steer_start=-0.1"),
    ({"steer_stop": 1.1}, "steer_stop=1.1"),
    ({"learning_rate": -1.0}, "learning_rate=-1.0 is out of range; give a number of at least 0"),
    ({"learning_rate": math.nan}, "learning_rate=nan"),
    ({"learning_rate_ramp": 2.0}, "learning_rate_ramp=2.0 is out of range; give a number from 0 to 1"),
    ({"optimization_steps": 0}, "optimization_steps=0"),
    ({"optimization_steps": 1.5}, "optimization_steps=1.5"),
    ({"data_step": "gradient"}, "data_step='gradient' is not known; use one of grad, prox, project"),
    ({"optimizer": "lbfgs"}, "optimizer='lbfgs' is not known; use one of sgd, adam"),
    ({"optimizer": "adam", "data_step": "prox"}, "optimizer='adam' with data_step='prox'"),
    ({"optimizer": "adam"}, "optimizer='adam' with data_step=None: use data_step='grad'"),
])  # fmt: skip
def test_settings_out_of_range_are_refused(cls: Any, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cls(**settings_of(cls), **change)


@pytest.mark.parametrize(("cls", "change", "message"), [
    (FlowChefScheduler, {"renoise": 1.5}, "renoise=1.5 is out of range; give a number from 0 to 1"),
    (FlowChefUniPCMultistepScheduler, {"data_step": "repaint"}, "data_step='repaint' is not known; use one of grad, prox"),
    (FlowChefUniPCMultistepScheduler, {"prediction_type": "epsilon"}, "prediction_type='epsilon'.*only flow models"),
    (FlowChefUniPCMultistepScheduler, {"predict_x0": False}, "predict_x0=False integrates the noise"),
    (FlowChefDPMSolverMultistepScheduler, {"use_flow_sigmas": False}, "use_flow_sigmas=False: only flow models"),
    (FlowChefDPMSolverMultistepScheduler, {"use_karras_sigmas": True}, "use_karras_sigmas=True lays levels of diffusion"),
    (FlowChefDPMSolverMultistepScheduler, {"timestep_spacing": "x"}, "timestep_spacing='x' is not known"),
    (FlowChefDPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver"}, "algorithm_type='dpmsolver' integrates the noise"),
])  # fmt: skip
def test_settings_that_a_class_does_not_have_are_refused(cls: Any, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cls(**change)


@every_class
def test_what_is_no_objective_is_refused(cls: Any) -> None:
    scheduler = cls(**settings_of(cls))
    with pytest.raises(TypeError, match="objective=function has no method grad.*FunctionObjective"):
        scheduler.set_objective(lambda clean: clean.sum())
    with pytest.raises(TypeError, match="generator=5 is not a torch.Generator"):
        scheduler.set_objective(Counting(), generator=5)
    scheduler = cls(**settings_of(cls), data_step="prox")
    with pytest.raises(ValueError, match="data_step='prox' needs prox of the objective, and Counting has none"):
        scheduler.set_objective(Counting())
    assert scheduler.objective is None


@every_class
def test_calls_in_the_wrong_order_or_of_the_wrong_kind_are_refused(cls: Any) -> None:
    scheduler = cls(**settings_of(cls))
    with pytest.raises(ValueError, match="no steps are laid yet; call set_timesteps first"):
        scheduler.step(noise(), 500.0, noise())
    for wrong in (0, -1, 2.5, 5000, True):
        with pytest.raises(ValueError, match=f"num_inference_steps={wrong!r}"):
            scheduler.set_timesteps(wrong)
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="model_output of shape .* does not fit"):
        scheduler.step(noise()[:, :3], scheduler.timesteps[0], noise())
    with pytest.raises(ValueError, match="model_output is not finite"):
        scheduler.step(noise() * math.nan, scheduler.timesteps[0], noise())
    with pytest.raises(ValueError, match="timestep=12345 is not one of"):
        scheduler.step(noise(), 12345.0, noise())
    with pytest.raises(TypeError, match="timestep='x' is not a number"):
        scheduler.step(noise(), "x", noise())
    walk(scheduler, noise())
    with pytest.raises(ValueError, match="steps are done; call set_timesteps first"):
        scheduler.step(noise(), scheduler.timesteps[-1], noise())


def test_levels_outside_of_a_flow_are_refused() -> None:
    scheduler = FlowChefScheduler()
    with pytest.raises(ValueError, match="levels that are not from 0 to 1; use other sigmas"):
        scheduler.set_timesteps(sigmas=[2.0, 1.0])
    with pytest.raises(ValueError, match="empty list of sigmas"):
        scheduler.set_timesteps(sigmas=[])
