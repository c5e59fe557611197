"""A stream of pictures through image-to-image: in one batch of staggered pictures, against one picture after the other.

    python benchmarks/stream_batch.py                         # three minutes of one core
    python benchmarks/stream_batch.py --parts sheet page      # some parts only; the others are kept from the last run

The demo model repaints pictures in another colour, of which the truth is known. Speed is that of the steady stream, in processor
seconds of one thread; each round measures every variant in turn, and the gain is that of the same round. Sequential is
`StableDiffusionImg2ImgPipeline` of diffusers with the same steps, and with the prompt encoded once. Settings were fixed before the figures
were made, but for guidance scales, of which all that were tried are shown.
"""

import argparse
import itertools
import json
import statistics
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import torch
from common import MODEL, ROOT, load_judge, read_result, right, share, summary, timed, write_result
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from page import write_between

from diffusers_ext import SimilarityFilter, StreamBatch
from diffusers_ext.data import DEMO_OBJECTS, EmojiScenes, Scenes
from diffusers_ext.metrics import psnr
from diffusers_ext.sheets import Tile, contact_sheet


PARTS = ("quality", "speed", "filter", "sheet", "page")
PAGE = ROOT / "docs" / "stream_batch.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
STEPS, STRENGTH = 8, 0.75
FULL_SCALE = 4.0
# guidance, scale, delta
MODES = (
    ("full", FULL_SCALE, 1.0), ("full", 1.4, 1.0), ("initialize", 1.4, 1.0), ("initialize", 2.0, 0.5), ("self", 1.2, 1.0),
    ("self", 1.4, 1.0), ("self", 2.0, 0.5), ("none", 1.0, 1.0),
)  # fmt: skip
FAST_MODES = (("full", FULL_SCALE), ("initialize", 1.4), ("self", 1.2), ("none", 1.0))


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def stream_of(pipe: Any, **settings: Any) -> StreamBatch:
    defaults = {"num_inference_steps": STEPS, "strength": STRENGTH, "generator": seeded(), "output_type": "pt"}
    return StreamBatch.from_pipe(pipe, **{**defaults, **settings})


def sequential_of(pipe: Any) -> StableDiffusionImg2ImgPipeline:
    stock = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    stock.set_progress_bar_config(disable=True)
    return stock


def quality(pipe: Any, count: int) -> list[dict[str, Any]]:
    """Every picture with a prompt of its own, in the hand of the judge and beside sequential image-to-image with full guidance."""
    scenes = EmojiScenes(objects=DEMO_OBJECTS)
    judge, pairs = load_judge(scenes), scenes.edit_pairs("colour", count, 3)
    stock = sequential_of(pipe)
    probe = stream_of(pipe)
    truth = []
    for image, prompt in zip(pairs.source, pairs.target_prompts, strict=True):
        with torch.no_grad():
            latents = probe._networks._encode(image[None])
        made = stock(
            prompt, image=latents, strength=STRENGTH, num_inference_steps=STEPS, guidance_scale=FULL_SCALE,
            generator=seeded(), output_type="pt",
        )  # fmt: skip
        truth.append(2 * made.images[0] - 1)
    rows = []
    sequential = torch.stack(truth)
    for name, scale, delta, found, stream in itertools.chain(
        [("sequential, full", FULL_SCALE, 1.0, sequential, None)],
        (streamed(pipe, pairs, *mode) for mode in MODES),
    ):
        read = right(judge, found, pairs.target_scenes)
        distance = psnr(found, sequential)
        rows.append({
            "guidance": name, "guidance_scale": scale, "delta": delta,
            **{what: share(read[what]) for what in ("colour", "object", "background")},
            "psnr_to_sequential": None if stream is None else summary(distance.clamp(max=99.0)),
            "unet_calls": count * 6 if stream is None else stream.unet_calls,
            "network_evaluations": 2 * count * 6 if stream is None else stream.network_evaluations,
        })  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
    return rows


def streamed(pipe: Any, pairs: Any, guidance: str, scale: float, delta: float) -> tuple[Any, ...]:
    stream = stream_of(pipe, guidance=guidance, guidance_scale=scale, delta=delta)

    def source() -> Iterator[torch.Tensor]:
        for image, prompt in zip(pairs.source, pairs.target_prompts, strict=True):
            stream.prompt = prompt
            yield (image + 1) / 2

    found = 2 * torch.stack(list(stream(source()))) - 1
    return guidance, scale, delta, found, stream


