"""The settings that every Space has, on a page of the tests' own: stops, errors without traces, limits."""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


gr = pytest.importorskip("gradio", reason='gradio is not installed: pip install "diffusers-ext[spaces]"')

from gradio_client import Client, handle_file  # noqa: E402

from diffusers_ext.serving import VisitorError  # noqa: E402
from diffusers_ext.serving import app as app_module  # noqa: E402
from diffusers_ext.serving.app import answering, launch, on_gpu, page, shown  # noqa: E402
from diffusers_ext.serving.fields import upload_field  # noqa: E402


SECRET = "/etc/secret/place"
counted: list[int] = []


@answering
def count(steps: float, progress: Any = gr.Progress()) -> Iterator[Any]:  # noqa: B008
    def work(report: Any) -> str:
        for i in range(int(steps)):
            report(i / steps, "counting")
            counted.append(i)
            time.sleep(0.05)
        return f"{int(steps)} steps"

    yield (yield from shown(work, progress, outputs=1))


@answering
def fail(kind: str) -> Iterator[Any]:
    yield gr.skip()
    raise VisitorError("The prompt is empty: write a few words.") if kind == "visitor" else RuntimeError(SECRET)


@answering
def name_of(picture: str | None) -> Iterator[Any]:
    yield Path(picture).suffix if picture else "none"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app_module, "MAX_WAITING", 3)
        with page("Test") as blocks:
            text, number, picture = gr.Textbox(), gr.Number(), upload_field("Picture")
            out = gr.Textbox()
            gr.Button().click(count, number, out, api_name="count")
            gr.Button().click(fail, text, out, api_name="fail")
            gr.Button().click(name_of, picture, out, api_name="name_of")
        _, address, _ = launch(blocks, prevent_thread_lock=True, quiet=True)
        yield address
        blocks.close()


@pytest.fixture(scope="module")
def client(url: str) -> Client:
    return Client(url, verbose=False)


def test_a_result_arrives_through_the_api(client: Client) -> None:
    assert client.predict(3, api_name="/count") == "3 steps"


