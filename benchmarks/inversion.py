"""How well each inversion method leads back to its pictures, and in how many passes.

    python benchmarks/inversion.py                          the small trained model of the tests, 10 steps, its own picture
    python benchmarks/inversion.py --model demo             the demo model, 20 steps, 8 pictures
    python benchmarks/inversion.py --model demo --steps 50 --only null_text         only these rows, at 50 steps

Writes `benchmarks/results/inversion_<model>_<steps>.json`, and into docs/inversion.md the table of that model at its usual steps and
what null-text inversion costs beside the authors' plan. With `--only` the other rows stay as they were measured.
"""

import argparse
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from common import ROOT, read_result, write_result
from diffusers import StableDiffusionPipeline
from page import table as markdown_table
from page import write_between

from diffusers_ext.data import DEMO_OBJECTS, EmojiScenes
from diffusers_ext.hub import load_pipeline
from diffusers_ext.inversion import DDIMLadder, Denoiser, invert, regenerate_states
from diffusers_ext.metrics import psnr


GOLDEN = ROOT / "tests" / "golden" / "editing"
PAGE = ROOT / "docs" / "inversion.md"

USUAL_STEPS = {"tiny": 10, "demo": 20}
# Of a step of the authors' code: the source prompt's pass, ten rounds forward and backward, two evaluations of what was found.
ORIGINAL_PASSES = 1 + 10 * 2 + 2
KEY = ("method", "settings", "guidance_scale")
SAME = ("model", "steps", "pictures", "seed")  # in all rows of a table
COMPARED = (("tiny", 10), ("demo", 20), ("demo", 50))

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
    ("null_text", {"schedule": "fast"}, 7.5),
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


@dataclass(frozen=True)
class Pictures:
    """Pictures (n, 3, H, W) in [-1, 1] of the demo model, and its autoencoder."""

    images: torch.Tensor
    vae: Any

    @torch.no_grad()
    def encoded(self) -> torch.Tensor:
        return self.vae.encode(self.images).latent_dist.mode() * self.vae.config.scaling_factor

    @torch.no_grad()
    def psnr_of(self, latents: torch.Tensor) -> float:
        """Mean PSNR of the pictures that latents decode to."""
        decoded = self.vae.decode(latents / self.vae.config.scaling_factor).sample
        return float(psnr(decoded, self.images).mean())


def demo(count: int, seed: int) -> tuple[Denoiser, Pictures, Any]:
    pipe = load_pipeline(StableDiffusionPipeline, device="cpu")
    pairs = EmojiScenes(objects=DEMO_OBJECTS).edit_pairs("colour", count, seed)
    return of_pipeline(pipe, list(pairs.source_prompts)), Pictures(pairs.source, pipe.vae), pipe.scheduler.config


