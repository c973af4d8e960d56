"""The memory of this machine: of the system, or of the cgroup if that is less."""

from __future__ import annotations

from pathlib import Path

import pytest

from flux_batch.model.optimize import host_memory
from flux_batch.model.optimize.host_memory import free_memory, total_memory
from flux_batch.pipeline.precision import fits_into_memory


def test_memory_is_that_of_the_cgroup_where_that_is_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "meminfo"
    info.write_text("MemTotal: 100 kB\nMemAvailable:   64 kB\n")
    monkeypatch.setattr(host_memory, "MEMORY_INFO", info)
    monkeypatch.setattr(host_memory, "CGROUP", tmp_path)
    assert (total_memory(), free_memory()) == (100 * 1024, 64 * 1024)
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert (total_memory(), free_memory()) == (100 * 1024, 64 * 1024)
    (tmp_path / "memory.max").write_text("9000\n")
    assert (total_memory(), free_memory()) == (9000, 8000)
    monkeypatch.setattr(host_memory, "MEMORY_INFO", tmp_path / "none")
    assert (total_memory(), free_memory()) == (None, None)
    assert fits_into_memory(10**15)
