"""Draws what each knob of Guide-and-Rescale does: a strip a knob, one picture and one prompt, all else at its default.

    python benchmarks/guidance_knobs.py [--output docs/images/knobs.png]

The strips show; they do not measure. What settings are worth is measured by `benchmarks/editing.py` on many pictures.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

from diffusers_ext import FeatureEnergy, GuideAndRescalePipeline, SelfAttentionEnergy
from diffusers_ext.data import DEMO_OBJECTS, EmojiScenes
from diffusers_ext.demos.editing import DemoScene, describe
from diffusers_ext.hub import load_pipeline
from diffusers_ext.imaging import to_pil
from diffusers_ext.sheets import Tile, contact_sheet


SCENE = DemoScene(
    {"object": "car", "colour": "blue", "background": "white", "pattern": "plain"}, (("colour", "orange"),), 3
)

# heading -> caption -> what the call changes
KNOBS: dict[str, dict[str, dict[str, Any]]] = {
    "guidance_scale": {f"{w:g}": {"guidance_scale": w} for w in (2.0, 4.0, 7.5, 12.0, 20.0)},
    "rescale_range, upper bound": {
        f"(0.33, {high:g})": {"rescale_range": (0.33, high)} for high in (0.33, 1.0, 3.0, 6.0, float("inf"))
    },
    "guidance_end": {f"{end:g}": {"guidance_end": end} for end in (0.0, 0.3, 0.6, 0.8, 1.0)},
    "guiders": {
        "none": {"guiders": []},
        "attention": {"guiders": [SelfAttentionEnergy()]},
        "features": {"guiders": [FeatureEnergy()]},
        "both, the default": {},
        "attention of at most 8 x 8 tokens, and features": {
            "guiders": [SelfAttentionEnergy(max_attention_resolution=8), FeatureEnergy()]
        },
    },
    "num_inference_steps": {f"{steps}": {"num_inference_steps": steps} for steps in (4, 8, 15, 30, 50)},
    "preset, inversion and alignment": {
        "edit": {},
        "stylize": {"preset": "stylize"},
        "negative-prompt inversion": {"inversion_method": "negative_prompt"},
        "official alignment": {"alignment": "official"},
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "docs" / "images" / "knobs.png")
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    pipe = load_pipeline(GuideAndRescalePipeline, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    world = EmojiScenes(objects=DEMO_OBJECTS)
    source, target = describe(world, SCENE)
    pictures, _ = world.render(source)
    truth, _ = world.render(target)
    words, wanted = world.captions(source)[0], world.captions(target)[0]
    rows, notes = [], []
    for knob, settings in KNOBS.items():
        row = [Tile(to_pil(pictures[0]), "source"), Tile(to_pil(truth[0]), "what the words ask for")]
        for caption, changes in settings.items():
            call = {"num_inference_steps": options.steps, "output_type": "pt", **changes}
            edited = pipe((pictures + 1) / 2, words, wanted, **call).images
            row.append(Tile(to_pil(torch.as_tensor(edited[0]) * 2 - 1), caption))
        rows.append(row)
        notes.append(knob)
        print(knob, flush=True)
    sheet = contact_sheet(
        rows,
        title="The knobs of Guide-and-Rescale",
        subtitle=f"{words} -> {wanted}; {options.steps} steps and defaults, except for what is said under a picture.",
        notes=notes,
        tile=128,
    )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    sheet.quantize(128).save(options.output, optimize=True)
    print(options.output, options.output.stat().st_size)


if __name__ == "__main__":
    main()
