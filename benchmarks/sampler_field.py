"""The samplers that `samplers.py` compares, and how each is driven: one evaluation of eps(x, s) after the other.

Configurations were fixed before noise was drawn, and every one of them is reported. Two settings:

* equal: every sampler walks the same n intervals from s_max to s_min with n evaluations. Where a scheduler of diffusers takes no
  nodes, they are put into its `sigmas` after `set_timesteps`. Heun needs two evaluations an interval and gets half the intervals.
* shipped: what `set_timesteps(n)` of an unchanged scheduler gives, and so, for most of diffusers' own, a last step that is
  spent on the jump to sigma 0. Each is judged against the exact trajectory between its own first and last level.

PNDM takes no nodes and BDIA only training timesteps: they are in the second setting only. SASolver is run as the ODE solver it is
with tau = 0; its default adds noise, which a trajectory cannot judge. k-diffusion depends on torchvision and is left out.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import numpy as np
import torch

from diffusers_ext import schedulers as ours


SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
GRIDS = {"karras": "use_karras_sigmas", "exponential": "use_exponential_sigmas"}
Noise = Callable[[torch.Tensor, float], torch.Tensor]
# Evaluations allowed -> a scheduler with its timesteps set.
Make = Callable[[int], Any]


@dataclass(frozen=True)
class Sampler:
    """One configuration.

    Attributes:
        name: For tables.
        own: Whether it is of this package.
        setting: "equal" or "shipped".
        make: Builds it for a number of evaluations.
        exploding: Whether its states are x / alpha, as those of Euler, Heun and LMS.
        starts_at_the_top: Whether it starts at the last training timestep whatever the number of steps.
    """

    name: str
    own: bool
    setting: str
    make: Make = field(compare=False)
    exploding: bool = False
    starts_at_the_top: bool = True


def training_table() -> np.ndarray:
    """s of the training timesteps."""
    bars = diffusers.DDIMScheduler(**SCHEDULE).alphas_cumprod.double().numpy()
    return np.sqrt((1 - bars) / bars)


TABLE = training_table()


def nodes(grid: str, count: int) -> np.ndarray:
    """`count` intervals over the whole range."""
    if grid == "karras":
        return np.linspace(TABLE[-1] ** (1 / 7), TABLE[0] ** (1 / 7), count + 1) ** 7
    return np.exp(np.linspace(math.log(TABLE[-1]), math.log(TABLE[0]), count + 1))


def put_nodes(scheduler: Any, levels: np.ndarray, heun: bool = False) -> Any:
    """Replaces the nodes of a scheduler of diffusers whose timesteps are set."""
    times = np.interp(np.log(levels[:-1]), np.log(TABLE), np.arange(len(TABLE)))
    sigmas, timesteps = torch.from_numpy(levels), torch.from_numpy(times).float()
    if heun:
        sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
        timesteps = torch.cat([timesteps[:1], timesteps[1:].repeat_interleave(2)])
    scheduler.sigmas, scheduler.timesteps = sigmas.float(), timesteps
    return scheduler


def stock(name: str, **config: Any) -> Any:
    return getattr(diffusers, name)(**{**SCHEDULE, **config})


def laid(scheduler: Any, steps: int) -> Any:
    scheduler.set_timesteps(steps)
    return scheduler


def given(scheduler: Any, levels: np.ndarray) -> Any:
    scheduler.set_timesteps(sigmas=levels.tolist())
    return scheduler


def half(evaluations: int) -> int:
    return (evaluations + 1) // 2


MULTISTEP: dict[str, tuple[str, dict[str, Any]]] = {
    "DPM++ 2M": ("DPMSolverMultistepScheduler", {"solver_order": 2}),
    "DPM++ 3M": ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    "UniPC 2": ("UniPCMultistepScheduler", {"solver_order": 2}),
    "UniPC 3": ("UniPCMultistepScheduler", {"solver_order": 3}),
    "DEIS 2": ("DEISMultistepScheduler", {"solver_order": 2}),
    "DEIS 3": ("DEISMultistepScheduler", {"solver_order": 3}),
    "SASolver (ODE)": ("SASolverScheduler", {"tau_func": lambda timestep: 0}),
}
HEAVY: dict[str, tuple[type, dict[str, Any]]] = {
    "DPM++ 2M + HB .8": (ours.HeavyBallDPMSolverMultistepScheduler, {"damping": 0.8}),
    "UniPC 2 + HB .8": (ours.HeavyBallUniPCMultistepScheduler, {"damping": 0.8}),
}


def equal_nodes() -> list[Sampler]:
    found = []

    def add(name: str, own: bool, make: Make, **more: Any) -> None:
        found.append(Sampler(name, own, "equal", make, **more))

    for grid in GRIDS:
        add(f"DDIM {grid}", False, lambda n, g=grid: put_nodes(laid(stock("EulerDiscreteScheduler"), n), nodes(g, n)),
            exploding=True)  # fmt: skip
        for name, (cls, config) in MULTISTEP.items():
            # No jump at the end. DEIS is better off without lower orders there, DPM-Solver++ and UniPC with them.
            extra: dict[str, Any] = {"final_sigmas_type": "sigma_min"}
            if cls == "DEISMultistepScheduler":
                extra = {"lower_order_final": False}
            elif cls == "SASolverScheduler":
                extra = {}

            def make(
                n: int, g: str = grid, cls: str = cls, config: dict[str, Any] = config, extra: Any = extra
            ) -> Any:
                return put_nodes(laid(stock(cls, **config, **extra), n), nodes(g, n))

            add(f"{name} {grid}", False, make)
        add(f"LMS 4 {grid}", False, lambda n, g=grid: put_nodes(laid(stock("LMSDiscreteScheduler"), n), nodes(g, n)),
            exploding=True)  # fmt: skip
        add(f"Heun {grid}", False,
            lambda n, g=grid: put_nodes(laid(stock("HeunDiscreteScheduler"), half(n)), nodes(g, half(n)), heun=True),
            exploding=True)  # fmt: skip
        for name, (cls, config) in HEAVY.items():
            add(f"{name} {grid}", True, lambda n, g=grid, cls=cls, config=config: put_nodes(
                laid(cls(**SCHEDULE, final_sigmas_type="sigma_min", **config), n), nodes(g, n)))  # fmt: skip
        for order, damping in ((4, 0.5), (3, 0.8), (4, 0.8), (2, 0.8)):
            add(f"GHVB {order}, {damping} {grid}", True, lambda n, g=grid, k=order, b=damping: given(
                ours.GHVBScheduler(**SCHEDULE, solver_order=k, damping=b), nodes(g, n)))  # fmt: skip
        add(f"PLMS 4 {grid}", True, lambda n, g=grid: given(
            ours.GHVBScheduler(**SCHEDULE, momentum_type="none"), nodes(g, n)))  # fmt: skip
        add(f"PLMS 4 + HB .8 {grid}", True, lambda n, g=grid: given(
            ours.GHVBScheduler(**SCHEDULE, momentum_type="hb", damping=0.8), nodes(g, n)))  # fmt: skip
        add(f"EVODiff {grid}", True, lambda n, g=grid: given(ours.EVODiffScheduler(**SCHEDULE), nodes(g, n)))
        add(
            f"AdaptiveAdams {grid}",
            True,
            lambda n, g=grid: given(ours.AdaptiveAdamsScheduler(**SCHEDULE), nodes(g, n)),
        )
        add(f"Adams p=.5 {grid}", True, lambda n, g=grid: given(
            ours.AdaptiveAdamsScheduler(**SCHEDULE, basis_power=0.5), nodes(g, n)))  # fmt: skip
    return found


def shipped() -> list[Sampler]:
    found = []

    def add(name: str, own: bool, make: Make, **more: Any) -> None:
        found.append(Sampler(name, own, "shipped", make, **more))

    ddim = {"clip_sample": False, "set_alpha_to_one": False}
    leading = {"timestep_spacing": "leading", "steps_offset": 1}
    add("DDIM leading", False, lambda n: laid(stock("DDIMScheduler", **ddim, **leading), n), starts_at_the_top=False)
    add("DDIM trailing", False, lambda n: laid(stock("DDIMScheduler", **ddim, timestep_spacing="trailing"), n))
    # It asks once more than it is told: the second timestep twice.
    pndm = {"skip_prk_steps": True, "set_alpha_to_one": False}
    add(
        "PNDM leading",
        False,
        lambda n: laid(stock("PNDMScheduler", **pndm, **leading), n - 1),
        starts_at_the_top=False,
    )
    add("PNDM trailing", False, lambda n: laid(stock("PNDMScheduler", **pndm, timestep_spacing="trailing"), n - 1))
    for grid, flag in GRIDS.items():
        for name, (cls, config) in MULTISTEP.items():
            add(f"{name} {grid}", False,
                lambda n, cls=cls, config=config, flag=flag: laid(stock(cls, **config, **{flag: True}), n))  # fmt: skip
        add(
            f"Euler {grid}",
            False,
            lambda n, f=flag: laid(stock("EulerDiscreteScheduler", **{f: True}), n),
            exploding=True,
        )
        add(
            f"LMS 4 {grid}",
            False,
            lambda n, f=flag: laid(stock("LMSDiscreteScheduler", **{f: True}), n),
            exploding=True,
        )
        add(f"Heun {grid}", False, lambda n, f=flag: laid(stock("HeunDiscreteScheduler", **{f: True}), half(n)),
            exploding=True)  # fmt: skip
        for name, (cls, config) in HEAVY.items():
            add(f"{name} {grid}", True,
                lambda n, cls=cls, config=config, flag=flag: laid(cls(**SCHEDULE, **config, **{flag: True}), n))  # fmt: skip
        own_grid = {"use_karras_sigmas": grid == "karras", "use_exponential_sigmas": grid == "exponential"}
        add(f"GHVB 4, 0.5 {grid}", True, lambda n, g=own_grid: laid(ours.GHVBScheduler(**SCHEDULE, **g), n))
        add(f"EVODiff {grid}", True, lambda n, g=own_grid: laid(ours.EVODiffScheduler(**SCHEDULE, **g), n))
        add(f"AdaptiveAdams {grid}", True, lambda n, g=own_grid: laid(ours.AdaptiveAdamsScheduler(**SCHEDULE, **g), n))
    add("BDIA-DDIM 0.5 leading", True, lambda n: laid(
        ours.BDIADDIMScheduler(**SCHEDULE, set_alpha_to_one=False, **leading), n), starts_at_the_top=False)  # fmt: skip
    return found


def field_of(setting: str) -> list[Sampler]:
    """All samplers of a setting."""
    return equal_nodes() if setting == "equal" else shipped()


@dataclass(frozen=True)
class Run:
    """What came of a run: X at its end, the levels it covered, and how often it asked."""

    state: torch.Tensor
    start: float
    end: float
    evaluations: int


def levels_of(scheduler: Any) -> list[float]:
    """s at which the model is asked, call by call, and s of the result."""
    if isinstance(scheduler, (diffusers.DDIMScheduler, diffusers.PNDMScheduler, ours.BDIADDIMScheduler)):
        final = getattr(scheduler, "final_alpha_cumprod", None)
        last = float(TABLE[0]) if final is None else math.sqrt((1 - float(final)) / float(final))
        return [*(float(TABLE[int(t)]) for t in scheduler.timesteps), last]
    kept = getattr(scheduler, "_nodes", None)
    if kept is not None:
        return list(kept)
    return scheduler.sigmas.double().tolist()


def walk(sampler: Sampler, noise: Noise, start: torch.Tensor, evaluations: int) -> Run:
    """Runs a sampler from x = `start` at its first level."""
    scheduler = sampler.make(evaluations)
    levels = levels_of(scheduler)
    sample = start * math.sqrt(1 + levels[0] ** 2) if sampler.exploding else start
    timesteps = scheduler.timesteps
    for index, timestep in enumerate(timesteps):
        scaled = scheduler.scale_model_input(sample, timestep)
        sample = scheduler.step(noise(scaled, levels[index]), timestep, sample, return_dict=False)[0].to(start.dtype)
    state = sample if sampler.exploding else sample * math.sqrt(1 + levels[-1] ** 2)
    return Run(state, levels[0], levels[-1], len(timesteps))
