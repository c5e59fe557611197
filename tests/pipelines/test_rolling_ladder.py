"""Streams: what they deliver, when, from what, in how much memory, and what they say when it cannot go on."""

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from diffusers_ext import RollingLadderPipeline, RollingLadderScheduler
from diffusers_ext.models import RollingTransformer1DModel
from tests.helpers.fresh_process import assert_reloads_equal


WINDOW = {"window_length": 6, "ladder_step": 2, "context_length": 2}
PROCESS: dict[str, Any] = {"prediction_type": "sample", "beta_schedule": "cosine"}


def tiny_pipeline(condition_channels: int = 2, **settings: Any) -> RollingLadderPipeline:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = RollingTransformer1DModel(
            3, condition_channels, num_layers=1, num_attention_heads=2, attention_head_dim=8
        ).eval()
        for weight in network.parameters():
            torch.nn.init.normal_(weight, std=0.2)
    pipeline = RollingLadderPipeline(network, RollingLadderScheduler(**{**PROCESS, **WINDOW, **settings}))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def features(frames: int, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, frames, 2, generator=seeded(5))


PIPE = tiny_pipeline()


def collected(stream: Iterator[torch.Tensor]) -> torch.Tensor:
    return torch.cat(list(stream), 1)


@pytest.mark.parametrize("base", ["dpmsolver++", "ddpm"])
@pytest.mark.parametrize("context_timestep", [None, 0])
def test_fewer_frames_are_the_first_of_more(base: str, context_timestep: int | None) -> None:
    pipe = tiny_pipeline(base=base, context_timestep=context_timestep)
    cond = features(60, 2)
    long = collected(pipe.stream(cond, 50, generator=seeded()))
    for count in (1, 7, 30):
        assert torch.equal(collected(pipe.stream(cond, count, generator=seeded())), long[:, :count])


def test_an_endless_stream_needs_no_condition_and_no_number() -> None:
    stream = PIPE.stream(generator=seeded())
    chunks = list(itertools.islice(stream, 12))
    assert [tuple(chunk.shape) for chunk in chunks] == [(1, 2, 3)] * 12
    assert torch.equal(torch.cat(chunks, 1)[:, :9], PIPE(num_frames=9, generator=seeded()).frames)
    stream.close()


@pytest.mark.parametrize(("frames", "steps"), [(1, 6), (8, 6), (9, 3), (20, 12), (4, 6)])
def test_evaluations_follow_the_formula(frames: int, steps: int) -> None:
    made = PIPE(num_frames=frames, num_inference_steps=steps)
    rungs, per_roll = 3, steps // 3
    assert made.network_evaluations == (rungs - 1) * per_roll + math.ceil(frames / 2) * per_roll
    drained = PIPE(features(frames), num_inference_steps=steps)
    assert drained.frames.shape[1] == frames and drained.network_evaluations == made.network_evaluations


def test_a_quarter_of_an_evaluation_a_frame() -> None:
    pipe = tiny_pipeline(window_length=16, ladder_step=4)
    made = pipe(num_frames=400, num_inference_steps=4)
    assert made.network_evaluations == 3 + 100


def test_one_rung_without_context_is_the_usual_loop() -> None:
    pipe = tiny_pipeline(base="ddim", window_length=6, ladder_step=6, context_length=0)
    made = pipe(num_frames=12, num_inference_steps=5, generator=seeded(), cond=None).frames
    ruler = RollingLadderScheduler(**PROCESS, base="ddim", window_length=6, ladder_step=6)
    ruler.set_timesteps(5)
    stock = DDIMScheduler(
        trained_betas=ruler.betas.numpy(), prediction_type="sample", timestep_spacing="trailing", clip_sample=False
    )
    stock.set_timesteps(5)
    generator = seeded()
    for block in range(2):
        own = other = torch.randn(1, 6, 3, generator=generator)
        for t in ruler.timesteps:
            with torch.no_grad():
                own = ruler.step(pipe.transformer(own, t.expand(1, 6)).sample, t, own).prev_sample
                other = stock.step(pipe.transformer(other, t).sample, t, other).prev_sample
        assert torch.equal(made[:, 6 * block : 6 * block + 6], own)
        torch.testing.assert_close(own, other, atol=1e-5, rtol=0)


def test_conditions_are_pulled_no_further_than_the_window() -> None:
    pulled = 0

    def microphone() -> Iterator[torch.Tensor]:
        nonlocal pulled
        for feature in features(40)[0]:
            pulled += 1
            yield feature

    stream = PIPE.stream(microphone(), generator=seeded())
    assert pulled == 0
    seen = []
    for _ in range(4):
        next(stream)
        seen.append(pulled)
    assert seen == [6, 8, 10, 12]


