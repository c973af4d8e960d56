"""The Ray cluster as a whole: joining it, or starting one here; telling whether it still answers."""

from __future__ import annotations

import glob
import logging
import os
import signal
import socket
import threading
import time
from typing import Any

import ray

from flux_batch.errors import Interrupted

# How long to wait for the TCP answer of a cluster that others have started.
REACHABLE_S = 10.0
# How long a cluster that stopped answering may take to come back.
LOST_S = 30.0


def connect(max_workers: int, num_gpus: float) -> None:
    """Connect to Ray unless this process already is; a local cluster on a machine without GPUs gets logical ones.

    Raises: Interrupted if no cluster answers at RAY_ADDRESS.
    """
    if ray.is_initialized():
        return
    options: dict[str, Any] = {"log_to_driver": True, "logging_level": logging.WARNING}
    if address := os.environ.get("RAY_ADDRESS"):
        check_reachable(address)
    else:
        options |= {"address": "local", "include_dashboard": False}
        if not glob.glob("/dev/nvidia[0-9]*"):
            options["num_gpus"] = max_workers * num_gpus
    handler = signal.getsignal(signal.SIGTERM)
    ray.init(**options)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)  # ray.init takes the signal over; it is the program's to handle


def gcs_address() -> str:
    """Give the address of the part of the cluster without which there is none."""
    return str(ray.get_runtime_context().gcs_address)


def check_reachable(address: str) -> None:
    """Raise Interrupted unless something listens at a HOST:PORT address; Ray itself would try for many minutes."""
    if reason := why_unreachable(address):
        raise Interrupted(
            f"RAY_ADDRESS = {address}: no Ray cluster answers there ({reason}); start it, or unset RAY_ADDRESS "
            "to start one on this machine"
        )


def why_unreachable(address: str, timeout_s: float = REACHABLE_S) -> str | None:
    """Say why nothing listens at a HOST:PORT address; None if something does, or if it is of another kind."""
    host, _, port = address.rpartition(":")
    if not port.isdecimal() or "/" in host:  # `auto` or ray://, which answer for themselves
        return None
    try:
        socket.create_connection((host, int(port)), timeout=timeout_s).close()
    except OSError as error:
        return str(error)
    return None


def await_cluster(address: str) -> None:
    """Wait while the cluster is away. Raises: Interrupted if it stays away.

    Calls of Ray would block, and after a minute Ray ends this process without a word to its user.
    """
    deadline = time.monotonic() + LOST_S
    while reason := why_unreachable(address):
        if time.monotonic() > deadline:
            raise Interrupted(f"the Ray cluster at {address} is gone ({reason}); run the same command again")
        time.sleep(1)