def speed(pipe: Any, rounds: int, count: int) -> dict[str, Any]:
    """Pictures a second of the steady stream, every variant in each round."""
    scenes = EmojiScenes(objects=DEMO_OBJECTS)
    drawn = scenes.sample(count, 5, "all")
    images = (scenes.render(drawn)[0] + 1) / 2
    prompt = scenes.captions(drawn)[0]
    stock = sequential_of(pipe)
    embeds, _ = pipe.encode_prompt(prompt, "cpu", 1, False)
    negative, _ = pipe.encode_prompt("", "cpu", 1, False)

    def sequential(scale: float) -> None:
        for image in images:
            stock(
                image=image[None], prompt_embeds=embeds, negative_prompt_embeds=negative, strength=STRENGTH,
                num_inference_steps=STEPS, guidance_scale=scale, generator=seeded(), output_type="pt",
            )  # fmt: skip

    variants: dict[str, Any] = {
        "sequential, full": lambda: sequential(FULL_SCALE),
        "sequential, none": lambda: sequential(1.0),
    }
    streams = {}
    for guidance, scale in FAST_MODES:
        stream = streams[f"stream, {guidance}"] = stream_of(
            pipe, prompt=prompt, guidance=guidance, guidance_scale=scale
        )
        variants[f"stream, {guidance}"] = lambda stream=stream: [stream.push(image) for image in images]
    for call in variants.values():  # warm, and with the streams full
        call()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, call in variants.items():
            seconds[name].append(timed(call))
    rows = []
    for name, values in seconds.items():
        base = seconds["sequential, none" if name.endswith("none") else "sequential, full"]
        gains = [b / v for b, v in zip(base, values, strict=True)]
        stream = streams.get(name)
        rows.append({
            "variant": name, "pictures_per_second": summary(count / value for value in values),
            "gain": summary(gains),
            "calls_a_picture": 6 if stream is None else 1,
            "rows_a_picture": (12 if "full" in name else 6) if stream is None else rows_of(stream),
        })  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
    return {"rounds": rounds, "pictures": count, "rows": rows, "batches": batches(pipe)}


def rows_of(stream: StreamBatch) -> int:
    """Rows of a batch of the full stream."""
    before = stream.network_evaluations
    stream.push(torch.rand(3, 64, 64))
    return stream.network_evaluations - before


def batches(pipe: Any) -> dict[str, float]:
    """Milliseconds a row of the network takes, by rows of the batch: what batching alone gains here."""
    embeds, _ = pipe.encode_prompt("", "cpu", 1, False)
    found = {}
    for rows in (1, 6, 12):
        latents = torch.randn(rows, 4, 16, 16)

        @torch.no_grad()
        def call(latents: torch.Tensor = latents, words: torch.Tensor = embeds.expand(rows, -1, -1)) -> None:
            pipe.unet(latents, 500, encoder_hidden_states=words)

        call()
        found[str(rows)] = round(1000 * statistics.median(timed(call) for _ in range(8)) / rows, 1)
    return found


def moving(count: int, places: torch.Tensor) -> tuple[torch.Tensor, str]:
    """One scene whose drawing moves: `places` in shares of the picture's side, (count,)."""
    scenes = EmojiScenes(objects=DEMO_OBJECTS)
    word = scenes.object_names.index("heart")
    drawn = scenes.sample(1, 11, "all")
    many = Scenes(**{field.name: getattr(drawn, field.name).expand(count).clone() for field in fields(Scenes)})
    blank = torch.zeros(count, dtype=torch.long)
    many = many.replace(
        object=blank + word, colour=blank + scenes.colour_names.index("red"), pattern=blank,
        background=blank + scenes.background_names.index("blue"),
        x=places, y=torch.full((count,), 0.5), size=torch.full((count,), 0.62),
        angle=torch.linspace(-10.0, 10.0, count) * (places.std() > 0),
    )  # fmt: skip
    return (scenes.render(many)[0] + 1) / 2, scenes.captions(many[:1])[0]


def similarity(pipe: Any) -> list[dict[str, Any]]:
    """A drawing that stands still, drifts, and moves fast, behind the filter."""
    count = 20
    places = {
        "still": torch.full((count,), 0.5),
        "drifting": torch.linspace(0.47, 0.53, count),
        "moving": torch.linspace(0.4, 0.6, count),
    }
    rows = []
    for name, where in places.items():
        images, prompt = moving(count, where)
        settings = {"prompt": prompt, "guidance": "none"}
        plain = stream_of(pipe, **settings)
        reference = torch.stack(list(plain(images)))
        for threshold in (0.98, 0.9):
            stream = stream_of(pipe, **settings, similarity_filter=SimilarityFilter(threshold, generator=seeded()))
            found = torch.stack(list(stream(images)))
            distance = psnr(2 * found - 1, 2 * reference - 1).clamp(max=99.0)
            rows.append({
                "scene": name, "threshold": threshold, "skipped": round(stream.pictures_skipped / count, 3),
                "network_evaluations": stream.network_evaluations, "without": plain.network_evaluations,
                "psnr": summary(distance),
            })  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)
    return rows


