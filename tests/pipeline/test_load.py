"""What a process is set up for once its pipeline is there."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flux_batch.config.schema import ModelConfig
from flux_batch.pipeline import load, precision


@pytest.mark.parametrize(("device", "times"), [("cpu", 1), ("cuda", 0)])
def test_a_process_keeps_freed_memory_for_a_pipeline_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, device: str, times: int
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(load, "keep_freed_memory", lambda: calls.append(device))
    pipeline: Any = SimpleNamespace(device=torch.device(device))
    load.prepare_process(pipeline)
    assert len(calls) == times


@pytest.mark.parametrize(("dtype", "is_slow"), [("bfloat16", True), ("float32", False)])
def test_a_dtype_that_the_device_only_imitates_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, dtype: str, is_slow: bool
) -> None:
    monkeypatch.setattr(precision, "native_dtype", lambda device: torch.float32)
    pipeline: Any = load.load_pipeline(ModelConfig(uri="demo", dtype=dtype))
    assert pipeline.torch_dtype == getattr(torch, dtype)
    assert ("has no instructions for bfloat16" in caplog.text) is is_slow
