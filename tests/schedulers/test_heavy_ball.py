"""Heavy-ball momentum in the solvers of diffusers: against the authors' code, and against the parents at damping 1."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

from diffusers_ext.schedulers import HeavyBallDPMSolverMultistepScheduler, HeavyBallUniPCMultistepScheduler
from tests.analytic.sampler_problems import MixtureProblem
from tests.helpers.golden import golden


SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PAIRS = {
    "dpm": (HeavyBallDPMSolverMultistepScheduler, DPMSolverMultistepScheduler),
    "unipc": (HeavyBallUniPCMultistepScheduler, UniPCMultistepScheduler),
}
FINALS = [
    (kind, name) for kind in PAIRS for name in golden(f"samplers/heavy_ball_{kind}.npz") if name.endswith("final")
]


@pytest.fixture
def float64() -> Iterator[None]:
    """The solvers of diffusers make some of their numbers in the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def in_float64(scheduler: Any, problem: MixtureProblem) -> Any:
    """The schedule of the reference at full precision, and a solver that does not round its samples to float32."""
    sigmas = ((1 - problem.alphas_cumprod) / problem.alphas_cumprod).sqrt()
    scheduler.sigmas = torch.cat([sigmas[scheduler.timesteps], sigmas[:1]])
    return without_rounding(scheduler)


def without_rounding(scheduler: Any) -> Any:
    """A solver of diffusers whose updates start from the sample as the test knows it."""
    for order in ("dpm_solver_first", "multistep_dpm_solver_second", "multistep_dpm_solver_third"):
        name = f"{order}_order_update"
        if hasattr(scheduler, name):
            setattr(scheduler, name, unrounded(getattr(scheduler, name)))
    return scheduler


SAMPLES: dict[str, torch.Tensor] = {}


def unrounded(update: Any) -> Any:
    """An update that starts from the sample as it was before `step` rounded it."""

    def call(*args: Any, sample: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return update(*args, sample=SAMPLES["now"], **kwargs)

    return call


def trajectory(scheduler: Any, problem: MixtureProblem, steps: int = 10) -> Iterator[torch.Tensor]:
    scheduler.set_timesteps(steps)
    sample = problem.start
    in_float64(scheduler, problem)
    for timestep in scheduler.timesteps:
        SAMPLES["now"] = sample
        output = problem.noise(sample, float(problem.alphas_cumprod[timestep]))
        sample = scheduler.step(output, timestep, sample).prev_sample
        yield sample


def built(kind: str, damping: float, **config: Any) -> Any:
    if kind == "unipc":
        config["official_momentum"] = True
    return PAIRS[kind][0](**{**SCHEDULE, "final_sigmas_type": "sigma_min", "damping": damping, **config})


@pytest.mark.parametrize(("kind", "name"), FINALS)
def test_final_latents_are_those_of_the_authors(kind: str, name: str, float64: None) -> None:
    data, (model, damping, _) = golden(f"samplers/heavy_ball_{kind}.npz"), name.split("_")
    scheduler, problem = built(kind, float(damping[1:])), MixtureProblem(model)
    *_, final = trajectory(scheduler, problem)
    assert scheduler.timesteps.tolist() == data["timesteps"].tolist()
    expected = data.tensor(name)
    assert float((final - expected).abs().max()) < 1e-9 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("kind", PAIRS)
def test_every_state_on_the_way_is_that_of_the_authors(kind: str, float64: None) -> None:
    expected = golden(f"samplers/heavy_ball_{kind}.npz").tensor("mix_b0.5_traj")
    for index, state in enumerate(trajectory(built(kind, 0.5), MixtureProblem("mix"))):
        assert float((state - expected[index + 1]).abs().max()) < 1e-9


CONFIGS: dict[str, list[dict[str, Any]]] = {
    "dpm": [
        {}, {"solver_order": 3}, {"solver_order": 1}, {"use_karras_sigmas": True}, {"algorithm_type": "sde-dpmsolver++"},
        {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}, {"solver_type": "heun"}, {"thresholding": True},
        {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}, {"euler_at_final": True},
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0},
    ],
    "unipc": [
        {}, {"solver_order": 3}, {"solver_order": 1}, {"use_karras_sigmas": True}, {"predict_x0": False, "final_sigmas_type": "sigma_min"},
        {"solver_type": "bh1", "final_sigmas_type": "sigma_min"},
        {"disable_corrector": [0, 1]}, {"prediction_type": "sample"}, {"timestep_spacing": "leading", "steps_offset": 1},
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0},
    ],
}  # fmt: skip


