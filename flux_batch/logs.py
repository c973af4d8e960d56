"""Log lines for people, or for programs; no secret of an address, and nothing a terminal would take for a command.

Programs ask for theirs as they do of Ray: RAY_LOGGING_CONFIG_ENCODING=JSON. Ray then writes those of the workers, with
its own fields beside; both have `run`, `shard` and `key` where a line is about one.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

from flux_batch.redaction import plain_text

SWITCH = "RAY_LOGGING_CONFIG_ENCODING"
FIELDS = ("run", "shard", "key", "exit_code")


class PlainLines(logging.Formatter):
    """A line as it is, or lines."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, or lines, of a record."""
        return plain_text(super().format(record))


class JsonLines(logging.Formatter):
    """One object a line. `run` is the name of the run, once it is known."""

    run = ""

    def format(self, record: logging.LogRecord) -> str:
        """Return the object of a record."""
        fields = {name: getattr(record, name) for name in FIELDS if hasattr(record, name)}
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


@contextmanager
def log_lines(level: int) -> Iterator[logging.Formatter]:
    """Write what this program logs to stderr, as the environment asks for; give the formatter."""
    ours = logging.getLogger("flux_batch")
    ours.setLevel(level)
    formatter = JsonLines() if os.environ.get(SWITCH) == "JSON" else PlainLines()
    lines = logging.StreamHandler(sys.stderr)
    lines.setFormatter(formatter)
    if isinstance(formatter, PlainLines):
        logging.basicConfig(level=logging.WARNING, handlers=[lines])
        yield formatter
        return
    ours.addHandler(lines)
    ours.propagate = False  # to the handler that Ray gives to the root
    try:
        yield formatter
    finally:
        ours.removeHandler(lines)
        ours.propagate = True
