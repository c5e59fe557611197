"""Sprite sheets: drawings of emoji vendors as one PNG with a JSON index, and their recolouring by hue cluster.

A recoloured drawing keeps its shading, stems, leaves and eyes: only the pixels whose hue lies within 36 degrees of the
drawing's dominant hue (the peak of a saturation-weighted hue histogram) are moved to the new hue, and their saturation
and value are scaled so that the cluster's means become those of the target colour.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from .words import OBJECT_COLOURS, OBJECTS


CELL = 96  # pixels on a side of one sprite
SHEETS = Path(__file__).parent / "sheets"
HUE_WINDOW = 36.0  # degrees around the dominant hue that are recoloured
MIN_COVERAGE = 0.35  # share of a drawing's pixels that the hue cluster must cover for a colour word to be true of it


@dataclass(frozen=True)
class SpriteSheet:
    """The drawings of one vendor.

    Args:
        vendor: Name of the hand, used in captions ("in noto style").
        sprites: Slug of each drawing -> uint8 array (96, 96, 4), straight alpha.
        licence: SPDX name of the artwork's licence.
    """

    vendor: str
    sprites: dict[str, np.ndarray]
    licence: str

    @classmethod
    def load(cls, path: str | Path | None = None) -> "SpriteSheet":
        """Reads `path` (the `.json` of a sheet; its PNG lies beside it). Without a path: the shipped Noto sheet.

        Raises:
            FileNotFoundError: If the sheet is not there, with the command that builds it.
            ValueError: If index and picture do not belong together.
        """
        index = Path(path) if path is not None else SHEETS / "noto.json"
        if not index.is_file():
            raise FileNotFoundError(
                f"path={str(index)!r} is not a sprite sheet; build one with `python training/data/build_emoji_scenes.py`"
            )
        meta = json.loads(index.read_text())
        with Image.open(index.with_suffix(".png")) as picture:
            pixels = np.asarray(picture.convert("RGBA"))
        columns, cell, slugs = meta["columns"], meta["cell"], meta["slugs"]
        rows = -(-len(slugs) // columns)
        if cell != CELL or pixels.shape != (rows * cell, columns * cell, 4):
            raise ValueError(
                f"{index.with_suffix('.png').name} has shape {pixels.shape}, but its index describes {len(slugs)} "
                f"sprites of {cell} pixels in {columns} columns; build the sheet again"
            )
        grid = pixels.reshape(rows, cell, columns, cell, 4).swapaxes(1, 2).reshape(-1, cell, cell, 4)
        return cls(meta["vendor"], dict(zip(slugs, grid)), meta["licence"])

    def save(self, folder: str | Path, columns: int = 12) -> Path:
        """Writes `<vendor>.png` and `<vendor>.json` into `folder` and returns the path of the index."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        rows = -(-len(self.sprites) // columns)
        grid = np.zeros((rows * columns, CELL, CELL, 4), np.uint8)
        grid[: len(self.sprites)] = np.stack(list(self.sprites.values()))
        pixels = grid.reshape(rows, columns, CELL, CELL, 4).swapaxes(1, 2).reshape(rows * CELL, columns * CELL, 4)
        index = folder / f"{self.vendor}.json"
        Image.fromarray(pixels).save(index.with_suffix(".png"), optimize=True)
        meta = {"vendor": self.vendor, "licence": self.licence, "cell": CELL, "columns": columns}
        index.write_text(json.dumps({**meta, "slugs": list(self.sprites)}, indent=1) + "\n")
        return index

    def objects(self) -> tuple[str, ...]:
        """Words of the everyday objects this vendor drew, in the vocabulary's order."""
        return tuple(word for slug, word in OBJECTS.items() if slug in self.sprites)


def rgb_to_hsv(rgb: np.ndarray) -> np.ndarray:
    """(..., 3) RGB in [0, 1] -> hue in degrees [0, 360), saturation and value in [0, 1]."""
    high, low = rgb.max(-1), rgb.min(-1)
    span = high - low
    r, g, b = np.moveaxis(rgb, -1, 0)
    safe = np.where(span > 0, span, 1.0)
    sixths = np.select(
        [high == r, high == g], [(g - b) / safe % 6.0, (b - r) / safe + 2.0], (r - g) / safe + 4.0
    )  # fmt: skip
    hue = np.where(span > 0, sixths * 60.0, 0.0)
    return np.stack([hue, span / np.where(high > 0, high, 1.0), high], -1)


def hsv_to_rgb(hsv: np.ndarray) -> np.ndarray:
    """Inverse of `rgb_to_hsv`."""
    hue, saturation, value = np.moveaxis(hsv, -1, 0)
    k = (np.array([5.0, 3.0, 1.0]) + hue[..., None] / 60.0) % 6.0
    return value[..., None] * (1.0 - saturation[..., None] * np.clip(np.minimum(k, 4.0 - k), 0.0, 1.0))


def hue_cluster(sprite: np.ndarray) -> tuple[np.ndarray, float]:
    """Pixels (96, 96) bool of a drawing's dominant colour, and the dominant hue in degrees."""
    hsv = rgb_to_hsv(sprite[..., :3] / 255.0)
    visible = sprite[..., 3] > 32
    weight = hsv[..., 1] * hsv[..., 2] * visible
    histogram, edges = np.histogram(hsv[..., 0], bins=36, range=(0.0, 360.0), weights=weight)
    smooth = histogram + 0.5 * (np.roll(histogram, 1) + np.roll(histogram, -1))
    hue = float(edges[smooth.argmax()] + 5.0)
    distance = np.abs((hsv[..., 0] - hue + 180.0) % 360.0 - 180.0)
    return visible & (distance <= HUE_WINDOW) & (hsv[..., 1] > 0.12), hue


def recolourable(sprite: np.ndarray) -> bool:
    """Whether one colour covers enough of the drawing for a colour word to describe it."""
    cluster, _ = hue_cluster(sprite)
    return bool(cluster.sum() > MIN_COVERAGE * max((sprite[..., 3] > 32).sum(), 1))


def recolour(sprite: np.ndarray, colour: str) -> np.ndarray:
    """Moves a drawing's dominant colour to `colour` (a name of the palette); uint8 (96, 96, 4) in and out."""
    if colour not in OBJECT_COLOURS:
        raise ValueError(f"colour={colour!r} is not in the palette; use one of {', '.join(OBJECT_COLOURS)}")
    cluster, hue = hue_cluster(sprite)
    if not cluster.any():
        return sprite.copy()
    target_hue, target_saturation, target_value = OBJECT_COLOURS[colour]
    hsv = rgb_to_hsv(sprite[..., :3] / 255.0)
    h, s, v = hsv[cluster].T
    # a quarter of the spread of hues is kept, so that painted shadows stay a little warmer or cooler
    h = target_hue + 0.25 * ((h - hue + 180.0) % 360.0 - 180.0)
    s = np.clip(s * target_saturation / s.mean(), 0.0, 1.0)
    v = np.clip(v * target_value / v.mean(), 0.0, 1.0)
    hsv[cluster] = np.stack([h, s, v], -1)
    out = sprite.copy()
    out[..., :3] = np.round(hsv_to_rgb(hsv) * 255.0)
    return out
