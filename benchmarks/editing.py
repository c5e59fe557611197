"""Edits with a known ground truth: Guide-and-Rescale against DDIM inversion, SDEdit and no edit, on the same model.

    python benchmarks/editing.py [--count 64] [--kinds colour background pattern]

Every method gets the same pictures, captions, number of steps and guidance scale. Reported for each: PSNR against the true
edited picture (whole, and outside the mask of the edit), the share of edits of which a judge reads the wanted value, the
share of which it also reads everything else unchanged, network evaluations and seconds. Settings are fixed in the
arguments' defaults before anything is drawn.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import ATTRIBUTES, JUDGE, MODEL, load_judge, right, share, summary, write_result
from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline

from diffusers_ext import GuideAndRescalePipeline
from diffusers_ext.data import DEMO_OBJECTS, EditPairs, EmojiScenes
from diffusers_ext.metrics import psnr, ssim
from diffusers_ext.training.export import picture_grid


Method = Callable[[torch.Tensor, list[str], list[str]], tuple[torch.Tensor, float]]


def methods_of(model: Path, options: argparse.Namespace) -> dict[str, Method]:
    """Name -> function from (pictures in [-1, 1], source prompts, target prompts) to (edited pictures, NFE a picture)."""
    pipe = GuideAndRescalePipeline.from_pretrained(model, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    redraw = StableDiffusionImg2ImgPipeline(**{**pipe.components, "scheduler": DDIMScheduler.from_config(pipe.scheduler.config)},
                                            requires_safety_checker=False)  # fmt: skip
    redraw.set_progress_bar_config(disable=True)
    steps, scale = options.steps, options.guidance_scale

    def no_edit(images, source, target):
        latents = pipe.vae.encode(images).latent_dist.mode()
        return pipe.vae.decode(latents).sample.clamp(-1.0, 1.0), 0.0

    def sdedit(strength: float) -> Method:
        def run(images, source, target):
            out = redraw(
                target, image=(images + 1.0) / 2.0, strength=strength, num_inference_steps=steps, guidance_scale=scale,
                generator=torch.Generator().manual_seed(options.seed), output_type="pt",
            )  # fmt: skip
            return out.images * 2.0 - 1.0, 2.0 * int(steps * strength)

        return run

    def guided(**settings: Any) -> Method:
        def run(images, source, target):
            out = pipe(
                image=(images + 1.0) / 2.0, source_prompt=source, prompt=target, num_inference_steps=steps,
                guidance_scale=scale, output_type="pt", **settings,
            )  # fmt: skip
            # a pass backwards costs about two forward
            return out.images * 2.0 - 1.0, (out.network_evaluations + 2.0 * out.backward_passes) / len(images)

        return run

    return {
        "no edit": no_edit,
        "SDEdit .7": sdedit(0.7),
        "DDIM inversion + CFG": guided(guiders=[]),
        "Guide-and-Rescale": guided(),
        "Guide-and-Rescale, official alignment": guided(alignment="official"),
    }


def measure(
    method: Method, pairs: EditPairs, judge: Any, kind: str, batch: int
) -> tuple[dict[str, Any], torch.Tensor]:
    began, parts, cost = time.perf_counter(), [], 0.0
    for first in range(0, len(pairs.source), batch):
        rows = slice(first, first + batch)
        with torch.no_grad():
            images, cost = method(pairs.source[rows], pairs.source_prompts[rows], pairs.target_prompts[rows])
        parts.append(images)
    seconds = (time.perf_counter() - began) / len(pairs.source)
    edited = torch.cat(parts)
    read = right(judge, edited, pairs.target_scenes)
    others = torch.stack([read[name] for name in ATTRIBUTES if name != kind]).all(0)
    return {
        "psnr": summary(psnr(edited, pairs.target)),
        "psnr_outside": summary(psnr(edited, pairs.target, (pairs.mask == 0).float())),
        "ssim": summary(ssim(edited, pairs.target)),
        "wanted_value_read": share(read[kind]),
        "and_the_rest_kept": share(read[kind] & others),
        "nfe": round(cost, 1),
        "seconds": round(seconds, 3),
    }, edited


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--judge", type=Path, default=JUDGE)
    parser.add_argument("--kinds", nargs="+", default=["colour", "background", "pattern", "object"])
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--seed", type=int, default=30_000)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--guidance-scale", type=float, default=5.0)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument(
        "--grid", type=Path, help="also write a sheet: source, truth and every method, eight pairs a kind"
    )
    options = parser.parse_args()

    scenes = EmojiScenes(objects=DEMO_OBJECTS)
    judge = load_judge(scenes, options.judge)
    methods = methods_of(options.model, options)
    table: dict[str, dict[str, Any]] = {}
    sheet = []
    for kind in options.kinds:
        pairs = scenes.edit_pairs(kind, options.count, options.seed)
        sheet += [pairs.source[:8], pairs.target[:8]]
        table[kind] = {}
        for name, method in methods.items():
            table[kind][name], edited = measure(method, pairs, judge, kind, options.batch)
            sheet.append(edited[:8])
            row = table[kind][name]
            print(
                f"{kind:10s} {name:38s} PSNR {row['psnr']['mean']:5.2f} (median {row['psnr']['median']:5.2f})  outside "
                f"{row['psnr_outside']['mean']:5.2f}  wanted {row['wanted_value_read']:.3f}  kept "
                f"{row['and_the_rest_kept']:.3f}  NFE {row['nfe']:5.0f}  {row['seconds']:.2f} s",
                flush=True,
            )
    settings = {"count": options.count, "seed": options.seed, "steps": options.steps}
    settings |= {"guidance_scale": options.guidance_scale, "model": options.model.name, "judge": options.judge.name}
    write_result("editing", {"settings": settings, "kinds": table})
    if options.grid:
        picture_grid(torch.cat(sheet), columns=8).save(options.grid)


if __name__ == "__main__":
    main()
