"""A Hugging Face Hub on the loopback interface, for tests: serves folders, with faults on demand.

Speaks what the client needs to look up, download and list files; knows no pages, uploads or users.

    with HubServer({"user/name": folder}) as server:  # the client runs with HF_ENDPOINT=server.url
        server.add_fault("model.safetensors", Fault(status=503), times=2)
        ...
        assert server.count("GET", "model.safetensors") == 3
"""

import hashlib
import json
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import cast
from urllib.parse import parse_qs, quote, unquote, urlsplit

import pytest

# for a parameter with which a test asks the real Hub; with another one it asks a HubServer
network = [
    pytest.mark.network,
    pytest.mark.skipif(
        os.environ.get("MINIGPT2_NETWORK_TESTS") != "1",
        reason="downloads GPT-2 from the Hugging Face Hub: set MINIGPT2_NETWORK_TESTS=1 to run it",
    ),
]
# kept by Git LFS: named by SHA-256, moved to a CDN if there is one
LARGE_FILES = (".safetensors", ".bin", ".parquet")


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    headers: Mapping[str, str]


@dataclass(frozen=True)
class Answer:
    status: int = 200
    headers: Mapping[str, str | None] = field(default_factory=dict)
    body: bytes = b""


@dataclass(frozen=True)
class Fault:
    """What goes wrong with an answer; several things may."""

    status: int | None = None
    headers: Mapping[str, str | None] = field(default_factory=dict)
    """Added to the answer's; None removes one."""
    change: Callable[[bytes], bytes] | None = None
    """Applied to the whole file before a range is cut from it."""
    silent: bool = False
    """Accept the request and never answer."""
    stop_after: int | None = None
    """Send so many bytes of the body and then..."""
    ending: str = "close"
    """...close, reset (TCP RST) or stall; reset without `stop_after` comes instead of an answer."""
    ignore_range: bool = False
    delay: float = 0
    """Seconds before the answer."""


def portal(_: bytes = b"") -> bytes:
    """The page that a hotel's network answers with."""
    return b"<!DOCTYPE html><html><body>Please log in</body></html>"


