"""The Ray cluster: joining or starting one, checking that it answers, finding nodes that leave."""

from __future__ import annotations

import json
import logging
import os
import queue
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RuntimeEnvSetupError

from flux_batch.engine.ray_local import is_uv_run, joins_cluster, local_options, settle_colours
from flux_batch.errors import FluxBatchError, Interrupted, JobError, one_line

log = logging.getLogger(__name__)

# For workers that it starts by uv, Ray packs the folder, at most 512 MiB: ray/_private/runtime_env/packaging.py.
_UV_ADVICE = (
    "name what workers do not need in .rayignore, or, where the nodes have flux-batch, set "
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV=0"
)
_ADDRESS_ADVICE = (
    "start it, set RAY_ADDRESS to HOST:PORT of another, e.g. head:6379, or unset it to start one on this machine"
)
_VERSION_ADVICE = "install the versions of the cluster here, or submit the job to it by jobs/submit.sh"
# Seconds in which an existing cluster must answer.
_CONNECT_TIMEOUT_S = 10.0
# The first bytes of an HTTP/2 client, with which gRPC begins, and the header of a server's first frame, SETTINGS:
# RFC 9113, sections 3.4 and 4.1.
_HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
_FRAME_HEADER_BYTES, _SETTINGS_FRAME = 9, b"\x04"
# Seconds in which a cluster that stopped answering must answer again.
CLUSTER_LOST_S = 30.0
# Seconds in which a node must accept a TCP connection; otherwise it counts as gone.
_NODE_TIMEOUT_S = 3.0


def find_cluster(max_workers: int, num_gpus: float) -> None:
    """Connect to the cluster of RAY_ADDRESS before anything is written; a submitted job only checks its address.

    Such a job connects later, when all modules are imported: once the driver connects, Ray unpacks the submitted folder
    again if nodes share a disk, and a module could not be imported meanwhile. Raises: as `connect`.
    """
    if _has_working_dir() and not ray.is_initialized():
        _check_address()
    else:
        connect(max_workers, num_gpus)


def connect(max_workers: int, num_gpus: float) -> None:
    """Connect to Ray unless this process is connected; a local cluster without GPUs gets logical ones.

    Raises: Interrupted if no cluster answers at RAY_ADDRESS, or after a SIGTERM; JobError if RAY_ADDRESS cannot be a
    cluster, if the cluster has other versions of Ray or Python, or if workers cannot get the environment of `uv run`.
    """
    if ray.is_initialized():
        return
    options: dict[str, Any] = {"log_to_driver": True, "logging_level": logging.WARNING}
    if joins_cluster():
        _check_address()
        if is_uv_run() and not _has_working_dir():
            log.info("uv run: Ray packs %s for the workers, up to 512 MiB; %s", Path.cwd(), _UV_ADVICE)
    else:
        options |= local_options(max_workers * num_gpus)
    settle_colours()
    with _signals_kept():
        _init(options)


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Run ray.init without keeping its SIGTERM handler; a SIGHUP is delivered after it.

    The processes that it starts never get a SIGHUP: a closed terminal would end the local cluster before its workers
    could stop.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP])  # child processes inherit it
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _init(options: Mapping[str, Any]) -> None:
    """Call ray.init. Raises: known errors as ours."""
    try:
        ray.init(**options)
    except SystemExit:  # from Ray's own signal handlers during ray.init, with exit code 15 or 1
        raise Interrupted("stopped by SIGTERM before Ray had started; run the same command again") from None
    except (ConnectionError, RuntimeEnvSetupError, RuntimeError) as error:
        if explained := _explained(error, os.environ.get("RAY_ADDRESS", "")):
            raise explained from error
        raise


def _explained(error: Exception, address: str) -> FluxBatchError | None:
    """Return a known error of ray.init in one sentence; None for an unknown one."""
    if isinstance(error, ConnectionError) and address:
        found = "several Ray clusters are" if "multiple" in str(error) else "no Ray cluster is"
        reason = f"{found} found on this machine" if address == "auto" else _no_cluster(one_line(error))
        return Interrupted(f"RAY_ADDRESS = {address}: {reason}; {_ADDRESS_ADVICE}")
    if str(error).startswith("Version mismatch"):
        return JobError(f"RAY_ADDRESS = {address}: {one_line(error)}; {_VERSION_ADVICE}")
    if is_uv_run() and "working_dir" in str(error) and not isinstance(error, ConnectionError):
        return JobError(f"uv run: {one_line(error)}; {_UV_ADVICE}")
    return None


def _has_working_dir() -> bool:
    """Return whether this process is a Ray job that was submitted with a working directory."""
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    return "working_dir" in (job.get("runtime_env") or {})


