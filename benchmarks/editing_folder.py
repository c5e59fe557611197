"""The editing benchmark on a user's own pictures, with any Stable Diffusion 1.x or 2.x checkpoint.

A folder holds pictures and a `metadata.jsonl` with one line a picture, in the layout of `datasets`' image folders:

    {"file_name": "cat.png", "source_prompt": "a cat on a sofa", "prompt": "a dog on a sofa", "mask": "cat_mask.png"}

`mask` may be left out; it is white where the edit may change the picture. What comes out is a sheet (`sheet.png`),
every edited picture, and the measures that need no truth (`measures.json`): PSNR, SSIM and feature distance to the
source, outside the mask where there is one, and the passes each method made.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import timed
from editing_measures import against_source, outside_only, summary_of
from editing_methods import DOCUMENTED
from editors import Batch, Editors
from PIL import Image
from second_judge import feature_distance, load_network, stage_features

from diffusers_ext.atomic import atomic_write
from diffusers_ext.imaging import open_image
from diffusers_ext.sheets import Tile, contact_sheet


METADATA = "metadata.jsonl"
MULTIPLE = 32  # LEDITS++ takes no other sides
FIELDS = ("file_name", "source_prompt", "prompt")


@dataclass(frozen=True)
class Wish:
    """One line of a folder: a picture, what it shows and what it shall show."""

    file_name: str
    image: Image.Image
    source_prompt: str
    prompt: str
    mask: Image.Image | None


def read_folder(folder: Path) -> list[Wish]:
    """The lines of a folder's `metadata.jsonl`.

    Raises:
        ValueError: For a line that cannot be used; the message names it.
        FileNotFoundError: If there is no `metadata.jsonl`.
    """
    path = Path(folder) / METADATA
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {METADATA}; it needs one line a picture with {', '.join(FIELDS)}")
    wishes = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number} of {path} is not JSON: {error}") from error
        missing = [name for name in FIELDS if not isinstance(entry, dict) or not isinstance(entry.get(name), str)]
        if missing:
            raise ValueError(f"line {number} of {path} has no {', '.join(missing)}; each must be a string")
        image = open_image(Path(folder) / entry["file_name"])
        mask = open_image(Path(folder) / entry["mask"]).convert("L") if entry.get("mask") else None
        if mask is not None and mask.size != image.size:
            raise ValueError(f"line {number} of {path}: the mask is {mask.size} pixels, the picture {image.size}")
        wishes.append(Wish(entry["file_name"], image, entry["source_prompt"], entry["prompt"], mask))
    if not wishes:
        raise ValueError(f"{path} holds no line")
    return wishes


def fitting(size: tuple[int, int], side: int) -> tuple[int, int]:
    """The size at which a picture is edited: its longer side about `side`, its shape kept, both multiples of 32."""
    scale = side / max(size)
    width, height = (max(MULTIPLE, round(length * scale / MULTIPLE) * MULTIPLE) for length in size)
    return width, height


def tensors_of(wish: Wish, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Picture (1, 3, H, W) in [-1, 1] and mask (1, 1, H, W) in [0, 1], all 0 without one."""
    size = fitting(wish.image.size, side)
    pixels = np.asarray(wish.image.resize(size, Image.Resampling.LANCZOS), np.float32) / 127.5 - 1.0
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    if wish.mask is None:
        return image, torch.zeros(1, 1, *image.shape[-2:])
    mask = np.asarray(wish.mask.resize(size, Image.Resampling.BILINEAR), np.float32) / 255.0
    return image, torch.from_numpy(mask.copy())[None, None]


@torch.no_grad()
def edit_folder(folder: Path, model: str | Path, output: Path, steps: int) -> dict[str, Any]:
    """Edits every picture with every method as it is documented; returns what it writes to `measures.json`."""
    wishes = read_folder(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    editors = Editors(model, steps, device)
    unet, vae_scale = editors.guide.unet, editors.guide.vae_scale_factor
    side = unet.config.sample_size * vae_scale
    network = load_network()
    output.mkdir(parents=True, exist_ok=True)
    records: dict[str, dict[str, list[Any]]] = {setting.name: {} for setting in DOCUMENTED}
    lines = []
    for number, wish in enumerate(wishes):
        image, mask = tensors_of(wish, side)
        batch = Batch(image, [wish.source_prompt], [wish.prompt], [number])
        tiles = [Tile(_picture(image), wish.source_prompt)]
        for setting in DOCUMENTED:
            edits: list[torch.Tensor] = []
            editors.forward_passes = editors.backward_passes = 0
            batch.inversions.clear()
            seconds = timed(lambda: edits.append(setting.run(editors, batch)))
            edited = edits[0]
            bare = outside_only(edited, image, mask)
            measures = {
                **against_source(edited, image, mask),
                "features_outside": feature_distance(
                    stage_features(network, bare), stage_features(network, image)
                ).tolist(),
                "forward": [editors.forward_passes],
                "backward": [editors.backward_passes],
                "seconds": [seconds],
            }
            for name, values in measures.items():
                records[setting.name].setdefault(name, []).extend(values)
            shown = _picture(edited)
            shown.save(
                output / f"{Path(wish.file_name).stem}-{re.sub('[^a-z]+', '-', setting.method.lower()).strip('-')}.png"
            )
            tiles.append(Tile(shown, f"{measures['psnr_outside'][0]:.1f} dB outside"))
        lines.append(tiles)
        print(f"{wish.file_name}: {wish.prompt}", flush=True)
    sheet = contact_sheet(
        lines,
        title="Edits",
        columns=["source", *(setting.method for setting in DOCUMENTED)],
        notes=[wish.prompt for wish in wishes],
        tile=min(side, 256),
    )
    sheet.save(output / "sheet.png")
    result = {
        "settings": {"model": str(model), "steps": steps, "pictures": [wish.file_name for wish in wishes]},
        "masks": sum(wish.mask is not None for wish in wishes),
        "methods": {name: summary_of(record) for name, record in records.items()},
        "pictures": records,
    }
    atomic_write(output / "measures.json", (json.dumps(result, indent=1) + "\n").encode())
    return result


def _picture(image: torch.Tensor) -> Image.Image:
    pixels = (image[0].clamp(-1.0, 1.0) * 127.5 + 127.5).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())
