"""The setup of a process for its pipeline: on a CPU, freed memory is used again."""

from __future__ import annotations

import subprocess
import sys
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flux_batch.config.schema import ModelConfig
from flux_batch.errors import DeviceFatal, JobError
from flux_batch.pipeline import load, precision
from flux_batch.pipeline.pipeline import FluxImagePipeline

# Prints how many new pages the system gave for blocks that had all been freed before.
PROGRAM = """
import resource, sys, threading
import numpy as np
from flux_batch.pipeline.load import keep_freed_memory

def step():
    return [np.ones(1 << 19) for _ in range(6)]

def work():
    step()
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    for _ in range(10):
        step()
    print(resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before)

if "keep" in sys.argv and not keep_freed_memory():
    print("no glibc")
elif "thread" in sys.argv:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
else:
    work()
"""


@pytest.mark.parametrize(("device", "times"), [("cpu", 1), ("cuda", 0)])
def test_a_process_keeps_freed_memory_for_a_pipeline_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, device: str, times: int
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(load, "keep_freed_memory", lambda: calls.append(device))
    pipeline: Any = SimpleNamespace(device=torch.device(device))
    load.prepare_process(pipeline)
    assert len(calls) == times


def test_the_worker_of_an_earlier_run_is_gone_before_a_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    class Worker:
        def __init__(self) -> None:
            self.itself = self

    earlier = weakref.ref(Worker())
    met: list[Worker | None] = []

    def load_nothing(*given: Any, **options: Any) -> None:
        met.append(earlier())
        raise LookupError

    monkeypatch.setattr(FluxImagePipeline, "from_pretrained", load_nothing)
    with pytest.raises(LookupError):
        load.load_pipeline(ModelConfig(uri="demo"))
    assert met == [None]


@pytest.mark.parametrize(("dtype", "is_slow"), [("bfloat16", True), ("float32", False)])
def test_a_dtype_that_the_device_only_imitates_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, dtype: str, is_slow: bool
) -> None:
    monkeypatch.setattr(precision, "native_dtype", lambda device: torch.float32)
    pipeline: Any = load.load_pipeline(ModelConfig(uri="demo", dtype=dtype))
    assert pipeline.torch_dtype == getattr(torch, dtype)
    assert ("has no instructions for bfloat16" in caplog.text) is is_slow


@pytest.mark.parametrize(("num_gpus", "is_said"), [(None, False), (0, False), (1, True)])
def test_a_worker_that_should_have_a_gpu_says_that_it_has_none(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, num_gpus: float | None, is_said: bool
) -> None:
    monkeypatch.setattr(precision, "default_device", lambda: torch.device("cpu"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert load.load_pipeline(ModelConfig(uri="demo", dtype="float32"), num_gpus).device.type == "cpu"
    assert ("torch finds no GPU on this node (" in caplog.text) is is_said


@pytest.mark.parametrize(
    ("assigned", "cuda", "devices", "is_lost"),
    [
        ("3", "13.0", ["/dev/nvidia3"], True),
        ("3", "13.0", [], False),  # a GPU that `ray start --num-gpus` only declares
        ("3", None, ["/dev/nvidia3"], False),
        ("", "13.0", ["/dev/nvidia3"], False),
        ("-1", "13.0", ["/dev/nvidia3"], False),
    ],
)
def test_a_gpu_that_was_assigned_and_does_not_start_is_lost_and_not_the_jobs_fault(
    monkeypatch: pytest.MonkeyPatch, assigned: str, cuda: str | None, devices: list[str], is_lost: bool
) -> None:
    def fail() -> None:
        raise RuntimeError("Unexpected error from cudaGetDeviceCount().\nError 802: system not yet initialized")

    monkeypatch.setattr(precision, "default_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "init", fail)
    monkeypatch.setattr(load.glob, "glob", lambda pattern: devices)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(load, "MAX_BYTES_ON_CPU", 1000)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", assigned)
    with pytest.raises(DeviceFatal if is_lost else JobError, match="Error 802: system not yet initialized"):
        load.load_pipeline(ModelConfig(uri="demo"), 1)


def test_without_gpus_a_worker_leaves_those_that_are_there_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "default_device", lambda: torch.device("cuda"))
    assert load.load_pipeline(ModelConfig(uri="demo", dtype="float32"), 0).device.type == "cpu"


def pages(*words: str) -> int:
    done = subprocess.run([sys.executable, "-c", PROGRAM, *words], capture_output=True, text=True, check=True)
    if done.stdout.startswith("no glibc"):
        pytest.skip("no glibc here")
    return int(done.stdout)


@pytest.mark.parametrize("where", ["main", "thread"])
def test_what_was_freed_is_used_again(where: str) -> None:
    assert pages(where, "keep") < 100 < 20_000 < pages(where)