def flip_bit(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


class HubServer:
    """Serves `repos` (Hub id -> folder, or file name -> bytes) at `url`; `requests` lists all.

    The id of a data set begins with datasets/. Every repository has a branch `main`, at the commit
    given in `commits` or made up from its files; `branches[repo][name]` is the id of a repository
    that is served as another branch. Lists come in pages of `page_size` entries. With `cdn`, large
    files are redirected to another origin, as the real Hub does.
    """

    def __init__(
        self,
        repos: Mapping[str, Path | Mapping[str, bytes]],
        *,
        commits: Mapping[str, str] | None = None,
        branches: Mapping[str, Mapping[str, str]] | None = None,
        page_size: int = 1000,
        cdn: bool = False,
    ) -> None:
        self.branches = {repo: dict(ids) for repo, ids in (branches or {}).items()}
        self.page_size = page_size
        self.repos = {name: _read(repo) for name, repo in repos.items()}
        self.commits = {name: _commit(content) for name, content in self.repos.items()}
        self.commits.update(commits or {})
        self.requests: list[Request] = []
        self._faults: list[tuple[str, str, Iterator[Fault]]] = []
        self._pushes: dict[tuple[str, str], tuple[str, Path | Mapping[str, bytes]]] = {}
        self._lock = threading.Lock()
        self.closing = threading.Event()
        self._server = _Server(self)
        self._cdn = _Server(self) if cdn else None
        self.url = self._server.url
        self.cdn_url = self._cdn.url if self._cdn else ""

    def __enter__(self) -> "HubServer":
        for server in filter(None, (self._server, self._cdn)):
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        for server in filter(None, (self._server, self._cdn)):
            server.shutdown()
            server.server_close()

    def push(self, repo: str, content: Path | Mapping[str, bytes]) -> None:
        """Move a repository's main to other content; the commit before stays where it was."""
        before = f"{repo}@{self.commits[repo]}"
        self.repos[before], self.commits[before] = self.repos[repo], self.commits[repo]
        self.branches.setdefault(repo, {})[before] = before
        self.repos[repo] = _read(content)
        self.commits[repo] = _commit(self.repos[repo])

    def push_after(
        self, method: str, name: str, repo: str, content: Path | Mapping[str, bytes]
    ) -> None:
        """Push once a file has been asked for."""
        self._pushes[method, name] = repo, content

    def add_fault(self, name: str, fault: Fault, *, method: str = "GET", times: int = 1000) -> None:
        """Let the next `times` requests for the file `name` go wrong; "*" is any method or file."""
        self._faults.append((method, name, iter([fault] * times)))

    def count(self, method: str, name: str = "") -> int:
        """How many requests of a method there were, for a file if one is named."""
        ending = f"/{name}" if name else ""
        return sum(r.method == method and r.path.endswith(ending) for r in self.requests)

    def answer(self, request: Request) -> tuple[Answer, Fault]:
        """What to send for a request, and what goes wrong with it."""
        path = urlsplit(request.path).path.strip("/")
        name = unquote(path.rsplit("/", 1)[-1])
        with self._lock:
            self.requests.append(request)
            fault = self._take_fault(request.method, name)
        if path.startswith("cdn/"):
            repo, _, name = unquote(path).removeprefix("cdn/").partition("/-/")
            content = (fault.change or bytes)(self.repos[repo][name])
            return _ranged(Answer(200, {}, content), request, fault), fault
        if path.startswith("api/"):
            answer = self._api(path, parse_qs(urlsplit(request.path).query))
            return replace(answer, body=(fault.change or bytes)(answer.body)), fault
        answer = self._resolve(path, fault)
        with self._lock:
            if due := self._pushes.pop((request.method, name), None):
                self.push(*due)
        return _ranged(answer, request, fault), fault

    def _take_fault(self, method: str, name: str) -> Fault:
        for wanted_method, wanted_name, faults in self._faults:
            wanted = wanted_method in ("*", method) and wanted_name in ("*", name)
            if wanted and (fault := next(faults, None)):
                return fault
        return Fault()

    def _at(self, repo: str, revision: str) -> str | None:
        """The id under which a revision of a repository is kept."""
        ids = {"main": repo, **self.branches.get(repo, {})}
        return ids.get(revision) or {self.commits[i]: i for i in ids.values()}.get(revision)

    def _resolve(self, path: str, fault: Fault) -> Answer:
        repo, _, rest = path.partition("/resolve/")
        revision, name = map(unquote, rest.split("/", 1))
        if repo not in self.repos:
            return _error(404, "RepoNotFound")
        if (repo := self._at(repo, revision)) is None:
            return _error(404, "RevisionNotFound")
        commit = self.commits[repo]
        if name not in self.repos[repo]:
            return _error(404, "EntryNotFound", {"X-Repo-Commit": commit})
        content = self.repos[repo][name]
        headers = {
            "X-Repo-Commit": commit,
            "ETag": f'"{git_blob_digest(content)}"',
            "Accept-Ranges": "bytes",
        }
        if name.endswith(LARGE_FILES):
            headers["X-Linked-Etag"] = f'"{hashlib.sha256(content).hexdigest()}"'
            headers["X-Linked-Size"] = str(len(content))
            if self.cdn_url:
                headers["Location"] = f"{self.cdn_url}/cdn/{repo}/-/{quote(name)}"
                return Answer(302, headers)
        return Answer(200, headers, (fault.change or bytes)(content))

    def _api(self, path: str, query: Mapping[str, list[str]]) -> Answer:
        """What a revision is, and what it or one of its folders holds, page by page."""
        kind, *parts = path.split("/")[1:]
        known = ("/".join(parts[:length]) for length in (2, 1))
        prefix = "datasets/" if kind == "datasets" else ""
        repo = next((f"{prefix}{name}" for name in known if f"{prefix}{name}" in self.repos), None)
        if repo is None:
            return _error(404, "RepoNotFound")
        question, revision, *folders = parts[repo.removeprefix(prefix).count("/") + 1 :]
        if (repo := self._at(repo, unquote(revision))) is None:
            return _error(404, "RevisionNotFound")
        if question == "revision":
            siblings = [{"rfilename": name} for name in self.repos[repo]]
            return _json({"id": repo, "sha": self.commits[repo], "siblings": siblings})
        folder = "".join(f"{unquote(name)}/" for name in folders)
        deep = query.get("recursive", ["false"])[0].lower() == "true"
        entries = _tree(self.repos[repo], folder, deep=deep)
        if not entries:
            return _error(404, "EntryNotFound")
        start = int(query.get("cursor", ["0"])[0])
        end = start + self.page_size
        following = f'<{self.url}/{path}?recursive={deep}&cursor={end}>; rel="next"'
        return _json(entries[start:end], {"Link": following} if entries[end:] else {})


def _json(value: object, headers: Mapping[str, str] | None = None) -> Answer:
    headers = {"Content-Type": "application/json", **(headers or {})}
    return Answer(200, headers, json.dumps(value).encode())


def git_blob_digest(content: bytes) -> str:
    """The name Git gives a file's content, which the Hub uses as the ETag of small files."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _read(repo: Path | Mapping[str, bytes]) -> dict[str, bytes]:
    if isinstance(repo, Path):
        return {
            p.relative_to(repo).as_posix(): p.read_bytes()
            for p in sorted(repo.rglob("*"))
            if p.is_file()
        }
    return dict(repo)


def _commit(content: Mapping[str, bytes]) -> str:
    names = "".join(f"{name} {git_blob_digest(data)}\n" for name, data in sorted(content.items()))
    return hashlib.sha1(names.encode()).hexdigest()


def _tree(content: Mapping[str, bytes], folder: str, *, deep: bool) -> list[dict[str, object]]:
    """The files and folders in a folder, or all below it."""
    below = {name: data for name, data in content.items() if name.startswith(folder)}
    parents = {str(parent) for name in below for parent in PurePosixPath(name).parents}
    folders = sorted(
        name for name in parents - {"."} if name.startswith(folder) and f"{name}/" != folder
    )
    entries = [{"type": "directory", "path": name, "oid": "0" * 40, "size": 0} for name in folders]
    entries += [_tree_entry(name, data) for name, data in below.items()]
    return [e for e in entries if deep or "/" not in str(e["path"]).removeprefix(folder)]


def _tree_entry(name: str, content: bytes) -> dict[str, object]:
    entry: dict[str, object] = {
        "type": "file",
        "path": name,
        "size": len(content),
        "oid": git_blob_digest(content),
    }
    if name.endswith(LARGE_FILES):
        digest = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 134}
    return entry


def _error(status: int, code: str, headers: Mapping[str, str] | None = None) -> Answer:
    return Answer(status, {"X-Error-Code": code, "X-Error-Message": code, **(headers or {})})


def _ranged(answer: Answer, request: Request, fault: Fault) -> Answer:
    start = request.headers.get("range", "").removeprefix("bytes=").removesuffix("-")
    if not start.isdecimal() or fault.ignore_range or answer.status != 200:
        return answer
    size = len(answer.body)
    if int(start) >= size:
        return Answer(416, {"Content-Range": f"bytes */{size}"})
    span = {"Content-Range": f"bytes {start}-{size - 1}/{size}"}
    return Answer(206, {**answer.headers, **span}, answer.body[int(start) :])


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, hub: HubServer) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub = hub
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: clients that hang up are what these tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        server = cast(_Server, self.server)
        hub = server.hub
        headers = {name.lower(): value for name, value in self.headers.items()}
        answer, fault = hub.answer(Request(self.command, self.path, headers))
        hub.closing.wait(fault.delay)
        if fault.silent:
            hub.closing.wait()
        if fault.silent or (fault.ending == "reset" and fault.stop_after is None):
            return self._hang_up(reset=True)
        if fault.status is not None:
            answer = replace(answer, status=fault.status, body=b"")
        sent = {"Content-Length": str(len(answer.body)), **answer.headers, **fault.headers}
        self.send_response(answer.status)
        for name, value in sent.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return None
        if sent["Content-Length"] is None:
            self.close_connection = True
        self.wfile.write(answer.body[: fault.stop_after])
        if fault.stop_after is not None:
            if fault.ending == "stall":
                hub.closing.wait()
            return self._hang_up(reset=fault.ending == "reset")
        return None

    do_HEAD = do_GET

    def _hang_up(self, *, reset: bool = False) -> None:
        self.close_connection = True
        if reset:
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            socket.close(self.connection.detach())

    def log_message(self, format: str, *args: object) -> None:
        """Tests read `requests` instead."""
