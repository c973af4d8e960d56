"""Log lines as text or JSON, without secrets or control characters.

RAY_LOGGING_CONFIG_ENCODING=JSON selects JSON here and in Ray, which then adds its own fields to the lines of workers.
Lines about a run, a shard or an image have the fields `run`, `shard` and `key`.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from typing import TextIO

from flux_batch.redaction import plain_text

ENCODING = "RAY_LOGGING_CONFIG_ENCODING"
_FIELDS = ("run", "shard", "key", "exit_code", "progress")


@contextmanager
def open_streams() -> Iterator[None]:
    """Keep stdout and stderr writable while the block runs, even after `>&-`.

    Unwritten output is dropped at the end if it cannot be written, as on a full disk: Python would exit with 120.
    """
    with ExitStack() as stack:
        for name in ("stdout", "stderr"):
            if getattr(sys, name) is None:
                nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
                stack.callback(setattr, sys, name, None)
                setattr(sys, name, nowhere)
        stack.callback(_drop_unread)
        yield


@contextmanager
def reader_may_be_gone() -> Iterator[None]:
    """Run a block that writes to a pipe or terminal whose reader may be gone."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.EIO):
            raise


def _drop_unread() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


class _PlainLines(logging.Formatter):
    """A formatter of plain text."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the lines of a record."""
        return plain_text(super().format(record))


class JsonLines(logging.Formatter):
    """A formatter that writes one JSON object per line; `run` is the name of the run, once known."""

    run = ""

    def format(self, record: logging.LogRecord) -> str:
        """Return a record as JSON."""
        fields = {name: getattr(record, name) for name in _FIELDS if hasattr(record, name)}
        body = {
            "asctime": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "levelname": record.levelname,
            "name": record.name,
            "message": plain_text(record.getMessage()),
            **({"run": self.run} if self.run else {}),
            **fields,
        }
        if record.exc_info:
            body["exc_text"] = plain_text(self.formatException(record.exc_info))
        return json.dumps(body)


class _Stderr(logging.StreamHandler[TextIO]):
    """A handler that looks up sys.stderr for each line, since a live display replaces it."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        """The present stderr."""
        return sys.stderr


@contextmanager
def log_lines(level: int) -> Iterator[logging.Formatter]:
    """Write this program's log lines to stderr, encoded as the environment says. Yields: the formatter."""
    ours = logging.getLogger("flux_batch")
    ours.setLevel(level)
    formatter = JsonLines() if os.environ.get(ENCODING) == "JSON" else _PlainLines()
    lines = _Stderr()
    lines.setFormatter(formatter)
    if isinstance(formatter, _PlainLines):
        logging.basicConfig(level=logging.WARNING, handlers=[lines])
        yield formatter
        return
    ours.addHandler(lines)
    ours.propagate = False  # otherwise Ray's handler of the root logger would write them again
    try:
        yield formatter
    finally:
        ours.removeHandler(lines)
        ours.propagate = True
