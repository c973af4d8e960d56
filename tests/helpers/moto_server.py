"""Moto's server with atomic conditional writes, as S3 promises; moto itself checks first and writes later."""

from __future__ import annotations

import sys
import threading
from typing import Any

from moto.s3.responses import S3Response
from moto.server import main


def make_writes_one_step() -> None:
    """Make writes run one after the other, once their bodies are read."""
    lock, put_object = threading.Lock(), S3Response.put_object

    def put(self: Any) -> Any:
        with lock:
            return put_object(self)

    S3Response.put_object = put  # type: ignore[method-assign]


if __name__ == "__main__":
    make_writes_one_step()
    main(sys.argv[1:])
