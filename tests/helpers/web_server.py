"""A loopback web server whose answers, including faulty ones, a test defines."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Answer = Callable[[BaseHTTPRequestHandler], None]


@dataclass
class WebServer:
    """A running server: `answers` maps paths to file contents or functions.

    `asked` has the requested paths, `posted` the received bodies.
    """

    url: str = ""
    answers: dict[str, bytes | Answer] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    posted: list[bytes] = field(default_factory=list)

    def at(self, path: str, answer: bytes | Answer) -> str:
        """Set the answer of a path. Returns: its address."""
        self.answers[path] = answer
        return self.url + path


@contextmanager
def web_server() -> Iterator[WebServer]:
    """Run a server during a block."""
    server = WebServer()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            server.posted.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.do_GET()

        def do_PUT(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            server.asked.append(self.path)
            answer = server.answers.get(self.path)
            if answer is None:
                self.send_error(404)
            elif isinstance(answer, bytes):
                self.send_response(200)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)
            else:
                answer(self)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        http.daemon_threads = True
        server.url = f"http://127.0.0.1:{http.server_address[1]}"
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            http.shutdown()
            thread.join()


def redirect(to: str) -> Answer:
    """Answer with a redirect."""

    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(302)
        request.send_header("Location", to)
        request.end_headers()

    return answer


def status(code: int, **headers: str) -> Answer:
    """Answer with a status and a short body."""

    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(code)
        for name, value in headers.items():
            request.send_header(name.replace("_", "-"), value)
        request.end_headers()
        request.wfile.write(b"body")

    return answer
