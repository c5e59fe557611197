"""Operators, objectives, solvers and the pipeline of steering under the fuzzer."""

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from diffusers_ext.schedulers import FLAIRScheduler, FlowChefScheduler
from diffusers_ext.steering import (
    Blur,
    ClassifierObjective,
    Compose,
    DecodedObjective,
    FromDeepinv,
    FunctionObjective,
    GaussianBlur,
    InpaintMask,
    LatentMaskObjective,
    MeasurementObjective,
    MotionBlur,
    PackedObjective,
    StagedObjective,
    SumObjective,
    SuperResolution,
    official_settings,
    steerable,
    velocity_errors,
)

from .functions_of_edits import EDIT_ARGUMENTS
from .registry import INF, NAN, Argument, Function, Made, shared_pipeline
from .values import NOT_COUNTS, NOT_NUMBERS, NOT_TEXT, PICTURES, TYPOS


def _noise(*shape: int, dtype: torch.dtype = torch.float32) -> Made:
    return Made(f"<noise {shape} {dtype}>", lambda rng: torch.randn(*shape).to(dtype))


NOT_TENSORS = (None, 5, "x", [], {}, object, torch.zeros(2, 3, 8, 8, dtype=torch.int64))
NOT_FINITE = (torch.full((2, 3, 8, 8), NAN), torch.full((2, 3, 8, 8), INF))
SAMPLES = Argument(
    good=[_noise(2, 3, 8, 8), _noise(1, 3, 8, 12), _noise(2, 3, 8, 8, dtype=torch.float16), _noise(1, 3, 8, 8, dtype=torch.float64)],
    bad=[*NOT_TENSORS, *NOT_FINITE, torch.zeros(0, 3, 8, 8), torch.zeros(3), torch.tensor(1.0)],
)  # fmt: skip
POSITIVE = [*NOT_NUMBERS, -1.0, True]
NOT_OBJECTIVES = (None, 5, "x", [5], {}, object, torch.nn.Linear(2, 2))


def _applied(operator: Any, pictures: Any) -> Any:
    """Everything that steering asks of an operator."""
    measured = operator.A(pictures)
    return [
        measured, operator.adjoint(measured), operator.pinv(measured), operator.solve(measured, 0.5, 0.1), operator.norm(pictures),
    ]  # fmt: skip


def _asked(objective: Any, clean: Any) -> Any:
    answers = [objective.loss(clean).detach(), objective.grad(clean)]
    if getattr(objective, "prox", None):
        answers += [objective.prox(clean, 0.5), objective.project(clean)]
    return answers


def _run(scheduler: Any, objective: Any, steps: Any = 2) -> Any:
    scheduler.set_objective(objective, torch.Generator().manual_seed(0))
    scheduler.set_timesteps(steps)
    state = torch.randn(1, 3, 8, 8)
    for timestep in scheduler.timesteps:
        state = scheduler.step(0.5 * state, timestep, state).prev_sample
    return state


def _measured(**settings: Any) -> MeasurementObjective:
    return MeasurementObjective(SuperResolution(2), torch.zeros(1, 3, 4, 4), **settings)


def _solve(scheduler_class: Any, **settings: Any) -> Any:
    return _run(scheduler_class(**settings), _measured())


def _steer(steering_kwargs: Any, **arguments: Any) -> Any:
    pipeline: Any = shared_pipeline("FlowChefPipeline")
    if arguments.get("measurement") is not None or arguments.get("operator") is not None:
        arguments |= {
            "image": None,
            "mask_image": None,
            "source_prompt": None,
            "source_stop": 0.0,
            "height": None,
            "width": None,
        }
    return pipeline(
        num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(0), steering_kwargs=steering_kwargs, **arguments
    )  # fmt: skip


def _sides(*shape: int) -> Made:
    return Made(f"<uniform {shape}>", lambda rng: torch.rand(*shape) * 2 - 1)


class _Turned:
    def A(self, x: torch.Tensor) -> torch.Tensor:
        return x.flip(-1)

    A_adjoint = A


WRONG_MASKS = (
    None,
    5,
    "x",
    [],
    object,
    torch.zeros(8, 8),
    torch.full((8, 8), 2.0),
    torch.full((8, 8), NAN),
    torch.ones(0),
)

