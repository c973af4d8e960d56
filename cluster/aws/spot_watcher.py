"""Watches for the interruption notice of this AWS spot node, and makes Ray drain the node.

    nohup python spot_watcher.py &        on every spot node, once `ray start` has returned

The driver then makes the workers of the node put their shards aside and begins them elsewhere, which loses no image.
Needs only Python and the `ray` command. Source of the addresses: AWS, "Spot Instance interruption notices" and
"Use the Instance Metadata Service" (version 2: a token first).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import urllib.request
from datetime import UTC, datetime
from http import HTTPStatus
from urllib.error import HTTPError

METADATA = "http://169.254.169.254"
# AWS recommends a check every 5 seconds; the notice comes 2 minutes before the end.
INTERVAL_S = 5.0
TOKEN_S = 21600
ANSWER_S = 2.0
# Ray must finish before the machine is gone.
SPARE_S = 10


class Metadata:
    """The metadata service of an instance."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._token = ""

    def end(self) -> datetime | None:
        """Return the time at which this instance ends, None without a notice. Raises: OSError."""
        try:
            return self._notice()
        except HTTPError as error:
            error.close()
            if error.code == HTTPStatus.NOT_FOUND:
                return None
            if error.code == HTTPStatus.UNAUTHORIZED:  # the token is too old
                self._token = ""
            raise

    def _notice(self) -> datetime:
        if not self._token:
            self._token = self._ask("/latest/api/token", "PUT", {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_S)})
        token = {"X-aws-ec2-metadata-token": self._token}
        notice = json.loads(self._ask("/latest/meta-data/spot/instance-action", "GET", token))
        return datetime.fromisoformat(notice["time"])

    def _ask(self, path: str, method: str, headers: dict[str, str]) -> str:
        request = urllib.request.Request(self._address + path, method=method, headers=headers)
        with urllib.request.urlopen(request, timeout=ANSWER_S) as answer:
            return str(answer.read().decode())


def watch(metadata: Metadata, interval_s: float) -> datetime:
    """Wait for the notice. Returns: the time at which the instance ends."""
    while True:
        try:
            if end := metadata.end():
                return end
        except (OSError, ValueError, KeyError) as error:
            print(f"spot_watcher: {error}", file=sys.stderr, flush=True)
        time.sleep(interval_s)


def drain(end: datetime) -> int:
    """Make Ray drain this node before it ends. Returns: the exit code of the command."""
    left_s = max(1, round((end - datetime.now(UTC)).total_seconds()) - SPARE_S)
    print(f"spot_watcher: this node ends at {end:%H:%M:%S} UTC; draining it within {left_s} s", flush=True)
    command = ["ray", "drain-node", "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot notice"]
    return subprocess.run([*command, "--deadline-remaining-seconds", str(left_s)], check=False).returncode


def main() -> int:
    """Wait for the notice and drain the node; try again while the command fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--metadata", default=METADATA, help=f"address of the metadata service ({METADATA})")
    parser.add_argument("--interval", type=float, default=INTERVAL_S, help=f"seconds between two checks ({INTERVAL_S})")
    given = parser.parse_args()
    end = watch(Metadata(given.metadata), given.interval)
    while drain(end):
        if datetime.now(UTC) >= end:
            return 1
        time.sleep(given.interval)
    return 0


if __name__ == "__main__":
    sys.exit(main())
