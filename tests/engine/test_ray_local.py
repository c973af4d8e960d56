"""A Ray cluster on this machine: whether there is one, and its settings on unusual machines."""

from __future__ import annotations

import fnmatch
import glob
import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from flux_batch.engine import ray_local
from flux_batch.engine.ray_local import joins_cluster, local_options, settle_colours
from flux_batch.errors import JobError

VARIABLES = ("RAY_ADDRESS", "RAY_TMPDIR", "TMPDIR", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # so that changes of the test are undone
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))


def test_the_address_of_a_job_server_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")
    with pytest.raises(JobError, match=r"^RAY_ADDRESS = http://head:8265 is a job server, .*, e.g. head:6379$"):
        joins_cluster()


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("ray://127.0.0.1:10001", r"is a server of the Ray client, .* e.g. head:6379$"),
        (
            "nonsense",
            r"is not the address of a Ray cluster; set it to HOST:PORT of its head, e.g. head:6379",
        ),
        ("head:port", "is not the address of a Ray cluster"),
        ("head:70000", "is not the address of a Ray cluster"),
        (":6379", "is not the address of a Ray cluster"),
        ("tcp://head:6379", "is not the address of a Ray cluster"),
    ],
)
def test_an_address_that_no_cluster_has_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, address: str, sentence: str
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(JobError, match=f"^RAY_ADDRESS = {address} {sentence}"):
        joins_cluster()


@pytest.mark.parametrize(
    ("address", "expected"),
    [("head:6379", True), ("[::1]:6379", True), ("auto", True), ("local", False), ("", False)],
)
def test_an_address_is_joined(monkeypatch: pytest.MonkeyPatch, address: str, expected: bool) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert joins_cluster() is expected


@pytest.mark.parametrize(
    ("device", "visible", "expected"),
    [
        ("/dev/nvidia0", None, True),
        ("/dev/nvidia0", "0,1", True),
        ("/dev/nvidia0", "", False),
        ("/dev/nvidiactl", None, False),
        ("/dev/dxg", None, True),
        (None, None, False),
    ],
)
def test_a_gpu_is_one_that_this_process_may_see(
    monkeypatch: pytest.MonkeyPatch, device: str | None, visible: str | None, expected: bool
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(glob, "glob", lambda pattern: fnmatch.filter([device] if device else [], pattern))
    assert ray_local.has_gpu() is expected


@pytest.mark.parametrize(
    ("files", "num_gpus"),
    [
        (["/dev/nvidia0"], None),
        (["/dev/dxg", "/usr/lib/wsl/lib/libnvidia-ml.so.1"], None),
        (["/dev/dxg"], 8),
        (["/dev/kfd"], 8),
        ([], 8),
    ],
)
def test_a_cluster_has_logical_gpus_where_ray_counts_none(
    monkeypatch: pytest.MonkeyPatch, files: list[str], num_gpus: int | None
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(glob, "glob", lambda pattern: fnmatch.filter(files, pattern))
    assert local_options(8).get("num_gpus") == num_gpus


def test_a_mac_counts_as_one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    assert ray_local.has_gpu()
    assert local_options(8)["num_gpus"] == 1


def test_a_long_tmpdir_is_left_for_a_short_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert local_options(1)["_temp_dir"] == "/tmp/ray"
    monkeypatch.setenv("TMPDIR", "/scratch")
    assert local_options(1)["_temp_dir"] == "/scratch/ray"
    monkeypatch.setenv("TMPDIR", "/" + 60 * "x")
    assert local_options(1)["_temp_dir"] == "/tmp/ray"
    monkeypatch.setenv("RAY_TMPDIR", "/" + 60 * "x")
    with pytest.raises(JobError, match=r"RAY_TMPDIR = /x+: must have at most 39 bytes"):
        local_options(1)


def test_little_shared_memory_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=2**14, f_bsize=2**12))
    options = local_options(1)
    assert options["_plasma_directory"] == "/tmp/ray"
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=2**15, f_bsize=2**12))
    assert "_plasma_directory" not in local_options(1)
    assert options["object_store_memory"] >= 75 * 2**20  # Ray refuses less


@pytest.mark.parametrize(("variable", "value"), [("RAY_AUTH_MODE", "disabled"), ("RAY_AUTH_TOKEN_PATH", "/token")])
def test_a_token_is_made_only_where_ray_can_keep_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str, value: str
) -> None:
    local_options(1)
    assert "RAY_AUTH_TOKEN" not in os.environ
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    monkeypatch.setenv(variable, value)
    local_options(1)
    assert "RAY_AUTH_TOKEN" not in os.environ
    monkeypatch.delenv(variable)
    local_options(1)
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 32


@pytest.mark.parametrize(
    ("no_color", "terminals", "given", "expected"),
    [
        ("", (True, True), None, None),
        ("1", (True, True), None, "0"),
        ("", (True, False), None, "0"),
        ("", (False, True), None, "0"),
        ("", (True, None), None, "0"),
        ("1", (False, False), "1", "1"),
    ],
)
def test_lines_of_workers_have_colours_on_terminals_only(
    monkeypatch: pytest.MonkeyPatch,
    no_color: str,
    terminals: tuple[bool | None, bool | None],
    given: str | None,
    expected: str | None,
) -> None:
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setenv("RAY_COLOR_PREFIX", given or "")
    if given is None:
        monkeypatch.delenv("RAY_COLOR_PREFIX")
    for name, is_terminal in zip(("stdout", "stderr"), terminals, strict=True):
        stream = None if is_terminal is None else SimpleNamespace(isatty=lambda answer=is_terminal: answer)
        monkeypatch.setattr(sys, name, stream)
    settle_colours()
    assert os.environ.get("RAY_COLOR_PREFIX") == expected


@pytest.mark.slow
@pytest.mark.parametrize(("address", "expected"), [("", "False"), ("head:6379", "True")])
def test_uv_run_builds_no_environment_again_on_this_machine(address: str, expected: str) -> None:
    """Ray reads this setting when it is imported; it stays unchanged for workers on other machines."""
    code = (
        "from flux_batch.config.schema import JobConfig; from flux_batch.job import ray_pool;"
        "names = {'prompts': {'uri': 'p'}, 'output': {'uri': 'o'}, 'model': {'uri': 'demo'}};"
        "ray_pool(JobConfig.from_dict(names));"
        "from ray._private.ray_constants import RAY_ENABLE_UV_RUN_RUNTIME_ENV; print(RAY_ENABLE_UV_RUN_RUNTIME_ENV)"
    )
    environment = {**os.environ, "RAY_ADDRESS": address}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == expected
