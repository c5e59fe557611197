"""Good and bad values that several subjects share."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tests.helpers.tiny_models import LATENT_SIZE

from .registry import INF, NAN, Argument, Made


NOT_NUMBERS = (NAN, INF, -INF, "7.5", "", None, [], {}, (1, 2), 1j, object)
NOT_COUNTS = (0, -1, -(2**63), 2.5, NAN, INF, "50", None, [], True, 2**31, 10**30)
NOT_TEXT = (0, 1.5, True, b"bytes", {}, [], [None], ["a", 1], object)
TYPOS = ("", "Matched", "matchd", "offical", " pil", None, 0, [], ("matched",))

PICTURE_KINDS = ("RGB", "L", "RGBA", "1", "CMYK", "P", "LA", "I;16", "I", "F", "HSV", "numpy", "tensor", "list")


def picture(kind: str) -> Made:
    def make(rng: random.Random) -> Any:
        height, width = rng.choice([8, 31, 32, 33]), rng.choice([8, 17, 32, 40])
        pixels = np.random.default_rng(rng.randrange(2**31)).integers(0, 256, (height, width, 3), dtype=np.uint8)
        if kind in ("I;16", "I", "F"):
            values = pixels[..., 0].astype(np.float32) / (255 if kind == "F" else 1)
            return Image.fromarray(values.astype({"I;16": np.uint16, "I": np.int32, "F": np.float32}[kind]))
        array = pixels.astype(np.float32) / 255
        if kind == "numpy":
            return rng.choice([pixels, array, array.astype(np.float64), array[None], array[..., 0], pixels[..., :1]])
        if kind == "tensor":
            tensor = torch.from_numpy(array).permute(2, 0, 1)
            return rng.choice([tensor, tensor[None], 2 * tensor - 1, tensor.half(), tensor.double(), tensor[:1]])
        if kind == "list":
            return [Image.fromarray(pixels)] * rng.choice([1, 2])
        return Image.fromarray(pixels).convert(kind)

    return Made(f"<{kind} picture>", make)


def _bad_pictures() -> dict[str, Callable[[], Any]]:
    array, tensor = np.full((32, 32, 3), 0.5, dtype=np.float32), torch.full((3, 32, 32), 0.5)
    return {
        "two channels": lambda: array[..., :2],
        "five channels": lambda: torch.zeros(1, 5, 32, 32),
        "no pixels": lambda: array[:0],
        "one axis": lambda: tensor.flatten(),
        "five axes": lambda: torch.zeros(1, 1, 3, 32, 32),
        "NaN": lambda: np.where(np.arange(3) == 1, np.nan, array).astype(np.float32),
        "NaN tensor": lambda: tensor * NAN,
        "inf": lambda: tensor / 0,
        "range 0..255": lambda: array * 255,
        "complex": lambda: tensor.to(torch.complex64),
        "integers": lambda: (tensor * 255).to(torch.uint8),
        "booleans": lambda: array > 0.4,
        "objects": lambda: np.full((4, 4, 3), None),
        "text array": lambda: np.full((4, 4, 3), "a"),
        "two sizes": lambda: [Image.new("RGB", (32, 32)), Image.new("RGB", (16, 32))],
        "mixed": lambda: [Image.new("RGB", (32, 32)), array],
    }


def _as_made(label: str, make: Callable[[], Any]) -> Made:
    return Made(f"<picture: {label}>", lambda rng: make())


PICTURES = Argument(
    good=[picture(kind) for kind in PICTURE_KINDS],
    bad=[
        *(_as_made(label, make) for label, make in _bad_pictures().items()),
        None, "picture.png", Path("picture.png"), 5, b"PNG", [], [None], {}, object, [[Image.new("RGB", (8, 8))]],
    ],
)  # fmt: skip

LATENTS = Argument(
    good=[None, Made("<latents>", lambda rng: torch.randn(1, 4, LATENT_SIZE, LATENT_SIZE))],
    bad=[
        Made("<latents (1,1,16,16)>", lambda rng: torch.randn(1, 1, LATENT_SIZE, LATENT_SIZE)),
        Made("<latents (1,4,1,1)>", lambda rng: torch.randn(1, 4, 1, 1)),
        Made("<latents scalar>", lambda rng: torch.tensor(1.0)),
        Made("<latents NaN>", lambda rng: torch.full((1, 4, LATENT_SIZE, LATENT_SIZE), NAN)),
        Made("<latents inf>", lambda rng: torch.full((1, 4, LATENT_SIZE, LATENT_SIZE), INF)),
        "latents", 0, [],
    ],
)  # fmt: skip
