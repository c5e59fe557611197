"""The editing pipelines under the fuzzer: Guide-and-Rescale, and inversion with edits by attention."""

import random
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch

from diffusers_ext import AttentionReplace, AttentionReweight, FeatureEnergy, InversionOutput, SelfAttentionEnergy
from diffusers_ext.inversion import INVERSIONS

from .registry import INF, NAN, Argument, Function, Made, sample_picture, shared_pipeline
from .values import LATENTS, NOT_COUNTS, NOT_NUMBERS, NOT_TEXT, PICTURES, TYPOS


PROMPTS = ["", "a", "a red heart", "x" * 3000, "\u2764\ufe0f \0", ["a"]]
TOO_MANY = ["a", "b", "c"] * 2
SPOILT = (None, 0, torch.zeros(1), torch.full((1, 4, 16, 16), NAN), "x")
TEARS: tuple[Callable[[InversionOutput], None], ...] = (
    lambda output: setattr(output, "latents", output.latents * NAN),
    lambda output: setattr(output, "latents", output.latents[:1]),
    lambda output: setattr(output, "latents", output.latents[0]),
    lambda output: setattr(output, "latents", None),
    lambda output: setattr(output, "timesteps", output.timesteps[:0]),
    lambda output: setattr(output, "timesteps", None),
    lambda output: setattr(output, "prompt", "a"),
    lambda output: setattr(output, "prompt", []),
    lambda output: setattr(output, "prompt", ["a", "b"]),
    lambda output: setattr(output, "config", {}),
    lambda output: setattr(output, "config", None),
    lambda output: setattr(output, "config", {**output.config, "image_size": "64"}),
    lambda output: setattr(output, "config", {**output.config, "num_inference_steps": 7}),
    lambda output: setattr(output, "config", {**output.config, "model": None}),
    lambda output: setattr(output, "config", {**output.config, "model": {"unet": None}}),
    lambda output: setattr(output, "config", {**output.config, "alignment": "official"}),
)


def _callback(returned: Callable[[random.Random, Any], Any]) -> Callable[[random.Random], Any]:
    return lambda rng: lambda pipe, step, t, tensors: returned(rng, tensors)


