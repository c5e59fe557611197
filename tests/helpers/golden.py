"""Reference arrays computed with the authors' own code, kept in `tests/golden/<topic>/` with a README on their origin."""

import os
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import numpy as np
import torch


GOLDEN = Path(__file__).resolve().parent.parent / "golden"


class GoldenFile(Mapping[str, np.ndarray]):
    """One `.npz` file, read array by array when asked for.

    Args:
        path (`Path`):
            The file.

    Example:
        ```python
        latents = golden("editing/guide_and_rescale_nonstyle.npz").tensor("latents")
        ```
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with np.load(path, allow_pickle=False) as archive:
            self._names = tuple(archive.files)

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._names:
            raise KeyError(f"{self.path.name} has no array {name!r}; it has {', '.join(sorted(self._names))}")
        with np.load(self.path, allow_pickle=False) as archive:
            return archive[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The array as a tensor of its own memory, in `dtype` if one is given."""
        return torch.tensor(self[name], dtype=dtype)


def golden_path(name: str) -> Path:
    """Path of a file or folder below `tests/golden/`.

    Raises:
        FileNotFoundError: If it is not there, with what is.
        ValueError: If `name` leads out of the folder.
    """
    # Not `resolve`, which would follow a link out of the folder.
    path = Path(os.path.normpath(GOLDEN / name))
    if not path.is_relative_to(GOLDEN):
        raise ValueError(f"name={name!r} leads out of tests/golden/; give a path below it such as 'editing/file.npz'")
    if not path.exists():
        folder = path.parent
        found = ", ".join(sorted(item.name for item in folder.iterdir())) if folder.is_dir() else "no such folder"
        raise FileNotFoundError(f"name={name!r} is not in tests/golden/; beside it: {found or 'nothing'}")
    return path


@cache
def golden(name: str) -> GoldenFile:
    """The reference file `tests/golden/<name>`.

    Raises:
        FileNotFoundError: If it is not there.
        ValueError: If `name` is not an `.npz` file below `tests/golden/`.
    """
    if not name.endswith(".npz"):
        raise ValueError(f"name={name!r} is not an .npz file; use golden_path for others")
    return GoldenFile(golden_path(name))
