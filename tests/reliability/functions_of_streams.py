"""Streams of pictures and adapters of video transformers under the fuzzer."""

from functools import cache
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, WanTransformer3DModel

from diffusers_ext import SimilarityFilter, StreamBatch
from diffusers_ext.models import WanFrameAdapter
from tests.helpers.tiny_models import tiny_stable_diffusion

from .registry import INF, NAN, Argument, Function, Made, shared_pipeline
from .values import NOT_COUNTS, NOT_NUMBERS, NOT_TEXT, PICTURES, TYPOS


@cache
def _pipe() -> StableDiffusionPipeline:
    return tiny_stable_diffusion()


def _stream(picture: Any, **settings: Any) -> list[Any]:
    stream = StreamBatch.from_pipe(_pipe(), **settings)
    first = stream.push(picture)
    return [*([] if first is None else [first]), *stream.drain()]


@cache
def _video_transformer() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return WanTransformer3DModel(
            num_attention_heads=1, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8, ffn_dim=16,
            num_layers=1,
        )  # fmt: skip


def _roll(height: Any, width: Any, prompt_embeds: Any, negative_prompt_embeds: Any, **call: Any) -> torch.Tensor:
    adapter = WanFrameAdapter(_video_transformer(), height, width, prompt_embeds, negative_prompt_embeds)
    with torch.no_grad():
        return adapter(**call).sample


def _sequence(**call: Any) -> Any:
    pipeline: Any = shared_pipeline("RollingLadderPipeline")
    return pipeline(**call, return_dict=False)[0]


def _skips(threshold: Any, max_skips: Any, generator: Any) -> bool:
    still = SimilarityFilter(threshold, max_skips, generator)
    still.passed(torch.ones(1, 3, 4, 4))
    return still.skips(torch.ones(1, 3, 4, 4))


NOT_TENSORS = (5, "x", [], {}, object, 1.5)
GENERATORS = Argument(
    good=[None, Made("<generator>", lambda rng: torch.Generator().manual_seed(0))],
    bad=[0, "cpu", [], {}, object, True],
)
THRESHOLDS = Argument(good=[0.98, 0, 0.5], bad=[*NOT_NUMBERS, -0.1, 1, 1.0, 2, True])
SIDES = Argument(good=[4, None], bad=[0, -4, 3, 2.5, NAN, "4", [], True, object])
EMBEDS = Argument(
    good=[Made("<embeds>", lambda rng: torch.randn(1, rng.choice([1, 5]), 8))],
    bad=[
        *NOT_TENSORS, torch.zeros(5, 8), torch.zeros(1, 5, 7), torch.zeros(0, 5, 8), torch.zeros(3, 5, 8),
        torch.full((1, 5, 8), NAN), torch.zeros(1, 5, 8, dtype=torch.int64), torch.zeros(1, 5, 8, 1),
    ],
)  # fmt: skip