def test_what_a_visitor_can_cure_is_said_and_anything_else_is_not(
    client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(Exception, match="write a few words"):
        client.predict("visitor", api_name="/fail")
    with pytest.raises(Exception) as caught:
        client.predict("other", api_name="/fail")
    said = str(caught.value)
    assert "Something went wrong here" in said and SECRET not in said and "Traceback" not in said
    mark = said.rstrip(".").split()[-1]
    assert any(mark in record.message and SECRET in (record.exc_text or "") for record in caplog.records)


def settled() -> int:
    """Steps of the work when it has ended, which it must do long before the last, on a busy machine too."""
    begin, before = time.monotonic(), -1
    while before != len(counted):
        assert time.monotonic() - begin < 60, "the work goes on"
        before = len(counted)
        time.sleep(0.5)
    return before


def join(url: str, session: str, steps: int) -> None:
    function = next(
        i["id"] for i in json.load(urllib.request.urlopen(f"{url}config"))["dependencies"] if i["api_name"] == "count"
    )
    body = json.dumps({"data": [steps], "fn_index": function, "session_hash": session}).encode()
    headers = {"Content-Type": "application/json"}
    urllib.request.urlopen(urllib.request.Request(f"{url}gradio_api/queue/join", body, headers), timeout=10)


def listen(url: str, session: str) -> Any:
    return urllib.request.urlopen(f"{url}gradio_api/queue/data?session_hash={session}", timeout=30)


def begun(steps: int) -> None:
    begin = time.monotonic()
    while len(counted) < steps:
        assert time.monotonic() - begin < 30, "the work does not begin"
        time.sleep(0.005)


# Less than half of the patience with one who does not look, at 20 steps a second.
SOON = 150


@pytest.mark.parametrize("steps", [1, 8])
def test_a_visitor_who_goes_away_ends_the_work(url: str, steps: int) -> None:
    counted.clear()
    join(url, f"goes-away-{steps}", 2000)
    stream = listen(url, f"goes-away-{steps}")
    begun(steps)
    stream.close()
    assert settled() < SOON


@pytest.mark.parametrize("steps", [1, 8])
def test_a_cancelled_job_ends_the_work_also_before_its_first_answer(client: Client, steps: int) -> None:
    counted.clear()
    job = client.submit(2000, api_name="/count")
    begun(steps)
    job.cancel()
    assert steps <= settled() < SOON


def test_a_visitor_who_left_before_he_listened_ends_the_work(url: str) -> None:
    counted.clear()
    heart = urllib.request.urlopen(f"{url}gradio_api/heartbeat/silent", timeout=10)
    heart.readline()
    join(url, "silent", 2000)
    begun(2)
    heart.close()
    assert settled() < SOON


def test_a_visitor_who_is_slow_to_listen_gets_the_answer(url: str) -> None:
    counted.clear()
    join(url, "slow", 80)
    begun(80)  # he has not opened the stream of answers yet, of which some twenty wait
    with listen(url, "slow") as stream:
        heard = b""
        while b"process_completed" not in heard:
            heard = stream.readline()
    assert b"80 steps" in heard


def test_a_visitor_who_lost_his_heartbeat_but_listens_gets_the_answer(url: str) -> None:
    counted.clear()
    heart = urllib.request.urlopen(f"{url}gradio_api/heartbeat/heartless", timeout=10)
    heart.readline()
    join(url, "heartless", 80)
    with listen(url, "heartless") as stream:
        begun(2)
        heart.close()
        heard = b""
        while b"process_completed" not in heard:
            heard = stream.readline()
    assert b"80 steps" in heard


def test_a_full_queue_is_refused_and_nobody_in_it_is_lost(url: str) -> None:
    clients = [Client(url, verbose=False) for _ in range(8)]
    jobs = [client.submit(30, api_name="/count") for client in clients]
    results = []
    for job in jobs:
        try:
            results.append(job.result(timeout=60))
        except Exception as error:
            results.append(str(error))
    done = [result for result in results if result == "30 steps"]
    refused = [result for result in results if "full" in result.lower()]
    assert len(done) + len(refused) == 8 and len(done) >= 3 and refused, results


def test_an_upload_is_not_decoded_and_too_large_a_one_is_refused(client: Client, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("hello")
    assert client.predict(handle_file(str(tmp_path / "text.png")), api_name="/name_of") == ".png"
    assert client.predict(None, api_name="/name_of") == "none"
    (tmp_path / "large.png").write_bytes(bytes(9 * 10**6))
    with pytest.raises(Exception):  # noqa: B017 - the client's own, of its HTTP library
        client.predict(handle_file(str(tmp_path / "large.png")), api_name="/name_of")


@pytest.mark.parametrize(
    "path", ["monitoring/summary", "gradio_api/file=/etc/passwd", "gradio_api/file=../../etc/passwd"]
)
def test_nothing_but_the_page_is_served(url: str, path: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(url + path, timeout=10)
    assert caught.value.code in (400, 403, 404)


@pytest.mark.parametrize("path", ["/etc/passwd", "../../../../etc/passwd", "http://127.0.0.1/secret"])
def test_a_path_of_the_server_is_no_upload(url: str, path: str) -> None:
    # Not with the client: it would upload its own file of that name.
    upload = {"path": path, "url": path, "meta": {"_type": "gradio.FileData"}}
    body = json.dumps({"data": [upload]}).encode()
    request = urllib.request.Request(f"{url}gradio_api/call/name_of", body, {"Content-Type": "application/json"})
    event = json.load(urllib.request.urlopen(request, timeout=10))["event_id"]
    with urllib.request.urlopen(f"{url}gradio_api/call/name_of/{event}", timeout=10) as answer:
        said = answer.read().decode()
    assert "event: error" in said and "event: complete" not in said, said


def test_without_zero_gpu_a_handler_stays_as_it_is() -> None:
    assert on_gpu(5)(count) is count
