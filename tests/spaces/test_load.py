"""The Spaces under load: nothing is mixed up or lost, also when visitors leave in between, and how long a start and
an answer take."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from diffusers_ext.serving.work import THREAD_NAME
from tests.helpers.fresh_process import ROOT

from .test_spaces import NAMES
from .visitors import EXAMPLES, PROMPT, SOURCE, api_names, client, editor, pixels, upload


STEERED = ROOT / "spaces" / "steer" / "examples"
START, ANSWER = 20, 15  # seconds


@pytest.mark.slow
def test_twenty_restorations_at_once_are_those_one_by_one(space: Callable[[str], Any]) -> None:
    _, url = space("restore")
    visitors = [client(url) for _ in range(20)]

    def restore(seed: int) -> bytes:
        names = ("noise", "rain", "scratches", "darkness")
        file = ROOT / "spaces" / "restore" / "examples" / f"{names[seed % 4]}.png"
        result, _ = visitors[seed].predict(upload(file), None, 1 + seed % 3, 1.0, seed, api_name="/restore")
        return pixels(result[1]).tobytes()

    check_load(restore)


@pytest.mark.slow
def test_twenty_edits_at_once_are_those_one_by_one(space: Callable[[str], Any]) -> None:
    module, url = space("edit")
    visitors = [client(url) for _ in range(20)]

    def edit(number: int) -> bytes:
        prompt = f"a {('red', 'green', 'pink', 'gray')[number % 4]} star on a blue background"
        method, steps = list(module.METHODS)[number % 2], 4 + number // 4
        result, _, _ = visitors[number].predict(
            upload(EXAMPLES / "star.png"), SOURCE, prompt, method, steps, 7.5, api_name="/edit"
        )
        return pixels(result[1]).tobytes()

    check_load(edit)


@pytest.mark.slow
def test_twenty_steerings_at_once_are_those_one_by_one(space: Callable[[str], Any]) -> None:
    module, url = space("steer")
    visitors = [client(url) for _ in range(20)]

    def steer(number: int) -> bytes:
        task = list(module.TASKS)[number % 4]
        value = editor(STEERED / "fish.png", STEERED / "fish-mask.png")
        _, _, steered, _ = visitors[number].predict(
            value, task, PROMPT, False, 4 + number % 2, 3.0, 2.0, number, api_name="/steer"
        )
        return pixels(steered).tobytes()

    check_load(steer)


@pytest.mark.slow
def test_twenty_comparisons_at_once_are_those_one_by_one(space: Callable[[str], Any]) -> None:
    _, url = space("distilled")
    check_load(comparing(url, 20))


@pytest.mark.slow
def test_five_visitors_of_twenty_leave_in_the_middle_and_nobody_else_notices(space: Callable[[str], Any]) -> None:
    """Two break off the stream of their answers while they are served, two cancel their job, and one leaves without
    having listened."""
    _, url = space("distilled")
    compare = comparing(url, 20)
    leaving = {2: break_off, 6: cancel, 10: break_off, 14: cancel, 18: never_listen}
    left: list[int] = []

    def ask(number: int) -> bytes:
        if number not in leaving:
            return compare(number)
        leaving[number](url)
        left.append(number)
        return b""

    with ThreadPoolExecutor(20) as pool:
        together = list(pool.map(ask, range(20)))
    assert sorted(left) == sorted(leaving)
    ended = time.monotonic() + 20
    while any(thread.name == THREAD_NAME for thread in threading.enumerate()):
        assert time.monotonic() < ended, "the work of a visitor who left goes on"
        time.sleep(0.1)
    staying = [number for number in range(20) if number not in leaving]
    answers = [together[number] for number in staying]
    assert len(set(answers)) == len(staying), "requests that differ have equal answers"
    assert answers == [compare(number) for number in staying]


def comparing(url: str, count: int) -> Callable[[int], bytes]:
    """A request of each of some visitors to the Space of teacher and students: all three pictures."""
    visitors = [client(url) for _ in range(count)]

    def compare(number: int) -> bytes:
        prompt = f"a {('red', 'green', 'pink', 'gray')[number % 4]} star on a blue background"
        *pictures, _ = visitors[number].predict(prompt, 4 + number % 3, 3.0, number, api_name="/distilled")
        return b"".join(pixels(picture).tobytes() for picture in pictures)

    return compare


# The longest that may be asked for, so that work which went on would be seen.
LONG = [PROMPT, 60, 3.0, 0]


def break_off(url: str) -> None:
    """Hears that the work has begun, and is gone."""
    session = f"leaves-{threading.get_ident()}"
    join(url, session)
    with urllib.request.urlopen(f"{url}gradio_api/queue/data?session_hash={session}", timeout=300) as stream:
        while b'"process_generating"' not in stream.readline():
            pass


def never_listen(url: str) -> None:
    """Closes his page before he heard anything."""
    session = f"silent-{threading.get_ident()}"
    with urllib.request.urlopen(f"{url}gradio_api/heartbeat/{session}", timeout=30) as heart:
        heart.readline()
        join(url, session)


def cancel(url: str) -> None:
    job = client(url).submit(*LONG, api_name="/distilled")
    while job.status().code.name in ("STARTING", "JOINING_QUEUE", "IN_QUEUE", "QUEUE_FULL", "SENDING_DATA"):
        time.sleep(0.05)
    job.cancel()


def join(url: str, session: str) -> None:
    with urllib.request.urlopen(f"{url}config", timeout=30) as page:
        (function,) = (i["id"] for i in json.load(page)["dependencies"] if i["api_name"] == "distilled")
    body = json.dumps({"data": LONG, "fn_index": function, "session_hash": session}).encode()
    request = urllib.request.Request(f"{url}gradio_api/queue/join", body, {"Content-Type": "application/json"})
    urllib.request.urlopen(request, timeout=30).close()


def check_load(ask: Callable[[int], bytes], count: int = 20) -> None:
    """`count` different requests at once are answered, each with the answer it gets alone."""
    with ThreadPoolExecutor(count) as pool:
        together = list(pool.map(ask, range(count)))
    assert len(set(together)) == count, "requests that differ have equal answers"
    assert together == [ask(number) for number in range(count)]


def usual_request(name: str) -> tuple[Any, ...]:
    """What a visitor sends who leaves all settings as they are."""
    return {
        "distilled": lambda: ("a red star on a teal background",),
        "edit": lambda: (upload(EXAMPLES / "star.png"), SOURCE, PROMPT),
        "restore": lambda: (upload(ROOT / "spaces" / "restore" / "examples" / "noise.png"),),
        "steer": lambda: (
            editor(STEERED / "fish.png", STEERED / "fish-mask.png"),
            "Paint inside the mask",
            "a yellow star on a teal striped background",
        ),
        "stream": tuple,
    }[name]()


def processor_seconds(process_id: int) -> float:
    """What a process has computed so far in all its threads, however busy the machine is."""
    times = psutil.Process(process_id).cpu_times()
    return times.user + times.system


@pytest.mark.nightly
@pytest.mark.parametrize("name", NAMES)
def test_a_space_starts_from_anywhere_and_answers_in_time(name: str, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    variables = {"OMP_NUM_THREADS": "2", **os.environ, "GRADIO_SERVER_PORT": str(port)}
    begin = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "spaces" / name / "app.py")], cwd=tmp_path, env=variables, stderr=subprocess.PIPE
    )
    try:
        names: set[str] = set()
        while not names and time.monotonic() - begin < 120 and process.poll() is None:
            try:
                names = api_names(url)
            except OSError:
                time.sleep(0.1)
        start, start_work = time.monotonic() - begin, processor_seconds(process.pid)
        assert name in names, f"no page after {start:.0f} s"
        visitor = client(url)
        begin = time.monotonic()
        job = visitor.submit(*usual_request(name), api_name=f"/{name}")
        if name == "stream":
            # It runs as long as it was asked to; what a visitor waits for is its first drawing.
            next(iter(job))
        else:
            job.result(timeout=300)
        answer, answer_work = time.monotonic() - begin, processor_seconds(process.pid) - start_work
    finally:
        process.kill()
        process.wait()
    busy = f"; {os.getloadavg()[0]:.1f} processes on {os.cpu_count()} cores" if hasattr(os, "getloadavg") else ""
    work = f"{start_work:.1f} s and {answer_work:.1f} s of a processor"
    print(f"{name}: started in {start:.1f} s, answered in {answer:.1f} s, which took {work}{busy}")
    assert start < START and answer < ANSWER, f"started in {start:.1f} s, answered in {answer:.1f} s"