@pytest.mark.parametrize(("kind", "config"), [(kind, config) for kind in PAIRS for config in CONFIGS[kind]], ids=str)
def test_damping_one_is_the_parent_bit_for_bit(kind: str, config: dict[str, Any]) -> None:
    ours, parent = (
        cls(**{**SCHEDULE, **config, **extra}) for cls, extra in zip(PAIRS[kind], ({"damping": 1.0}, {}), strict=True)
    )
    states = []
    for scheduler in (ours, parent):
        generator = torch.Generator().manual_seed(0)
        sample = torch.randn(2, 3, 8, 8, generator=generator)
        scheduler.set_timesteps(12)
        arguments = {"generator": generator} if kind == "dpm" else {}
        run = []
        for timestep in scheduler.timesteps:
            sample = scheduler.step(0.3 * torch.sin(sample + timestep), timestep, sample, **arguments).prev_sample
            run.append(sample)
        states.append(torch.stack(run))
    assert torch.isfinite(states[0]).all() and torch.equal(*states)


GRIDS: list[dict[str, Any]] = [
    {}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"timestep_spacing": "trailing"},
]  # fmt: skip
FLOW = {"use_flow_sigmas": True, "flow_shift": 3.0}


def settings(kind: str, order: int, prediction: str) -> Iterator[dict[str, Any]]:
    """Every setting of a solver that changes its arithmetic, except those that are left to the parent."""
    finals = [
        {"lower_order_final": lower, "final_sigmas_type": end}
        for lower in (True, False)
        for end in ("zero", "sigma_min")
    ]
    grids = [FLOW] if prediction == "flow_prediction" else [*GRIDS, FLOW]
    if kind == "dpm":
        variants = [
            {"algorithm_type": algorithm, "solver_type": solver, "euler_at_final": euler}
            for algorithm in ("dpmsolver++", "dpmsolver") for solver in ("midpoint", "heun") for euler in (False, True)
        ]  # fmt: skip
    else:
        variants = [
            {"predict_x0": data, "solver_type": solver, "disable_corrector": disabled, "official_momentum": official}
            for data in (True, False) for solver in ("bh1", "bh2") for disabled, official in (([], False), ([0, 3], True))
        ]  # fmt: skip
    for number, (variant, final) in enumerate((variant, final) for variant in variants for final in finals):
        of_noise = variant.get("algorithm_type") == "dpmsolver" or not variant.get("predict_x0", True)
        at_zero = final["final_sigmas_type"] == "zero"
        # Where diffusers itself refuses, or divides by zero: a prediction of noise at the end, an order above one there, bh1.
        if of_noise and (at_zero or prediction == "flow_prediction"):
            continue
        if at_zero and (
            variant.get("solver_type") == "bh1" or (kind == "unipc" and not final["lower_order_final"] and order > 1)
        ):
            continue
        # Each variant meets each grid at some end; all of all would be five times as many runs.
        yield {**variant, **final, **grids[number % len(grids)], "solver_order": order, "prediction_type": prediction}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction", "flow_prediction"])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("kind", PAIRS)