def _check_address() -> None:
    """Check that a Ray cluster answers at RAY_ADDRESS; Ray itself would retry for many minutes.

    `auto` is left to Ray, which finds out at once. Raises: Interrupted if nothing answers there; JobError if the server
    there does not speak gRPC, as the head of a cluster does.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    if not _has_port(address):
        return
    uses_tls = os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true")
    try:
        with _connected(address, _CONNECT_TIMEOUT_S) as connection:
            frame = None if uses_tls else _first_frame(connection)
    except OSError as error:
        raise Interrupted(f"RAY_ADDRESS = {address}: {_no_cluster(str(error))}; {_ADDRESS_ADVICE}") from error
    if frame is not None and frame[3:4] != _SETTINGS_FRAME:
        program = "an HTTP server, perhaps the dashboard," if frame.startswith(b"HTTP/") else "another program"
        raise JobError(f"RAY_ADDRESS = {address}: {program} answers there, not a Ray cluster; {_ADDRESS_ADVICE}")


def _first_frame(connection: socket.socket) -> bytes:
    """Return the first bytes that a server sends; an HTTP/2 server sends a frame header. Raises: OSError."""
    with connection.makefile("rb") as stream:
        connection.sendall(_HTTP2_PREFACE)
        if frame := stream.read(_FRAME_HEADER_BYTES):
            return frame
    raise ConnectionError("the connection was closed at once")


def _no_cluster(reason: str) -> str:
    return f"no Ray cluster answers there ({reason})"


def why_unreachable(address: str, timeout_s: float = _CONNECT_TIMEOUT_S) -> str | None:
    """Return why an address accepts no connection; None if it does, or if it is not HOST:PORT."""
    if not _has_port(address):
        return None
    try:
        _connected(address, timeout_s).close()
    except OSError as error:
        return str(error)
    return None


def _has_port(address: str) -> bool:
    """Return whether an address ends with a port, unlike `auto`."""
    return address.rpartition(":")[2].isdecimal()


def _connected(address: str, timeout_s: float) -> socket.socket:
    """Return a connection to HOST:PORT with a timeout of `timeout_s` per operation. Raises: OSError."""
    host, _, port = address.rpartition(":")
    return socket.create_connection((host.strip("[]"), int(port)), timeout=timeout_s)


def await_cluster(address: str) -> None:
    """Wait while the cluster does not answer. Raises: Interrupted if it does not come back.

    Calls of Ray would block meanwhile, and after a minute Ray would end this process without a message to the user.
    """
    deadline = time.monotonic() + CLUSTER_LOST_S
    while reason := why_unreachable(address):
        if time.monotonic() > deadline:
            raise Interrupted(f"the Ray cluster at {address} is gone ({reason}); run the same command again")
        time.sleep(1)


class RayCluster:
    """The cluster of this process, with actors of one class.

    Each call is a future that Ray completes, so the driver need not poll all calls.
    """

    def __init__(self, actor_class: Any, factory: Any) -> None:
        self.clock = time.monotonic
        self.address = str(ray.get_runtime_context().gcs_address)
        self._actor_class = actor_class
        self._factory = ray.put(factory)  # once for all actors
        self._answered: queue.SimpleQueue[Future[Any]] = queue.SimpleQueue()
        self._nodes = _Nodes()

    @property
    def node(self) -> str:
        """The node of this process."""
        return self._nodes.here

    def start_actor(self) -> Any:
        """Start one more worker process; if there is no room for it, the autoscaler adds a node."""
        return self._actor_class.remote(self._factory)

    def call(self, method: Any, *arguments: Any) -> Future[Any]:
        """Call a method of an actor; `wait` returns the call once it is answered."""
        call = self.ask(method, *arguments)
        call.add_done_callback(self._answered.put)
        return call

    def ask(self, method: Any, *arguments: Any) -> Future[Any]:
        """Call a method of an actor; `wait` does not return the call."""
        call: Future[Any] = method.remote(*arguments).future()
        return call

    def wait(self, timeout_s: float) -> list[Future[Any]]:
        """Wait for answers, for `timeout_s` at most. Returns: the calls answered since the last wait."""
        answered: list[Future[Any]] = []
        try:
            answered.append(self._answered.get(timeout=timeout_s))
            while True:
                answered.append(self._answered.get_nowait())
        except queue.Empty:
            return answered

    def kill(self, actor: Any) -> None:
        """End the process of an actor at once."""
        ray.kill(actor)

    def check(self) -> None:
        """Wait while the cluster does not answer. Raises: Interrupted if it does not come back."""
        await_cluster(self.address)

    def caused_loss(self, node: str, error: BaseException | None) -> bool:
        """Return whether a process was lost because its node was lost; `node` is empty if it never had one."""
        return self._nodes.caused_loss(node, error)

    def leaving_nodes(self) -> set[str]:
        """Return all nodes that are or were being drained."""
        self._nodes.refresh()
        return self._nodes.leaving

    def resources(self) -> Mapping[str, float]:
        """Return the cluster's total of each resource."""
        found: Mapping[str, float] = ray.cluster_resources()
        return found


class _Nodes:
    """The nodes of the cluster: `here` is this process's node, `leaving` all that are or were being drained."""

    def __init__(self) -> None:
        self.here = str(ray.get_runtime_context().get_node_id())
        self.leaving: set[str] = set()

    def refresh(self) -> None:
        """Read the draining nodes again."""
        self.leaving |= draining_nodes()

    def caused_loss(self, node: str, error: BaseException | None) -> bool:
        """Return whether a process was lost because its node was lost; `node` is empty if it never had one."""
        if isinstance(error, RayActorError) and error.preempted:
            return True
        self.refresh()
        return node in self.leaving or (not _is_up(node) if node else _never_ran(error))


def draining_nodes() -> set[str]:
    """Return the hexadecimal ids of the nodes that are being drained.

    `get_draining_nodes` is the only API of Ray used here that is not public; Ray Train and Ray Data use it too. With a
    version of Ray that lacks it, no node counts as draining until it is gone.
    """
    try:
        from ray._private.state import state

        return set(state.get_draining_nodes())
    except Exception as error:  # not public: any version may change or remove it
        log.debug("the draining nodes cannot be read: %s", error)
        return set()


def _is_up(node: str) -> bool:
    """Return whether a node accepts connections.

    Measured with Ray 2.60: calls to actors fail 2 s after their node died, but the cluster takes 15 s to notice.
    """
    for each in ray.nodes():
        if each["NodeID"] == node and each["Alive"]:
            return why_unreachable(f"{each['NodeManagerAddress']}:{each['NodeManagerPort']}", _NODE_TIMEOUT_S) is None
    return False


def _never_ran(error: BaseException | None) -> bool:
    """Return whether an actor was lost before it had a process: its node left during its start."""
    return isinstance(error, RayActorError) and "never ran" in str(error)
