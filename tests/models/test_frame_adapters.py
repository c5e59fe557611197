"""Video transformers of diffusers under rolling diffusion: the same network, with a time for every frame."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import LTXVideoTransformer3DModel, SkyReelsV2Transformer3DModel, WanTransformer3DModel

from diffusers_ext import RollingLadderPipeline, RollingLadderScheduler
from diffusers_ext.models import LTXFrameAdapter, SkyReelsV2FrameAdapter, WanFrameAdapter
from tests.helpers.placement import in_own_memory


WAN: dict[str, Any] = {
    "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 8, "freq_dim": 16,
    "ffn_dim": 16, "num_layers": 2, "rope_max_seq_len": 32,
}  # fmt: skip
LTX: dict[str, Any] = {
    "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12, "cross_attention_dim": 24,
    "num_layers": 2, "caption_channels": 8,
}  # fmt: skip
CLASSES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "wan": (WanFrameAdapter, WanTransformer3DModel, WAN),
    "skyreels": (SkyReelsV2FrameAdapter, SkyReelsV2Transformer3DModel, WAN),
    "skyreels with frame rate": (SkyReelsV2FrameAdapter, SkyReelsV2Transformer3DModel, {**WAN, "inject_sample_info": True}),
    "ltx": (LTXFrameAdapter, LTXVideoTransformer3DModel, LTX),
    "ltx with patches": (LTXFrameAdapter, LTXVideoTransformer3DModel, {**LTX, "in_channels": 16, "out_channels": 16, "patch_size": 2}),
}  # fmt: skip
KINDS = tuple(CLASSES)
ROLL: dict[str, Any] = {
    "prediction_type": "flow_prediction",
    "window_length": 4,
    "ladder_step": 2,
    "context_length": 2,
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def words(batch: int = 1, tokens: int = 5, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, tokens, 8, generator=seeded(seed))


def latents(batch: int = 1, frames: int = 5) -> torch.Tensor:
    return torch.randn(batch, frames, 4, 4, 6, generator=seeded(2))


def build(kind: str, prompt: bool = True, **overrides: Any) -> Any:
    adapter_class, wrapped_class, config = CLASSES[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        wrapped: Any = wrapped_class(**{**config, **overrides})
        for weight in wrapped.parameters():
            torch.nn.init.normal_(weight, std=0.2)
    adapter = adapter_class(wrapped, 4, 6).eval()
    if prompt:
        adapter.set_prompt(words(), words(seed=3))
    return adapter


def pipeline(adapter: Any, **settings: Any) -> RollingLadderPipeline:
    pipe = RollingLadderPipeline(adapter, RollingLadderScheduler(**{**ROLL, **settings}))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def as_stock(kind: str, adapter: Any, sample: torch.Tensor, time: float) -> torch.Tensor:
    """The transformer as its own pipeline calls it, with one time for all frames."""
    video, embeds, times = sample.transpose(1, 2), words(), torch.full((len(sample),), time)
    embeds = embeds.expand(len(sample), -1, -1)
    if not kind.startswith("ltx"):
        extra: dict[str, Any] = {"fps": [1] * len(sample)} if "rate" in kind else {}
        return adapter.transformer(video, times, embeds, **extra).sample.transpose(1, 2)
    from diffusers import LTXPipeline

    patch = adapter.config.patch_size
    answer = adapter.transformer(
        LTXPipeline._pack_latents(video, patch, 1), embeds, times, torch.ones(embeds.shape[:2]),
        num_frames=sample.shape[1], height=4 // patch, width=6 // patch, rope_interpolation_scale=(8 / 25, 32, 32),
    ).sample  # fmt: skip
    unpacked = LTXPipeline._unpack_latents(answer, sample.shape[1], 4 // patch, 6 // patch, patch, 1)
    return unpacked.transpose(1, 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [1, 2])
def test_one_time_for_all_frames_is_the_call_of_diffusers(kind: str, batch: int) -> None:
    adapter, sample = build(kind), latents(batch)
    expected = as_stock(kind, adapter, sample, 600.0)
    with torch.no_grad():
        for time in (600.0, torch.full((1,), 600.0), torch.full((batch, 5), 600.0)):
            found = adapter(sample, time).sample
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert found.shape == sample.shape and float(found.std()) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_every_frame_has_its_own_time(kind: str) -> None:
    adapter, sample = build(kind), latents(2)
    times = torch.full((2, 5), 600.0)
    base = adapter(sample, times).sample
    changed = times.clone()
    changed[1, 3] = 100.0
    found = adapter(sample, changed).sample
    torch.testing.assert_close(found[0], base[0])
    difference = (found[1] - base[1]).abs().flatten(1).amax(1)
    assert float(difference[3]) > 1e-3 and int(difference.argmax()) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_of_latents_has_the_prefix_property(kind: str) -> None:
    pipe = pipeline(build(kind))
    long = pipe(num_frames=7, generator=seeded()).frames
    short = pipe(num_frames=3, generator=seeded()).frames
    assert long.shape == (1, 7, 4, 4, 6) and bool(long.isfinite().all())
    assert torch.equal(short, long[:, :3])
    chunks = [tuple(chunk.shape) for chunk in pipe.stream(num_frames=4)]
    assert chunks == [(1, 2, 4, 4, 6)] * 2


def test_one_rung_is_the_usual_loop_of_flow_matching() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    adapter = build("wan")
    pipe = pipeline(adapter, ladder_step=4, context_length=0, base="flow_match_euler")
    made = pipe(num_frames=4, num_inference_steps=5, generator=seeded()).frames
    stock = FlowMatchEulerDiscreteScheduler()
    stock.set_timesteps(sigmas=[1.0, 0.8, 0.6, 0.4, 0.2])
    sample = torch.randn(1, 4, 4, 4, 6, generator=seeded())
    for time in stock.timesteps:
        sample = stock.step(as_stock("wan", adapter, sample, float(time)), time, sample).prev_sample
    torch.testing.assert_close(made, sample, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["wan", "skyreels with frame rate", "ltx with patches"])
def test_a_stream_goes_on_from_a_prefix_and_may_be_padded(kind: str) -> None:
    pipe = pipeline(build(kind))
    first = pipe(num_frames=4, generator=seeded(), batch_size=2).frames
    following = pipe(num_frames=3, prefix=first, warmup="pad", generator=seeded(1)).frames
    assert following.shape == (2, 3, 4, 4, 6)
    assert not torch.equal(following, pipe(num_frames=3, prefix=-first, warmup="pad", generator=seeded(1)).frames)


@torch.no_grad()
def test_guidance_is_over_the_prompt() -> None:
    adapter = build("wan")
    sample, times = latents(2), torch.tensor([[900.0, 700.0, 500.0, 300.0, 100.0]])
    mask = torch.tensor([True, False])[:, None].expand(-1, 5)
    both = adapter(sample, times, condition_mask=mask).sample
    adapter.set_prompt(words(seed=3))
    other = adapter(sample, times).sample
    adapter.set_prompt(words())
    torch.testing.assert_close(both, torch.stack([adapter(sample, times).sample[0], other[1]]))

    pipe = pipeline(build("wan"))
    plain, guided = (pipe(num_frames=3, guidance_scale=scale, generator=seeded()).frames for scale in (1.0, 4.0))
    assert not torch.allclose(plain, guided)
    swapped = pipeline(build("wan"))
    swapped.transformer.set_prompt(words(seed=3), words())
    negative = swapped(num_frames=3, generator=seeded()).frames
    assert torch.equal(negative, pipe(num_frames=3, guidance_scale=0.0, generator=seeded()).frames)


@torch.no_grad()
def test_prompts_of_different_length_guide_and_each_sample_may_have_its_own() -> None:
    adapter = build("ltx")
    adapter.set_prompt(words(2), words(1, 3, 4))
    sample = latents(4)
    mask = torch.tensor([True, True, False, False])[:, None].expand(-1, 5)
    found = adapter(sample, 500.0, condition_mask=mask).sample
    adapter.set_prompt(words(2)[1:])
    torch.testing.assert_close(found[1:2], adapter(sample[1:2], 500.0).sample, atol=1e-5, rtol=1e-5)


def test_a_prompt_may_change_while_frames_are_on_their_way() -> None:
    pipe = pipeline(build("skyreels"))

    def change(pipe: Any, first_frame: int, tensors: dict[str, torch.Tensor]) -> None:
        if first_frame == 2:
            pipe.transformer.set_prompt(words(seed=9))

    plain = pipe(num_frames=8, generator=seeded()).frames
    changed = pipe(num_frames=8, generator=seeded(), callback_on_chunk_end=change).frames
    assert torch.equal(plain[:, :4], changed[:, :4]) and not torch.allclose(plain[:, 4:6], changed[:, 4:6])


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_is_the_transformer_itself(kind: str, tmp_path: Path) -> None:
    adapter = build(kind)
    adapter.save_pretrained(tmp_path / "adapter")
    stock = type(adapter.transformer).from_pretrained(tmp_path / "adapter")
    assert dict(stock.config)["num_layers"] == 2
    again: Any = in_own_memory(type(adapter).from_pretrained(tmp_path / "adapter", height=4, width=6)).eval()
    again.set_prompt(words())
    with torch.no_grad():
        assert torch.equal(again(latents(), 300.0).sample, adapter(latents(), 300.0).sample)


def test_a_pipeline_with_an_adapter_loads_again(tmp_path: Path) -> None:
    pipe = pipeline(build("wan"))
    expected = pipe(num_frames=3, generator=seeded()).frames
    pipe.save_pretrained(tmp_path / "pipe")
    loaded: Any = in_own_memory(RollingLadderPipeline.from_pretrained(tmp_path / "pipe"))
    loaded.set_progress_bar_config(disable=True)
    assert isinstance(loaded.transformer, WanFrameAdapter)
    with pytest.raises(ValueError, match="height and width of the latents are missing"):
        loaded(num_frames=3)
    loaded.transformer.set_size(4, 6)
    with pytest.raises(ValueError, match="prompt_embeds are missing; call set_prompt first"):
        loaded(num_frames=3)
    loaded.transformer.set_prompt(words())
    assert torch.equal(loaded(num_frames=3, generator=seeded()).frames, expected)


def test_half_precision_stays_half_inside() -> None:
    adapter = build("wan").to(torch.bfloat16)
    assert adapter.dtype == torch.bfloat16
    frames = pipeline(adapter)(num_frames=3, generator=seeded()).frames
    assert frames.dtype == torch.float32 and bool(frames.isfinite().all())


# -- what goes wrong ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"sample": torch.zeros(1, 5, 4, 4)}, ValueError, r"sample has the shape \(1, 5, 4, 4\); this network needs"),
        ({"sample": torch.zeros(1, 5, 3, 4, 6)}, ValueError, r"\(batch, frames, 4, height, width\)"),
        ({"sample": torch.zeros(1, 5, 4, 3, 6)}, ValueError, "height in multiples of 2"),
        ({"sample": torch.zeros(1, 0, 4, 4, 6)}, ValueError, r"shape \(1, 0, 4, 4, 6\)"),
        ({"sample": torch.zeros(1, 5, 4, 4, 6, dtype=torch.long)}, TypeError, "sample is torch.int64"),
        ({"sample": None}, TypeError, "sample is NoneType"),
        ({"timestep": torch.zeros(1, 4)}, ValueError, r"timestep of shape \(1, 4\) does not fit"),
        ({"timestep": float("nan")}, ValueError, "timestep=nan is not finite"),
        ({"timestep": "now"}, ValueError, "timestep='now'"),
        ({"condition": torch.zeros(1, 5, 2)}, ValueError, r"condition=.1, 5, 2. is given to a network whose frames have none"),
        ({"condition_mask": torch.ones(1, 4, dtype=torch.bool)}, ValueError, r"condition_mask=\(1, 4\) does not fit"),
        ({"condition_mask": torch.tensor([[True, True, True, True, False]])}, ValueError, "the same for all frames"),
        ({"condition_mask": 5}, ValueError, "condition_mask=int"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["wan", "skyreels", "ltx with patches"])
def test_a_wrong_call_is_named(kind: str, change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build(kind)(**{"sample": latents(), "timestep": 500.0, **change})


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: WanFrameAdapter(build("ltx").transformer), TypeError, "transformer=LTXVideo.* give a WanTransformer3DModel"),
        (lambda: LTXFrameAdapter(None), TypeError, "transformer=NoneType"),  # type: ignore[arg-type]
        (lambda: build("wan", in_channels=9), ValueError, "9 input and 4 output channels"),
        (lambda: build("wan", patch_size=(2, 2, 2)), ValueError, "one token of 2 frames"),
        (lambda: WanFrameAdapter(build("wan").transformer, 5, 6), ValueError, "height=5 of the latents .* multiple of 2"),
        (lambda: WanFrameAdapter(build("wan").transformer, 4, "6"), ValueError, "width='6'"),  # type: ignore[arg-type]
        (lambda: SkyReelsV2FrameAdapter(build("skyreels").transformer, fps=0), ValueError, "fps=0"),
        (lambda: LTXFrameAdapter(build("ltx").transformer, rope_interpolation_scale=(1.0, 0.0, 1.0)), ValueError, "rope_inter"),
        (lambda: build("wan").set_prompt(torch.zeros(1, 5, 9)), ValueError, r"prompt_embeds has the shape \(1, 5, 9\)"),
        (lambda: build("ltx").set_prompt(words(), torch.zeros(5, 8)), ValueError, r"negative_prompt_embeds has the shape"),
        (lambda: build("wan").set_prompt(torch.full((1, 5, 8), float("nan"))), ValueError, "prompt_embeds holds values"),
        (lambda: build("wan").set_prompt("a cat"), TypeError, "prompt_embeds is str"),
        (lambda: build("wan").set_prompt(None), TypeError, "prompt_embeds is NoneType"),
        (lambda: pipeline(build("wan", prompt=False))(num_frames=2), ValueError, "prompt_embeds are missing"),
        (lambda: pipeline(build("wan"))(torch.zeros(1, 3, 2)), ValueError, "cond=.* without condition_channels"),
        (lambda: pipeline(build("wan"))(num_frames=2, prefix=torch.zeros(1, 2, 4)), ValueError, r"\(1, frames, 4, 4, 6\)"),
    ],
)  # fmt: skip
def test_what_cannot_be_rolled_is_named(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_guidance_without_a_negative_prompt_is_refused() -> None:
    adapter = build("wan")
    adapter.set_prompt(words())
    with pytest.raises(ValueError, match="guidance_scale=3.0 needs a cond"):
        pipeline(adapter)(num_frames=2, guidance_scale=3.0)
    with pytest.raises(ValueError, match="negative_prompt_embeds are missing"):
        adapter(latents(), 500.0, condition_mask=torch.zeros(1, 5, dtype=torch.bool))
    adapter.set_prompt(words(3))
    with pytest.raises(ValueError, match="prompt_embeds are of 3 prompts for a batch of 2; give 1 or 2"):
        adapter(latents(2), 500.0)


def test_causal_blocks_want_whole_blocks() -> None:
    adapter = build("skyreels", num_frame_per_block=2)
    frames = pipeline(adapter)(num_frames=4, generator=seeded()).frames
    assert bool(frames.isfinite().all())
    with pytest.raises(
        ValueError, match="5 frames are not whole blocks of num_frame_per_block=2; use multiples of it"
    ):
        adapter(latents(), 500.0)
