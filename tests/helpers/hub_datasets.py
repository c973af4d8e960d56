"""A loopback server for data sets, like the Hugging Face Hub: preupload, LFS, commits, listings, files.

Written from huggingface_hub's calls: _commit_api.py, lfs.py and hf_api.py.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from helpers.hub_server import git_sha1

LARGE = (".parquet", ".tar", ".jpg")


@dataclass
class DatasetHub:
    """The single data set of a hub, its uploads and commits, and the faults of the hub."""

    endpoint: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # of LFS, by sha256
    uploads: Counter[str] = field(default_factory=Counter)  # times that an object was sent
    commits: list[list[str]] = field(default_factory=list)  # the paths of each commit
    is_there: bool = False
    requests: int = 0
    failing: dict[int, int] = field(default_factory=dict)  # number of a request -> its status
    lost: set[int] = field(default_factory=set)  # numbers of commits that succeed but are answered with 500
    on_request: Callable[[int], None] = lambda number: None
    token: str | None = None

    @property
    def head(self) -> str:
        return f"{len(self.commits):040x}"


class _Handler(BaseHTTPRequestHandler):
    hub: DatasetHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.answer()

    def do_HEAD(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def do_PUT(self) -> None:
        self.answer()

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])) if self.headers["Content-Length"] else self.chunks()
        self.hub.requests += 1
        number = self.hub.requests
        self.hub.on_request(number)
        if (status := self.hub.failing.get(number)) is not None:
            self.send(status, b"{}")
            return
        path = unquote(urlsplit(self.path).path).strip("/")
        parts = path.split("/")
        if (
            self.hub.token
            and not path.startswith("lfs/")
            and self.headers["Authorization"] != f"Bearer {self.hub.token}"
        ):
            status, answer, headers = 401, b"{}", {}
        else:
            status, answer, headers = self.answered(path, parts, body)
        self.send(status, answer, headers)

    def answered(self, path: str, parts: list[str], body: bytes) -> tuple[int, bytes, dict[str, str]]:
        hub = self.hub
        if path == "api/repos/create":
            status, hub.is_there = 409 if hub.is_there else 200, True
            return status, json.dumps({"url": f"{hub.endpoint}/datasets/o/n", "id": "o/n"}).encode(), {}
        if path == "api/validate-yaml":
            return 200, b'{"errors": [], "warnings": []}', {}
        if parts[:2] == ["api", "datasets"] and "tree" in parts:
            return 200, json.dumps([entry(path, data) for path, data in hub.files.items()]).encode(), {}
        if parts[:2] == ["api", "datasets"] and "preupload" in parts:
            return 200, json.dumps({"files": [self.mode(file) for file in json.loads(body)["files"]]}).encode(), {}
        if parts[:2] == ["api", "datasets"] and "commit" in parts:
            return self.commit([json.loads(line) for line in body.splitlines() if line])
        if parts[:2] == ["api", "datasets"]:
            return 200, json.dumps({"id": "o/n", "sha": hub.head, "siblings": []}).encode(), {}
        if path.endswith("info/lfs/objects/batch"):
            objects = [self.action(each) for each in json.loads(body)["objects"]]
            return 200, json.dumps({"transfer": "basic", "objects": objects}).encode(), {}
        if parts[0] == "lfs":
            if hashlib.sha256(body).hexdigest() != parts[1]:
                return 400, b"", {}
            hub.objects[parts[1]] = body
            hub.uploads[parts[1]] += 1
            return 200, b"", {}
        if "resolve" in parts:
            name = "/".join(parts[parts.index("resolve") + 2 :])
            if name not in hub.files:
                return 404, b"", {"X-Error-Code": "EntryNotFound"}
            data = hub.files[name]
            return 200, data, {"X-Repo-Commit": hub.head, "ETag": f'"{git_sha1(data)}"'}
        return 404, b"{}", {}

    def mode(self, file: dict[str, Any]) -> dict[str, Any]:
        known = self.hub.files.get(file["path"])
        is_large = file["path"].endswith(LARGE)
        oid = None if known is None else hashlib.sha256(known).hexdigest() if is_large else git_sha1(known)
        return {"path": file["path"], "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False, "oid": oid}

    def action(self, each: dict[str, Any]) -> dict[str, Any]:
        if each["oid"] in self.hub.objects:
            return each
        return each | {"actions": {"upload": {"href": f"{self.hub.endpoint}/lfs/{each['oid']}", "header": {}}}}

    def commit(self, lines: list[dict[str, Any]]) -> tuple[int, bytes, dict[str, str]]:
        hub = self.hub
        changed = {}
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                changed[value["path"]] = base64.b64decode(value["content"])
            else:
                changed[value["path"]] = hub.objects[value["oid"]]
        hub.files |= changed
        hub.commits.append(sorted(changed))
        if len(hub.commits) in hub.lost:
            return 500, b"{}", {}
        answer = {"commitUrl": f"{hub.endpoint}/datasets/o/n/commit/{hub.head}", "commitOid": hub.head, "success": True}
        return 200, json.dumps(answer).encode(), {}

    def chunks(self) -> bytes:
        """Return a body in chunked encoding."""
        body = b""
        if self.headers["Transfer-Encoding"] == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        return body

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle(self) -> None:
        try:
            super().handle()
        except (ConnectionError, ValueError):  # some tests kill the other side, perhaps in the middle of a body
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        pass


def entry(path: str, data: bytes) -> dict[str, Any]:
    """Return a file's entry in a listing of the Hub."""
    facts: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": git_sha1(data)}
    if path.endswith(LARGE):
        digest = hashlib.sha256(data).hexdigest()
        facts |= {"oid": "0" * 40, "lfs": {"oid": digest, "size": len(data), "pointerSize": 134}}
    return facts


@contextmanager
def dataset_hub() -> Iterator[DatasetHub]:
    """Run a hub without data sets."""
    hub = DatasetHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def publish_to(hub: DatasetHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Point huggingface_hub in this process at `hub`, with plain LFS and without long waits."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _detect_agent, _http

    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    for name, value in (("HF_HUB_OFFLINE", False), ("HF_HUB_DISABLE_XET", True)):
        monkeypatch.setattr(constants, name, value)
    # Otherwise huggingface_hub asks huggingface.co about the calling program.
    monkeypatch.setattr(_detect_agent, "_registry", {"standardEnvVars": [], "harnesses": {}})
    monkeypatch.setenv("HF_TOKEN", hub.token or "hf_loopback")
    monkeypatch.setattr(_http, "time", SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None}))
