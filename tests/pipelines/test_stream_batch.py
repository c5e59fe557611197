"""Streams of pictures: what leaves, when, at what cost, and that each picture is what it would be alone."""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionImg2ImgPipeline,
)
from PIL import Image

from diffusers_ext import SimilarityFilter, StreamBatch
from diffusers_ext.pipelines.stream_stages import GUIDANCES
from tests.helpers.tiny_models import tiny_components, tiny_stable_diffusion, tiny_stable_diffusion_xl, tiny_unet


SIZE = 16
PIPE = tiny_stable_diffusion()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(count: int, seed: int = 1, size: int = SIZE) -> list[torch.Tensor]:
    return list(torch.rand(count, 3, size, size, generator=seeded(seed)))


def build(pipe: Any = PIPE, **settings: Any) -> StreamBatch:
    defaults = {
        "prompt": "a", "num_inference_steps": 6, "guidance_scale": 2.0, "generator": seeded(), "output_type": "pt",
    }  # fmt: skip
    return StreamBatch.from_pipe(pipe, **{**defaults, **settings})


def alone(items: list[Any], pipe: Any = PIPE, **settings: Any) -> torch.Tensor:
    """Every picture as the only one of its stream."""
    return torch.stack([next(build(pipe, **settings)([item])) for item in items])


def close(found: Any, expected: torch.Tensor, atol: float = 1e-5) -> None:
    found = torch.stack(list(found)) if not isinstance(found, torch.Tensor) else found
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


@pytest.fixture(scope="module")
def three() -> tuple[list[torch.Tensor], torch.Tensor]:
    """Three pictures, and what becomes of each by itself."""
    items = pictures(3)
    return items, alone(items)


@pytest.mark.parametrize("update", ["ddim", "lcm"])
@pytest.mark.parametrize("guidance", GUIDANCES)
def test_staggered_pictures_are_those_of_one_at_a_time(guidance: str, update: str) -> None:
    items = pictures(3)
    settings = {"guidance": guidance, "update": update, "delta": 0.7, "negative_prompt": "c"}
    stream = build(**settings)
    close(stream(items), alone(items, **settings))
    assert stream.unet_calls == 3 + stream.latency == 5


def test_staggered_pictures_are_those_of_one_at_a_time_on_sdxl() -> None:
    pipe, items = tiny_stable_diffusion_xl(), pictures(2)
    for guidance in ("self", "full"):
        close(build(pipe, guidance=guidance)(items), alone(items, pipe, guidance=guidance))


@pytest.mark.parametrize(
    ("kind", "scheduler", "update"),
    [
        ("epsilon", DDIMScheduler, None), ("v_prediction", DDIMScheduler, None), ("epsilon", LCMScheduler, None),
        ("sample", DDIMScheduler, "lcm"),
    ],
)  # fmt: skip
def test_full_guidance_is_the_image_to_image_loop_of_diffusers(kind: str, scheduler: Any, update: str | None) -> None:
    parts = tiny_components(kind)
    config = parts["scheduler"].config
    stock = StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    stock.set_progress_bar_config(disable=True)
    stock.scheduler = (LCMScheduler if update == "lcm" else scheduler).from_config(config)
    ours = tiny_stable_diffusion(kind)
    ours.scheduler = scheduler.from_config(config)
    settings = {"num_inference_steps": 7, "strength": 0.6, "guidance_scale": 3.0}
    items = pictures(1)
    for guidance, scale in (("full", 3.0), ("none", 1.0)):
        stream = build(ours, guidance=guidance, negative_prompt="b", update=update, **settings)
        with torch.no_grad():
            latents = [stream._networks._encode(2 * item[None] - 1) for item in items]
        expected = [
            stock(
                "a", image=one, negative_prompt="b", generator=seeded(), output_type="pt",
                **{**settings, "guidance_scale": scale},
            ).images[0]
            for one in latents
        ]  # fmt: skip
        close(stream(items), torch.stack(expected), atol=3e-5)


def test_a_guidance_scale_of_one_is_the_same_in_every_mode() -> None:
    items = pictures(2)
    expected = alone(items, guidance="none")
    for guidance in GUIDANCES:
        close(build(guidance=guidance, guidance_scale=1.0)(items), expected, atol=2e-5)


