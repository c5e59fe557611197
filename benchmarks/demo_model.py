"""How good the demo model is: reconstruction, and whether its pictures show what their captions say.

    python benchmarks/demo_model.py [--model pipelines/emoji-scenes-64] [--count 256]

Captions come from triples of object, colour and background that were never trained on. A network trained on ground-truth
renderings reads the pictures; its own accuracy on renderings of the same scenes stands beside every figure. Settings
(steps, guidance scale, seed) are fixed in the arguments' defaults before anything is drawn.
"""

import argparse
import time
from pathlib import Path

import torch
from common import ATTRIBUTES, JUDGE, MODEL, load_judge, right, share, summary, write_result
from diffusers import StableDiffusionPipeline

from diffusers_ext.data import DEMO_OBJECTS, EmojiScenes
from diffusers_ext.metrics import psnr, ssim
from diffusers_ext.training.export import picture_grid


def reconstruct(pipe: StableDiffusionPipeline, images: torch.Tensor, batch: int) -> torch.Tensor:
    parts = [pipe.vae.decode(pipe.vae.encode(part).latent_dist.mode()).sample for part in images.split(batch)]
    return torch.cat(parts).clamp(-1.0, 1.0)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--judge", type=Path, default=JUDGE)
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--seed", type=int, default=20_000)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--guidance-scale", type=float, default=4.0)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--grid", type=Path, help="also write the first 48 pictures as a sheet")
    options = parser.parse_args()

    scenes = EmojiScenes(objects=DEMO_OBJECTS)
    judge = load_judge(scenes, options.judge)
    pipe = StableDiffusionPipeline.from_pretrained(options.model, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    drawn = scenes.sample(options.count, options.seed, "held_out")
    truth, _ = scenes.render(drawn)
    captions = scenes.captions(drawn)

    restored = reconstruct(pipe, truth, options.batch)
    began = time.perf_counter()
    parts = []
    for first in range(0, options.count, options.batch):
        part = pipe(
            captions[first : first + options.batch],
            num_inference_steps=options.steps,
            guidance_scale=options.guidance_scale,
            generator=torch.Generator().manual_seed(options.seed + first),
            output_type="pt",
        ).images
        parts.append(part * 2.0 - 1.0)
    seconds = time.perf_counter() - began
    pictures = torch.cat(parts)

    readings = {"samples": pictures, "renderings": truth, "reconstructions": restored}
    accuracy = {}
    for name, images in readings.items():
        read = right(judge, images, drawn)
        accuracy[name] = {attribute: share(read[attribute]) for attribute in ATTRIBUTES}
        # a drawing in its own colours has no colour word, so its colour can only be read where one was said
        spoken = drawn.colour > 0
        accuracy[name]["spoken colour"] = share(read["colour"][spoken])
        accuracy[name]["all four"] = share(torch.stack([read[attribute] for attribute in ATTRIBUTES]).all(0))
    result = {
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()},
        "autoencoder_psnr": summary(psnr(restored, truth)),
        "autoencoder_ssim": summary(ssim(restored, truth)),
        "accuracy": accuracy,
        "seconds_per_picture": round(seconds / options.count, 3),
    }
    result["settings"]["model"] = options.model.name
    result["settings"]["judge"] = options.judge.name
    result["settings"].pop("grid")
    path = write_result("demo_model", result)
    print(f"autoencoder {result['autoencoder_psnr']['mean']:.2f} dB")
    for name, row in accuracy.items():
        print(f"{name:16s}", "  ".join(f"{attribute} {value:.3f}" for attribute, value in row.items()))
    print(f"{result['seconds_per_picture']} s a picture; written to {path.name}")
    if options.grid:
        picture_grid(pictures[:48], columns=8).save(options.grid)


if __name__ == "__main__":
    main()