def measured(
    row: tuple[str, dict[str, Any], float],
    denoiser: Denoiser,
    latents: torch.Tensor,
    ladder: DDIMLadder,
    pictures: Pictures | None,
) -> dict[str, Any]:
    """What an inversion costs and how well it leads back."""
    method, settings, scale = row
    began = time.process_time()
    seed = {"generator": torch.Generator().manual_seed(0)} if method == "edit_friendly" else {}
    inverted = invert(denoiser, latents, ladder, method, **settings, **seed)
    seconds = time.process_time() - began
    states = torch.stack(list(regenerate_states(denoiser, inverted, ladder, scale)))
    errors = (states[-1] - latents).flatten(1).square().mean(1).sqrt()
    found: dict[str, Any] = {
        "method": method,
        "settings": settings,
        "guidance_scale": scale,
        "forward_passes": inverted.forward_passes / len(latents),
        "backward_passes": inverted.backward_passes / len(latents),
        "rmse_mean": float(errors.mean()),
        "rmse_worst": float(errors.max()),
        "seconds_a_picture": round(seconds / len(latents), 3),
    }
    if method == "null_text":
        # How near the way back keeps to the trajectory, on which edits depend as well.
        away = (states[1:].flip(0) - inverted.latents[:-1]).flatten(2)
        found["rmse_of_all_states"] = float(away.square().mean(2).sqrt().mean())
    if pictures is not None:
        found["psnr"] = pictures.psnr_of(states[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(USUAL_STEPS), default="tiny")
    parser.add_argument("--steps", type=int, help="10 for tiny, 20 for demo")
    parser.add_argument("--pictures", type=int, default=8, help="of the demo model")
    parser.add_argument("--seed", type=int, default=0, help="of the pictures of the demo model")
    parser.add_argument(
        "--only", default="", help="measure the rows that this is part of, such as null_text or fast; default all"
    )
    options = parser.parse_args()
    chosen = [row for row in ROWS if options.only in key_of(*row)]
    if not chosen:
        parser.error(
            f"--only={options.only!r} is part of no row; the rows are {'; '.join(key_of(*row) for row in ROWS)}"
        )
    torch.set_num_threads(1)
    steps = options.steps or USUAL_STEPS[options.model]
    pictures = None
    if options.model == "tiny":
        denoiser, latents, config = tiny()
    else:
        denoiser, pictures, config = demo(options.pictures, options.seed)
        latents = pictures.encoded()
    ladder = DDIMLadder.from_scheduler_config(config, steps)
    name = f"inversion_{options.model}_{steps}"
    result: dict[str, Any] = {"model": options.model, "steps": steps, "pictures": len(latents), "seed": options.seed}
    if pictures is not None:
        result["psnr_of_autoencoder"] = pictures.psnr_of(latents)
    for row in chosen:
        found = measured(row, denoiser, latents, ladder, pictures)
        print(found, flush=True)
        # Read only now, so that parts may be measured side by side.
        before = read_result(name)
        same = all(before.get(key) == result[key] for key in SAME)
        rows = {key_of(*(old[part] for part in KEY)): old for old in (before["rows"] if same else [])}
        rows[key_of(*row)] = found
        result["rows"] = [rows[key] for key in (key_of(*row) for row in ROWS) if key in rows]
        write_result(name, result)
    if steps == USUAL_STEPS[options.model]:
        write_between(PAGE, f"<!-- {options.model} -->", f"<!-- end of {options.model} -->", table(result))
    write_between(PAGE, "<!-- null text -->", "<!-- end of null text -->", null_text_table())


def key_of(method: str, settings: dict[str, Any], scale: float) -> str:
    return f"{method} {settings_text(settings)} {scale}"


def settings_text(settings: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in settings.items())


def table(result: dict[str, Any]) -> str:
    """The measured rows as Markdown."""
    of_pictures = "psnr_of_autoencoder" in result
    about = f"{result['steps']} steps, {result['pictures']} picture{'s' if result['pictures'] > 1 else ''}"
    if of_pictures:
        about += f"; the autoencoder alone gives back {result['psnr_of_autoencoder']:.2f} dB"
    header = ["method", "settings", "guidance", "forward", "backward", "error, mean", "worst"]
    rows = [
        [
            row["method"],
            settings_text(row["settings"]),
            f"{row['guidance_scale']:g}",
            f"{row['forward_passes']:.4g}",
            f"{row['backward_passes']:.4g}",
            f"{row['rmse_mean']:.2g}",
            f"{row['rmse_worst']:.2g}",
            *([f"{row['psnr']:.2f}"] if of_pictures else []),
        ]
        for row in result["rows"]
    ]
    return f"{about}:\n\n" + markdown_table([*header, *(["picture, dB"] if of_pictures else [])], rows)


def null_text_table() -> str:
    """Null-text inversion beside the authors' plan, wherever it was measured."""
    header = [
        "model",
        "steps",
        "schedule",
        "passes a step",
        "fewer than the plan",
        "error, mean",
        "error of all states",
    ]
    rows = []
    for model, steps in COMPARED:
        result = read_result(f"inversion_{model}_{steps}")
        for row in result.get("rows", []):
            if row["method"] == "null_text":
                # DDIM inversion comes before either and is not part of the plan.
                a_step = (row["forward_passes"] + row["backward_passes"]) / steps - 1
                rows.append([
                    f"{model}, {result['pictures']} picture{'s' if result['pictures'] > 1 else ''}",
                    steps,
                    row["settings"]["schedule"],
                    f"{a_step:.2f}",
                    f"{ORIGINAL_PASSES / a_step:.2f}x",
                    f"{row['rmse_mean']:.4f}",
                    f"{row['rmse_of_all_states']:.4f}",
                ])  # fmt: skip
    return markdown_table(header, rows)


if __name__ == "__main__":
    main()
