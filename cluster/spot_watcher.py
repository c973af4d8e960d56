"""Watches for the spot notice of this node on AWS, Google or Azure, and makes Ray drain the node.

    nohup python cluster/spot_watcher.py --cloud aws &        on every spot node, once `ray start` has returned

The driver then makes the workers of the node put their shards aside and begins these shards on other nodes, so that no
image is lost. A notice leaves two minutes on AWS, but only 30 seconds on Google and Azure: there, set
`failures.drain_s` to 15. Needs only Python and the `ray` command. Source of addresses and headers: AWS, "Spot Instance
interruption notices" and "Use the Instance Metadata Service" (version 2: a token first); Google, "Create and use Spot
VMs"; Azure, "Scheduled Events for Linux VMs" and "Azure Instance Metadata Service".
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import urllib.request
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from http.client import HTTPException
from urllib.error import HTTPError

# AWS recommends an interval of 5 seconds, Azure of 1 second.
INTERVAL_S = 2.0
TOKEN_S = 21600
ANSWER_S = 2.0
# Google's notice has no time; a node has 30 seconds.
GOOGLE_NOTICE_S = 30
# Ray must finish before the machine is gone.
SPARE_S = 10
# The service is on the machine itself, so it must not be asked through a proxy from the environment.
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
# Errors of a failed request or a bad answer; the watcher asks again.
BROKEN = (OSError, HTTPException, ValueError, KeyError, TypeError)


class Metadata:
    """The metadata service of an instance."""

    address = "http://169.254.169.254"

    def __init__(self, address: str = "") -> None:
        self.address = address or self.address

    def end(self) -> datetime | None:
        """Return the time at which this instance ends, None without a notice. Raises: one of BROKEN."""
        raise NotImplementedError

    def ask(self, path: str, headers: dict[str, str], method: str = "GET") -> str:
        """Return the answer to a request. Raises: OSError, HTTPException."""
        request = urllib.request.Request(self.address + path, method=method, headers=headers)
        with DIRECT.open(request, timeout=ANSWER_S) as answer:
            return str(answer.read().decode())


class Aws(Metadata):
    """The metadata service of EC2."""

    token = ""

    def end(self) -> datetime | None:
        """Return the time in the notice, None while the service answers 404."""
        try:
            return self._notice()
        except HTTPError as error:
            error.close()
            if error.code == HTTPStatus.NOT_FOUND:
                return None
            if error.code == HTTPStatus.UNAUTHORIZED:  # the token is too old
                self.token = ""
            raise

    def _notice(self) -> datetime:
        if not self.token:
            seconds = {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_S)}
            self.token = self.ask("/latest/api/token", seconds, "PUT")
        token = {"X-aws-ec2-metadata-token": self.token}
        return datetime.fromisoformat(json.loads(self.ask("/latest/meta-data/spot/instance-action", token))["time"])


class Google(Metadata):
    """The metadata service of Compute Engine."""

    address = "http://metadata.google.internal"

    def end(self) -> datetime | None:
        """Return 30 seconds from now if the instance is marked as preempted, else None."""
        is_going = self.ask("/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"}).strip() == "TRUE"
        return datetime.now(UTC) + timedelta(seconds=GOOGLE_NOTICE_S) if is_going else None


class Azure(Metadata):
    """The metadata service of Azure, whose events cover all machines of a group."""

    name = ""

    def end(self) -> datetime | None:
        """Return the time of this machine's preemption, None without a notice; now if it has begun."""
        header = {"Metadata": "true"}
        if not self.name:
            self.name = self.ask("/metadata/instance/compute/name?api-version=2021-02-01&format=text", header)
        for event in json.loads(self.ask("/metadata/scheduledevents?api-version=2020-07-01", header))["Events"]:
            if event["EventType"] == "Preempt" and self.name in event["Resources"]:
                return parsedate_to_datetime(event["NotBefore"]) if event["NotBefore"] else datetime.now(UTC)
        return None


CLOUDS = {"aws": Aws, "google": Google, "azure": Azure}


def watch(metadata: Metadata, interval_s: float) -> datetime:
    """Wait for the notice. Returns: the time at which the instance ends."""
    while True:
        try:
            if end := metadata.end():
                return end
        except BROKEN as error:
            print(f"spot_watcher: {error!r}", file=sys.stderr, flush=True)
        time.sleep(interval_s)


def drain(end: datetime) -> int:
    """Make Ray drain this node before it ends. Returns: the exit code of the command."""
    left_s = max(1, round((end - datetime.now(UTC)).total_seconds()) - SPARE_S)
    print(f"spot_watcher: this node ends at {end:%H:%M:%S} UTC; draining it within {left_s} s", flush=True)
    command = ["ray", "drain-node", "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot notice"]
    return subprocess.run([*command, "--deadline-remaining-seconds", str(left_s)], check=False).returncode


def main() -> int:
    """Wait for the notice and drain the node, again while the command fails until the node ends."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cloud", choices=CLOUDS, default="aws", help="the cloud of this spot node (aws)")
    parser.add_argument("--metadata", default="", help="address of the metadata service, if not the cloud's own")
    parser.add_argument("--interval", type=float, default=INTERVAL_S, help=f"seconds between two checks ({INTERVAL_S})")
    given = parser.parse_args()
    end = watch(CLOUDS[given.cloud](given.metadata), given.interval)
    while drain(end):
        if datetime.now(UTC) >= end:
            return 1
        time.sleep(given.interval)
    return 0


if __name__ == "__main__":
    sys.exit(main())
