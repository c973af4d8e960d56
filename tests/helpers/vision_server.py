"""A loopback server with an OpenAI-compatible API of a vision model, whose answers a test defines."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class VisionServer:
    """A running server.

    `answer(request, number)` returns a text or a status code. `requests` has the received requests, and `most_at_once`
    the most that were open at a time.
    """

    answer: Callable[[dict[str, Any], int], str | int]
    url: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)
    most_at_once: int = 0
    at_once: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


@contextmanager
def vision_server(answer: Callable[[dict[str, Any], int], str | int]) -> Iterator[VisionServer]:
    """Serve on a free port while the block runs."""
    state = VisionServer(answer)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with state.lock:
                number = len(state.requests)
                state.requests.append(body)
                state.keys.add(self.headers.get("Authorization", ""))
                state.at_once += 1
                state.most_at_once = max(state.most_at_once, state.at_once)
            found = state.answer(body, number)
            with state.lock:
                state.at_once -= 1
            self.respond(found)

        def respond(self, found: str | int) -> None:
            if isinstance(found, int):
                data, code = b'{"error": {"message": "not now"}}', found
            else:
                usage = {"prompt_tokens": 100, "completion_tokens": 10}
                data, code = json.dumps({"choices": [{"message": {"content": found}}], "usage": usage}).encode(), 200
            self.send_response(code)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            """Log nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
