"""What the commands share: options, where a result goes, and what is said about it."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from ..imaging import FORMATS
from ..reports import check_image_suffix, write_json


def picture_options(parser: argparse.ArgumentParser, becomes: str) -> None:
    """The options of a command for one picture."""
    parser.add_argument("picture", metavar="PICTURE", type=Path, help=f"a picture file ({', '.join(FORMATS)})")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help=f"where to write (default: <picture>-{becomes}.png)"
    )
    parser.add_argument("--json", action="store_true", help="also print the settings as JSON, and nothing else")
    parser.add_argument("--revision", metavar="SHA", help="branch, tag or commit of a Hub model")


def common_options(parser: argparse.ArgumentParser, steps: int, what: str, model: str = "the demo model") -> None:
    """The options of every command that runs a model."""
    parser.add_argument("--model", metavar="PATH_OR_ID", help=f"folder or Hub id (default: {model})")
    parser.add_argument("--steps", type=int, default=steps, help=f"{what} (default: %(default)s)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the best one present)")
    parser.add_argument("--debug", action="store_true", help="show the trace of an error and the libraries' warnings")


def write_report(report: dict[str, Any], stem: Path, written: dict[Path, str], as_json: bool) -> None:
    """Writes the settings beside the pictures, and says what was written."""
    settings_path = stem.with_name(f"{stem.name}.json")
    write_json(report, settings_path)
    if as_json:
        print(json.dumps(report, indent=2))
        return
    for path, words in written.items():
        print(f"{path}  {words}")
    print(f"{settings_path}  {report['seconds']:.1f} s, {report['network_evaluations']} network evaluations")


def stem_of(output: Path | None, picture: Path, becomes: str) -> Path:
    """The output without its ending."""
    return output.with_suffix("") if output else Path(f"{picture.stem}-{becomes}")


def output_paths(output: Path | None, picture: Path, becomes: str, count: int) -> list[Path]:
    """Found wrong now, a name costs nothing; found wrong after the work, it costs the work."""
    if output:
        check_image_suffix(output, "--output")
    suffix = output.suffix if output else ".png"
    stem = stem_of(output, picture, becomes)
    names = [""] if count == 1 else [f"-{i}" for i in range(1, count + 1)]
    paths = [stem.with_name(f"{stem.name}{name}{suffix}") for name in names]
    for path in paths:
        if path.is_dir():
            raise ValueError(f"--output={str(path)!r} is a folder; name a file")
        if path.exists() and path.samefile(picture):
            raise ValueError(f"--output={str(path)!r} is the picture itself; give another name")
    stem.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(stem.parent, os.W_OK):
        raise ValueError(f"--output={str(paths[0])!r} cannot be written: the folder is not open to you")
    return paths


def quieten(debug: bool) -> None:
    """The libraries' hints are for programmers; on a terminal they would bury the one sentence that matters.

    Some are printed on import, so this comes before ours of the pipelines.
    """
    if debug:
        return
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