@pytest.mark.parametrize(
    ("guidance", "first", "full"), [("self", 1, 3), ("none", 1, 3), ("initialize", 2, 4), ("full", 2, 6)]
)
def test_a_call_evaluates_what_the_mode_says(guidance: str, first: int, full: int) -> None:
    stream, rows = build(guidance=guidance), []
    for item in pictures(5):
        before = stream.network_evaluations
        stream.push(item)
        rows.append(stream.network_evaluations - before)
    assert stream.unet_calls == 5 and rows[0] == first and rows[2:] == [full] * 3


def test_pictures_leave_after_the_latency_and_in_order(three: Any) -> None:
    items, expected = (part * 2 if isinstance(part, list) else part.repeat(2, 1, 1, 1) for part in three)
    stream = build()
    assert stream.latency == len(stream.timesteps) - 1 == 2
    pushed = [stream.push(item) for item in items]
    assert pushed[:2] == [None, None]
    close([*pushed[2:], *stream.drain()], expected)
    assert list(stream.drain()) == [] and stream.unet_calls == 8
    close([stream.push(items[0]), *stream.drain()][1:], expected[:1])


def test_pictures_are_pulled_one_at_a_time_from_any_iterator() -> None:
    pulled = 0

    def camera() -> Iterator[torch.Tensor]:
        nonlocal pulled
        for item in itertools.cycle(pictures(3)):
            pulled += 1
            yield item

    results = build()(camera())
    assert pulled == 0
    for number in range(4):
        next(results)
        assert pulled == number + 3
    results.close()


def test_two_streams_of_one_object_do_not_disturb_each_other(three: Any) -> None:
    (first, expected), stream = three, build()
    second = first[::-1]
    pairs = list(zip(stream(first), stream(second), strict=True))
    stream.push(first[0])
    close([pair[0] for pair in pairs], expected)
    close([pair[1] for pair in pairs], expected.flip(0))


def test_a_picture_keeps_the_prompt_it_entered_with() -> None:
    items = pictures(4)
    settings = {"guidance": "full", "guidance_scale": 4.0}
    stream = build(**settings)
    found = []
    for number, item in enumerate(items):
        if number == 2:
            stream.prompt, stream.negative_prompt = "zebra", "b"
        found.append(stream.push(item))
    found = [*found[2:], *stream.drain()]
    close(found[:2], alone(items[:2], **settings))
    close(found[2:], alone(items[2:], **{**settings, "prompt": "zebra", "negative_prompt": "b"}))
    assert not torch.allclose(found[2], alone(items[2:3], **settings)[0], atol=1e-4)


def test_a_prompt_may_change_between_two_results() -> None:
    items, stream = pictures(5), build(guidance="none")
    found = []
    for result in stream(items):
        stream.prompt = "zebra"
        found.append(result)
    # the first result came after the third picture had entered
    close(found[:3], alone(items[:3], guidance="none"))
    close(found[3:], alone(items[3:], guidance="none", prompt="zebra"))


def test_the_same_generator_gives_the_same_stream_and_one_noise_serves_all_pictures() -> None:
    items = pictures(3)
    generator = seeded(4)
    stream = build(generator=generator)
    first, second = list(stream(items)), list(stream(items))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(generator.get_state(), seeded(4).get_state())
    again = list(build(generator=seeded(4))(items))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    still = list(build()([items[0]] * 3))
    close(still, still[0].expand(3, -1, -1, -1))
    assert not torch.allclose(list(build(generator=seeded(5))(items))[0], first[0], atol=1e-3)


def test_noise_may_be_given() -> None:
    items, noise = pictures(2), torch.randn(3, 4, 8, 8, generator=seeded(0))
    given = list(build(noise=noise, update="lcm", generator=None)(items))
    drawn = torch.cat([torch.randn(1, 4, 8, 8, generator=g) for g in [seeded(0)] for _ in range(3)])
    close(list(build(update="lcm", noise=drawn)(items)), torch.stack(list(build(update="lcm")(items))))
    assert not torch.equal(given[0], given[1])
    with pytest.raises(ValueError, match=r"noise=\(3, 4, 4, 4\) does not fit .* give \(3, 4, 8, 8\)"):
        build(noise=noise[..., :4, :4], update="lcm").push(items[0])


