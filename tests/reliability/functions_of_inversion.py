"""Inversion methods under the fuzzer, on a network of one line."""

from typing import Any

import torch
from diffusers import DDIMScheduler

from diffusers_ext.inversion import INVERSIONS, DDIMLadder, Denoiser, interpolate, invert, regenerate

from .registry import INF, NAN, Argument, Function, Made
from .values import NOT_COUNTS, NOT_NUMBERS


NOT_TENSORS = (None, 5, "x", [], [[1.0]], {}, object)


def _network(latents: torch.Tensor, timestep: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
    return 0.3 * torch.sin(latents) + embeddings.mean(dim=(1, 2))[:, None, None, None]


def _denoiser(batch: int = 1, network: Any = _network) -> Denoiser:
    return Denoiser(network, torch.ones(batch, 2, 4), torch.zeros(batch, 2, 4))


def _ladder() -> DDIMLadder:
    return DDIMLadder.from_scheduler_config(DDIMScheduler(clip_sample=False).config, 3)


def _there_and_back(method: Any, network: Any, latents: Any, ladder: Any, **settings: Any) -> Any:
    denoiser = _denoiser(1, network)
    inverted = invert(denoiser, latents, ladder, method, **settings)
    return [inverted.latents, regenerate(denoiser, inverted, ladder)]


def _back(guidance_scale: Any, skip: Any) -> Any:
    inverted = invert(_denoiser(), torch.ones(1, 4, 8, 8), _ladder(), "direct", guidance_scale=None)
    return [regenerate(_denoiser(), inverted, _ladder(), guidance_scale, skip=skip)]


def _latents(*shape: int) -> Made:
    return Made(f"<latents {shape}>", lambda rng: torch.randn(*shape))


LATENTS = Argument(
    good=[_latents(1, 4, 8, 8), _latents(1, 4, 3, 5)],
    bad=[
        *NOT_TENSORS, torch.zeros(4), torch.zeros(0, 4, 8, 8), torch.zeros(2, 4, 8, 8), torch.full((1, 4, 8, 8), NAN),
        torch.full((1, 4, 8, 8), INF), torch.zeros(1, 4, 8, 8).long(),
    ],
)  # fmt: skip
PLACES = Argument(
    good=[_latents(2, 4, 8, 8)],
    bad=[*NOT_TENSORS, torch.zeros(2, 4, 8, 7), torch.full((2, 4, 8, 8), NAN), torch.zeros(2, 4, 8, 8).long()],
)
PARTS = Argument(good=[0.5, 0, 1, 0.3], bad=[*NOT_NUMBERS, -0.1, 1.1, True])
SCALES = Argument(good=[3.5, 2], bad=[*NOT_NUMBERS, -1, True])
SETTINGS: dict[str, dict[str, Argument]] = {
    "ddim": {"alignment": Argument(good=["matched", "official"], bad=["", "x", None, 5, [], object])},
    "fixed_point": {
        "iterations": Argument(good=[2, 3, 0], bad=[value for value in NOT_COUNTS if value != 0]),
        "solver": Argument(good=["iterate", "anderson", "gradient"], bad=["", "x", None, 5, [], object]),
        "tolerance": Argument(good=[0.0, 1e-3], bad=[*NOT_NUMBERS, -1, True]),
    },
    "negative_prompt": {"interpolation": PARTS},
    "null_text": {
        "inner_steps": Argument(good=[2, 4, None], bad=[value for value in NOT_COUNTS if value is not None]),
        "guidance_scale": Argument(good=[3.5, 0], bad=[*SCALES.bad, 1]),
        "schedule": Argument(good=["fast", "official"], bad=["", "x", None, 5, [], object]),
        "learning_rate": Argument(good=[None, 0.1], bad=[0, "x", NAN, -1, 1e9, [], True]),
        "early_stop": Argument(good=[1e-5, 0], bad=[*NOT_NUMBERS, -1, True]),
    },
    "direct": {"guidance_scale": Argument(good=[3.5, None], bad=[value for value in SCALES.bad if value is not None])},
    "edit_friendly": {
        "guidance_scale": SCALES,
        "eta": Argument(good=[1.0, 0.5], bad=[*NOT_NUMBERS, 0, 2, True]),
        "noise": Argument(good=[None], bad=[5, "x", [], torch.zeros(1), torch.full((3, 1, 4, 8, 8), NAN)]),
        "generator": Argument(good=[None, torch.Generator()], bad=[5, "x", {}, object]),
    },
    "bdia": {"gamma": Argument(good=[0.96, 1.0], bad=[*NOT_NUMBERS, 0.5, 1.1]), "guidance_scale": SCALES},
}


def _function(name: str) -> Function:
    # The scheduler that BDIA uses speaks of its own `model_output`, not of a network.
    spoilt = [] if name == "bdia" else [Made("<of NaN>", lambda rng: lambda z, t, e: z * NAN)]
    return Function(f"invert, {name}", _there_and_back, {
        "method": Argument(good=[name], bad=["", "DDIM", None, 5, [], object]),
        "network": Argument(
            good=[Made("<network>", lambda rng: _network)],
            bad=[
                None, 5, "x", [], *spoilt, Made("<of nothing>", lambda rng: lambda z, t, e: None),
                Made("<of another shape>", lambda rng: lambda z, t, e: z[..., :1]),
            ],
        ),
        "latents": LATENTS,
        "ladder": Argument(good=[Made("<ladder>", lambda rng: _ladder())], bad=[None, 5, "x", [], {}]),
        "callback": Argument(good=[None, Made("<callback>", lambda rng: lambda progress: None)], bad=[5, "x", [], {}]),
        **SETTINGS[name],
    })  # fmt: skip


FUNCTIONS_OF_INVERSION: tuple[Function, ...] = (
    *(_function(name) for name in INVERSIONS),
    Function("regenerate", _back, {
        "guidance_scale": Argument(good=[None, 1.0, 7.5, 0], bad=[NAN, INF, "x", [], {}, -1, True, object]),
        "skip": Argument(good=[0, 2], bad=[3, -1, 1.5, NAN, "1", None, [], True]),
    }),
    Function("interpolate", interpolate, {
        "first": PLACES, "second": PLACES, "first_picture": PLACES, "second_picture": PLACES,
        "alpha_bar": PARTS, "fraction": PARTS,
        "fresh": Argument(good=[0.0, 0.5], bad=[*NOT_NUMBERS, 1, -0.1, True]),
        "image_weight": Argument(good=[1.2, 1, 0], bad=[*NOT_NUMBERS, -1, True]),
        "bound": Argument(good=[2.0, INF], bad=[NAN, "x", None, [], 0, -1, True]),
    }),
)  # fmt: skip
