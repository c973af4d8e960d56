"""A loopback proxy in front of an S3 server: counts requests, slows them down, and injects faults.

With a certificate it speaks TLS. Like Ceph's gateway, it answers 411 to a body without a length.
"""

from __future__ import annotations

import http.client
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

# S3's error codes for the statuses that tests inject.
CODES = {
    400: "IncompleteBody",
    404: "NoSuchUpload",
    403: "AccessDenied",
    409: "ConditionalRequestConflict",
    411: "MissingContentLength",
    412: "PreconditionFailed",
    500: "InternalError",
    413: "EntityTooLarge",
    501: "NotImplemented",
    503: "ServiceUnavailable",
    507: "XMinioStorageFull",
}

# The methods whose conditions a store ignores: PUT writes a whole object, POST completes a multipart upload.
HABITS = {"always": frozenset[str](), "singles": frozenset({"POST"}), "never": frozenset({"PUT", "POST"})}


@dataclass
class Proxy:
    """The state of a proxy: its requests so far, and its faults.

    `is_down` closes every connection. `pause_s` is the wait before every 64 KiB of an answer. `fault(method, path)`
    returns the fault of a request: None for none, a status to answer without asking the server, `cut` to end the
    connection, `torn` to forward half of the body and end both connections, `lost` to forward the request but not the
    answer, `half` to send half of the answer, `slow` to wait for `slow_s` first, `hold` to wait until `fault` returns
    something else.
    """

    target: str
    endpoint_url: str = ""
    requests: list[tuple[str, str, str]] = field(default_factory=list)  # method, path, range
    is_down: bool = False
    pause_s: float = 0.0
    slow_s: float = 1.0
    fault: Callable[[str, str], int | str | None] = lambda method, path: None
    # Methods whose conditions are removed: POST completes a multipart upload, PUT writes a whole object.
    ignores_conditions_of: frozenset[str] = frozenset()
    deciding: threading.Lock = field(default_factory=threading.Lock)

    def gets(self) -> list[tuple[str, str]]:
        """Return path and range of each read of an object, without listings."""
        found = []
        for method, path, extent in self.requests:
            url = urlsplit(path)
            if method == "GET" and not parse_qs(url.query).keys() & {"list-type", "prefix", "delimiter", "location"}:
                found.append((unquote(url.path), extent))
        return found


class Handler(BaseHTTPRequestHandler):
    proxy: Proxy
    protocol_version = "HTTP/1.1"

    def forward(self) -> None:
        proxy = self.proxy
        proxy.requests.append((self.command, self.path, self.headers["Range"] or ""))
        if self.command == "PUT" and "Content-Length" not in self.headers:
            self.close_connection = True
            self.refuse(411)
            return
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        fault = "cut" if proxy.is_down else proxy.fault(self.command, self.path)
        while fault == "hold":
            time.sleep(0.01)
            fault = proxy.fault(self.command, self.path)
        if isinstance(fault, int):
            self.refuse(fault)
            return
        if fault in ("cut", "torn"):
            self.close_connection = True
            if fault == "torn":
                self.send_half(body)
            return
        if fault == "slow":
            time.sleep(proxy.slow_s)
        with closing(self.connect()) as connection:
            headers = dict(self.headers.items())
            if self.command in proxy.ignores_conditions_of:
                headers.pop("If-None-Match", None)
            # moto checks whether the key is free and writes it later, so conditional requests take turns.
            with proxy.deciding if "If-None-Match" in headers else nullcontext():
                connection.request(self.command, self.path, body, headers)
                answer = connection.getresponse()
                data = answer.read()
        if fault == "lost":
            self.close_connection = True
            return
        self.send_response(answer.status)
        length = answer.headers["Content-Length"] or str(len(data))
        for key, value in answer.headers.items():
            if key.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(key, value)
        self.send_header("Content-Length", length)
        self.end_headers()
        if fault == "half":
            data, self.close_connection = data[: len(data) // 2], True
        for begin in range(0, len(data), 1 << 16):
            time.sleep(proxy.pause_s)
            self.wfile.write(data[begin : begin + (1 << 16)])

    def send_half(self, body: bytes) -> None:
        """Forward a request with half of its body."""
        with closing(self.connect()) as connection:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for key, value in self.headers.items():
                connection.putheader(key, value)
            connection.endheaders()
            connection.send(body[: len(body) // 2])

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.proxy.target.removeprefix("http://"), timeout=300)

    def refuse(self, status: int) -> None:
        """Answer with an error as S3 does, with only its code."""
        body = b"" if self.command == "HEAD" else f"<Error><Code>{CODES[status]}</Code></Error>".encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = forward

    def handle(self) -> None:
        with suppress(ConnectionError, ssl.SSLError):  # some tests kill the other side
            super().handle()

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def counting_proxy(target: str, certificate: Path | None = None) -> Iterator[Proxy]:
    """Run a proxy in front of `target`; with a certificate and its key, over TLS."""
    proxy = Proxy(target)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"proxy": proxy}))
    server.daemon_threads = True
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    proxy.endpoint_url = f"{'https' if certificate else 'http'}://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()