def test_a_list_of_indices_chooses_the_stages() -> None:
    stream = build(num_inference_steps=50, t_index_list=[18, 26, 35, 45])
    schedule = DDIMScheduler.from_config(PIPE.scheduler.config)
    schedule.set_timesteps(50)
    assert list(stream.timesteps) == schedule.timesteps[[18, 26, 35, 45]].tolist() and stream.latency == 3
    assert next(stream(pictures(1))).shape == (3, SIZE, SIZE)


def test_a_tensor_or_array_of_pictures_is_a_stream_of_them(three: Any) -> None:
    items, expected = three
    close(build()(torch.stack(items)), expected)
    close(build()(torch.stack(items).permute(0, 2, 3, 1).numpy()), expected)


def test_one_stage_has_no_latency() -> None:
    stream = build(num_inference_steps=2)
    assert stream.latency == 0 and stream.push(pictures(1)[0]) is not None and list(stream.drain()) == []


@pytest.mark.parametrize(
    ("kind", "shape"), [("pil", (SIZE, SIZE)), ("np", (SIZE, SIZE, 3)), ("pt", (3, SIZE, SIZE)), ("latent", (4, 8, 8))]
)
def test_pictures_of_any_kind_enter_and_leave(kind: str, shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    forms = [Image.fromarray(pixels), pixels, torch.from_numpy(pixels).permute(2, 0, 1) / 255.0]
    results = list(build(output_type=kind)(forms))
    assert [getattr(result, "size" if kind == "pil" else "shape") for result in results] == [shape] * 3
    arrays = [np.asarray(result, dtype=np.float32) for result in results]
    for array in arrays[1:]:
        np.testing.assert_allclose(array, arrays[0], atol=1 if kind == "pil" else 1e-4)


def test_sizes_that_the_networks_do_not_divide_come_out_as_they_went_in() -> None:
    assert next(build()([torch.rand(3, 14, 21)])).shape == (3, 14, 21)
    assert next(build(height=12, width=16)([torch.rand(3, 14, 21)])).shape == (3, 12, 16)


# -- the similarity filter ----------------------------------------------------------------------------------------


def scene(moving: list[bool]) -> list[torch.Tensor]:
    """Pictures of which some are the one before."""
    made, fresh = [], iter(pictures(len(moving)))
    for moves in moving:
        made.append(next(fresh) if moves or not made else made[-1])
    return made


def test_a_picture_that_is_left_out_gives_the_result_before_it() -> None:
    moving = [True, False, False, True, False, True, True, False]
    items = scene(moving)
    stream = build(similarity_filter=SimilarityFilter(generator=seeded()))
    results = list(stream(items))
    assert len(results) == len(items)
    close(results, alone(items))
    assert stream.pictures_skipped == 4 and stream.network_evaluations == 3 * 4
    assert all(torch.equal(results[i], results[i - 1]) for i in (1, 2, 4, 7))
    results[0].zero_()
    assert float(results[1].abs().max()) > 0


def test_what_is_on_its_way_leaves_while_the_scene_stands_still() -> None:
    item = pictures(1)[0]
    stream = build(similarity_filter=SimilarityFilter(max_skips=100, generator=seeded()))
    results = [stream.push(item) for _ in range(10)]
    assert results[:2] == [None, None] and all(result is not None for result in results[2:])
    # three calls for the only picture that was computed, and none after it
    assert stream.unet_calls == stream.network_evaluations == 3


def test_no_more_than_the_most_skips_in_a_row() -> None:
    item = pictures(1)[0]
    stream = build(similarity_filter=SimilarityFilter(max_skips=3, generator=seeded()))
    assert len(list(stream([item] * 12))) == 12
    assert stream.pictures_skipped == 9 and stream.network_evaluations == 3 * 3


def test_the_filter_draws_with_the_probability_of_the_formula() -> None:
    base = torch.ones(1, 3, 4, 4)
    base[:, :, ::2] = -1.0
    other = base + 0.2 * torch.randn(base.shape, generator=seeded(3))
    cosine = float(torch.cosine_similarity(base.flatten(), other.flatten(), dim=0))
    chance = 1 - (1 - cosine) / (1 - 0.9)
    assert 0.2 < chance < 0.95
    kept = SimilarityFilter(0.9, 10, seeded())
    kept.passed(base)
    share = np.mean([kept.skips(other) for _ in range(2000)])
    assert abs(share - chance) < 4 * (chance * (1 - chance) / 2000) ** 0.5


def test_streams_with_a_filter_repeat() -> None:
    items = [(0.9 * pictures(1)[0] + 0.1 * item) for item in pictures(8, 7)]
    stream = build(similarity_filter=SimilarityFilter(0.98, generator=seeded(2)))
    runs = []
    for _ in range(2):
        before = stream.pictures_skipped
        list(stream(items))
        runs.append(stream.pictures_skipped - before)
    assert runs[0] == runs[1] and 0 < runs[0] < 7


# -- what goes wrong ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"num_inference_steps": 0}, ValueError, "num_inference_steps=0"),
        ({"num_inference_steps": 2000}, ValueError, "num_inference_steps=2000 is more than the 1000"),
        ({"num_inference_steps": 2**62}, ValueError, "is more than the 1000"),
        ({"strength": 0.0}, ValueError, "strength=0.0 of num_inference_steps=6 leaves no step"),
        ({"strength": 1.5}, ValueError, "strength=1.5 is out of range"),
        ({"t_index_list": [3, 2]}, ValueError, r"t_index_list=\[3, 2\] does not fit; give ascending .* from 0 to 5"),
        ({"t_index_list": [2, 6]}, ValueError, r"t_index_list=\[2, 6\]"),
        ({"t_index_list": []}, ValueError, r"t_index_list=\[\]"),
        ({"guidance": "rcfg"}, ValueError, "guidance='rcfg' is not one of self, initialize, full, none"),
        ({"guidance_scale": 0.5}, ValueError, "guidance_scale=0.5 is out of range; give a number of at least 1"),
        ({"delta": -1}, ValueError, "delta=-1"),
        ({"update": "euler"}, ValueError, "update='euler'"),
        ({"prompt": 5}, ValueError, "prompt=5 is not a str"),
        ({"negative_prompt": ["a"]}, ValueError, "negative_prompt="),
        ({"similarity_filter": 0.98}, TypeError, "similarity_filter=0.98"),
        ({"height": 0}, ValueError, "height=0"),
        ({"generator": 3}, TypeError, "generator=3"),
        ({"noise": torch.zeros(2, 4, 8, 8)}, ValueError, r"noise=\(2, 4, 8, 8\) does not fit"),
        ({"noise": torch.full((1, 4, 8, 8), float("nan"))}, ValueError, "noise holds values"),
        ({"output_type": "jpg"}, ValueError, "output_type='jpg'"),
        ({"guidance_scal": 2}, TypeError, "guidance_scal"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else None,
)  # fmt: skip
def test_a_wrong_setting_is_named(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build(**settings)


@pytest.mark.parametrize(
    ("threshold", "skips", "name"), [(1.0, 10, "threshold"), (-1, 10, "threshold"), (0.9, 0, "max_skips")]
)
def test_a_wrong_filter_is_named(threshold: float, skips: int, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        SimilarityFilter(threshold, skips)
    with pytest.raises(TypeError, match="generator=5"):
        SimilarityFilter(generator=5)


def test_models_that_cannot_be_streamed_are_refused() -> None:
    with pytest.raises(ValueError, match="pipe=Linear has no UNet"):
        StreamBatch.from_pipe(torch.nn.Linear(2, 2))
    flow = tiny_stable_diffusion()
    flow.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="scheduler=FlowMatchEulerDiscreteScheduler"):
        StreamBatch.from_pipe(flow)
    zero = tiny_stable_diffusion()
    zero.scheduler = DDIMScheduler.from_config(
        zero.scheduler.config, rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    with pytest.raises(ValueError, match="cannot start from pure noise at timestep 999; use a lower strength"):
        build(zero, strength=1.0)
    distilled = tiny_stable_diffusion()
    distilled.unet = tiny_unet(time_cond_proj_dim=8)
    with pytest.raises(ValueError, match='takes the guidance scale as an input; use guidance="none"'):
        build(distilled)
    assert next(build(distilled, guidance="none")(pictures(1))).isfinite().all()


def test_any_scheduler_of_a_diffusion_model_lends_its_config() -> None:
    other = tiny_stable_diffusion()
    other.scheduler = EulerDiscreteScheduler.from_config(other.scheduler.config)
    items = pictures(2)
    close(build(other)(items), alone(items))


@pytest.mark.parametrize("wrong", ["x", b"x", {}, 5, None, Image.new("RGB", (8, 8)), torch.zeros(3, 8, 8)])
def test_what_is_no_iterable_of_pictures_is_refused_at_once(wrong: Any) -> None:
    with pytest.raises(TypeError, match="pictures=.* is not an iterable of pictures; give a list"):
        build()(wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.rand(3, 8, 8), "picture is 8x8 in a stream of 16x16; give height and width"),
        (torch.rand(2, 3, SIZE, SIZE), "picture has a batch of 2"),
        ([torch.rand(3, SIZE, SIZE)], "give one picture at a time"),
        (torch.full((3, SIZE, SIZE), float("nan")), "picture"),
        ("cat.png", "picture"),
        (None, "picture is missing"),
    ],
    ids=["size", "batch", "list", "nan", "path", "none"],
)
def test_earlier_pictures_are_delivered_before_a_wrong_one_is_reported(wrong: Any, message: str, three: Any) -> None:
    (items, expected), stream = three, build()
    found = []
    with pytest.raises(
        ValueError, match=rf"(?s)pictures: number 3 failed .*{message}.* the 3 before it were delivered"
    ):
        for result in stream([*items, wrong]):
            found.append(result)
    close(found, expected)
    close(stream(items), expected)


def test_a_source_that_raises_is_reported_after_the_pictures_before_it() -> None:
    def camera() -> Iterator[torch.Tensor]:
        yield from pictures(2)
        raise OSError("unplugged")

    found = []
    with pytest.raises(ValueError, match="number 2 failed .OSError: unplugged.") as caught:
        for result in build()(camera()):
            found.append(result)
    assert len(found) == 2 and isinstance(caught.value.__cause__, OSError)


def test_a_push_that_fails_changes_nothing(monkeypatch: pytest.MonkeyPatch, three: Any) -> None:
    (items, expected), stream = three, build(similarity_filter=SimilarityFilter(generator=seeded()))
    stream.push(items[0])
    for wrong in (torch.rand(3, 8, 8), "x", torch.full((3, SIZE, SIZE), float("nan"))):
        with pytest.raises((ValueError, TypeError)):
            stream.push(wrong)
    original = stream._networks.unet.forward
    monkeypatch.setattr(stream._networks.unet, "forward", lambda *a, **k: (original(*a, **k)[0] * float("nan"),))
    with pytest.raises(ValueError, match="the latents after stage . of 3 are infinite or not a number"):
        stream.push(items[1])
    monkeypatch.undo()
    found = [stream.push(item) for item in items[1:]]
    close([*found[1:], *stream.drain()], expected)


def test_reset_drops_what_is_on_its_way() -> None:
    stream = build()
    stream.push(pictures(1)[0])
    stream.reset()
    assert list(stream.drain()) == []
    assert [stream.push(item) for item in pictures(1, size=8)] == [None]


def test_a_setting_that_is_refused_leaves_the_one_before() -> None:
    stream = build()
    with pytest.raises(ValueError, match="prompt=None"):
        stream.prompt = None  # type: ignore[assignment]
    assert stream.prompt == "a"


def test_a_long_stream_holds_no_more_than_its_stages() -> None:
    stream = build(output_type="latent", similarity_filter=SimilarityFilter(max_skips=2, generator=seeded()))
    sizes = []
    for number, item in enumerate(itertools.islice(itertools.cycle(scene([True, False, True])), 20)):
        stream.prompt = str(number)
        stream.push(item)
        run = stream._run
        sizes.append((len(run.slots), len(run.conditions)))
    assert set(sizes) == {(stream.latency, 1)}


def test_the_pipeline_is_left_as_it_was() -> None:
    pipe = tiny_stable_diffusion()
    scheduler, processors = dict(pipe.scheduler.config), dict(pipe.unet.attn_processors)
    steps, dtype = pipe.scheduler.num_inference_steps, pipe.unet.dtype
    list(build(pipe, guidance="full")(pictures(2)))
    assert dict(pipe.scheduler.config) == scheduler and pipe.unet.attn_processors == processors
    assert pipe.scheduler.num_inference_steps == steps and pipe.unet.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_give_the_same_picture(dtype: torch.dtype) -> None:
    pipe = tiny_stable_diffusion().to(dtype)
    found = next(build(pipe)(pictures(1)))
    tolerance = 1e-4 if dtype == torch.float64 else 0.1
    close(found[None].float(), alone(pictures(1)), atol=tolerance)