def sheet(pipe: Any) -> None:
    """Pictures that go in, and what comes out, with the prompt changed on the way."""
    count, change = 8, 4
    images, before = moving(count, torch.linspace(0.38, 0.62, count))
    prompts = ["a green heart on a blue background", "a yellow star on a purple background"]
    stream = stream_of(pipe, guidance="full", guidance_scale=FULL_SCALE, output_type="pil")

    def camera() -> Iterator[torch.Tensor]:
        for number, image in enumerate(images):
            stream.prompt = prompts[number >= change]
            yield image

    made = list(stream(camera()))
    given = [Tile(stream_to_pil(image)) for image in images]
    shown = [Tile(image) for image in made]
    drawing = contact_sheet(
        [given, shown], title="One picture in, one picture out",
        notes=["what enters", f"what leaves: the first {change} with “{prompts[0]}”, then “{prompts[1]}”"], tile=96,
    )  # fmt: skip
    drawing.quantize(128).save(ROOT / "docs" / "images" / "stream_batch.png", optimize=True)


def stream_to_pil(image: torch.Tensor) -> Any:
    from PIL import Image

    return Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy())


def page(result: dict[str, Any]) -> str:
    lines = []
    if "speed" in result:
        measured = result["speed"]
        lines += [
            f"### Speed: {measured['pictures']} pictures of 64 pixels a round, {measured['rounds']} rounds, six stages, one thread", "",
            "| | calls a picture | rows a picture | pictures a second (5–95 %) | times sequential, full (none: sequential, none) |",
            "|---|---|---|---|---|",
        ]  # fmt: skip
        for row in measured["rows"]:
            rate, gain = row["pictures_per_second"], row["gain"]
            lines.append(
                f"| {row['variant']} | {row['calls_a_picture']} | {row['rows_a_picture']} | {rate['median']:.2f} ({rate['q05']:.2f}–"
                f"{rate['q95']:.2f}) | {gain['median']:.2f} ({gain['q05']:.2f}–{gain['q95']:.2f}) |"
            )
        per_row = ", ".join(f"{value} ms in a batch of {rows}" for rows, value in measured["batches"].items())
        lines += ["", f"A row of the network alone takes {per_row}.", ""]
    if "quality" in result:
        lines += [
            "### What the guidance makes of an ordinary model: pictures repainted in another colour, each with its own prompt", "",
            "| guidance | scale | delta | rows | colour as said | object kept | background kept | PSNR to sequential, full (median) |",
            "|---|---|---|---|---|---|---|---|",
        ]  # fmt: skip
        for row in result["quality"]:
            found = row["psnr_to_sequential"]
            distance = "" if found is None else "over 90 dB" if found["median"] > 90 else f"{found['median']:.1f} dB"
            lines.append(
                f"| {row['guidance']} | {row['guidance_scale']} | {row['delta']} | {row['network_evaluations']} | {row['colour']:.2f} | "
                f"{row['object']:.2f} | {row['background']:.2f} | {distance} |"
            )
        lines.append("")
    if "filter" in result:
        lines += [
            "### The similarity filter: 20 pictures of a drawing that stands still, drifts, or moves across the picture", "",
            "| scene | threshold | left out | rows, of | PSNR to all computed (median) |", "|---|---|---|---|---|",
        ]  # fmt: skip
        for row in result["filter"]:
            found = "the same" if row["psnr"]["median"] > 90 else f"{row['psnr']['median']:.1f} dB"
            lines.append(
                f"| {row['scene']} | {row['threshold']} | {100 * row['skipped']:.0f} % | {row['network_evaluations']}, "
                f"{row['without']} | {found} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--pictures", type=int, default=8, help="of a round of the speed")
    parser.add_argument("--pairs", type=int, default=24, help="of the quality")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pipe = StableDiffusionPipeline.from_pretrained(MODEL, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    result = read_result("stream_batch")
    result["settings"] = {"num_inference_steps": STEPS, "strength": STRENGTH, "full_guidance_scale": FULL_SCALE}
    runs = {
        "speed": lambda: speed(pipe, args.rounds, args.pictures),
        "quality": lambda: quality(pipe, args.pairs),
        "filter": lambda: similarity(pipe),
    }
    for name, run in runs.items():
        if name in args.parts:
            result[name] = run()
            write_result("stream_batch", result)
    if "sheet" in args.parts:
        sheet(pipe)
    if "page" in args.parts:
        write_between(PAGE, BEGIN, END, page(result))


if __name__ == "__main__":
    main()
