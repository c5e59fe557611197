"""Damaged files in a pipeline folder: what is loaded without a word, and what fails without a sentence.

Each mutation is made on a copy of a sound folder, the pipeline is loaded from it, and if that succeeds it is run.
"""

import json
import os
import random
import shutil
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from diffusers_ext.integrity import MANIFEST_NAME, DamagedFileError, UnsafeFileError

from .outcomes import NOT_FINITE, OK, RAW, REFUSED, Tally, kind_of_result
from .registry import PIPELINES, PipelineSubject


SAME = "same result"  # nothing that matters was hit: the pipeline gives the very same picture
CHANGED = "another result"  # loads and runs, and paints something else

Damage = Callable[[bytes], bytes]


def sound_folder(subject: PipelineSubject, folder: Path, manifest: bool = True) -> Path:
    """A folder saved by the subject; without its manifest it is what stock diffusers would have saved."""
    subject.build().save_pretrained(folder)
    if not manifest:
        (folder / MANIFEST_NAME).unlink()
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Mutations: endless supplies of (name, damage)
# ---------------------------------------------------------------------------------------------------------------------


def safetensors_mutations(rng: random.Random) -> Iterator[tuple[str, Damage]]:
    def header_length(data: bytes) -> int:
        return struct.unpack("<Q", data[:8])[0]

    def flip(data: bytes, position: int) -> bytes:
        return data[:position] + bytes([data[position] ^ (1 << rng.randrange(8))]) + data[position + 1 :]

    def nan_payload(data: bytes) -> bytes:
        start = 8 + header_length(data)
        position = start + 4 * rng.randrange((len(data) - start) // 4)
        return data[:position] + struct.pack("<f", float("nan")) + data[position + 4 :]

    def renamed(data: bytes) -> bytes:
        length = header_length(data)
        header = json.loads(data[8 : 8 + length])
        name = rng.choice([name for name in header if name != "__metadata__"])
        header[name[:-1] + "#"] = header.pop(name)
        text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
        return struct.pack("<Q", len(text)) + text + data[8 + length :]

    kinds: list[tuple[str, Damage]] = [
        ("truncated", lambda data: data[: rng.randrange(len(data))]),
        ("bit flipped in the header", lambda data: flip(data, rng.randrange(8 + header_length(data)))),
        ("bit flipped in the payload", lambda data: flip(data, rng.randrange(8 + header_length(data), len(data)))),
        ("NaN in the payload", nan_payload),
        ("bytes appended", lambda data: data + rng.randbytes(rng.choice([1, 8, 1000]))),
        ("empty", lambda data: b""),
        ("tensor renamed", renamed),
    ]
    while True:
        yield from kinds


def json_mutations(rng: random.Random) -> Iterator[tuple[str, Damage]]:
    def somewhere(data: bytes, change: Callable[[Any, Any], None]) -> bytes:
        place = content = json.loads(data)
        while isinstance(place, (dict, list)) and place:
            key = rng.choice(sorted(place)) if isinstance(place, dict) else rng.randrange(len(place))
            if not isinstance(place[key], (dict, list)) or not place[key] or rng.random() < 0.3:
                change(place, key)
                return json.dumps(content).encode()
            place = place[key]
        return data + b"#"

    def replaced(*values: Any) -> Damage:
        def change(place: Any, key: Any) -> None:
            place[key] = rng.choice([value for value in values if value != place[key]])

        return lambda data: somewhere(data, change)

    def removed(place: Any, key: Any) -> None:
        del place[key]

    kinds: list[tuple[str, Damage]] = [
        ("truncated", lambda data: data[: rng.randrange(len(data))]),
        ("value of another type", replaced(None, "x", [], {}, 3, 1.5, True)),
        ("number out of range", replaced(0, -1, 10**9, 1e-30, -7.5)),
        ("number not finite", replaced(float("nan"), float("inf"), -float("inf"))),
        ("key or item removed", lambda data: somewhere(data, removed)),
        ("another kind of JSON", lambda data: rng.choice([b"[]", b"null", b"3", b'"x"', b"{}", b"", b"[" * 10000])),
        ("bytes that are no text", lambda data: data[:5] + b"\xff\xfe\x00" + data[5:]),
    ]
    while True:
        yield from kinds


# ---------------------------------------------------------------------------------------------------------------------
# Probe
# ---------------------------------------------------------------------------------------------------------------------


def probe(
    subject: PipelineSubject,
    sound: Path,
    suffix: str,
    count: int,
    load: Callable[[str], Any] | None = None,
    run: Callable[[Any], Any] | None = None,
    seed: int = 0,
) -> Tally:
    """Damages a file that ends in `suffix`, `count` times, each time in a sound copy, and tallies what comes of it."""
    rng = random.Random(f"{seed}/{suffix}")
    mutations = safetensors_mutations(rng) if suffix == ".safetensors" else json_mutations(rng)
    files = sorted(path for path in sound.rglob(f"*{suffix}") if path.name != MANIFEST_NAME)
    run = run or subject.made
    load = load or subject.load
    healthy = run(load(str(sound)))
    tally = Tally()
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "copy"
        shutil.copytree(sound, copy, copy_function=os.link)
        for number in range(count):
            victim = copy / rng.choice(files).relative_to(sound)
            name, damage = next(mutations)
            data = victim.read_bytes()
            damaged = damage(data)
            # The copies are links, so the file is replaced and never written through.
            victim.unlink()
            victim.write_bytes(damaged)
            outcome, message = _load_and_run(load, run, copy, healthy)
            outcome = OK if damaged == data else outcome
            description = f"#{number} {name} in {victim.relative_to(copy)} -> {message[:300]}"
            tally.counts[outcome] += 1
            if outcome not in (OK, REFUSED, SAME):
                tally.faults.append(f"{outcome}: {description}")
            victim.write_bytes(data)
    return tally


def _load_and_run(
    load: Callable[[str], Any], run: Callable[[Any], Any], folder: Path, healthy: Any
) -> tuple[str, str]:
    try:
        pipeline = load(str(folder))
    except (DamagedFileError, UnsafeFileError) as error:
        return (REFUSED if str(folder) in str(error) or ": tensor" in str(error) else RAW), str(error)
    except (OSError, ValueError) as error:
        # A stock sentence counts if it says which folder, file or component.
        names = (folder.name, ".json", ".safetensors", *(path.name for path in folder.iterdir()), "expected")
        known = any(name in str(error) for name in names) or _is_ours(error)
        return (REFUSED if known else RAW), f"{type(error).__name__}: {error}"
    except Exception as error:
        return RAW, f"{type(error).__name__}: {error}"
    try:
        result = run(pipeline)
    except (ValueError, TypeError) as error:
        return (REFUSED if _is_ours(error) else RAW), f"when run: {type(error).__name__}: {error}"
    except Exception as error:
        return RAW, f"when run: {type(error).__name__}: {error}"
    if kind_of_result(result) != OK:
        return NOT_FINITE, "when run"
    return (SAME if result.shape == healthy.shape and (result == healthy).all() else CHANGED), ""


def _is_ours(error: Exception) -> bool:
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return traceback is not None and "/diffusers_ext/" in traceback.tb_frame.f_code.co_filename


def pickle_only(subject: PipelineSubject, sound: Path) -> str:
    """The message with which a folder without safetensors is refused; an empty string if it is loaded."""
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "pickled"
        shutil.copytree(sound, copy)
        (copy / MANIFEST_NAME).unlink(missing_ok=True)
        for path in sorted(copy.rglob("*.safetensors")):
            torch.save(load_file(path), path.with_suffix(".bin"))
            path.unlink()
        try:
            subject.load(str(copy))
        except UnsafeFileError as error:
            return str(error)
        return ""


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 50
    for subject in PIPELINES:
        for manifest in (True, False):
            with tempfile.TemporaryDirectory() as scratch:
                sound = sound_folder(subject, Path(scratch) / "sound", manifest)
                for suffix in (".safetensors", ".json"):
                    started = time.perf_counter()
                    tally = probe(subject, sound, suffix, count)
                    seconds = time.perf_counter() - started
                    print(subject.name, f"manifest={manifest}", suffix, tally.as_dict(), f"{seconds:.0f} s")
                    print(*(f"   {fault}" for fault in tally.faults), sep="\n")
                print(pickle_only(subject, sound))


if __name__ == "__main__":
    main()
