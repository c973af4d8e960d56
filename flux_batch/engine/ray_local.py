"""The Ray cluster that a run starts on its own machine: when it does, and with which settings.

Imports no Ray, so that what Ray reads from the environment when it is imported can be set before.
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

# Images never pass through the object store: it holds the worker factory. Ray takes no less than 75 MiB.
_OBJECT_STORE_BYTES = 80 << 20
_SHARED_MEMORY = "/dev/shm"
_SHORT_TEMP_DIR = "/tmp/ray"
# The bytes of a socket's path, without its end: sockaddr_un in unix(7), and in macOS.
_MAX_SOCKET_PATH = 103 if sys.platform == "darwin" else 107
_LONGEST_SOCKET = "/ray/session_2026-11-29_14-06-08_553668_4194304/sockets/plasma_store"
# Values of RAY_ADDRESS with which a cluster is started here.
_NO_CLUSTER = ("", "local")
_MAX_PORT = 65535
# The namespace of actors in a cluster that was started here, by which it is told from one of somebody else.
_OWN_NAMESPACE = "flux-batch"


def joins_cluster() -> bool:
    """Return whether a run uses a Ray cluster of somebody else; otherwise it starts one on this machine.

    One that an earlier run of this process has started is not of somebody else.
    Raises: JobError if RAY_ADDRESS can never be the address of a cluster.
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
            f"RAY_ADDRESS = {address} is a job server, which takes jobs by jobs/submit.sh or `ray job submit`; unset "
            "it to run the job here, or set it to the cluster itself, as in head:6379"
        )
    if address.startswith("ray://"):
        raise JobError(
            f"RAY_ADDRESS = {address} is a server of the Ray client, which is not used here; submit the job by "
            "jobs/submit.sh or `ray job submit`, or set RAY_ADDRESS to the head of the cluster, as in head:6379"
        )
    host, _, port = address.rpartition(":")
    if "/" in host or not (host.strip() and port.isascii() and port.isdecimal() and 0 < int(port) <= _MAX_PORT):
        raise JobError(
            f"RAY_ADDRESS = {address} is no address of a Ray cluster; set it to HOST:PORT of its head, as in "
            "head:6379, or to auto for the cluster of this machine, or unset it to start one here"
        )


def has_gpu() -> bool:
    """Return whether this machine has a GPU that its processes may see.

    Linux shows NVIDIA's GPUs as /dev/nvidia0 and so on, or as /dev/dxg under Windows, and AMD's as /dev/kfd. Apple's
    processors have one.
    """
    if _has_apple_gpu():
        return True
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
        return False
    return any(glob.glob(pattern) for pattern in ("/dev/nvidia[0-9]*", "/dev/dxg", "/dev/kfd"))


def is_uv_run() -> bool:
    """Return whether Ray starts the workers of a cluster by `uv run`.

    uv sets the variable for what it runs; Ray looks at the command lines of its parents.
    """
    is_asked = os.environ.get("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "1").lower() in ("1", "true")
    return is_asked and "UV_RUN_RECURSION_DEPTH" in os.environ


def keep_environment() -> None:
    """Keep workers on this machine in the environment of the driver; call it before Ray is imported.

    Under `uv run` Ray would copy the working folder and build the environment again for each worker.
    """
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")


def local_options(num_gpus: float) -> dict[str, Any]:
    """Return the arguments of ray.init for a cluster on this machine. It has logical GPUs where there are no others.

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
        options["num_gpus"] = 1  # Ray itself counts none
    elif not (has_gpu() and _ray_counts_gpus()):
        options["num_gpus"] = num_gpus
    if _free_shared_memory() < _OBJECT_STORE_BYTES:
        options["_plasma_directory"] = str(_existing(options["_temp_dir"]))
    _settle_token()
    return options


def settle_colours() -> None:
    """Keep Ray from colouring the lines of workers.

    This holds where NO_COLOR is set, or where stdout or stderr is no terminal.
    """
    are_terminals = all(stream and stream.isatty() for stream in (sys.stdout, sys.stderr))
    if os.environ.get("NO_COLOR") or not are_terminals:
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")


def _folder() -> str:
    """Return the folder for Ray's files: its default, unless that is too long for the sockets in it."""
    name = next((name for name in ("RAY_TMPDIR", "TMPDIR") if os.environ.get(name)), "")
    folder = os.environ.get(name, "/tmp")
    if len(os.fsencode(folder + _LONGEST_SOCKET)) <= _MAX_SOCKET_PATH:
        return os.path.join(folder, "ray")
    if name == "RAY_TMPDIR":
        longest = _MAX_SOCKET_PATH - len(_LONGEST_SOCKET)
        raise JobError(f"RAY_TMPDIR = {folder}: must have at most {longest} bytes, for the sockets in it")
    return _SHORT_TEMP_DIR


def _ray_counts_gpus() -> bool:
    """Return whether Ray finds this machine's GPUs by itself: NVIDIA's, by a library that comes with their driver."""
    return any(glob.glob(pattern) for pattern in ("/dev/nvidia[0-9]*", "/usr/lib/wsl/lib/libnvidia-ml.so*"))


def _has_apple_gpu() -> bool:
    return sys.platform == "darwin" and platform.machine() == "arm64"


def _existing(folder: str) -> Path:
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    return path


def _free_shared_memory() -> int:
    """Return the free bytes of shared memory; more than enough on systems that have it elsewhere."""
    try:
        usage = os.statvfs(_SHARED_MEMORY)
    except OSError:
        return sys.maxsize
    return usage.f_bavail * usage.f_bsize


def _settle_token() -> None:
    """Make a token for this run where Ray cannot keep one in the home folder.

    Ray keeps other users off the cluster by a token in ~/.ray, with a warning that there is nothing to do about.
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
