"""A small imitation of the Hugging Face Hub on 127.0.0.1, enough for pushing, loading and remote code. Standard library only.

It knows the routes that `huggingface_hub` uses for creating repositories, committing files, listing and downloading them,
and keeps each commit of each repository as a plain folder:

    <root>/models/<owner>/<name>/<sha>/...   and   <root>/models/<owner>/<name>/HEAD

What it does not imitate: branches other than main, pull requests, large-file storage, private repositories, quotas.
"""

import base64
import hashlib
import json
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


USER = "user"
TOKEN = "hf_loopback"
KINDS = ("models", "datasets", "spaces")
_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_API = re.compile(r"/api/(models|datasets|spaces)/([\w.-]+/[\w.-]+)(?:/(\w[\w-]*)(?:/(.*))?)?")
_RESOLVE = re.compile(r"/(?:(datasets|spaces)/)?([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)")


def git_oid(content: bytes) -> str:
    """The name that git gives to a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class HubError(Exception):
    """An answer that is an error, with the code by which the client knows which one."""

    def __init__(self, status: int, code: str, message: str, **facts: str) -> None:
        super().__init__(message)
        self.status, self.code, self.facts = status, code, facts


class HubStore:
    """The repositories, in a folder.

    Args:
        root (`Path`):
            An empty or earlier folder of a store.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._lock = threading.Lock()

    def _folder(self, kind: str, repo: str) -> Path:
        if kind not in KINDS or not _NAME.fullmatch(repo) or ".." in repo:
            raise HubError(400, "BadRequest", f"{kind}/{repo} is not the name of a repository")
        return self.root / kind / repo

    def create(self, kind: str, repo: str) -> bool:
        """Makes an empty repository; `False` if it was there."""
        folder = self._folder(kind, repo)
        with self._lock:
            if folder.exists():
                return False
            sha = hashlib.sha1(f"{kind}/{repo}".encode()).hexdigest()
            (folder / sha).mkdir(parents=True)
            (folder / "HEAD").write_text(sha)
            return True

    def snapshot(self, kind: str, repo: str, revision: str = "main") -> tuple[str, Path]:
        """Commit and folder of a revision (`main` or a commit)."""
        folder = self._folder(kind, repo)
        if not folder.is_dir():
            raise HubError(404, "RepoNotFound", f"Repository {repo} not found")
        sha = (folder / "HEAD").read_text() if revision == "main" else revision
        if not re.fullmatch(r"[0-9a-f]{40}", sha) or not (folder / sha).is_dir():
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha, folder / sha

    def file(self, kind: str, repo: str, revision: str, path: str) -> tuple[str, Path]:
        """Commit and path of a file."""
        sha, folder = self.snapshot(kind, repo, revision)
        file = (folder / path).resolve()
        if not file.is_relative_to(folder.resolve()) or not file.is_file():
            raise HubError(404, "EntryNotFound", f"Entry not found: {path}")
        return sha, file

    def files(self, kind: str, repo: str, revision: str = "main") -> dict[str, bytes]:
        """Every file of a revision."""
        _, folder = self.snapshot(kind, repo, revision)
        found = sorted(file for file in folder.rglob("*") if file.is_file())
        return {file.relative_to(folder).as_posix(): file.read_bytes() for file in found}

    def commit(self, kind: str, repo: str, changes: dict[str, bytes | None], onto: str | None = None) -> str:
        """Writes (`None`: deletes) files on top of main, which must still be `onto`, and gives the new commit."""
        with self._lock:
            parent, old = self.snapshot(kind, repo)
            if onto not in (None, parent):
                raise HubError(412, "PreconditionFailed", "A commit has happened since. Please refresh and try again.")
            state = hashlib.sha1(parent.encode())
            for path, content in sorted(changes.items()):
                if not (old / path).resolve().is_relative_to(old.resolve()):
                    raise HubError(400, "BadRequest", f"{path} leads out of the repository")
                state.update(path.encode() + b"\0" + hashlib.sha1(content or b"").digest())
            sha = state.hexdigest()
            new = old.parent / sha
            shutil.copytree(old, new)
            for path, content in changes.items():
                if content is None:
                    (new / path).unlink(missing_ok=True)
                else:
                    (new / path).parent.mkdir(parents=True, exist_ok=True)
                    (new / path).write_bytes(content)
            (old.parent / "HEAD").write_text(sha)
            return sha


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "_Server"

    def log_message(self, *_: Any) -> None:
        """Requests are counted by the server, not printed."""

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length)
            if len(body) < length:
                raise ConnectionAbortedError("the client went away in the middle of a request")
            return body
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if self.server.broken and self.server.broken in path:
            self.server.requests.append((f"broken {self.command}", path))
            self.rfile.read(min(2**16, int(self.headers.get("Content-Length") or 0)))
            self.server.reached.set()
            self.server.resume.wait(60)
            self.close_connection = True
            return
        try:
            body = self._body()
        except (ConnectionError, ValueError):
            self.close_connection = True
            return
        self.server.requests.append((self.command, path))
        try:
            if resolve := _RESOLVE.fullmatch(path):
                self._file(*resolve.groups())
            else:
                answer = self._api(path, body)
                self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})
        except HubError as error:
            headers = {"X-Error-Code": error.code, "X-Error-Message": str(error), "Content-Type": "application/json"}
            self._send(error.status, json.dumps({"error": str(error), **error.facts}).encode(), headers)

    do_GET = do_HEAD = do_POST = _answer

    def _file(self, kind: str | None, repo: str, revision: str, path: str) -> None:
        sha, file = self.server.store.file(kind or "models", repo, revision, path)
        content = file.read_bytes()
        headers = {
            "X-Repo-Commit": sha,
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "Content-Type": "application/octet-stream",
            "Accept-Ranges": "none",
        }
        self._send(200, content, headers)

    def _signed_in(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise HubError(401, "Unauthorized", "Invalid username or password.")

    def _api(self, path: str, body: bytes) -> Any:
        store = self.server.store
        if path == "/api/whoami-v2":
            self._signed_in()
            return {"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": {"role": "write"}}}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            self._signed_in()
            wanted = json.loads(body)
            kind, repo = f"{wanted.get('type') or 'model'}s", f"{wanted.get('organization') or USER}/{wanted['name']}"
            url = f"{self.server.url}/{'' if kind == 'models' else kind + '/'}{repo}"
            if not store.create(kind, repo):
                raise HubError(409, "RepoExists", f"You already created this {kind[:-1]} repo: {repo}", url=url)
            return {"url": url, "id": repo, "name": repo}
        match = _API.fullmatch(path)
        if not match:
            raise HubError(404, "NotFound", f"no route {self.command} {path}")
        kind, repo, action, rest = match.groups()
        if self.command == "POST" and action == "preupload":
            self._signed_in()
            store.snapshot(kind, repo, rest)
            held = store.files(kind, repo, rest)
            names = [file["path"] for file in json.loads(body)["files"]]
            oids = {name: git_oid(held[name]) if name in held else None for name in names}
            settings = {"uploadMode": "regular", "shouldIgnore": False}
            return {"files": [{"path": name, "oid": oid, **settings} for name, oid in oids.items()]}
        if self.command == "POST" and action == "commit":
            self._signed_in()
            return self._commit(kind, repo, body)
        if self.command == "POST" and action == "paths-info":
            wanted = json.loads(body)["paths"]
            return [entry for entry in self._tree(kind, repo, rest) if entry["path"] in wanted]
        if action == "tree":
            return self._tree(kind, repo, (rest or "main").split("/")[0])
        if action in (None, "revision"):
            sha, _ = store.snapshot(kind, repo, rest or "main")
            siblings = [{"rfilename": name} for name in store.files(kind, repo, sha)]
            facts = {"private": False, "gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": []}
            return {"_id": repo, "id": repo, "modelId": repo, "sha": sha, "siblings": siblings, **facts}
        raise HubError(404, "NotFound", f"no route {self.command} {path}")

    def _tree(self, kind: str, repo: str, revision: str) -> list[dict[str, Any]]:
        files = self.server.store.files(kind, repo, revision)
        return [
            {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
            for path, content in files.items()
        ]

    def _commit(self, kind: str, repo: str, body: bytes) -> dict[str, Any]:
        changes: dict[str, bytes | None] = {}
        summary, onto = "", None
        for line in filter(None, body.split(b"\n")):
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                changes[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "deletedFile":
                changes[value["path"]] = None
            elif entry["key"] == "header":
                summary, onto = value["summary"], value.get("parentCommit")
            else:
                raise HubError(400, "BadRequest", f"entries of kind {entry['key']!r} are not taken")
        sha = self.server.store.commit(kind, repo, changes, onto)
        self.server.messages.append(summary)
        return {
            "success": True,
            "commitOid": sha,
            "commitUrl": f"{self.server.url}/{repo}/commit/{sha}",
            "hookOutput": "",
        }


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, store: HubStore) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.store = store
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.requests: list[tuple[str, str]] = []
        self.messages: list[str] = []
        self.broken, self.reached, self.resume = "", threading.Event(), threading.Event()


class LoopbackHub:
    """The server, running in a thread while the context lasts.

    Args:
        root (`Path`):
            Folder for the repositories and for the caches of the clients.

    Example:
        ```python
        with LoopbackHub(tmp_path) as hub:
            hub.store.create("models", "user/tiny")
            hub.store.commit("models", "user/tiny", {"model_index.json": b"{}"})
            run_fresh("...", env=hub.client_environment())
        ```
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.store = HubStore(root / "store")
        self._server = _Server(self.store)
        self._clients = 0
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    def __enter__(self) -> "LoopbackHub":
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5)

    @property
    def url(self) -> str:
        """Address of the server."""
        return self._server.url

    @property
    def requests(self) -> list[tuple[str, str]]:
        """Method and path of every request so far."""
        return self._server.requests

    @property
    def messages(self) -> list[str]:
        """Message of every commit so far."""
        return self._server.messages

    @contextmanager
    def breaking(self, part: str) -> Iterator["threading.Event"]:
        """While it lasts, requests with `part` in their path get no answer.

        Their connection hangs in the middle of the body until the context ends or [`cut`] is called, and is cut off then; the
        event that is given is set as soon as one hangs.
        """
        server = self._server
        server.broken = part
        server.reached.clear()
        server.resume.clear()
        try:
            yield server.reached
        finally:
            server.broken = ""
            server.resume.set()

    def cut(self) -> None:
        """Cuts off the connections that hang, and from now on each one at once."""
        self._server.resume.set()

    def use_here(self, monkeypatch: Any, token: str = TOKEN) -> None:
        """Makes clients in this process take this server for the Hub.

        Only those that ask for the address when they are built, as `HfApi` does; downloads need a process of their own.
        """
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", token)

    def client_environment(self, token: str | None = TOKEN) -> dict[str, str]:
        """Variables of a process that takes this server for the Hub, with caches of its own.

        `huggingface_hub` reads them when it is imported, so the client must be another process.
        """
        self._clients += 1
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(self.root / f"client-{self._clients}"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": token or "",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }
