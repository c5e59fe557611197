"""Batches in one process and in two, and one that is killed again and again, without an import for each of them.

They are forked from a process that has imported everything. Run it as a program (`python -m tests.batching.launch
FOLDER`): a process that is to fork must not have threads. Two processes find each other by the variables that
`accelerate launch` and torchrun set, and are joined by gloo.
"""

import json
import multiprocessing
import os
import random
import socket
import sys
from pathlib import Path

import torch

from diffusers_ext import batching, pipelines  # noqa: F401 (imported for the forks)
from diffusers_ext.cli import main
from diffusers_ext.data import DEMO_OBJECTS, EmojiScenes
from diffusers_ext.imaging import to_pil
from diffusers_ext.manifest import digest_of
from tests.reliability.kill import half_written, kill_during


PICTURES = 14
BAD = 2
KILLS = 4
SOME_FAILED = 3


def draw_pictures(folder: Path, count: int, bad: int) -> None:
    """Pictures of the demo model's world, of which so many are damaged."""
    folder.mkdir(parents=True)
    world = EmojiScenes(resolution=64, objects=DEMO_OBJECTS)
    pictures, _ = world.render(world.sample(count, 0, "held_out"))
    for i, picture in enumerate(pictures):
        to_pil(picture).save(folder / f"{i:03d}.png")
    for i in range(bad):
        path = folder / f"{i * count // bad:03d}.png"
        path.write_bytes(path.read_bytes()[:90])


def restore(folder: Path, output: str) -> None:
    """One process of a batch; its exit status says whether it went as it should."""
    # Noise at its full size, so that a wrong seed shows.
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    words = ["batch", "restore", str(folder / "in"), str(folder / output), "--set", "noise_scale=1"]
    code = main([*words, "--device", "cpu"])
    if code != SOME_FAILED:
        raise SystemExit(f"{output} ended with {code}")


def restore_in_two(folder: Path, output: str) -> None:
    """Two processes of a batch."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "GLOO_SOCKET_IFNAME": "lo"}

    def work(rank: int) -> None:
        os.environ.update(place, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
        restore(folder, output)

    processes = [multiprocessing.get_context("fork").Process(target=work, args=(rank,)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise RuntimeError(f"{output}: the two ended with {[process.exitcode for process in processes]}")


def outputs(folder: Path) -> int:
    """How many outputs a folder holds."""
    return len(list(folder.glob("[!.]*.json")))


def faults_of(output: Path) -> list[str]:
    """What is wrong with the output folder of a killed process: a record whose picture is not the one it speaks of."""
    faults = []
    for path in output.rglob("[!.]*.json"):
        record = json.loads(path.read_text())
        if record["picture_sha256"] != digest_of(path.with_suffix(".png")):
            faults.append(f"{path.name} speaks of another picture")
    return faults


def run(folder: Path) -> None:
    """Writes `one`, `two` and `killed` into the folder, and prints what happened."""
    torch.set_num_threads(1)
    draw_pictures(folder / "in", PICTURES, BAD)
    if kill_during(lambda: restore(folder, "one"), None, 300.0):
        raise RuntimeError("a batch of a few pictures took five minutes")
    restore_in_two(folder, "two")

    rng = random.Random(0)
    killed, faults, kills, inside = folder / "killed", [], 0, 0
    for number in range(KILLS):
        goal = outputs(killed) + 2
        # Every other kill is aimed at a file that is being written.
        aim = number % 2 == 0

        def is_under_way() -> bool:
            return outputs(killed) >= goal and (half_written(killed) or not aim)

        delay = 0.0 if aim else rng.uniform(0.0, 0.05)
        kills += kill_during(lambda: restore(folder, "killed"), is_under_way, delay)
        inside += half_written(killed)
        faults += faults_of(killed)
    made = outputs(killed)
    restore_in_two(folder, "killed")
    left = [path.name for path in killed.rglob("*.tmp")]
    print(json.dumps({"kills": kills, "inside": inside, "made": made, "faults": faults, "left": left}))


if __name__ == "__main__":
    run(Path(sys.argv[1]))
