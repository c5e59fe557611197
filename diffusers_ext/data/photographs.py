"""Photographs that scikit-image ships, as training and test pictures; nothing is downloaded, and only files are read.

Those below say in scikit-image's own notes (`skimage/data/_fetchers.py`) that they are CC0 or in the public domain:

    camera       CC0, Lav Varshney                         retina               CC0, Mikael Haggstrom
    brick        CC0, cc0textures.com                      rocket               public domain, SpaceX
    grass        CC0, linolafett                           hubble_deep_field    public domain, NASA
    gravel       CC0, cc0textures.com                      astronaut            public domain, NASA
    chelsea      CC0, Stefan van der Walt                  coffee               CC0, Rachel Michetti

Others it has (coins, ihc, motorcycle, ...) say less or something else, and are not used.

The middles of the three that nothing here is trained on lie in this package too, in `held_out/`, 96 pixels wide after halving, so that
demos need nothing more.
"""

import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

from ..imaging import open_image


TRAINING_PHOTOGRAPHS = (
    "camera.png", "brick.png", "grass.png", "gravel.png", "rocket.jpg", "hubble_deep_field.jpg", "retina.jpg",
)  # fmt: skip
# never trained on
HELD_OUT_PHOTOGRAPHS = ("chelsea.png", "coffee.png", "astronaut.png")
PACKAGED_SIDE = 96
GRAYSCALE = ("camera.png", "brick.png", "grass.png", "gravel.png")


def photograph(name: str) -> Image.Image:
    """One of the photographs, in RGB.

    Args:
        name (`str`): An entry of `TRAINING_PHOTOGRAPHS` or `HELD_OUT_PHOTOGRAPHS`.

    Raises:
        ValueError: If it is none of these.
        FileNotFoundError: If scikit-image is not installed or does not ship it.

    Example:
        ```python
        from diffusers_ext.data.photographs import photograph

        cat = photograph("chelsea.png")
        ```
    """
    known = (*TRAINING_PHOTOGRAPHS, *HELD_OUT_PHOTOGRAPHS)
    if name not in known:
        raise ValueError(f"name={name!r} is not a photograph of known licence; use one of {', '.join(known)}")
    # the package itself is not imported: only a picture file of it is wanted
    found = importlib.util.find_spec("skimage")
    for folder in (found.submodule_search_locations or []) if found else []:
        path = Path(folder) / "data" / name
        if path.is_file():
            return open_image(path)
    raise FileNotFoundError(
        f"{name} comes with scikit-image, which is not installed; pip install 'diffusers-ext[bench]'"
    )


class PhotographCrops:
    """Random crops of the training photographs, scaled, mirrored, and coloured where they are gray.

    Args:
        size (`int`): Side of the crops in pixels, from 8 to 256.

    Raises:
        ValueError: If `size` is out of range.
        FileNotFoundError: If scikit-image is not installed.

    Example:
        ```python
        import torch
        from diffusers_ext.data.photographs import PhotographCrops

        crops = PhotographCrops(64).draw(4, torch.Generator().manual_seed(0))  # (4, 3, 64, 64) in [0, 1]
        ```
    """

    def __init__(self, size: int) -> None:
        if isinstance(size, bool) or not isinstance(size, int) or not 8 <= size <= 256:
            raise ValueError(f"size={size!r} is out of range; use an int from 8 to 256")
        self.size = size
        self._sources: list[tuple[torch.Tensor, bool]] = []
        for name in TRAINING_PHOTOGRAPHS:
            picture = photograph(name)
            while min(picture.size) > 1.5 * size:
                pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
                image = pixels.reshape(picture.height, picture.width, 3).permute(2, 0, 1)
                # at full size photographs are soft and noisy; halved they are as sharp as pixels can be
                self._sources.append((image, name in GRAYSCALE))
                picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.LANCZOS)

    def draw(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """`count` crops (n, 3, size, size) of floats in [0, 1]."""
        return torch.stack([self._crop(generator) for _ in range(count)])

    def _crop(self, generator: torch.Generator) -> torch.Tensor:
        which = torch.randint(len(self._sources), (1,), generator=generator).item()
        image, is_gray = self._sources[int(which)]
        share = torch.rand(8, generator=generator)
        room = torch.tensor([side - self.size for side in image.shape[1:]]) + 1
        top, left = (share[:2] * room).long().tolist()
        crop = image[:, top : top + self.size, left : left + self.size].float() / 255.0
        if share[2] < 0.5:
            crop = crop.flip(-1)
        if share[3] < 0.5:
            crop = crop.transpose(1, 2)
        if is_gray and share[4] < 0.75:
            # from one random colour in the shadows to another in the lights
            dark, light = torch.rand(2, 3, generator=generator)
            crop = (0.4 * dark)[:, None, None] * (1.0 - crop) + (0.4 + 0.6 * light)[:, None, None] * crop
        return crop


def held_out_crops(size: int, scale: float = 0.5) -> dict[str, torch.Tensor]:
    """The middle of each held-out photograph.

    Args:
        size (`int`): Side of the squares in pixels, at least 8.
        scale (`float`, *optional*, defaults to 0.5): Factor that the photographs are scaled by before.

    Returns:
        `dict[str, torch.Tensor]`: name without ending -> (1, 3, size, size) of floats in [0, 1].

    Raises:
        ValueError: If a photograph is smaller than that.
        FileNotFoundError: If scikit-image is not installed.
    """
    crops = {}
    for name in HELD_OUT_PHOTOGRAPHS:
        picture = photograph(name)
        pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
        image = pixels.reshape(1, picture.height, picture.width, 3).permute(0, 3, 1, 2).float() / 255.0
        image = F.interpolate(image, scale_factor=scale, mode="bicubic", antialias=True).clamp(0.0, 1.0)
        height, width = image.shape[2:]
        if size < 8 or size > min(height, width):
            raise ValueError(
                f"size={size!r} does not fit {name} of {width}x{height} pixels; use 8 to {min(height, width)}"
            )
        top, left = (height - size) // 2, (width - size) // 2
        crops[Path(name).stem] = image[..., top : top + size, left : left + size]
    return crops


def packaged_crops() -> dict[str, Image.Image]:
    """What `held_out_crops(96)` gives, from files of this package.

    Returns:
        `dict[str, PIL.Image.Image]`: name without ending -> picture of 96 x 96 pixels in RGB.

    Example:
        >>> {name: picture.size for name, picture in packaged_crops().items()}
        {'chelsea': (96, 96), 'coffee': (96, 96), 'astronaut': (96, 96)}
    """
    folder = Path(__file__).parent / "held_out"
    return {Path(name).stem: open_image(folder / f"{Path(name).stem}.png") for name in HELD_OUT_PHOTOGRAPHS}
