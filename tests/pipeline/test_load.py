"""What a process is set up for once its pipeline is there."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flux_batch.pipeline import load


@pytest.mark.parametrize(("device", "times"), [("cpu", 1), ("cuda", 0)])
def test_a_process_keeps_freed_memory_for_a_pipeline_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, device: str, times: int
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(load, "keep_freed_memory", lambda: calls.append(device))
    pipeline: Any = SimpleNamespace(device=torch.device(device))
    load.prepare_process(pipeline)
    assert len(calls) == times
