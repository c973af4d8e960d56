import json
import logging
import signal
import socket
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import ray
from ray._private.utils import check_version_info
from ray.exceptions import RuntimeEnvSetupError

from flux_batch.engine import ray_cluster
from flux_batch.engine.ray_cluster import await_cluster, connect, find_cluster
from flux_batch.errors import Interrupted, JobError
from helpers.s3 import free_port

JOB = json.dumps({"runtime_env": {"working_dir": "gcs://_ray_pkg_0123456789abcdef.zip"}})


def test_an_address_where_no_cluster_answers_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(Interrupted, match=f"RAY_ADDRESS = {address}: no Ray cluster answers there") as caught:
        connect(max_workers=1, num_gpus=1)
    assert caught.value.exit_code == 75


@pytest.mark.parametrize(
    ("answer", "error", "sentence"),
    [
        (b"HTTP/1.0 400 Bad Request\r\n", JobError, "an HTTP server, perhaps the dashboard, answers there"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", JobError, "another program answers there, not a Ray cluster; start it, set"),
        (b"", Interrupted, r"no Ray cluster answers there \(the connection was closed at once\)"),
        (b"\0\0\x18\4\0\0\0\0\0\0", None, ""),  # the SETTINGS frame of a gRPC server
    ],
    ids=["the dashboard", "another program", "nothing behind a proxy", "a cluster"],
)
def test_another_program_at_the_address_is_said_at_once(
    monkeypatch: pytest.MonkeyPatch, answer: bytes, error: type[Exception] | None, sentence: str
) -> None:
    def serve() -> None:
        connection, _ = server.accept()
        with connection:
            connection.recv(100)
            connection.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(ray, "is_initialized", lambda: False)
        monkeypatch.setattr(ray, "init", lambda **options: None)
        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(error, match=sentence) if error else nullcontext():
            connect(max_workers=1, num_gpus=1)
        thread.join()


@pytest.mark.parametrize("is_submitted", [False, True])
def test_a_submitted_job_looks_for_its_cluster_and_connects_later(
    monkeypatch: pytest.MonkeyPatch, is_submitted: bool
) -> None:
    connected = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("RAY_USE_TLS", "1")
        monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", JOB if is_submitted else "{}")
        monkeypatch.setattr(ray, "is_initialized", lambda: False)
        monkeypatch.setattr(ray, "init", lambda **options: connected.append(options))
        find_cluster(max_workers=1, num_gpus=1)
        server.setblocking(False)
        server.accept()[0].close()  # it has checked the address in both cases
    assert bool(connected) != is_submitted


def test_a_cluster_behind_tls_need_only_take_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:  # sends nothing, as before a TLS handshake
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(ray, "is_initialized", lambda: False)
        monkeypatch.setattr(ray, "init", lambda **options: None)
        monkeypatch.setenv("RAY_USE_TLS", "1")
        connect(max_workers=1, num_gpus=1)


@pytest.mark.parametrize(
    ("environment", "is_packed", "sentence"),
    [
        ({"UV_RUN_RECURSION_DEPTH": "1"}, True, r"uv run: Failed .* too large; name what .* in \.rayignore, or"),
        ({"UV_RUN_RECURSION_DEPTH": "1", "RAY_JOB_CONFIG_JSON_ENV_VAR": JOB}, False, "uv run: Failed"),
        ({"UV_RUN_RECURSION_DEPTH": "1", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}, False, None),
        ({}, False, None),
    ],
)
def test_the_folder_that_ray_packs_under_uv_run_is_said(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    environment: dict[str, str],
    is_packed: bool,
    sentence: str | None,
) -> None:
    def too_large(**options: object) -> None:
        raise RuntimeEnvSetupError("Failed to upload working_dir /data: Package size (9000.00MiB) is too large")

    for name in ("UV_RUN_RECURSION_DEPTH", "RAY_JOB_CONFIG_JSON_ENV_VAR", "RAY_ENABLE_UV_RUN_RUNTIME_ENV"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**environment, "RAY_ADDRESS": "auto"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", too_large)

    with caplog.at_level(logging.INFO), pytest.raises(JobError if sentence else RuntimeEnvSetupError, match=sentence):
        connect(max_workers=1, num_gpus=1)

    assert (f"uv run: Ray packs {Path.cwd()} for the workers" in caplog.text) == is_packed


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        ("Could not find any running Ray instance. Please specify the `--address` flag", "no Ray cluster is found"),
        ("Found multiple active Ray instances: {'a:1', 'b:2'}.", "several Ray clusters are found"),
    ],
)
def test_a_cluster_that_ray_does_not_find_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, found: str, sentence: str
) -> None:
    def init(**options: object) -> None:
        raise ConnectionError(found)

    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(Interrupted, match=f"^RAY_ADDRESS = auto: {sentence} on this machine; start it, set"):
        connect(max_workers=1, num_gpus=1)


def test_a_sigterm_while_ray_starts_ends_the_run_with_75(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**options: object) -> None:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))  # ray.init does this first
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match="stopped by SIGTERM before Ray had started; run the same") as caught:
        connect(max_workers=1, num_gpus=1)
    assert caught.value.exit_code == 75
    assert signal.getsignal(signal.SIGTERM) == before


def test_what_ray_starts_outlives_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    there: list[set[int]] = []
    heard: list[int] = []

    def init(**options: object) -> None:
        there.append(signal.pthread_sigmask(signal.SIG_BLOCK, []))
        signal.raise_signal(signal.SIGHUP)
        assert not heard

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    before = signal.signal(signal.SIGHUP, lambda number, frame: heard.append(number))
    try:
        connect(max_workers=1, num_gpus=1)
        assert signal.SIGHUP in there[0]  # blocked, so that Ray's processes inherit it
        assert heard == [signal.SIGHUP]  # the run itself still gets the signal
        assert signal.SIGHUP not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_cluster_of_other_versions_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**options: object) -> None:
        check_version_info({"ray_version": "2.9.3", "python_version": "3.8.1"}, "node 10.0.0.1")

    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    sentence = r"^RAY_ADDRESS = auto: Version mismatch: The cluster was started with: Ray: 2\.9\.3 Python: 3\.8\.1 .*"
    with pytest.raises(JobError, match=f"{sentence}; install the versions of the cluster here, or") as caught:
        connect(max_workers=1, num_gpus=1)
    assert "\n" not in str(caught.value)


def test_a_cluster_that_stays_away_ends_the_run_with_75(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "CLUSTER_LOST_S", 0.0)
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(Interrupted, match=f"the Ray cluster at {address} is gone") as caught:
        await_cluster(address)
    assert caught.value.exit_code == 75


def test_a_cluster_that_comes_back_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter(["connection refused", "connection refused", None])
    monkeypatch.setattr(ray_cluster, "why_unreachable", lambda address: next(answers))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    await_cluster("")
    assert next(answers, "all asked") == "all asked"
