"""Fixtures that more than one file needs, and the environment that Ray's worker processes inherit."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

import helpers.no_sync  # noqa: F401
from flux_batch.output import lease
from helpers.driver import Drive, Driver
from helpers.hub_server import Hub, hub_server, point_at
from helpers.s3 import Bucket, S3Server, moto_server, rclone_server, tls_server

# Workers of a local cluster import the helpers of this folder by name.
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
# Tiny models are quicker on one thread, and processes side by side do not fight over the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nothing here may look for a hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# As many shares of a core as everybody has: workers of Ray would stand still wherever something else is busy.
os.environ.setdefault("RAY_worker_niceness", "0")

# A shell that starts the suite in its background lets it ignore SIGINT, and so would every process that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Folders of whole runs, processes, servers and models; a test elsewhere that takes seconds is marked by itself.
SLOW_FOLDERS = frozenset({"bench", "chaos", "cluster", "demo", "download", "end_to_end", "gpu", "jobs", "pipeline"})
SLOW_MARKS = ("ray", "s3", "browser", "compiled", "gpu", "long")
FIRST_FOLDERS = frozenset({"chaos", "demo", "train"})
TESTS = Path(__file__).parent
S3_FIXTURES = frozenset({"moto", "rclone", "tls", "s3_store"})
# No second driver is about, so nobody has to wait for one where writes are not conditional.
SETTLE_S = 0.1
S3_SERVERS = [pytest.param(name, marks=pytest.mark.s3) for name in ("moto", "rclone")]


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark a test that starts an S3 server, by the fixtures it asks for itself or through others; and what is slow."""
    if not S3_FIXTURES.isdisjoint(getattr(item, "fixturenames", ())):
        item.add_marker(pytest.mark.s3)
    folder = item.path.relative_to(TESTS).parts[0]
    is_marked = any(item.get_closest_marker(name) for name in SLOW_MARKS)
    if folder in SLOW_FOLDERS or is_marked or "drive" in getattr(item, "fixturenames", ()):
        item.add_marker(pytest.mark.slow)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave the folders alone of which no test would be run: to import them takes longer than many tests."""
    is_left_out = collection_path.parent == TESTS and collection_path.name in SLOW_FOLDERS
    return True if is_left_out and config.option.markexpr == "not slow" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the files that take minutes first: begun last, one of them would keep a single core busy at the end."""
    slow = {item.path for item in items if item.get_closest_marker("ray") or item.get_closest_marker("compiled")}
    items.sort(key=lambda item: not (item.path in slow or item.path.parent.name in FIRST_FOLDERS))


@pytest.fixture(scope="session")
def moto() -> Iterator[S3Server]:
    """An S3 server that honours If-None-Match."""
    with moto_server() as server:
        yield server


@pytest.fixture(scope="session")
def rclone() -> Iterator[S3Server]:
    """An S3 server that ignores If-None-Match."""
    with rclone_server() as server:
        yield server


@pytest.fixture(scope="session")
def tls(moto: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """An S3 server over TLS, with a certificate of its own, that wants the length of what it gets beforehand."""
    with tls_server(moto, tmp_path_factory.mktemp("tls")) as server:
        yield server


@pytest.fixture(params=S3_SERVERS)
def s3_store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """A fresh bucket, on each server in turn."""
    server: S3Server = request.getfixturevalue(request.param)
    monkeypatch.setattr(lease, "SETTLE_S", SETTLE_S)
    return Bucket(server.make_bucket(), server.storage_options, server.name)


@pytest.fixture
def drive() -> Iterator[Drive]:
    """Start a driver (see Driver for the arguments); none of them outlives the test."""
    with ExitStack() as started:
        yield lambda *arguments, **options: started.enter_context(Driver(*arguments, **options))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Both model hubs, on loopback, with this process pointed at them and an empty cache."""
    with hub_server() as server:
        point_at(server, monkeypatch, tmp_path / "cache")
        yield server
