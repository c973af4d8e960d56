"""The Ray cluster that a run starts on its own machine: the decision to start it, and its settings.

This module does not import Ray, so that it can set environment variables which Ray reads at its import.
"""

from __future__ import annotations

import glob
import logging
import os
import platform
import secrets
import sys
from pathlib import Path
from typing import Any

from flux_batch.errors import JobError

# The object store holds only the worker factory, no images. Ray requires at least 75 MiB.
_OBJECT_STORE_BYTES = 80 << 20
_SHARED_MEMORY = "/dev/shm"
_SHORT_TEMP_DIR = "/tmp/ray"
# The longest path of a socket in bytes, without the final NUL: sockaddr_un in unix(7), and in macOS.
_MAX_SOCKET_PATH = 103 if sys.platform == "darwin" else 107
_LONGEST_SOCKET = "/ray/session_2026-11-29_14-06-08_553668_4194304/sockets/plasma_store"
# Values of RAY_ADDRESS for which a cluster is started on this machine.
_NO_CLUSTER = ("", "local")
_MAX_PORT = 65535
# The namespace of a cluster that this program started; it distinguishes the cluster from others.
_OWN_NAMESPACE = "flux-batch"


def joins_cluster() -> bool:
    """Return whether a run joins an existing Ray cluster; otherwise it starts one on this machine.

    A cluster that an earlier run of this process has started does not count as existing.
    Raises: JobError if RAY_ADDRESS cannot be the address of a cluster.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    _check_address(address)
    if address not in _NO_CLUSTER:
        return True
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return False
    return bool(ray.get_runtime_context().namespace != _OWN_NAMESPACE)


def _check_address(address: str) -> None:
    """Raise JobError for an address that no cluster can have."""
    if address in (*_NO_CLUSTER, "auto"):
        return
    if address.startswith(("http://", "https://")):
        raise JobError(
            f"RAY_ADDRESS = {address} is a job server, which takes jobs from jobs/submit.sh or `ray job submit`; unset "
            "it to run the job here, or set it to the cluster itself, e.g. head:6379"
        )
    if address.startswith("ray://"):
        raise JobError(
            f"RAY_ADDRESS = {address} is a server of the Ray client, which is not supported; submit the job with "
            "jobs/submit.sh or `ray job submit`, or set RAY_ADDRESS to the head of the cluster, e.g. head:6379"
        )
    host, _, port = address.rpartition(":")
    if "/" in host or not (host.strip() and port.isascii() and port.isdecimal() and 0 < int(port) <= _MAX_PORT):
        raise JobError(
            f"RAY_ADDRESS = {address} is not the address of a Ray cluster; set it to HOST:PORT of its head, e.g. "
            "head:6379, or to auto for the cluster of this machine, or unset it to start one here"
        )


def has_gpu() -> bool:
    """Return whether this machine has a GPU that this process may use.

    Linux shows NVIDIA's GPUs as /dev/nvidia0 and so on, or as /dev/dxg in WSL, and AMD's as /dev/kfd. Apple's
    processors have one.
    """
    if _has_apple_gpu():
        return True
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
        return False
    return any(glob.glob(pattern) for pattern in ("/dev/nvidia[0-9]*", "/dev/dxg", "/dev/kfd"))


def is_uv_run() -> bool:
    """Return whether Ray starts the workers of a cluster with `uv run`.

    uv sets UV_RUN_RECURSION_DEPTH for its child processes; Ray itself reads the command lines of its parents.
    """
    is_asked = os.environ.get("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "1").lower() in ("1", "true")
    return is_asked and "UV_RUN_RECURSION_DEPTH" in os.environ


def keep_environment() -> None:
    """Make workers on this machine use the driver's Python environment; call it before Ray is imported.

    Under `uv run`, Ray would otherwise copy the working folder and rebuild the environment for each worker.
    """
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")


def local_options(num_gpus: float) -> dict[str, Any]:
    """Return the arguments of ray.init for a local cluster; it has logical GPUs if Ray finds none.

    Raises: JobError if RAY_TMPDIR is too long.
    """
    options: dict[str, Any] = {
        "address": "local",
        "namespace": _OWN_NAMESPACE,
        "include_dashboard": False,
        "object_store_memory": _OBJECT_STORE_BYTES,
        "_temp_dir": _folder(),
    }
    if _has_apple_gpu():
        options["num_gpus"] = 1  # Ray does not find it
    elif not (has_gpu() and _ray_counts_gpus()):
        options["num_gpus"] = num_gpus
    if _free_shared_memory() < _OBJECT_STORE_BYTES:
        options["_plasma_directory"] = str(_existing(options["_temp_dir"]))
    _settle_token()
    return options


def settle_colours() -> None:
    """Turn off Ray's colours in the log lines of workers if NO_COLOR is set.

    Also turn them off if stdout or stderr is not a terminal.
    """
    are_terminals = all(stream and stream.isatty() for stream in (sys.stdout, sys.stderr))
    if os.environ.get("NO_COLOR") or not are_terminals:
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")


def _folder() -> str:
    """Return the folder for Ray's files: its default, unless the paths of its sockets would be too long."""
    name = next((name for name in ("RAY_TMPDIR", "TMPDIR") if os.environ.get(name)), "")
    folder = os.environ.get(name, "/tmp")
    if len(os.fsencode(folder + _LONGEST_SOCKET)) <= _MAX_SOCKET_PATH:
        return os.path.join(folder, "ray")
    if name == "RAY_TMPDIR":
        longest = _MAX_SOCKET_PATH - len(_LONGEST_SOCKET)
        raise JobError(f"RAY_TMPDIR = {folder}: must have at most {longest} bytes, for the sockets in it")
    return _SHORT_TEMP_DIR


def _ray_counts_gpus() -> bool:
    """Return whether Ray finds this machine's GPUs itself: it finds NVIDIA's, by a library of their driver."""
    return any(glob.glob(pattern) for pattern in ("/dev/nvidia[0-9]*", "/usr/lib/wsl/lib/libnvidia-ml.so*"))


def _has_apple_gpu() -> bool:
    return sys.platform == "darwin" and platform.machine() == "arm64"


def _existing(folder: str) -> Path:
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    return path


def _free_shared_memory() -> int:
    """Return the free bytes of /dev/shm; a very large number on systems without it."""
    try:
        usage = os.statvfs(_SHARED_MEMORY)
    except OSError:
        return sys.maxsize
    return usage.f_bavail * usage.f_bsize


def _settle_token() -> None:
    """Make a token for this run if Ray cannot store one in the home folder.

    Ray keeps other users off the cluster by a token in ~/.ray. Its warning about that is turned off, since the user
    need not do anything.
    """
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    given = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    if any(os.environ.get(name) for name in given):
        return
    token = Path.home() / ".ray" / "auth_token"
    try:
        token.parent.mkdir(parents=True, exist_ok=True)
        is_writable = token.exists() or os.access(token.parent, os.W_OK)
    except OSError:
        is_writable = False
    if not is_writable:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(16)
