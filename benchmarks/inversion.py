"""How well each inversion method leads back to its pictures, and in how many passes.

    python benchmarks/inversion.py                          the small trained model of the tests, 10 steps, its own picture
    python benchmarks/inversion.py --model demo             the demo model, 20 steps, 8 pictures

Writes `benchmarks/results/inversion_<model>.json`, and the table of docs/inversion.md of that model.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import write_result
from diffusers import StableDiffusionPipeline
from page import write_between

from diffusers_ext.data import DEMO_OBJECTS, EmojiScenes
from diffusers_ext.hub import load_pipeline
from diffusers_ext.inversion import DDIMLadder, Denoiser, invert, regenerate


ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden" / "editing"
PAGE = ROOT / "docs" / "inversion.md"

# What is measured: name, settings of the inversion, guidance scale of the way back.
ROWS: tuple[tuple[str, dict[str, Any], float], ...] = (
    ("ddim", {}, 1.0),
    ("ddim", {}, 7.5),
    ("fixed_point", {"iterations": 1}, 1.0),
    ("fixed_point", {"iterations": 5}, 1.0),
    ("fixed_point", {"iterations": 25}, 1.0),
    ("fixed_point", {"iterations": 5, "solver": "anderson"}, 1.0),
    ("fixed_point", {"iterations": 25, "solver": "gradient"}, 1.0),
    ("negative_prompt", {}, 7.5),
    ("null_text", {"schedule": "official"}, 7.5),
    ("null_text", {}, 7.5),
    ("direct", {}, 7.5),
    ("edit_friendly", {}, 3.5),
    ("edit_friendly", {"last_noise": False}, 3.5),
    ("bdia", {}, 1.0),
)


def of_pipeline(pipe: StableDiffusionPipeline, prompts: list[str]) -> Denoiser:
    """A pipeline's network with the embeddings of its prompts."""
    pipe.unet.requires_grad_(False)
    source, null = pipe.encode_prompt(prompts, pipe.device, 1, True)
    return Denoiser(lambda z, t, words: pipe.unet(z, t, words, return_dict=False)[0], source, null)


def tiny() -> tuple[Denoiser, torch.Tensor, Any]:
    pipe = StableDiffusionPipeline.from_pretrained(GOLDEN / "tiny_sd", dtype=torch.float32, safety_checker=None)
    with np.load(GOLDEN / "null_text_inversion.npz", allow_pickle=False) as file:
        latents, prompt = torch.from_numpy(file["ddim_latents"][0]), str(file["source_prompt"])
    return of_pipeline(pipe, [prompt]), latents, pipe.scheduler.config


def demo(pictures: int) -> tuple[Denoiser, torch.Tensor, Any]:
    pipe = load_pipeline(StableDiffusionPipeline, device="cpu")
    pairs = EmojiScenes(objects=DEMO_OBJECTS).edit_pairs("colour", pictures, 0)
    with torch.no_grad():
        latents = pipe.vae.encode(pairs.source).latent_dist.mode() * pipe.vae.config.scaling_factor
    return of_pipeline(pipe, list(pairs.source_prompts)), latents, pipe.scheduler.config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("tiny", "demo"), default="tiny")
    parser.add_argument("--steps", type=int, help="10 for tiny, 20 for demo")
    parser.add_argument("--pictures", type=int, default=8, help="of the demo model")
    options = parser.parse_args()
    torch.set_num_threads(1)
    steps = options.steps or (10 if options.model == "tiny" else 20)
    denoiser, latents, config = tiny() if options.model == "tiny" else demo(options.pictures)
    ladder = DDIMLadder.from_scheduler_config(config, steps)
    rows = []
    for method, settings, scale in ROWS:
        began = time.process_time()
        seed = {"generator": torch.Generator().manual_seed(0)} if method == "edit_friendly" else {}
        inverted = invert(denoiser, latents, ladder, method, **settings, **seed)
        seconds = time.process_time() - began
        back = regenerate(denoiser, inverted, ladder, scale)
        errors = (back - latents).flatten(1).square().mean(1).sqrt()
        row = {
            "method": method,
            "settings": settings,
            "guidance_scale": scale,
            "forward_passes": inverted.forward_passes // len(latents),
            "backward_passes": inverted.backward_passes // len(latents),
            "rmse_mean": float(errors.mean()),
            "rmse_worst": float(errors.max()),
            "seconds_a_picture": round(seconds / len(latents), 3),
        }
        print(row, flush=True)
        rows.append(row)
    result = {"model": options.model, "steps": steps, "pictures": len(latents), "rows": rows}
    write_result(f"inversion_{options.model}", result)
    write_between(PAGE, f"<!-- {options.model} -->", f"<!-- end of {options.model} -->", table(result))


def table(result: dict[str, Any]) -> str:
    """The measured rows as Markdown."""
    lines = [
        f"{result['steps']} steps, {result['pictures']} picture{'s' if result['pictures'] > 1 else ''}:",
        "",
        "| method | settings | guidance | forward | backward | error, mean | worst |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        settings = ", ".join(f"{key}={value!r}" for key, value in row["settings"].items())
        lines.append(
            f"| {row['method']} | {settings} | {row['guidance_scale']:g} | {row['forward_passes']} | {row['backward_passes']} | "
            f"{row['rmse_mean']:.2g} | {row['rmse_worst']:.2g} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
