"""The imitated Hub by itself, asked over plain HTTP."""

import base64
import json
import urllib.error
import urllib.request
from typing import Any

import pytest

from .loopback import TOKEN, HubError, LoopbackHub, git_oid


@pytest.fixture()
def repository(loopback_hub: LoopbackHub) -> str:
    loopback_hub.store.create("models", "user/plain")
    loopback_hub.store.commit("models", "user/plain", {"a.txt": b"alpha", "folder/b.txt": b"beta"})
    return "user/plain"


def ask(hub: LoopbackHub, path: str, body: bytes | None = None, method: str | None = None, token: str = TOKEN) -> Any:
    headers = {"Authorization": f"Bearer {token}"}
    return urllib.request.urlopen(urllib.request.Request(hub.url + path, body, headers, method=method), timeout=10)


def test_a_file_comes_with_commit_and_etag(loopback_hub: LoopbackHub, repository: str) -> None:
    with ask(loopback_hub, f"/{repository}/resolve/main/folder/b.txt") as answer:
        assert answer.read() == b"beta"
        commit = answer.headers["X-Repo-Commit"]
    with ask(loopback_hub, f"/{repository}/resolve/{commit}/a.txt", method="HEAD") as answer:
        assert answer.headers["Content-Length"] == "5"
        assert len(answer.headers["ETag"].strip('"')) == 64
        assert answer.read() == b""


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("/user/nothing/resolve/main/a.txt", "RepoNotFound"),
        ("/user/plain/resolve/v2/a.txt", "RevisionNotFound"),
        ("/user/plain/resolve/main/c.txt", "EntryNotFound"),
        ("/user/plain/resolve/main/../HEAD", "EntryNotFound"),
        ("/api/models/user/nothing", "RepoNotFound"),
        ("/api/unheard-of", "NotFound"),
    ],
)
def test_what_is_missing_is_a_404_with_its_code(
    loopback_hub: LoopbackHub, repository: str, path: str, code: str
) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        ask(loopback_hub, path)
    assert (caught.value.code, caught.value.headers["X-Error-Code"]) == (404, code)


def test_a_commit_keeps_the_one_before(loopback_hub: LoopbackHub, repository: str) -> None:
    before = json.load(ask(loopback_hub, f"/api/models/{repository}"))["sha"]
    entries = [
        {"key": "header", "value": {"summary": "replace a, delete b", "description": ""}},
        {
            "key": "file",
            "value": {"path": "a.txt", "content": base64.b64encode(b"new").decode(), "encoding": "base64"},
        },
        {"key": "deletedFile", "value": {"path": "folder/b.txt"}},
    ]
    body = b"\n".join(json.dumps(entry).encode() for entry in entries)
    answer = json.load(ask(loopback_hub, f"/api/models/{repository}/commit/main", body))
    assert answer["commitOid"] != before
    assert loopback_hub.store.files("models", repository) == {"a.txt": b"new"}
    assert loopback_hub.store.files("models", repository, before) == {"a.txt": b"alpha", "folder/b.txt": b"beta"}
    assert loopback_hub.messages[-1] == "replace a, delete b"
    tree = json.load(ask(loopback_hub, f"/api/models/{repository}/tree/main?recursive=true"))
    assert [(entry["path"], entry["size"]) for entry in tree] == [("a.txt", 3)]


def test_writing_needs_the_token(loopback_hub: LoopbackHub, repository: str) -> None:
    for path in ("/api/repos/create", f"/api/models/{repository}/commit/main"):
        with pytest.raises(urllib.error.HTTPError) as caught:
            ask(loopback_hub, path, b"{}", token="wrong")
        assert caught.value.code == 401


def test_a_path_out_of_the_repository_is_refused(loopback_hub: LoopbackHub, repository: str) -> None:
    entry = {"key": "file", "value": {"path": "../../HEAD", "content": "", "encoding": "base64"}}
    with pytest.raises(urllib.error.HTTPError) as caught:
        ask(loopback_hub, f"/api/models/{repository}/commit/main", json.dumps(entry).encode())
    assert caught.value.code == 400


def test_a_commit_on_top_of_a_state_that_is_past_is_refused(loopback_hub: LoopbackHub) -> None:
    loopback_hub.store.create("models", "user/another")
    seen, _ = loopback_hub.store.snapshot("models", "user/another")
    loopback_hub.store.commit("models", "user/another", {"a": b"1"}, seen)
    with pytest.raises(HubError, match="has happened since"):
        loopback_hub.store.commit("models", "user/another", {"a": b"2"}, seen)


def test_a_file_has_the_name_that_git_gives_it() -> None:
    # `printf hello | git hash-object --stdin`
    assert git_oid(b"hello") == "b6fc4c620b67d95f953a5c1c1230aaab5db5a1b0"