FUNCTIONS_OF_STEERING: tuple[Function, ...] = (
    Function("InpaintMask", lambda mask, pictures: _applied(InpaintMask(mask), pictures), {
        "mask": Argument(
            good=[torch.ones(8, 1), torch.eye(8)[:, :1] > 0, torch.full((1, 1, 8, 1), 0.5)],
            bad=[*WRONG_MASKS, torch.ones(5, 7), torch.ones(2, 2, 3, 8, 8), torch.ones(8, 1) * 1j],
        ),
        "pictures": SAMPLES,
    }),
    Function("SuperResolution", lambda factor, mode, pictures: _applied(SuperResolution(factor, mode), pictures), {
        "factor": Argument(good=[2, 4], bad=[*NOT_COUNTS, 1, 3, 16, 1025]),
        "mode": Argument(good=["average", "bicubic"], bad=TYPOS),
        "pictures": SAMPLES,
    }),
    Function("GaussianBlur", lambda kernel_size, sigma, padding, pictures: _applied(GaussianBlur(kernel_size, sigma, padding), pictures), {
        "kernel_size": Argument(good=[1, 3, 7], bad=[*NOT_COUNTS, 2, 50, 4097]),
        "sigma": Argument(good=[1, 0.5, 3.0], bad=[*POSITIVE, 0]),
        "padding": Argument(good=["reflect", "replicate", "circular", "zeros"], bad=TYPOS),
        "pictures": SAMPLES,
    }),
    Function("MotionBlur", lambda length, angle, pictures: _applied(MotionBlur(length, angle), pictures), {
        "length": Argument(good=[1, 4, 9], bad=[*NOT_COUNTS, 4096]),
        "angle": Argument(good=[0, -30.0, 1e6], bad=[*NOT_NUMBERS, True]),
        "pictures": SAMPLES,
    }),
    Function("Blur", lambda kernel, pictures: _applied(Blur(kernel), pictures), {
        "kernel": Argument(
            good=[_sides(3, 3), _sides(1, 5), _sides(11, 3)],
            bad=[*NOT_TENSORS, torch.ones(2, 2), torch.ones(3), torch.zeros(3, 3), torch.full((3, 3), NAN), torch.ones(0, 1)],
        ),
        "pictures": SAMPLES,
    }),
    Function("Compose", lambda operators, pictures: _applied(Compose(*operators), pictures), {
        "operators": Argument(
            good=[(GaussianBlur(3, 1.0), SuperResolution(2)), (MotionBlur(3), InpaintMask(torch.ones(8, 1)))],
            bad=[(), (5,), (SuperResolution,), (SuperResolution(2), None)],
        ),
        "pictures": SAMPLES,
    }),
    Function("FromDeepinv", lambda physics, pictures: _applied(FromDeepinv(physics), pictures), {
        "physics": Argument(good=[_Turned()], bad=[None, 5, "x", object, torch.nn.Linear(2, 2)]),
        "pictures": SAMPLES,
    }),
    Function("MeasurementObjective", lambda clean, **settings: _asked(MeasurementObjective(**settings), clean), {
        "operator": Argument(good=[SuperResolution(2)], bad=[None, 5, "x", SuperResolution, object]),
        "measurement": Argument(good=[_noise(1, 3, 4, 4)], bad=[*NOT_TENSORS, *NOT_FINITE, torch.zeros(3), torch.zeros(1, 3, 5, 5)]),
        "noise_std": Argument(good=[0, 0.05, 1], bad=POSITIVE),
        "weight": Argument(good=[None, 1.0], bad=[0, *(value for value in POSITIVE if value is not None)]),
        "clean": Argument(good=[_noise(1, 3, 8, 8)] * 2, bad=SAMPLES.bad),
    }),
    Function("LatentMaskObjective", lambda mask, reference, clean: _asked(LatentMaskObjective(mask, reference), clean), {
        "mask": Argument(good=[torch.ones(8, 8).tril()], bad=[*WRONG_MASKS, torch.ones(5, 7)]),
        "reference": Argument(good=[_noise(1, 3, 8, 8)], bad=[*NOT_TENSORS, *NOT_FINITE, torch.zeros(3)]),
        "clean": Argument(good=[_noise(1, 3, 8, 8), _noise(4, 3, 8, 8)], bad=SAMPLES.bad),
    }),
    Function("SumObjective", lambda objectives, weights: _asked(SumObjective(objectives, weights), torch.zeros(1, 3, 8, 8)), {
        "objectives": Argument(good=[[_measured(), _measured()]], bad=[[], 5, None, [5, 5], [_measured], {}, "ab", object]),
        "weights": Argument(good=[None, [1, 2.0]], bad=[[1], [0, 1], [-1, 1], [NAN, 1], "ab", 5, {}, object]),
    }),
    Function("StagedObjective", lambda objectives, stops: _run(FlowChefScheduler(), StagedObjective(objectives, stops)), {
        "objectives": Argument(good=[[_measured(), _measured()]], bad=[[], 5, None, [5, 5], [_measured], {}, "ab", object]),
        "stops": Argument(good=[[0.5], [0], [1.0]], bad=[[], [2.0], [-0.1], [NAN], ["x"], [0.5, 0.6], 0.5, None, {}, object]),
    }),
    Function("PackedObjective", lambda clean, **settings: _asked(PackedObjective(**settings), clean), {
        "objective": Argument(good=[_measured()], bad=NOT_OBJECTIVES),
        "height": Argument(good=[8], bad=[*NOT_COUNTS, 7, 4]),
        "width": Argument(good=[8], bad=[*NOT_COUNTS, 7, 4]),
        "patch_size": Argument(good=[2], bad=[*NOT_COUNTS, 3, 4]),
        "clean": Argument(good=[_noise(1, 16, 12)], bad=[*SAMPLES.bad, torch.zeros(1, 16, 13), torch.zeros(1, 15, 12)]),
    }),
    Function("FunctionObjective", lambda clean, **settings: _asked(FunctionObjective(**settings), clean), {
        "function": Argument(
            good=[lambda x: x.flatten(1).square().mean(1)],
            bad=[None, 5, "x", lambda x: x, lambda x: 5, lambda x: torch.zeros(len(x)), lambda x: None],
        ),
        "floor": Argument(good=[0, -1.0], bad=[*NOT_NUMBERS, True]),
        "largest_step": Argument(good=[0.5, 10], bad=[*POSITIVE, 0]),
        "clean": SAMPLES,
    }),
    Function("ClassifierObjective", lambda clean, **settings: _asked(ClassifierObjective(**settings), clean), {
        "classifier": Argument(
            good=[lambda x: x.mean((2, 3))], bad=[None, 5, "x", lambda x: x, lambda x: 5, lambda x: x.mean((2, 3))[:0]],
        ),
        "target": Argument(good=[0, 2, torch.tensor([1])], bad=[3, -1, 1.5, "0", None, [0], True, torch.tensor([0.5]), torch.tensor([5])]),
        "confidence": Argument(good=[0.95, 0.5], bad=[*POSITIVE, 0, 1, 2.0]),
        "clean": Argument(good=[_noise(1, 3, 8, 8)], bad=SAMPLES.bad),
    }),
    Function("DecodedObjective", lambda clean, **settings: _asked(DecodedObjective(**settings), clean), {
        "vae": Argument(good=[lambda latents: latents.tanh()], bad=[None, 5, "x", [], {}]),
        "objective": Argument(good=[_measured()], bad=NOT_OBJECTIVES),
        "checkpointing": Argument(good=[False], bad=[True]),
        "largest_step": Argument(good=[0.5], bad=[*POSITIVE, 0]),
        "clean": Argument(good=[_noise(1, 3, 8, 8)], bad=SAMPLES.bad),
    }),
    Function("velocity_errors", velocity_errors, {
        "velocity": Argument(good=[lambda x, t: x * t], bad=[None, 5, "x", lambda x, t: x[:, :1], lambda x, t: None, lambda x, t: x * NAN]),
        "samples": SAMPLES,
        "count": Argument(good=[2, 5], bad=[value for value in NOT_COUNTS if value not in (2**31, 10**30)]),
        "generator": Argument(good=[None], bad=[5, "x", [None], object]),
    }),
    Function("FlowChefScheduler.set_objective", lambda objective: _run(FlowChefScheduler(), objective), {
        "objective": Argument(
            good=[None, _measured(), FunctionObjective(lambda x: x.flatten(1).square().mean(1))],
            bad=[5, "x", [], {}, object(), torch.nn.Linear(2, 2), _measured],
        ),
    }),
    Function("FLAIRScheduler with an objective", lambda **settings: _solve(FLAIRScheduler, **settings), {
        "data_step": Argument(good=["grad", "prox", "project"], bad=TYPOS),
        "data_learning_rate": Argument(good=[1, 0.1], bad=[*POSITIVE, 0]),
        "data_steps": Argument(good=[1, 15], bad=[value for value in NOT_COUNTS if value not in (2**31, 10**30)]),
        "prior_scale": Argument(good=[0.5, 3, 1e-9], bad=[*POSITIVE, 0]),
        "velocity_errors": Argument(
            good=[None, [1.0, 0.5], [1, 0.2, 1]], bad=[[], [1.0], [0.0, 1.0], [NAN, 1.0], ["a", "b"], "ab", 5, {}, [None, 1.0], object],
        ),
        "final_level": Argument(good=[0.18, 0.5, 0.01], bad=[*POSITIVE, 0, 1, 2.0]),
    }),
    Function("steerable", lambda scheduler, solver: _run(steerable(scheduler, solver), _measured()), {
        "scheduler": Argument(good=[FlowMatchEulerDiscreteScheduler()], bad=[None, 5, "x", FlowMatchEulerDiscreteScheduler, object]),
        "solver": Argument(good=["flowchef", "flair"], bad=TYPOS),
    }),
    Function("official_settings", lambda task: official_settings(task).num_inference_steps, {
        "task": Argument(good=["pixel", "flux_edit"], bad=TYPOS),
    }),
    Function("FlowChefPipeline", _steer, {
        "prompt": Argument(good=["a", ["b"]], bad=NOT_TEXT),
        "image": Argument(good=[_sides(1, 3, 32, 32), _sides(1, 3, 16, 24)], bad=PICTURES.bad),
        "mask_image": Argument(
            good=[Made("<mask>", lambda rng: torch.eye(32)[None, None])],
            bad=[value for value in PICTURES.bad if value is not None],
        ),
        "source_prompt": Argument(good=[None, "c"], bad=NOT_TEXT),
        "guidance_scale": Argument(good=[2, 7.5], bad=[*NOT_NUMBERS, -1.0, 1e308, True]),
        "height": Argument(good=[None, 32], bad=[*EDIT_ARGUMENTS["height"].bad, 31]),
        "width": Argument(good=[None, 32], bad=[*EDIT_ARGUMENTS["width"].bad, 31]),
        "num_images_per_prompt": Argument(good=[1, 2], bad=[value for value in NOT_COUNTS if value not in (2**31, 10**30)]),
        "noise_std": Argument(good=[None, 0.1], bad=[value for value in POSITIVE if value is not None]),
        "source_stop": Argument(good=[0.0, 0.5, 1], bad=[*NOT_NUMBERS, -0.1, 1.1, True]),
        "steering_kwargs": Argument(
            good=[None, {}, {"data_step": "grad"}, {"solver": "flair"}],
            bad=[5, "x", [1], {"x": 1}, {5: 1}, {"data_step": "x"}, {"learning_rate": -1.0}, {"solver": "x"}, object],
        ),
    }, is_model=True),
    Function("FlowChefPipeline restoring", _steer, {
        "prompt": Argument(good=["a"], bad=[]),
        "measurement": Argument(
            good=[_sides(1, 3, 8, 8)],
            bad=[5, "x", [], {}, object, torch.zeros(3), torch.zeros(1, 1, 8, 8), torch.zeros(1, 3, 7, 7), torch.full((1, 3, 8, 8), NAN)],
        ),
        "operator": Argument(good=[SuperResolution(4)], bad=[5, "x", [], SuperResolution, object]),
        "steering_kwargs": Argument(good=[None], bad=[{"data_step": "prox"}, {"data_step": "project"}]),
    }, is_model=True),
)  # fmt: skip
