"""Fixtures that more than one file needs, and the environment that Ray's worker processes inherit."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Generator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

import helpers.no_sync  # noqa: F401
from flux_batch.output import lease
from helpers.driver import Drive, Driver
from helpers.hub_server import Hub, hub_server, point_at
from helpers.s3 import Bucket, S3Server, moto_server, rclone_server, tls_server

# Workers of a local cluster import the helpers of this folder by name.
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
# Tiny models are faster on one thread, and parallel processes then do not compete for the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# torch's extra compile processes would first have to import everything again.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# No test may ask the real hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Normal priority: Ray gives its workers a lower one, at which they would stand still on a busy machine.
os.environ.setdefault("RAY_worker_niceness", "0")

# No deadline for an example of hypothesis, since a machine may be slow.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")

# A shell that runs the suite in the background makes it, and all its child processes, ignore SIGINT; nohup does so with
# SIGHUP.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Folders with tests of whole runs, processes, servers and models. Slow tests in other folders have their own mark.
SLOW_FOLDERS = frozenset(
    {"bench", "chaos", "cluster", "dataset", "demo", "download", "end_to_end", "gpu", "jobs", "pipeline", "report"}
)
SLOW_MARKS = ("ray", "s3", "browser", "compiled", "gpu", "long")
# The longest files, in the order in which they begin: on two cores, two that compute run beside one that waits for Ray,
# servers or other processes. A long file that began last would keep one core busy at the end.
LONGEST = [
    "jobs/test_submit.py",
    "model/optimize/test_compile.py",
    "chaos/test_on_cluster.py",
    "report/gallery/test_viewer.py",
    "engine/test_ray_pool.py",
    "end_to_end/test_job_s3.py",
    "end_to_end/test_on_ray.py",
    "end_to_end/test_job_lease.py",
    "test_cli.py",
    "download/test_models.py",
    "cluster/test_monitoring.py",
    "chaos/test_two_drivers.py",
    "report/test_charts.py",
    "chaos/test_storage_faults.py",
    "demo/test_meaning.py",
    "end_to_end/test_retry.py",
    "report/test_verify.py",
    "chaos/test_driver_kills.py",
    "storage/test_store.py",
    "dataset/test_annotate.py",
    "demo/train/test_training.py",
    "test_job.py",
    "end_to_end/test_nightly.py",
    "report/gallery/test_write.py",
    "storage/test_retry.py",
    "output/test_gc.py",
    "engine/test_ray_metrics.py",
    "pipeline/test_cuda_without_a_device.py",
    "download/test_local_copy.py",
    "storage/test_multipart.py",
    "dataset/test_export.py",
    "pipeline/test_parity.py",
    "worker/test_worker.py",
    "bench/test_command.py",
    "jobs/test_job_files.py",
    "dataset/test_publish.py",
    "pipeline/test_image_prompts.py",
    "pipeline/test_conditions.py",
    "test_architecture.py",
    "pipeline/test_controlnets.py",
    "jobs/test_bench_gpu.py",
    "demo/test_demo_model.py",
    "engine/test_ray_pool_starts.py",
    "worker/test_settled_precision.py",
    "output/test_lease.py",
    "bench/pipeline/test_lossy.py",
    "pipeline/test_pipeline.py",
    "demo/world/test_scorer.py",
    "model/checkpoint/test_loading.py",
    "download/test_transfer.py",
    "output/test_commits.py",
    "bench/pipeline/test_pipeline.py",
    "model/optimize/test_quantize.py",
    "plan/test_plan.py",
    "dataset/test_select.py",
    "dataset/test_annotate_again.py",
    "model/optimize/test_tiling.py",
    "model/optimize/test_dtypes.py",
]
TESTS = Path(__file__).parent
S3_FIXTURES = frozenset({"moto", "rclone", "tls", "s3_store"})
# There is no second driver to wait for where writes are not conditional.
SETTLE_S = 0.1
S3_SERVERS = [pytest.param(name, marks=pytest.mark.s3) for name in ("moto", "rclone")]


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark tests that use an S3 server, directly or by other fixtures, and slow tests."""
    if not S3_FIXTURES.isdisjoint(getattr(item, "fixturenames", ())):
        item.add_marker(pytest.mark.s3)
    folder = item.path.relative_to(TESTS).parts[0]
    is_marked = any(item.get_closest_marker(name) for name in SLOW_MARKS)
    if folder in SLOW_FOLDERS or is_marked or "drive" in getattr(item, "fixturenames", ()):
        item.add_marker(pytest.mark.slow)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Skip folders without quick tests for `-m "not slow"`: importing them takes longer than many tests."""
    is_left_out = collection_path.parent == TESTS and collection_path.name in SLOW_FOLDERS
    return True if is_left_out and config.option.markexpr == "not slow" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest files first, since one that begins last would keep a single core busy at the end."""
    places = {TESTS / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, Any, Any]:
    """Exclude the objects imported during collection from garbage collection.

    Scanning them again and again would take longer than many tests.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the user's cache free of what tests remember, such as the speed of a fake pipeline."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLUX_BATCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


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
    """An S3 server over TLS with its own certificate, which refuses bodies without a length."""
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
    """A function that starts a driver (see Driver for the arguments); all are killed at the end of the test."""
    with ExitStack() as started:
        yield lambda *arguments, **options: started.enter_context(Driver(*arguments, **options))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Both model hubs, on loopback, used by this process with an empty cache."""
    with hub_server() as server:
        point_at(server, monkeypatch, tmp_path / "cache")
        yield server