EDIT_ARGUMENTS: dict[str, Argument] = {
    "image": PICTURES,
    "source_prompt": Argument(good=PROMPTS, bad=[None, *NOT_TEXT, TOO_MANY]),
    "prompt": Argument(good=[*PROMPTS, ["a", "b"]], bad=[None, *NOT_TEXT]),
    "negative_prompt": Argument(good=[None, *PROMPTS], bad=[*NOT_TEXT, TOO_MANY]),
    "guiders": Argument(
        good=[
            None, [], Made("<attention>", lambda rng: [SelfAttentionEnergy(rng.choice([0, 1e-3, 3e5]))]),
            Made("<features>", lambda rng: [FeatureEnergy(rng.choice([0, 500.0]), loss=rng.choice(["l1", "l2"]))]),
            Made("<negative>", lambda rng: (FeatureEnergy(-5.0, layer="conv_norm_out"), SelfAttentionEnergy())),
            Made("<by step>", lambda rng: [SelfAttentionEnergy(lambda step, steps: 3e5 * (step < 1), loss="l1")]),
            Made("<target>", lambda rng: [FeatureEnergy(branch="target"), SelfAttentionEnergy(branch="target")]),
            Made("<by tokens>", lambda rng: [SelfAttentionEnergy(layers=256), FeatureEnergy()]),
        ],
        bad=[
            5, "all", {}, object, [None], ["self"], SelfAttentionEnergy(), [SelfAttentionEnergy],
            Made("<no such layer>", lambda rng: [FeatureEnergy(layer="up_blocks.9")]),
            Made("<no such attention>", lambda rng: [SelfAttentionEnergy(layers=["mid_blok"])]),
            Made("<no such tokens>", lambda rng: [SelfAttentionEnergy(layers=3)]),
            Made("<bad weight>", lambda rng: [FeatureEnergy(lambda step, steps: rng.choice([NAN, None, "x"]))]),
        ],
    ),
    "num_inference_steps": Argument(good=[1, 2, 3, np.int64(2)], bad=[*NOT_COUNTS, 1001, 2000, object]),
    "guidance_scale": Argument(good=[0, 1, 1.0, 7.5, 30.0], bad=[*NOT_NUMBERS, -1.0, 1e308, True]),
    "rescale_range": Argument(
        good=[None, (0.33, 3.0), [0, 1], (0, INF), (1, 1), (2.0, 2)],
        bad=[
            (3.0, 0.33), (NAN, 1), (0, NAN), (-1, 1), (INF, INF), 1.0, "ab", "0.3,3", (1,), (1, 2, 3), ("a", "b"),
            (None, 1), (0, 1e308), (1e308, INF), [[0], [1]], {},
        ],
    ),
    "guidance_end": Argument(good=[0, 0.5, 0.6, 1, 1.0], bad=[*NOT_NUMBERS, -0.1, 1.01, 50, True]),
    "alignment": Argument(good=["matched", "official"], bad=TYPOS),
    "preset": Argument(good=["edit", "stylize"], bad=TYPOS),
    "inversion_method": Argument(good=["ddim", "negative_prompt"], bad=TYPOS),
    "timesteps": Argument(
        good=[None, [999, 499], [0], (7, 3, 1), np.array([500, 100])],
        bad=[5, "999", [], [1, 2], [1000], [-1], [5, 5], [1.5], [None], {}, [True], torch.zeros(2, 2)],
    ),
    "samples_per_pass": Argument(good=[1, 2, None], bad=NOT_COUNTS),
    "ip_adapter_image": Argument(good=[None], bad=[5, "x", Made("<picture>", lambda rng: torch.rand(1, 3, 8, 8))]),
    "ip_adapter_image_embeds": Argument(good=[None], bad=[[], 5, [torch.zeros(2, 1, 4)]]),
    "inversion": Argument(
        good=[None], bad=["x", 5, {}, [], Made("<torn>", lambda rng: torn_inversion(rng.choice(TEARS))), object]
    ),
    "height": Argument(good=[None, 8, 32, 31], bad=[0, -8, 2.5, NAN, "64", [], True, 10**6, 10**30]),
    "width": Argument(good=[None, 8, 32, 40], bad=[0, -8, 2.5, NAN, "64", [], True, 10**6, 10**30]),
    "latents": LATENTS,
    "generator": Argument(
        good=[
            None, Made("<generator>", lambda rng: torch.Generator().manual_seed(0)),
            Made("<generators>", lambda rng: [torch.Generator().manual_seed(0)]),
        ],
        bad=[0, 42, "cpu", {}, [0], [None], object, Made("<four generators>", lambda rng: [torch.Generator()] * 4)],
    ),
    "output_type": Argument(good=["pil", "np", "pt", "latent"], bad=["PIL", "nope", "", None, 0, [], object]),
    "return_dict": Argument(good=[True, False], bad=[]),
    "cross_attention_kwargs": Argument(good=[None, {}, {"scale": 1.0}], bad=["scale", 5, [], {"scale": "x"}, {"scale": NAN}]),
    "callback_on_step_end": Argument(
        good=[None, Made("<callback>", _callback(lambda rng, tensors: rng.choice([None, {}, tensors])))],
        bad=[
            5, "f", {}, Made("<callback: bad latents>", _callback(lambda rng, tensors: {"latents": rng.choice(SPOILT)})),
            Made("<callback: bad prompt>", _callback(lambda rng, tensors: {"prompt_embeds": rng.choice(SPOILT)})),
        ],
    ),
    "callback_on_step_end_tensor_inputs": Argument(
        good=[["latents"], [], ["prompt_embeds"]], bad=["latents", None, 5, ["latent"], [None], ["self"], {}]
    ),
}  # fmt: skip
INVERT_ARGUMENTS = {
    name: EDIT_ARGUMENTS[name]
    for name in (
        "image", "source_prompt", "num_inference_steps", "alignment", "height", "width", "cross_attention_kwargs",
        "timesteps",
    )
}  # fmt: skip


def edit(**arguments: Any) -> Any:
    pipeline: Any = shared_pipeline("GuideAndRescalePipeline")
    if arguments.get("inversion") is not None:
        arguments["image"] = None
    return pipeline(**arguments)


def invert(**arguments: Any) -> Any:
    pipeline: Any = shared_pipeline("GuideAndRescalePipeline")
    return pipeline.invert(**arguments)


@cache
def inversion() -> InversionOutput:
    return invert(image=sample_picture(), source_prompt="a", num_inference_steps=2)


def torn_inversion(tear: Callable[[InversionOutput], None]) -> InversionOutput:
    whole = inversion()
    torn = InversionOutput(whole.latents.clone(), whole.timesteps.clone(), list(whole.prompt), dict(whole.config))
    tear(torn)
    return torn


# ---------------------------------------------------------------------------------------------------------------------
# Null-text inversion and its relatives
# ---------------------------------------------------------------------------------------------------------------------


def _controller(*prompts: str) -> Made:
    def make(rng: random.Random) -> Any:
        tokenizer: Any = shared_pipeline("NullTextInversionPipeline").tokenizer
        if len(set(prompts)) == 1:
            return AttentionReweight(tokenizer, list(prompts), {prompts[0]: 2.0})
        return AttentionReplace(tokenizer, list(prompts))

    return Made(f"<controller of {prompts}>", make)


def _controllers(*pairs: tuple[str, ...]) -> Made:
    """A list with one of each prompts; the first is there twice."""

    def make(rng: random.Random) -> Any:
        made = [_controller(*prompts).make(rng) for prompts in pairs]
        return made if rng.random() < 0.5 else [*made, made[0]]

    return Made(f"<controllers of {pairs}>", make)


def _invert_by(method: Any, **arguments: Any) -> Any:
    pipeline: Any = shared_pipeline("NullTextInversionPipeline")
    return pipeline.invert(method=method, **arguments)