def test_our_own_step_is_momentum_over_the_step_of_diffusers(
    kind: str, order: int, prediction: str, float64: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    cls, count = PAIRS[kind][0], 0
    for config in settings(kind, order, prediction):
        states = []
        for own in (True, False):
            scheduler = cls(**SCHEDULE, damping=0.6, **config)
            scheduler.set_timesteps(6)
            scheduler.sigmas = scheduler.sigmas.double()
            if not own:
                monkeypatch.setattr(scheduler, "_is_plain", lambda: False)
                without_rounding(scheduler)
            sample = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            run = []
            # On some grids diffusers ends with a step of no length, and divides by it.
            steps = 6 if float(scheduler.sigmas[-1]) < 0.999 * float(scheduler.sigmas[-2]) else 5
            for timestep in scheduler.timesteps[:steps]:
                SAMPLES["now"] = sample
                output = 0.3 * torch.sin(sample + timestep)
                sample = scheduler.step(output, timestep, sample).prev_sample
                run.append(sample)
            states.append(torch.stack(run))
        ours, theirs = states
        size = theirs.abs().amax((1, 2, 3, 4), keepdim=True)
        assert float(((ours - theirs) / size).abs().max()) < 1e-6, config
        count += 1
    assert count >= 8


@pytest.mark.parametrize("kind", PAIRS)
def test_in_single_precision_our_own_step_differs_by_rounding(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    states = []
    for own in (True, False):
        scheduler = PAIRS[kind][0](**SCHEDULE, damping=0.6, solver_order=3, use_karras_sigmas=True)
        scheduler.set_timesteps(20)
        if not own:
            monkeypatch.setattr(scheduler, "_is_plain", lambda: False)
        sample = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        for timestep in scheduler.timesteps:
            sample = scheduler.step(0.3 * torch.sin(sample + timestep), timestep, sample).prev_sample
        states.append(sample)
    assert float((states[0] - states[1]).abs().max()) < 2e-5 * float(states[1].abs().max())


@pytest.mark.parametrize("kind", PAIRS)
def test_thresholding_is_left_to_diffusers_and_has_momentum(kind: str) -> None:
    finals = []
    for damping in (1.0, 0.6):
        scheduler = PAIRS[kind][0](**SCHEDULE, damping=damping, thresholding=True)
        scheduler.set_timesteps(8)
        sample = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        for timestep in scheduler.timesteps:
            sample = scheduler.step(torch.sin(3 * sample), timestep, sample).prev_sample
        finals.append(sample)
    assert torch.isfinite(finals[1]).all() and not torch.allclose(*finals, atol=1e-3)
    # A thresholded prediction is where a run ends that jumps to it.
    assert float(finals[1].abs().max()) <= 1.0 + 1e-6


@pytest.mark.parametrize("kind", PAIRS)
def test_gradients_pass_through_our_own_step(kind: str) -> None:
    scheduler = PAIRS[kind][0](**SCHEDULE, damping=0.6)
    scheduler.set_timesteps(5)
    scale = torch.tensor(0.5, requires_grad=True)
    sample = torch.ones(1, 2, 4, 4)
    for timestep in scheduler.timesteps:
        sample = scheduler.step(scale * sample, timestep, sample).prev_sample
    sample.sum().backward()
    assert scale.grad is not None and torch.isfinite(scale.grad) and float(scale.grad) != 0.0


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("config", [{}, {"final_sigmas_type": "sigma_min"}], ids=str)
def test_momentum_changes_nothing_where_the_prediction_is_constant(kind: str, config: dict[str, Any]) -> None:
    states = []
    for damping in (1.0, 0.5):
        scheduler = PAIRS[kind][0](**{**SCHEDULE, **config, "prediction_type": "sample", "damping": damping})
        scheduler.set_timesteps(12)
        sample = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        clean = torch.linspace(-1, 1, sample.numel()).reshape(sample.shape)
        for timestep in scheduler.timesteps:
            sample = scheduler.step(clean, timestep, sample).prev_sample
        states.append(sample)
    torch.testing.assert_close(*states, rtol=0, atol=1e-5)


def test_official_momentum_is_another_method() -> None:
    problem = MixtureProblem("mix")
    finals = []
    for official in (False, True):
        scheduler = HeavyBallUniPCMultistepScheduler(**SCHEDULE, damping=0.5, official_momentum=official)
        scheduler.set_timesteps(10)
        sample = problem.start.float()
        for timestep in scheduler.timesteps:
            output = problem.noise(sample.double(), float(problem.alphas_cumprod[timestep])).float()
            sample = scheduler.step(output, timestep, sample).prev_sample
        finals.append(sample)
    assert float((finals[0] - finals[1]).abs().max()) > 1e-3


def test_a_stochastic_solver_has_no_momentum() -> None:
    with pytest.raises(ValueError, match="damping=0.8 with algorithm_type='sde-dpmsolver"):
        HeavyBallDPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++")


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("damping", [0.0, 1.5, float("nan"), "1", True])
def test_a_damping_out_of_range_is_named(kind: str, damping: Any) -> None:
    with pytest.raises(ValueError, match="damping="):
        PAIRS[kind][0](damping=damping)


@pytest.mark.parametrize("kind", PAIRS)
def test_a_grid_that_repeats_a_node_is_refused(kind: str) -> None:
    scheduler = PAIRS[kind][0](timestep_spacing="leading")
    with pytest.raises(ValueError, match="num_inference_steps=1000"):
        scheduler.set_timesteps(1000)
    with pytest.raises(ValueError, match="call set_timesteps first"):
        scheduler.step(torch.zeros(1, 3, 4, 4), 999, torch.zeros(1, 3, 4, 4))
