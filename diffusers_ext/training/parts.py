"""What takes long to make before training: made in parts by all processes, kept in one file, resumed where it was."""

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import save

from ..integrity import atomic_write
from .latents import read_kept


logger = logging.getLogger(__name__)

Tensors = dict[str, torch.Tensor]


def make_in_parts(
    file: Path,
    make: Callable[[torch.Tensor], Tensors],
    finish: Callable[[Tensors], Tensors],
    ends: Sequence[int],
    accelerator: Accelerator,
    *,
    what: str,
    size: int,
    save_seconds: float,
) -> None:
    """Makes rows 0 ... ends[-1] and writes what becomes of them; what is done meanwhile is kept beside the file.

    Args:
        file: The safetensors file to write, in the folder of the run.
        make: From row numbers (n,) to tensors (n, ...), a pure function of each row: neither its neighbours nor the
            number of processes may change it.
        finish: From the tensors of all rows to those of the file.
        ends: Rising row numbers that no call of `make` reaches across; the last is the number of rows.
        accelerator: All processes share the work and call this together.
        what: Name of the rows in messages, e.g. "pairs".
        size: Most rows of a call of `make`.
        save_seconds: What an interruption loses at most; the remains are gone on with by the next call.

    Raises:
        ValueError: If a number is not finite, or what an interrupted call left is damaged.
        OSError: If the file cannot be written. What was kept before is then still there.
    """
    unfinished = file.with_name(f".{file.stem}.unfinished")
    parts = [read_kept(unfinished, f"make the {what} again")] if unfinished.is_file() else []
    accelerator.wait_for_everyone()
    done = first = sum(len(next(iter(part.values()))) for part in parts)
    total = ends[-1]
    began = saved = time.monotonic()
    file.parent.mkdir(parents=True, exist_ok=True)
    while done < total:
        end = next(end for end in ends if end > done)
        share = min(size, -(-(end - done) // accelerator.num_processes))
        rows = done + accelerator.process_index * share + torch.arange(share)
        made = {
            name: accelerator.gather(value.to(accelerator.device))[: end - done].cpu()
            for name, value in make(rows.clamp(max=end - 1)).items()
        }
        if not all(bool(torch.isfinite(value).all()) for value in made.values()):
            raise ValueError(
                "the teacher's samples are not finite; lower teacher_guidance_scale, or try the teacher in its "
                "pipeline"
            )
        parts.append(made)
        done += len(next(iter(made.values())))
        if accelerator.is_main_process and time.monotonic() - saved > save_seconds and done < total:
            atomic_write(unfinished, save(_joined(parts)))
            saved = time.monotonic()
            left = (saved - began) / (done - first) * (total - done)
            logger.info("%d of %d %s, about %.0f s more", done, total, what, left)
    if accelerator.is_main_process:
        atomic_write(file, save({name: value.contiguous() for name, value in finish(_joined(parts)).items()}))
        unfinished.unlink(missing_ok=True)
        logger.info("made %d %s in %.0f s", total - first, what, time.monotonic() - began)


def _joined(parts: Sequence[Tensors]) -> Tensors:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