@pytest.mark.parametrize(("lookahead", "expected"), [(2, [2, 4, 6, 8]), (3, [3, 5, 7, 9]), (6, [6, 8, 10, 12])])
def test_conditions_are_pulled_no_further_than_the_lookahead(lookahead: int, expected: list[int]) -> None:
    pulled = 0

    def microphone() -> Iterator[torch.Tensor]:
        nonlocal pulled
        for feature in features(40)[0]:
            pulled += 1
            yield feature

    stream = PIPE.stream(microphone(), generator=seeded(), lookahead=lookahead)
    seen = []
    for _ in expected:
        next(stream)
        seen.append(pulled)
    assert seen == expected


@pytest.mark.parametrize("warmup", ["init", "pad"])
def test_a_lookahead_of_the_window_is_the_default(warmup: str) -> None:
    cond = features(15, 2)
    plain = PIPE(cond, generator=seeded(), warmup=warmup, guidance_scale=2.0).frames
    assert torch.equal(PIPE(cond, generator=seeded(), warmup=warmup, guidance_scale=2.0, lookahead=6).frames, plain)
    assert not torch.allclose(PIPE(cond, generator=seeded(), warmup=warmup, lookahead=4).frames, plain)


@pytest.mark.parametrize("warmup", ["init", "pad"])
@pytest.mark.parametrize("lookahead", [2, 3, 5])
def test_a_frame_depends_on_conditions_up_to_the_lookahead_only(lookahead: int, warmup: str) -> None:
    cond = features(24)
    changed = cond.clone()
    changed[:, 12:] *= -1.0
    here, there = (PIPE(c, generator=seeded(), lookahead=lookahead, warmup=warmup).frames for c in (cond, changed))
    # the chunk that begins at frame f is made when conditions up to f + lookahead have arrived
    same = 2 * ((12 - lookahead) // 2 + 1)
    assert torch.equal(here[:, :same], there[:, :same])
    assert (here[:, same : same + 2] - there[:, same : same + 2]).abs().amax() > 1e-6


@pytest.mark.parametrize("frames", [1, 2, 3, 5, 6, 7, 12, 13])
@pytest.mark.parametrize("lookahead", [2, 3, 5, 6])
@pytest.mark.parametrize("warmup", ["init", "pad"])
def test_every_condition_has_its_frame_with_any_lookahead(frames: int, lookahead: int, warmup: str) -> None:
    cond = features(frames)
    made = PIPE(cond, generator=seeded(), lookahead=lookahead, warmup=warmup)
    assert made.frames.shape[1] == frames
    # two evaluations a roll; three rolls bring padding out, or two rungs of warm-up lead to the steady state
    assert made.network_evaluations == 2 * (math.ceil(frames / 2) + (3 if warmup == "pad" else 2))
    assert torch.equal(PIPE(iter(cond[0]), generator=seeded(), lookahead=lookahead, warmup=warmup).frames, made.frames)


def test_every_kind_of_iterable_gives_the_same() -> None:
    cond = features(9)
    expected = PIPE(cond, generator=seeded()).frames
    assert expected.shape == (1, 9, 3)
    rows = cond[0]
    for kind in (cond.numpy(), iter(rows), list(rows), rows.tolist(), (row[None] for row in rows), cond.double()):
        assert torch.equal(PIPE(kind, generator=seeded()).frames, expected)
    memory = np.zeros(2)

    def reusing() -> Iterator[np.ndarray]:
        for row in rows.double().numpy():
            memory[:] = row
            yield memory

    assert torch.equal(PIPE(reusing(), generator=seeded()).frames, expected)


def test_a_sequence_does_not_depend_on_its_batch() -> None:
    cond = features(11, 3)
    together = PIPE(cond, generator=[seeded(i) for i in range(3)]).frames
    for i in range(3):
        torch.testing.assert_close(
            together[i : i + 1], PIPE(cond[i : i + 1], generator=seeded(i)).frames, atol=1e-5, rtol=0
        )


def test_streams_of_one_pipeline_do_not_disturb_each_other() -> None:
    first, second = PIPE.stream(num_frames=20, generator=seeded(0)), PIPE.stream(num_frames=20, generator=seeded(1))
    pairs = list(zip(first, second, strict=True))
    for place, seed in ((0, 0), (1, 1)):
        alone = collected(PIPE.stream(num_frames=20, generator=seeded(seed)))
        assert torch.equal(torch.cat([pair[place] for pair in pairs], 1), alone)
    assert torch.is_grad_enabled()


BROKEN: dict[str, tuple[Any, str]] = {
    "raises": (ZeroDivisionError("the cable"), r"cond raised ZeroDivisionError \(the cable\) at frame 13"),
    "wrong width": (torch.zeros(3), r"cond yielded the shape \(3,\) at frame 13 instead of \(2,\) or \(1, 2\)"),
    "not numbers": ("loud", r"cond yielded str at frame 13 instead of numbers"),
    "not finite": (torch.tensor([0.0, math.nan]), "cond yielded values at frame 13 that are infinite or not a number"),
    "None": (None, "at frame 13"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_condition_that_breaks_delivers_what_was_made_and_then_says_so(kind: str) -> None:
    item, message = BROKEN[kind]

    def failing() -> Iterator[Any]:
        yield from features(13)[0]
        if isinstance(item, Exception):
            raise item
        yield item

    expected = PIPE(features(13), generator=seeded()).frames
    made = []
    with pytest.raises(ValueError, match=f"{message}.*the 13 frames before it were delivered"):
        made.extend(PIPE.stream(failing(), generator=seeded()))
    assert torch.equal(torch.cat(made, 1), expected)


@pytest.mark.parametrize("lookahead", [2, 5])
def test_a_condition_that_breaks_delivers_the_frames_before_it_with_any_lookahead(lookahead: int) -> None:
    def failing() -> Iterator[Any]:
        yield from features(13)[0]
        raise OSError("unplugged")

    made = []
    with pytest.raises(ValueError, match="cond raised OSError .unplugged. at frame 13"):
        made.extend(PIPE.stream(failing(), generator=seeded(), lookahead=lookahead))
    expected = PIPE(features(13), generator=seeded(), lookahead=lookahead).frames
    assert torch.equal(torch.cat(made, 1), expected) and expected.shape[1] == 13


def test_a_condition_that_ends_early_delivers_what_was_made_and_then_says_so() -> None:
    made: list[torch.Tensor] = []
    with pytest.raises(ValueError, match="num_frames=20, but cond ended after 9 frames, which were delivered"):
        made.extend(PIPE.stream(iter(features(9)[0]), 20, generator=seeded()))
    assert torch.equal(torch.cat(made, 1), PIPE(features(9), generator=seeded()).frames)
    assert list(PIPE.stream([])) == []
    with pytest.raises(ValueError, match="cond is empty"):
        PIPE([])
    with pytest.raises(ValueError, match="num_frames=1, but cond ended after 0 frames"):
        PIPE([], num_frames=1, warmup="pad")


def test_the_condition_matters_and_can_be_changed_on_the_way() -> None:
    cond = features(20)
    plain = PIPE(cond, generator=seeded()).frames
    assert not torch.allclose(plain, PIPE(-cond, generator=seeded()).frames)
    calls = []

    def look(pipe: Any, first: int, tensors: dict[str, torch.Tensor]) -> None:
        calls.append((first, tensors["frames"].shape[1], tensors["condition"].shape[1]))

    assert torch.equal(PIPE(cond, generator=seeded(), callback_on_chunk_end=look).frames, plain)
    assert calls[:2] == [(0, 2, 4), (2, 2, 4)] and calls[-1] == (18, 2, 0)

    def turn(pipe: Any, first: int, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor] | None:
        return {"condition": -tensors["condition"]} if first == 6 else None

    turned = PIPE(cond, generator=seeded(), callback_on_chunk_end=turn).frames
    assert torch.equal(turned[:, :8], plain[:, :8])
    assert (turned[:, 8:12] - plain[:, 8:12]).abs().amax() > 1e-4


def test_frames_that_a_callback_replaces_are_delivered_and_become_context() -> None:
    def silence(pipe: Any, first: int, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"frames": torch.zeros_like(tensors["frames"])} if first == 2 else {}

    plain = PIPE(num_frames=12, generator=seeded()).frames
    changed = PIPE(num_frames=12, generator=seeded(), callback_on_chunk_end=silence).frames
    assert torch.equal(changed[:, :2], plain[:, :2]) and not changed[:, 2:4].any()
    assert not torch.equal(changed[:, 4:], plain[:, 4:])


def test_guidance_leads_away_from_no_condition() -> None:
    cond = features(8)
    without = PIPE(cond, generator=seeded(), guidance_scale=0.0).frames
    torch.testing.assert_close(without, PIPE(-cond, generator=seeded(), guidance_scale=0.0).frames)
    plain, strong = (PIPE(cond, generator=seeded(), guidance_scale=scale).frames for scale in (1.0, 3.0))
    assert not torch.allclose(plain, strong) and not torch.allclose(plain, without)


def test_a_prefix_is_context_and_only_its_end_counts() -> None:
    prefix = torch.randn(1, 5, 3, generator=seeded(3))
    made = PIPE(num_frames=8, generator=seeded(), prefix=prefix).frames
    assert torch.equal(made, PIPE(num_frames=8, generator=seeded(), prefix=prefix[:, -2:]).frames)
    assert not torch.equal(made, PIPE(num_frames=8, generator=seeded()).frames)
    # a stream may be taken up where another one ended
    assert PIPE(features(8), generator=seeded(), prefix=made).frames.shape == (1, 8, 3)


def test_padding_starts_from_a_pose_on_the_ladder() -> None:
    pose = torch.full((1, 1, 3), 2.0)
    levels: list[torch.Tensor] = []
    pipe = tiny_pipeline()
    hook = pipe.transformer.register_forward_pre_hook(lambda module, inputs: levels.append(inputs[1].clone()))
    made = pipe(features(8), generator=seeded(), prefix=pose, warmup="pad")
    hook.remove()
    pipe.scheduler.set_timesteps(6)
    assert torch.equal(levels[0][0, 1:], pipe.scheduler.window_timesteps[0])
    assert made.frames.shape == (1, 8, 3)
    # the padding is rolled out of the window first: three rolls more, without a warm-up
    assert made.network_evaluations == 3 * 2 + 4 * 2
    assert torch.equal(made.frames, pipe(features(8), generator=seeded(), prefix=pose, warmup="pad").frames)
    longer = pipe(features(20), num_frames=4, generator=seeded(), prefix=pose, warmup="pad").frames
    assert longer.shape == (1, 4, 3)


def test_the_state_does_not_grow() -> None:
    pipe = tiny_pipeline(context_timestep=0)
    sizes = []
    for _ in itertools.islice(pipe.stream(itertools.repeat(torch.zeros(2)), generator=seeded()), 300):
        stream = pipe._stream
        assert stream is not None and stream.scheduler._history is not None
        held = [stream.window, stream.context, stream.condition, stream.known, stream.scheduler._history.data]
        sizes.append(sum(tensor.untyped_storage().nbytes() for tensor in held))
    assert len(set(sizes[5:])) == 1 and sizes[5] < 2000


@pytest.mark.slow
def test_ten_thousand_frames_need_no_more_memory_than_two_hundred() -> None:
    import psutil

    process, first = psutil.Process(), 0
    for number, _ in enumerate(PIPE.stream(num_frames=10_000, generator=seeded())):
        if number == 100:
            first = process.memory_info().rss
    assert process.memory_info().rss - first < 5 * 2**20


@pytest.mark.slow
def test_a_stream_of_ten_thousand_begins_as_a_short_one() -> None:
    long = collected(PIPE.stream(num_frames=10_000, generator=seeded()))
    for count in (9, 1000):
        assert torch.equal(long[:, :count], collected(PIPE.stream(num_frames=count, generator=seeded())))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_near(dtype: torch.dtype) -> None:
    exact = PIPE(features(10), generator=seeded()).frames
    rough = tiny_pipeline().to(dtype)(features(10), generator=seeded()).frames
    assert rough.dtype == torch.float32
    assert (rough - exact).abs().max() < 0.1 * exact.abs().max()


def test_a_pipeline_reloads_in_a_fresh_process(tmp_path: Path) -> None:
    assert_reloads_equal(tiny_pipeline(), tmp_path, {"cond": features(7), "num_inference_steps": 3})


def test_output_types_and_tuples_agree() -> None:
    output = PIPE(features(5), generator=seeded())
    frames, evaluations = PIPE(features(5), generator=seeded(), output_type="np", return_dict=False)
    assert isinstance(frames, np.ndarray) and np.array_equal(frames, output.frames.numpy())
    assert evaluations == output.network_evaluations


WRONG: list[tuple[dict[str, Any], str]] = [
    ({}, "num_frames=None without cond would never end"),
    ({"num_frames": 0}, "num_frames=0"),
    ({"num_frames": 2.5}, "num_frames=2.5"),
    ({"num_frames": 4, "num_inference_steps": 4}, "num_inference_steps=4 is not a multiple of the 3 rungs.*use 3 or 6"),
    ({"num_frames": 4, "num_inference_steps": 2000}, "num_inference_steps=2000"),
    ({"num_frames": 4, "warmup": "cold"}, "warmup='cold' is not one of init, pad"),
    ({"num_frames": 4, "guidance_scale": 2.0}, "guidance_scale=2.0 needs a cond"),
    ({"cond": torch.zeros(1, 5, 2), "guidance_scale": math.nan}, "guidance_scale=nan"),
    ({"cond": torch.zeros(1, 5, 2), "lookahead": 1}, "lookahead=1 is not usable; use an int from 2, the ladder_step, to 6"),
    ({"cond": torch.zeros(1, 5, 2), "lookahead": 7}, "lookahead=7 is not usable"),
    ({"cond": torch.zeros(1, 5, 2), "lookahead": 4.0}, "lookahead=4.0 is not usable"),
    ({"num_frames": 4, "lookahead": 4}, "lookahead=4 is of conditions; give a cond"),
    ({"cond": torch.zeros(1, 5, 3)}, r"cond has the shape \(1, 5, 3\); give \(batch, frames, 2\)"),
    ({"cond": torch.zeros(5, 2)}, r"cond has the shape \(5, 2\)"),
    ({"cond": "speech.wav"}, "cond=a str is not a tensor or an iterable"),
    ({"cond": 5}, "cond=a int"),
    ({"cond": torch.zeros(2, 5, 2), "batch_size": 3}, "cond has a batch of 2 where others have 3"),
    ({"num_frames": 4, "batch_size": 0}, "batch_size=0"),
    ({"num_frames": 4, "batch_size": 10**30}, "batch_size=10{30} is too large; use at most 1000000"),
    ({"cond": torch.zeros(1, 5, 2), "prefix": torch.zeros(2, 2, 3)}, r"prefix of shape \(2, 2, 3\) has a batch of 2 where"),
    ({"num_frames": 4, "prefix": torch.zeros(1, 2, 4)}, r"prefix=\(1, 2, 4\) does not fit"),
    ({"num_frames": 4, "prefix": [1.0]}, "prefix=list does not fit"),
    ({"num_frames": 4, "prefix": torch.full((1, 2, 3), math.inf)}, "prefix holds values"),
    ({"num_frames": 4, "generator": 5}, "generator=5"),
    ({"num_frames": 4, "generator": [seeded()], "batch_size": 2}, "generator has a batch of 1"),
    ({"num_frames": 4, "noise_source": 5}, "noise_source=5 cannot be called"),
    ({"num_frames": 4, "noise_source": lambda count: torch.zeros(count)}, r"noise_source returned \(6,\)"),
    ({"num_frames": 4, "noise_source": lambda count: torch.full((1, count, 3), math.nan)}, "noise_source returned"),
    ({"num_frames": 4, "callback_on_chunk_end": 5}, "callback_on_chunk_end=5 cannot be called"),
    ({"num_frames": 4, "callback_on_chunk_end": lambda *a: {"window": 1}}, r"callback_on_chunk_end returned \['window'\]"),
    ({"num_frames": 4, "callback_on_chunk_end": lambda *a: {"frames": 1}}, "callback_on_chunk_end returned frames of shape int"),
    ({"num_frames": 4, "output_type": "pil"}, "output_type='pil' is not one of pt, np"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_a_wrong_call_is_named_and_the_next_one_works(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        PIPE(**arguments)
    assert PIPE(num_frames=3).frames.shape == (1, 3, 3)


def test_wrong_arguments_of_a_stream_are_named_at_once() -> None:
    with pytest.raises(ValueError, match="num_frames=-1"):
        PIPE.stream(num_frames=-1)
    with pytest.raises(ValueError, match="without condition_channels; leave it out"):
        tiny_pipeline(condition_channels=0).stream(features(4))


def test_parts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="scheduler=DDIMScheduler knows no times of frames"):
        RollingLadderPipeline(PIPE.transformer, DDIMScheduler())
    with pytest.raises(ValueError, match="frame_dim=2"):
        RollingLadderPipeline(PIPE.transformer, RollingLadderScheduler(frame_dim=2))


def test_a_network_that_answers_nan_is_reported() -> None:
    pipe = tiny_pipeline()
    with torch.no_grad():
        pipe.transformer.proj_out.bias.fill_(math.nan)
    with pytest.raises(ValueError, match="model_output is not finite at timestep="):
        pipe(num_frames=4)