FUNCTIONS_OF_STREAMS: tuple[Function, ...] = (
    Function("StreamBatch", _stream, {
        "picture": PICTURES,
        "prompt": Argument(good=["a", "", "x" * 3000], bad=[None, ["a"], *NOT_TEXT]),
        "negative_prompt": Argument(good=[None, "", "a"], bad=[["a"], *NOT_TEXT]),
        "num_inference_steps": Argument(good=[4, 2, 6], bad=[*NOT_COUNTS, 1001, object]),
        "strength": Argument(good=[0.5, 1, 1.0, 0.75], bad=[*NOT_NUMBERS, 0, -0.5, 1.01, 1e-9, True]),
        "t_index_list": Argument(
            good=[None, [0, 1], (1,)], bad=[[], [1, 0], [0, 0], [-1], [0, 99], "01", 1, [0.5], [True], [None], {}, object]
        ),
        "guidance_scale": Argument(good=[1.2, 1, 4.0], bad=[*NOT_NUMBERS, 0, -1.0, 1e308, True]),
        "guidance": Argument(good=["self", "initialize", "full", "none"], bad=TYPOS),
        "delta": Argument(good=[1.0, 0, 0.5], bad=[*NOT_NUMBERS, -0.1, 1e308, True]),
        "update": Argument(good=[None, "ddim", "lcm"], bad=["DDIM", "", 0, [], "euler", object]),
        "similarity_filter": Argument(good=[None, SimilarityFilter()], bad=[0.98, "x", [], SimilarityFilter, True]),
        "height": Argument(good=[None, 8, 32], bad=[0, -8, 2.5, NAN, "64", [], True, 10**6]),
        "width": Argument(good=[None, 8, 40], bad=[0, -8, 2.5, NAN, "64", [], True, 10**6]),
        "generator": GENERATORS,
        "noise": Argument(
            good=[None],
            bad=[
                *NOT_TENSORS, torch.zeros(1, 4, 3, 3), torch.zeros(4), torch.zeros(2, 1, 1, 1), torch.full((1, 4, 16, 16), NAN),
                torch.zeros(1, 4, 16, 16, dtype=torch.int64), torch.zeros(1, 0, 16, 16),
            ],
        ),
        "output_type": Argument(good=["pil", "np", "pt", "latent"], bad=["PIL", "nope", "", None, 0, [], object]),
    }, is_model=True),
    Function("RollingLadderPipeline", _sequence, {
        "cond": Argument(
            good=[torch.zeros(1, 6, 2), Made("<rows>", lambda rng: iter(torch.randn(rng.choice([1, 5, 9]), 2))), [[0.0, 1.0]] * 7],
            bad=[
                *NOT_TENSORS, torch.zeros(1, 6, 3), torch.zeros(6, 2), torch.zeros(0, 6, 2), torch.zeros(3, 6, 2), torch.zeros(1, 0, 2),
                torch.full((1, 6, 2), NAN), [[0.0]], ["x"], [[INF, 0.0]], [[1j, 0.0]], {"a": 1}, "speech.wav", torch.zeros(1, 6, 2).long(),
            ],
        ),
        "num_frames": Argument(good=[None, 1, 5], bad=[value for value in NOT_COUNTS if value is not None]),
        "num_inference_steps": Argument(good=[None, 2, 4, 8], bad=[*NOT_COUNTS[:-3], True, 3, 1, 2000, object]),
        "prefix": Argument(
            good=[None, torch.zeros(1, 3, 3), torch.zeros(1, 0, 3)],
            bad=[*NOT_TENSORS, torch.zeros(1, 3, 2), torch.zeros(3, 3), torch.zeros(2, 3, 3), torch.full((1, 3, 3), NAN)],
        ),
        "warmup": Argument(good=["init", "pad"], bad=TYPOS),
        "guidance_scale": Argument(good=[1.0, 0, 3.0], bad=[*NOT_NUMBERS, -0.1, True]),
        "batch_size": Argument(good=[None, 1], bad=[*[value for value in NOT_COUNTS if value is not None], 2]),
        "generator": GENERATORS,
        "noise_source": Argument(
            good=[None, lambda count: torch.zeros(1, count, 3)],
            bad=[5, "x", [], lambda count: None, lambda count: torch.zeros(1, count), lambda count: torch.full((1, count, 3), NAN)],
        ),
        "callback_on_chunk_end": Argument(
            good=[None, lambda *call: None, lambda *call: {}],
            bad=[5, "x", [], lambda *call: 5, lambda *call: {"window": 1}, lambda *call: {"frames": torch.zeros(1)}],
        ),
        "lookahead": Argument(good=[None, 2, 3, 4], bad=[0, 1, 5, -1, 2.5, NAN, "2", [], True, object]),
        "output_type": Argument(good=["pt", "np"], bad=["PT", "pil", "", None, 0, [], object]),
    }, is_model=True),
    Function("SimilarityFilter", _skips, {
        "threshold": THRESHOLDS, "max_skips": Argument(good=[10, 1], bad=NOT_COUNTS), "generator": GENERATORS,
    }),
    Function("WanFrameAdapter", _roll, {
        "height": SIDES, "width": SIDES, "prompt_embeds": EMBEDS,
        "negative_prompt_embeds": Argument(good=[None, *EMBEDS.good], bad=EMBEDS.bad),
        "sample": Argument(
            good=[Made("<latents>", lambda rng: torch.randn(1, 3, 4, 4, 4))],
            bad=[
                None, *NOT_TENSORS, torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 5, 4, 4), torch.zeros(1, 3, 4, 3, 4),
                torch.zeros(1, 0, 4, 4, 4), torch.zeros(0, 3, 4, 4, 4), torch.zeros(1, 3, 4, 0, 4), torch.zeros(1, 3, 4, 4, 4).long(),
            ],
        ),
        "timestep": Argument(
            good=[500.0, 0, torch.tensor([[999.0, 500.0, 0.0]]), torch.tensor([7])],
            bad=["now", None, [], [[]], {}, object, torch.zeros(1, 2), torch.zeros(2), torch.zeros(1, 1, 1), 1j, NAN, INF],
        ),
        "condition": Argument(good=[None], bad=[torch.zeros(1, 3, 2), 5, "x"]),
        "condition_mask": Argument(
            good=[None, torch.ones(1, 3, dtype=torch.bool), torch.zeros(1, 3, dtype=torch.bool)],
            bad=[5, "x", [], torch.ones(1, 3), torch.ones(1, 2, dtype=torch.bool), torch.tensor([[True, False, True]]), object],
        ),
    }, is_model=True),
)  # fmt: skip
