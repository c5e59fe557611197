"""One process, two processes, and a batch that was killed in the middle: the same files, bit for bit."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from PIL import Image

from diffusers_ext.data import DEMO_OBJECTS, EmojiScenes
from tests.batching.launch import BAD, KILLS, PICTURES


ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
BATCH = ["-m", "diffusers_ext.cli", "batch"]
# As a user would start two processes on a machine without a GPU.
LAUNCHED = [
    "-m", "accelerate.commands.launch", f"--config_file={ROOT / 'training' / 'configs' / 'cpu_2_gloo.yaml'}",
    "--main_process_port=0", *BATCH,
]  # fmt: skip
THOUSAND = 1000
DAMAGED = 5


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.reliability
def test_two_processes_and_a_killed_run_give_the_files_of_one(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.batching.launch", str(tmp_path)],
        env=ENVIRONMENT,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kills"] == KILLS and not found["faults"] and not found["left"]
    # The kills came in the middle: something was done before the last run, and something was left to it.
    assert KILLS <= found["made"] < PICTURES - BAD and found["inside"]
    one = contents(tmp_path / "one")
    assert len(one) == 2 * (PICTURES - BAD) + 2 and one["failures.jsonl"].count(b"\n") == BAD
    assert contents(tmp_path / "two") == one and contents(tmp_path / "killed") == one
    assert len({data for name, data in one.items() if name.endswith(".png")}) == PICTURES - BAD


def scenes(folder: Path) -> Path:
    """A list of a thousand prompts of the demo model's world, a few of which cannot be drawn."""
    folder.mkdir(parents=True, exist_ok=True)
    world = EmojiScenes(resolution=64, objects=DEMO_OBJECTS)
    prompts = world.captions(world.sample(THOUSAND, 0, "train"))
    jobs = [{"name": f"{i // 100}/{i:03d}", "prompt": prompt} for i, prompt in enumerate(prompts)]
    for i in range(DAMAGED):
        jobs[i * THOUSAND // DAMAGED + 7]["guidance_scale"] = "much"
    path = folder / "jobs.jsonl"
    path.write_text("".join(f"{json.dumps(job)}\n" for job in jobs))
    return path


def start(launcher: list[str], output: Path, spec: Path, log: Path) -> "subprocess.Popen[bytes]":
    words = ["sample", str(output), "--spec", str(spec), "--device", "cpu"]
    words += ["--set", "num_inference_steps=2", "--set", "guidance_scale=1"]
    with open(log, "ab") as file:
        return subprocess.Popen([sys.executable, *launcher, *words], env=ENVIRONMENT, stdout=file, stderr=file)


def kill(process: "subprocess.Popen[bytes]") -> None:
    """kill -9 for a launcher and all that it started, which would go on without it."""
    if process.poll() is not None:
        return
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        member.kill()
    process.wait()
    psutil.wait_procs(family, timeout=30)


@pytest.mark.nightly
@pytest.mark.reliability
@pytest.mark.timeout(5400)
def test_a_thousand_pictures_of_two_processes_killed_in_the_middle_are_those_of_one_that_nobody_killed(
    tmp_path: Path,
) -> None:
    spec, log = scenes(tmp_path), tmp_path / "log"
    killed = tmp_path / "killed"
    process = start(LAUNCHED, killed, spec, log)
    try:
        while process.poll() is None and len(list(killed.rglob("*.png"))) < THOUSAND // 2:
            time.sleep(0.2)
        assert process.poll() is None, log.read_text()[-3000:]
    finally:
        kill(process)
    before = {path: path.stat().st_mtime_ns for path in killed.rglob("*.png") if path.with_suffix(".json").is_file()}
    assert THOUSAND // 3 < len(before) < THOUSAND - 50
    for path in before:
        with Image.open(path) as picture:
            assert picture.load() is not None and picture.size == (64, 64)

    # A launcher makes 1 of the status 3 of its processes.
    assert start(LAUNCHED, killed, spec, log).wait() == 1
    assert f"{THOUSAND - DAMAGED - len(before)} done, {len(before)} were there, {DAMAGED} failed" in log.read_text()
    assert all(path.stat().st_mtime_ns == moment for path, moment in before.items())

    whole = tmp_path / "whole"
    assert start(BATCH, whole, spec, log).wait() == 3
    files = contents(whole)
    assert len(files) == 2 * (THOUSAND - DAMAGED) + 2 and files["failures.jsonl"].count(b"\n") == DAMAGED
    assert contents(killed) == files
