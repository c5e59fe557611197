"""The restoration sheet: pictures degraded in six ways, restored in few network evaluations and by the usual hundred.

None of them was trained on: three photographs, and three scenes of the held-out split. All columns use the same network, and those with
start noise the same noise.
"""

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import MRRestorationPipeline
from ..data import DEMO_OBJECTS, EmojiScenes
from ..data.degradations import gaussian_blur, gaussian_noise, jpeg, low_light, rain, scratches
from ..data.photographs import packaged_crops
from ..hub import RESTORATION_MODEL_NAME, load_pipeline, resolve_model
from ..imaging import to_pil, to_tensor
from ..metrics import psnr
from ..reports import check_output_folder, write_sheet
from ..schedulers import MRScheduler
from ..sheets import Tile, contact_sheet


FEW, MORE, MANY = 5, 10, 100


@dataclass(frozen=True)
class Damage:
    """A picture and what happens to it.

    Args:
        picture (`str`): Name of a photograph in `packaged_crops()`, or `scene N` for the N-th held-out scene.
        words (`str`): What happens, for the sheet.
        spoil (`Callable`): A batch of pictures in [0, 1] and a generator to the degraded batch.
    """

    picture: str
    words: str
    spoil: Callable[[torch.Tensor, torch.Generator], torch.Tensor]


DAMAGES = (
    Damage("chelsea", "noise, deviation .12", lambda x, g: gaussian_noise(x, 0.12, g)),
    Damage("coffee", "rain", lambda x, g: rain(x, 0.01, 12.0, 80.0, g)),
    Damage("astronaut", "scratches", lambda x, g: scratches(x, 9, 2.5, g)),
    Damage("scene 1", "blur of 1.5 pixels", lambda x, g: gaussian_blur(x, 1.5)),
    Damage("scene 2", "a third of the light", lambda x, g: low_light(x, 0.33, 1.1, 0.01, g)),
    Damage("scene 3", "JPEG of quality 10", lambda x, g: jpeg(x, 10)),
)


def run_restoration_demo(
    output: str | os.PathLike[str] = "demo",
    *,
    model: str | os.PathLike[str] | None = None,
    device: str | torch.device | None = None,
    damages: Sequence[Damage] = DAMAGES,
    many: int = MANY,
) -> dict[str, Any]:
    """Degrades pictures, restores them, and writes a sheet and the figures.

    Args:
        output (`str` or `os.PathLike`, *optional*, defaults to `"demo"`):
            Folder for `restoration.png` and `restoration.json`; it is made if needed.
        model (`str` or `os.PathLike`, *optional*):
            Folder or Hub id of an `MRRestorationPipeline`; the restoration model of this project by default.
        device (`str` or `torch.device`, *optional*):
            Where to compute.
        damages (`Sequence[Damage]`, *optional*):
            The rows.
        many (`int`, *optional*, defaults to 100):
            Evaluations of the baseline, posterior sampling.

    Returns:
        `dict`: What `restoration.json` holds: for each picture the PSNR in dB to the clean one, before and after, and seconds.

    Raises:
        ValueError: If `output` is a file.
        OSError: If there is no such model, or the folder cannot be written.
    """
    folder = check_output_folder(output)
    resolved = resolve_model(model, RESTORATION_MODEL_NAME)
    pipe = load_pipeline(MRRestorationPipeline, resolved, device=device)
    pipe.set_progress_bar_config(disable=True)
    own = pipe.scheduler
    posterior = MRScheduler.from_config(own.config, algorithm_type="posterior")
    runs = {
        f"{FEW} evaluations, no start noise": ("psnr_few_no_noise", own, FEW, 0.0),
        f"{FEW} evaluations": ("psnr_few", own, FEW, 1.0),
        f"{MORE} evaluations": ("psnr_more", own, MORE, 1.0),
        f"{many}, posterior sampling": ("psnr_posterior", posterior, many, 1.0),
    }
    rows, notes = [], []
    reports: list[dict[str, Any]] = []
    for damage in damages:
        clean = _clean(damage.picture)
        degraded = damage.spoil(clean, torch.Generator().manual_seed(0))
        tiles = [Tile(to_pil(degraded[0] * 2 - 1), f"{damage.words}: {_decibel(degraded, clean)}")]
        values: dict[str, float | None] = {}
        evaluations = 0
        began = time.perf_counter()
        for name, scheduler, count, noise_scale in runs.values():
            pipe.scheduler = scheduler
            generator = torch.Generator().manual_seed(0)
            result: Any = pipe(degraded, count, noise_scale=noise_scale, generator=generator, output_type="pt")
            restored = result.images.cpu()
            evaluations += result.network_evaluations
            values[name] = _psnr(restored, clean)
            tiles.append(Tile(to_pil(restored[0] * 2 - 1), _decibel(restored, clean)))
        seconds = time.perf_counter() - began
        rows.append([*tiles, Tile(to_pil(clean[0] * 2 - 1), damage.picture)])
        notes.append(f"{seconds:.1f} s, {evaluations} network evaluations")
        reports.append(
            {
                "picture": damage.picture,
                "damage": damage.words,
                "psnr_degraded": _psnr(degraded, clean),
                **values,
                "seconds": round(seconds, 3),
                "network_evaluations": evaluations,
            }
        )
    pipe.scheduler = own
    columns = ["degraded", *runs, "clean"]
    subtitle = (
        f"Mean-reverting diffusion, {Path(resolved).name} on {pipe.device.type}: the same network in every column. "
        "PSNR to the clean picture."
    )
    sheet = contact_sheet(rows, title="Pictures restored", subtitle=subtitle, columns=columns, notes=notes)
    return write_sheet(
        sheet,
        folder / "restoration.png",
        folder / "restoration.json",
        model=resolved,
        device=str(pipe.device),
        pictures=reports,
        seconds=round(sum(row["seconds"] for row in reports), 3),
        network_evaluations=sum(row["network_evaluations"] for row in reports),
    )


def _clean(name: str) -> torch.Tensor:
    """A picture (1, 3, H, W) in [0, 1]."""
    if name.startswith("scene "):
        world = EmojiScenes(None, 64, objects=DEMO_OBJECTS)
        return world.render(world.sample(1, seed=int(name.split()[1]), split="held_out"))[0] / 2.0 + 0.5
    return to_tensor(packaged_crops()[name])[None] / 2.0 + 0.5


def _psnr(picture: torch.Tensor, clean: torch.Tensor) -> float | None:
    """Of pictures in [0, 1]; `None` for equal ones, which JSON has no number for."""
    value = float(psnr(picture * 2 - 1, clean * 2 - 1))
    return round(value, 2) if math.isfinite(value) else None


def _decibel(picture: torch.Tensor, clean: torch.Tensor) -> str:
    value = _psnr(picture, clean)
    return "the clean picture" if value is None else f"{value:.1f} dB"
