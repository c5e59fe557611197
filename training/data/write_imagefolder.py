"""Writes emoji scenes as an image folder that stock diffusers scripts and `datasets` can read.

    python training/data/write_imagefolder.py --out scenes --count 2000
    accelerate launch train_text_to_image.py --train_data_dir scenes ...

Every picture is `train/<number>.png`, every caption a line of `train/metadata.jsonl` with its labels. `--pairs` writes
ground-truth edit pairs instead: `source`, `target` and `mask` pictures with both captions.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from PIL import Image

from diffusers_ext.atomic import atomic_folder
from diffusers_ext.data import DEMO_OBJECTS, EmojiScenes, vendor_pairs
from diffusers_ext.data.emoji_scenes import SPLITS
from diffusers_ext.data.words import FAMILIES


BATCH = 256
LABELS = ("object", "colour", "background", "pattern", "vendor")


def picture(tensor: torch.Tensor) -> Image.Image:
    """(3, R, R) in [-1, 1] or (1, R, R) in [0, 1] -> PIL."""
    scaled = tensor * 255.0 if tensor.shape[0] == 1 else (tensor + 1.0) * 127.5
    array = scaled.round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    return Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array)


def write_scenes(scenes: EmojiScenes, folder: Path, count: int, seed: int, split: str) -> None:
    drawn = scenes.sample(count, seed, split)
    captions = scenes.captions(drawn)
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as lines:
        for start in range(0, count, BATCH):
            images, _ = scenes.render(drawn[start : start + BATCH])
            for i, image in enumerate(images, start):
                name = f"{i:06d}.png"
                picture(image).save(folder / name)
                labels = {key: getattr(scenes, f"{key}_names")[getattr(drawn, key)[i]] for key in LABELS}
                lines.write(json.dumps({"file_name": name, "text": captions[i], **labels}) + "\n")


def write_pairs(scenes: EmojiScenes, folder: Path, kind: str, count: int, seed: int) -> None:
    if kind in FAMILIES:
        pairs = vendor_pairs(kind, count, resolution=scenes.resolution, seed=seed)
    else:
        pairs = scenes.edit_pairs(kind, count, seed)
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as lines:
        for i in range(count):
            names = {role: f"{i:06d}_{role}.png" for role in ("source", "target", "mask")}
            for role, name in names.items():
                picture(getattr(pairs, role)[i]).save(folder / name)
            row = {
                "file_name": names["source"],
                "target_file_name": names["target"],
                "mask_file_name": names["mask"],
                "source_prompt": pairs.source_prompts[i],
                "prompt": pairs.target_prompts[i],
                "kind": kind,
            }
            lines.write(json.dumps(row) + "\n")


def main(arguments: list[str] | None = None) -> int:
    kinds = ("colour", "background", "pattern", "object", "vendor", *FAMILIES)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to create; it must not exist yet")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", default="train", choices=SPLITS)
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--vendors", nargs="+", default=["noto"])
    parser.add_argument("--objects", nargs="+", default=["demo"], help="words, or 'demo', or 'all'")
    parser.add_argument("--pairs", choices=kinds, help="write edit pairs of this kind")
    options = parser.parse_args(arguments)
    objects = {"demo": DEMO_OBJECTS, "all": None}.get(options.objects[0], options.objects)
    if options.out.exists():
        print(f"error: --out {options.out} exists already; name a new folder", file=sys.stderr)
        return 2
    try:
        scenes = EmojiScenes(options.vendors, options.resolution, objects)
        with atomic_folder(options.out) as staging:
            folder = Path(staging) / "train"
            folder.mkdir()
            if options.pairs:
                write_pairs(scenes, folder, options.pairs, options.count, options.seed)
            else:
                write_scenes(scenes, folder, options.count, options.seed, options.split)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: {options.count} {'pairs' if options.pairs else 'pictures'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
