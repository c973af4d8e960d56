"""A loopback server with the HTTP APIs of Hugging Face and ModelScope, and faults of a network."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_loopback-token-5f3a"
LARGE = (".safetensors", ".gguf", ".model")


@dataclass(frozen=True)
class Seen:
    """A received request."""

    method: str
    path: str
    headers: Message
    is_cdn: bool


@dataclass
class Hub:
    """The files of a hub, its faults, and the requests it received."""

    endpoint: str = ""
    cdn: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    commit: str = COMMIT
    requests: list[Seen] = field(default_factory=list)
    # Faults.
    statuses: list[int] = field(default_factory=list)  # statuses to answer the next requests with
    breaks: int = 0  # number of next answers with file contents that end in the middle
    damaged: set[str] = field(default_factory=set)  # files that arrive with one byte changed
    has_ranges: bool = True
    pause_s: float = 0.0  # before every 64 KiB of contents
    stops_after: int | None = None  # number of bytes after which an answer with contents stops

    def gets(self, part: str = "") -> list[Seen]:
        """Return the requests for contents of files whose address has `part`."""
        contents = ("/cdn/", "/resolve/", "FilePath=")
        seen = [each for each in self.requests if each.method == "GET" and any(mark in each.path for mark in contents)]
        return [each for each in seen if part in unquote(each.path)]

    def bytes_of(self, digest: str) -> bytes:
        """Return the contents with a sha256."""
        files = (data for files in self.repositories.values() for data in files.values())
        return next(data for data in files if hashlib.sha256(data).hexdigest() == digest)


class Handler(BaseHTTPRequestHandler):
    """The handler of both hubs, and of the separate server for large files of Hugging Face."""

    hub: Hub
    is_cdn = False
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        self.hub.requests.append(Seen(self.command, self.path, self.headers, self.is_cdn))
        url = urlsplit(self.path)
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        if self.hub.statuses:
            self.send(self.hub.statuses.pop(0), b"busy")
        elif self.is_cdn:
            self.contents(parts[2], self.hub.bytes_of(parts[1]))
        elif parts[:3] == ["api", "v1", "models"]:
            self.modelscope("/".join(parts[3:5]), parts[5:], parse_qs(url.query))
        elif parts[:2] == ["api", "models"] and parts[4:5] == ["tree"]:
            self.tree("/".join(parts[2:4]))
        elif parts[:2] == ["api", "models"]:
            self.model_info("/".join(parts[2:4]), parts[-1])
        elif parts[:2] == ["api", "datasets"] and parts[4:5] == ["tree"]:
            self.dataset_tree("/".join(parts[1:4]), "/".join(parts[6:]), parse_qs(url.query))
        elif parts[:2] == ["api", "datasets"]:
            self.model_info("/".join(parts[1:4]), parts[-1] if "revision" in parts else "main")
        elif parts[:1] == ["datasets"] and parts[3:4] == ["resolve"]:
            self.resolve("/".join(parts[:3]), "/".join(parts[5:]))
        elif parts[2:3] == ["resolve"]:
            self.resolve("/".join(parts[:2]), "/".join(parts[4:]))
        else:
            self.send(404, b"")

    def model_info(self, name: str, revision: str) -> None:
        """Send a repository of Hugging Face, as GET /api/models/.../revision/... with blobs=true."""
        if name not in self.hub.repositories:
            self.send(401, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        elif revision not in ("main", self.hub.commit):
            self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"})
        else:
            files = self.hub.repositories[name]
            siblings = [describe(path, data) for path, data in files.items()]
            self.send(200, json.dumps({"id": name, "sha": self.hub.commit, "siblings": siblings}).encode())

    def tree(self, name: str) -> None:
        """List the files of a Hugging Face repository, as GET /api/models/.../tree/... with recursive=true."""
        entries = [tree_entry(describe(path, data)) for path, data in self.hub.repositories.get(name, {}).items()]
        self.send(200, json.dumps(entries).encode())

    def dataset_tree(self, name: str, folder: str, query: Mapping[str, list[str]]) -> None:
        """List the files and folders in a folder of a data set, recursively if the query says so."""
        prefix = f"{folder}/" if folder else ""
        files = {path: data for path, data in self.hub.repositories[name].items() if path.startswith(prefix)}
        is_recursive = query.get("recursive", [""])[0].lower() in ("true", "1")
        own = [path for path in files if is_recursive or "/" not in path[len(prefix) :]]
        folders = {prefix + path[len(prefix) :].partition("/")[0] for path in files if "/" in path[len(prefix) :]}
        entries = [tree_entry(describe(path, files[path])) for path in own]
        entries += [{"type": "directory", "path": path, "oid": "0" * 40} for path in sorted(folders)]
        if entries:
            self.send(200, json.dumps(entries).encode())
        else:
            self.send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"})

    def resolve(self, name: str, path: str) -> None:
        """Send a small file of Hugging Face, or the redirect to a large one."""
        common = {"X-Repo-Commit": self.hub.commit}
        data = self.hub.repositories.get(name, {}).get(path)
        if data is None:
            self.send(404, b"", common | {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"})
            return
        if name in self.hub.gated and self.headers["Authorization"] != f"Bearer {TOKEN}":
            message = "Access to model is restricted. You must have access to it and be authenticated to access it."
            self.send(401, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": message})
        elif path.endswith(LARGE):
            digest = hashlib.sha256(data).hexdigest()
            linked = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(data))}
            location = f"{self.hub.cdn}/cdn/{digest}/{path.rpartition('/')[2]}?Signature=secret"
            self.send(302, b"", common | linked | {"Location": location})
        else:
            self.contents(path, data, common | {"ETag": f'"{git_sha1(data)}"'})

    def modelscope(self, name: str, rest: list[str], query: Mapping[str, list[str]]) -> None:
        """List a repository of ModelScope, or send a file of it."""
        if name not in self.hub.repositories:
            self.send(404, json.dumps({"Code": 10010205001, "Message": "not found", "Success": False}).encode())
        elif rest == ["repo", "files"]:
            files = [
                {"Path": path, "Type": "blob", "Size": len(data), "Sha256": hashlib.sha256(data).hexdigest()}
                for path, data in self.hub.repositories[name].items()
            ]
            folders = [{"Path": "vae", "Type": "tree", "Size": 0, "Sha256": ""}]
            answer = {"Code": 200, "Success": True, "Data": {"Files": folders + files}}
            self.send(200, json.dumps(answer).encode())
        elif name in self.hub.gated and self.headers["Authorization"] != f"Bearer {TOKEN}":
            self.send(403, b"")
        else:
            path = query["FilePath"][0]
            self.contents(path, self.hub.repositories[name][path])

    def contents(self, path: str, data: bytes, headers: Mapping[str, str] | None = None) -> None:
        """Send the contents of a file, or the requested range."""
        start, end, status = 0, len(data), 200
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', **(headers or {})}
        if self.hub.has_ranges and (asked := self.headers["Range"]):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, end, status = int(first), min(int(last or len(data)) + 1, len(data)), 206
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
        if path in self.hub.damaged:
            middle = len(data) // 2
            data = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        self.send(status, data[start:end], headers, is_contents=True)

    def send(
        self, status: int, body: bytes, headers: Mapping[str, str] | None = None, *, is_contents: bool = False
    ) -> None:
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if is_contents and self.hub.breaks > 0 and len(body) > 1:
            self.hub.breaks -= 1
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
            return
        for begin in range(0, len(body), 1 << 16):
            if is_contents and self.hub.pause_s:
                time.sleep(self.hub.pause_s)
            while is_contents and self.hub.stops_after is not None and begin >= self.hub.stops_after:
                time.sleep(0.01)
            self.wfile.write(body[begin : begin + (1 << 16)])

    def handle(self) -> None:
        with suppress(ConnectionError):  # some tests kill the other side
            super().handle()

    def log_message(self, format: str, *args: object) -> None:
        pass


def point_at(hub: Hub, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """Point this process at `hub` as both hubs, and at `cache` as every cache."""
    # Imported here, since huggingface_hub reads its environment at import, before conftest has set it.
    from huggingface_hub import constants

    from flux_batch.storage import retry

    for key in ("HF_ENDPOINT", "MODELSCOPE_ENDPOINT"):
        monkeypatch.setenv(key, hub.endpoint)
    for key in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "MODELSCOPE_API_TOKEN"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("FLUX_BATCH_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache / "huggingface"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no token"))
    monkeypatch.setattr(retry, "ATTEMPTS", 3)  # fewer than usual, so that requests that never succeed fail quickly


def describe(path: str, data: bytes) -> dict[str, object]:
    """Return the description of a file as in Hugging Face's model info."""
    facts: dict[str, object] = {"rfilename": path, "size": len(data), "blobId": git_sha1(data)}
    if path.endswith(LARGE):
        digest = hashlib.sha256(data).hexdigest()
        facts["lfs"] = {"sha256": digest, "size": len(data), "pointerSize": 134}
        facts["blobId"] = "0" * 40  # the id of the LFS pointer
    return facts


def tree_entry(facts: dict[str, Any]) -> dict[str, Any]:
    """Return the description of a file as in a tree listing."""
    entry = {"type": "file", "path": facts["rfilename"], "size": facts["size"], "oid": facts["blobId"]}
    if lfs := facts.get("lfs"):
        entry["lfs"] = {"oid": lfs["sha256"], "size": lfs["size"], "pointerSize": lfs["pointerSize"]}
    return entry


def git_sha1(data: bytes) -> str:
    """Return git's id of a blob."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def hub_server() -> Iterator[Hub]:
    """Run a hub without repositories."""
    hub = Hub()
    servers = []
    for is_cdn in (False, True):
        handler = type("BoundHandler", (Handler,), {"hub": hub, "is_cdn": is_cdn})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        servers.append(server)
    hub.endpoint, hub.cdn = (f"http://127.0.0.1:{server.server_address[1]}" for server in servers)
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()
