"""The Ray cluster: joining or starting one, checking that it answers, and finding nodes that leave."""

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

# Ray packs a folder only for workers that it starts by uv, and takes 512 MiB: ray/_private/runtime_env/packaging.py.
_UV_ADVICE = (
    "name what workers do not need in .rayignore, or, where the nodes have flux-batch, set "
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV=0"
)
_ADDRESS_ADVICE = (
    "start it, set RAY_ADDRESS to HOST:PORT of another, as in head:6379, or unset it to start one on this machine"
)
_VERSION_ADVICE = "install the versions of the cluster here, or submit the job to it by jobs/submit.sh"
# Seconds for the answer of a cluster that others have started.
_CONNECT_TIMEOUT_S = 10.0
# A client's first bytes in HTTP/2, with which gRPC begins, and the header of a server's first frame, its settings:
# RFC 9113, sections 3.4 and 4.1.
_HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
_FRAME_HEADER_BYTES, _SETTINGS_FRAME = 9, b"\x04"
# Seconds that a cluster which stopped answering may take to come back.
CLUSTER_LOST_S = 30.0
# Seconds for the TCP answer of a node, which counts as gone after them.
_NODE_TIMEOUT_S = 3.0


def find_cluster(max_workers: int, num_gpus: float) -> None:
    """Connect to the cluster of RAY_ADDRESS before anything is written, as `connect`; a submitted job only looks.

    Its cluster has started it. Once its driver connects, Ray unpacks the submitted folder again where nodes share a
    disk, and a module that is imported meanwhile is not there: the driver connects when all of them are imported.
    """
    if _has_working_dir() and not ray.is_initialized():
        _check_address()
    else:
        connect(max_workers, num_gpus)


def connect(max_workers: int, num_gpus: float) -> None:
    """Connect to Ray unless this process is connected; a local cluster without GPUs gets logical ones.

    Raises: Interrupted if no cluster answers at RAY_ADDRESS, or at a SIGTERM; JobError if none ever can, if it has
    other versions of Ray and Python, or if Ray cannot give the workers the environment of `uv run`.
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
    """Run ray.init without the handlers that it sets; a SIGHUP meanwhile comes when it is done.

    What it starts never gets that: a closed terminal would end the local cluster before its workers could stop.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP])  # which processes inherit
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _init(options: Mapping[str, Any]) -> None:
    """Call ray.init. Raises: its errors as ours, where they are known."""
    try:
        ray.init(**options)
    except SystemExit:  # the handlers that Ray sets meanwhile end the process, with 15 or 1
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
    """Return whether this is a job of Ray that was submitted with a folder."""
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    return "working_dir" in (job.get("runtime_env") or {})


