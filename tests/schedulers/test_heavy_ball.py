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
    for name in ("dpm_solver_first_order_update", "multistep_dpm_solver_second_order_update"):
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