def _edit_with_attention(**arguments: Any) -> Any:
    pipeline: Any = shared_pipeline("NullTextInversionPipeline")
    if arguments.get("inversion") is not None:
        arguments |= {"image": None, "num_inference_steps": None}
    return pipeline(**arguments)


@cache
def _inverted_by(method: str) -> InversionOutput:
    noise = {"generator": torch.Generator().manual_seed(0)} if method == "edit_friendly" else {}
    return _invert_by(method, image=sample_picture(), prompt="a", num_inference_steps=2, **noise)


def _torn_by(method: str, tear: Callable[[InversionOutput], None]) -> Made:
    def make(rng: random.Random) -> InversionOutput:
        whole = _inverted_by(method)
        torn = InversionOutput(
            whole.latents, whole.timesteps, list(whole.prompt), dict(whole.config),
            null_embeddings=whole.null_embeddings, noise_maps=whole.noise_maps,
        )  # fmt: skip
        tear(torn)
        return torn

    return Made(f"<torn {method}>", make)


def _without(name: str) -> Callable[[InversionOutput], None]:
    return lambda output: setattr(output, "config", {**output.config, "settings": {name: "x"}})


SHARED = {
    name: EDIT_ARGUMENTS[name]
    for name in (
        "image", "source_prompt", "prompt", "negative_prompt", "guidance_scale", "timesteps", "ip_adapter_image",
        "ip_adapter_image_embeds", "height", "width", "latents", "output_type", "return_dict", "generator",
        "cross_attention_kwargs", "callback_on_step_end", "callback_on_step_end_tensor_inputs",
    )
}  # fmt: skip
BY_ATTENTION: dict[str, Argument] = {
    **SHARED,
    "source_prompt": Argument(good=["a"], bad=SHARED["source_prompt"].bad),
    "num_inference_steps": Argument(good=[2, 3], bad=[value for value in NOT_COUNTS if value is not None]),
    "inversion": Argument(
        good=[None],
        bad=[
            "x", 5, {}, [], object, Made("<torn>", lambda rng: torn_inversion(rng.choice(TEARS))),
            _torn_by("null_text", lambda output: setattr(output, "null_embeddings", output.null_embeddings[..., :3])),
            _torn_by("null_text", lambda output: setattr(output, "null_embeddings", output.null_embeddings * NAN)),
            _torn_by("edit_friendly", lambda output: setattr(output, "noise_maps", None)),
            _torn_by("edit_friendly", _without("eta")), _torn_by("bdia", _without("gamma")),
            _torn_by("ddim", lambda output: setattr(output, "config", {**output.config, "method": "magic"})),
            _torn_by("ddim", lambda output: setattr(output, "latents", output.latents[:, :, :2])),
            _torn_by("ddim", lambda output: setattr(output, "config", {**output.config, "scheduler": {"timesteps": 5}})),
        ],
    ),
    "controller": Argument(
        good=[None],
        bad=[
            5, "replace", [], {}, object, AttentionReplace, _controller("a", "c"), _controller("b", "b"), [None], ["a"],
            [[]], (5,), _controllers(("a", "c")), _controllers(("b", "b")), _controllers(("a", "b"), ("a", "b")),
            _controllers(("a", "b"), ("a", "b", "c")),
        ],
    ),
    "inversion_method": Argument(good=["direct", "ddim", "negative_prompt", "edit_friendly"], bad=TYPOS),
    "inversion_settings": Argument(good=[None, {}], bad=[5, "x", [1], {"x": 1}, {5: 1}, {"callback": None}, object]),
    "skip": Argument(good=[0, 1], bad=[-1, 2**31, 1.5, NAN, "1", None, [], True]),
    "return_source": Argument(good=[False, True], bad=[None, 1, "yes", []]),
}  # fmt: skip
BY_METHOD: dict[str, Argument] = {
    **{
        name: SHARED[name] for name in ("image", "height", "width", "timesteps", "cross_attention_kwargs", "generator")
    },
    "prompt": SHARED["source_prompt"],
    "method": Argument(good=list(INVERSIONS), bad=TYPOS),
    "num_inference_steps": Argument(good=[2, 3], bad=NOT_COUNTS),
    "guidance_scale": Argument(good=[None], bad=[value for value in NOT_NUMBERS if value is not None]),
    "settings": Argument(
        good=[None, {}], bad=[5, "x", [1], {"x": 1}, {5: 1}, {"guidance_scale": 3}, {"generator": None}, object]
    ),
    "gradient_checkpointing": Argument(good=[False, True], bad=[None, 1, "yes"]),
    "callback_on_step_end": Argument(good=[None], bad=[5, "f", {}]),
}

FUNCTIONS_OF_EDITS: tuple[Function, ...] = (
    Function("GuideAndRescalePipeline", edit, EDIT_ARGUMENTS, is_model=True),
    Function("GuideAndRescalePipeline.invert", invert, INVERT_ARGUMENTS, is_model=True),
    Function("NullTextInversionPipeline", _edit_with_attention, BY_ATTENTION, is_model=True),
    Function("NullTextInversionPipeline.invert", _invert_by, BY_METHOD, is_model=True),
)