def _check_address() -> None:
    """Check that a Ray cluster answers at RAY_ADDRESS; Ray itself would try for many minutes, at any server.

    `auto` is left to Ray, which looks for a cluster at once. Raises: Interrupted if nothing answers there; JobError if
    it is no server of gRPC, as the head of a cluster is.
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
        program = "a server of HTTP, perhaps the dashboard," if frame.startswith(b"HTTP/") else "another program"
        raise JobError(f"RAY_ADDRESS = {address}: {program} answers there and no Ray cluster; {_ADDRESS_ADVICE}")


def _first_frame(connection: socket.socket) -> bytes:
    """Return the first bytes that a server sends: of one of HTTP/2 the header of a frame. Raises: OSError."""
    with connection.makefile("rb") as stream:
        connection.sendall(_HTTP2_PREFACE)
        if frame := stream.read(_FRAME_HEADER_BYTES):
            return frame
    raise ConnectionError("the connection is closed at once")


def _no_cluster(reason: str) -> str:
    return f"no Ray cluster answers there ({reason})"


def why_unreachable(address: str, timeout_s: float = _CONNECT_TIMEOUT_S) -> str | None:
    """Return why a HOST:PORT address accepts no connection; None if it does, or if the address has another form."""
    if not _has_port(address):
        return None
    try:
        _connected(address, timeout_s).close()
    except OSError as error:
        return str(error)
    return None


def _has_port(address: str) -> bool:
    """Return whether an address is HOST:PORT, and not `auto`."""
    return address.rpartition(":")[2].isdecimal()


def _connected(address: str, timeout_s: float) -> socket.socket:
    """Return a connection to HOST:PORT, for which each wait is `timeout_s`. Raises: OSError."""
    host, _, port = address.rpartition(":")
    return socket.create_connection((host.strip("[]"), int(port)), timeout=timeout_s)


def await_cluster(address: str) -> None:
    """Wait while the cluster does not answer. Raises: Interrupted if it stays away.

    Calls of Ray would block meanwhile, and after a minute Ray ends this process without a message to the user.
    """
    deadline = time.monotonic() + CLUSTER_LOST_S
    while reason := why_unreachable(address):
        if time.monotonic() > deadline:
            raise Interrupted(f"the Ray cluster at {address} is gone ({reason}); run the same command again")
        time.sleep(1)


class RayCluster:
    """The cluster that this process is connected to, whose actors are of one class.

    A call is a future from its begin: Ray itself hands over its answer, so that no turn of the driver asks for all.
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
        """Start one more process of a worker. If there is no room for it, this makes the autoscaler add a node."""
        return self._actor_class.remote(self._factory)

    def call(self, method: Any, *arguments: Any) -> Future[Any]:
        """Call a method of an actor. `wait` returns the call once it is answered."""
        call = self.ask(method, *arguments)
        call.add_done_callback(self._answered.put)
        return call

    def ask(self, method: Any, *arguments: Any) -> Future[Any]:
        """Call a method of an actor without waiting for its answer."""
        call: Future[Any] = method.remote(*arguments).future()
        return call

    def wait(self, timeout_s: float) -> list[Future[Any]]:
        """Wait until a call is answered. Returns: those that are since the last wait, none after `timeout_s`."""
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
        """Wait while the cluster does not answer. Raises: Interrupted if it stays away."""
        await_cluster(self.address)

    def caused_loss(self, node: str, error: BaseException | None) -> bool:
        """Return whether a process was lost because its node was; `node` is empty if it never had one."""
        return self._nodes.caused_loss(node, error)

    def leaving_nodes(self) -> set[str]:
        """Return the nodes that were or are being drained."""
        self._nodes.refresh()
        return self._nodes.leaving

    def resources(self) -> Mapping[str, float]:
        """Return how much of each resource the cluster has."""
        found: Mapping[str, float] = ray.cluster_resources()
        return found


class _Nodes:
    """The nodes of the cluster: `here` is that of this process, `leaving` are all that were or are being drained."""

    def __init__(self) -> None:
        self.here = str(ray.get_runtime_context().get_node_id())
        self.leaving: set[str] = set()

    def refresh(self) -> None:
        """Read again which nodes are being drained."""
        self.leaving |= draining_nodes()

    def caused_loss(self, node: str, error: BaseException | None) -> bool:
        """Return whether a process was lost because its node was; `node` is empty if it never had one."""
        if isinstance(error, RayActorError) and error.preempted:
            return True
        self.refresh()
        return node in self.leaving or (not _is_up(node) if node else _never_ran(error))


def draining_nodes() -> set[str]:
    """Return the hexadecimal ids of the nodes that are being drained.

    This is the one use of an API of Ray which is not public: `get_draining_nodes`, which Ray Train and Ray Data use
    too. A version of Ray without it has no draining nodes: they count as staying until they are gone.
    """
    try:
        from ray._private.state import state

        return set(state.get_draining_nodes())
    except Exception as error:  # not public: any version may change or remove it
        log.debug("the draining nodes cannot be read: %s", error)
        return set()


def _is_up(node: str) -> bool:
    """Return whether a node accepts connections.

    Measured with Ray 2.60: calls to its actors fail 2 s after a node died, the cluster takes 15 s to find out.
    """
    for each in ray.nodes():
        if each["NodeID"] == node and each["Alive"]:
            return why_unreachable(f"{each['NodeManagerAddress']}:{each['NodeManagerPort']}", _NODE_TIMEOUT_S) is None
    return False


def _never_ran(error: BaseException | None) -> bool:
    """Return whether an actor was lost before it had a process. This happens if its node leaves while it starts."""
    return isinstance(error, RayActorError) and "never ran" in str(error)
