"""Prompt-to-prompt under the fuzzer: controllers, their blend, and where words are in a prompt."""

from functools import cache
from typing import Any

import torch

from diffusers_ext import AttentionRefine, AttentionReplace, AttentionReweight, LocalBlend
from diffusers_ext.attention import word_indices, word_schedule
from tests.helpers.tiny_models import tiny_tokenizer, tiny_unet

from .registry import NAN, Argument, Function, Made
from .values import NOT_COUNTS, NOT_NUMBERS, TYPOS


_tokenizer = cache(tiny_tokenizer)
_unet = cache(tiny_unet)

TOKENIZERS = Argument(
    good=[Made("<tokenizer>", lambda rng: _tokenizer())],
    bad=[None, 5, "a cat", [], {}, object, Made("<class>", lambda rng: type(_tokenizer()))],
)
NOT_PROMPTS = ("a cat", b"a", None, 5, [], {}, ["a cat"], [None, "a"], [["a"], ["b"]], object, NAN)
PROMPTS = Argument(
    good=[["a cat", "a dog"], ("a cat", "a dog"), ["A cat,", "a\tdog"], ["x" * 99 + " cat", "a dog"]], bad=NOT_PROMPTS
)
WRONG_SHARES = (*NOT_NUMBERS, -0.1, 1.01, True, 10**400, (0.5, 0.1), (0, 0.5, 1), (0, NAN), ("a", "b"), torch.zeros(2))
CROSS_STEPS = Argument(
    good=[0, 0.4, 1, (0.1, 0.5), [0, 1], {"default_": 0.2}, {"dog": 0.5, "a": (0.0, 0.1)}],
    bad=[*WRONG_SHARES, {"cow": 1}, {"": 1}, {5: 1}, {"dog": None}, {"default_": 2}],
)
SELF_STEPS = Argument(good=[0, 0.6, 1, (0.2, 0.6)], bad=WRONG_SHARES)
SHARES = Argument(good=[0.3, 1, 1.0], bad=[*NOT_NUMBERS, -0.1, 1.01, True, 32])
STEPS = Argument(good=[1, 4], bad=NOT_COUNTS)


def _edit(controller: Any, latents_shape: Any, num_inference_steps: Any) -> Any:
    latents, text = torch.ones(2, 4, 16, 16), torch.linspace(-1, 1, 2 * 16 * 8).view(2, 16, 8)
    with torch.no_grad(), controller.attach(_unet(), latents_shape, num_inference_steps):
        return controller.after_step(0, _unet()(latents, 500, text, return_dict=False)[0])


def _replace(
    tokenizer: Any, prompts: Any, alignment: Any, latents_shape: Any, num_inference_steps: Any, **options: Any
) -> Any:
    return _edit(
        AttentionReplace(tokenizer, prompts, alignment=alignment, **options), latents_shape, num_inference_steps
    )


def _refine(tokenizer: Any, prompts: Any, max_self_attention_resolution: Any, local_blend: Any) -> Any:
    options = {"max_self_attention_resolution": max_self_attention_resolution, "local_blend": local_blend}
    return _edit(AttentionRefine(tokenizer, prompts, **options), (16, 16), 2)


def _reweight(weights: Any, controller: Any) -> Any:
    return AttentionReweight(_tokenizer(), ["a dog", "a dog"], weights, controller).weights


def _blend(**arguments: Any) -> Any:
    blend = LocalBlend(**arguments)
    return _edit(AttentionRefine(arguments["tokenizer"], arguments["prompts"], local_blend=blend), (16, 16), 1)


NOT_WORDS = (5, None, b"cat", "", " ", ["a"], {}, object, "cow")
BLEND_WORDS = Argument(
    good=[["cat", "dog"], ("a cat", ["a", "dog"]), [[], "dog"], "a"],
    bad=[
        5,
        "",
        "cow",
        {},
        [],
        ["cat"],
        ["cat", 5],
        ["dog", "cat"],
        [[], []],
        ["cat", None],
        object,
        [["cat", 5], "dog"],
    ],
)

FUNCTIONS_OF_WORDS: tuple[Function, ...] = (
    Function("AttentionReplace", _replace, {
        "tokenizer": TOKENIZERS, "prompts": Argument(good=PROMPTS.good, bad=[*NOT_PROMPTS, ["a cat", "a big dog"]]),
        "alignment": Argument(good=["matched", "official"], bad=TYPOS),
        "cross_replace_steps": CROSS_STEPS, "self_replace_steps": SELF_STEPS,
        "latents_shape": Argument(
            good=[(16, 16), torch.Size([2, 4, 16, 16])], bad=[None, 16, (), (16,), "16", (16, 1.5), (0, 16), (8, 16), (NAN, 1), object]
        ),
        "num_inference_steps": STEPS,
    }, is_model=True),
    Function("AttentionRefine", _refine, {
        "tokenizer": TOKENIZERS, "prompts": PROMPTS, "max_self_attention_resolution": SHARES,
        "local_blend": Argument(good=[None], bad=[5, "cat", [], object, LocalBlend]),
    }, is_model=True),
    Function("AttentionReweight", _reweight, {
        "weights": Argument(
            good=[{"dog": 2.0}, {"a": 0, "dog": -1}, [{"dog": 3}], [{}]],
            bad=[*NOT_NUMBERS, {"cow": 1.0}, {"dog": NAN}, {"dog": 1e308}, {"dog": "2"}, {5: 1.0}, [{}, {}], [{"cow": 1}]],
        ),
        "controller": Argument(good=[None], bad=[5, "x", [], object, AttentionRefine]),
    }),
    Function("LocalBlend", _blend, {
        "tokenizer": TOKENIZERS, "prompts": Argument(good=[["a cat", "a dog"]], bad=NOT_PROMPTS),
        "words": BLEND_WORDS, "subtract_words": Argument(good=[None, "a", [[], "dog"]], bad=BLEND_WORDS.bad),
        "start": SHARES, "threshold": SHARES, "subtract_threshold": SHARES, "resolution": SHARES,
    }, is_model=True),
    Function("word_indices", word_indices, {
        "tokenizer": TOKENIZERS, "prompt": Argument(good=["a cat", "A  Cat, here"], bad=[None, 5, [], b"cat", object, ["a cat"]]),
        "word": Argument(good=["cat", "a", "A CAT"], bad=NOT_WORDS),
    }),
    Function("word_schedule", word_schedule, {
        "tokenizer": TOKENIZERS, "prompts": Argument(good=PROMPTS.good[:3], bad=[]), "num_inference_steps": STEPS,
        "cross_replace_steps": CROSS_STEPS,
    }),
)  # fmt: skip
