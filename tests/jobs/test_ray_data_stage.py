"""The workers of a Ray Data pipeline; tests/end_to_end/test_on_ray.py runs one."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest

SCRIPT = Path(__file__).parents[2] / "jobs/ray_data_stage.py"


@pytest.mark.parametrize(
    ("address", "gpus_there", "expected"),
    [
        ("", 0, 0),  # a machine without a GPU
        ("local", 0, 0),
        ("", 2, 0.5),
        # A cluster scaled to zero: with 0 GPUs, the model would be loaded on the head at once.
        ("head:6379", 0, 0.5),
        ("auto", 0, 0.5),
    ],
)
def test_only_this_machine_makes_do_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, address: str, gpus_there: int, expected: float
) -> None:
    spec = importlib.util.spec_from_file_location("ray_data_stage", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    stage = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stage)
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(stage.ray, "cluster_resources", lambda: {"GPU": gpus_there} if gpus_there else {"CPU": 8})
    assert stage.gpus_of_a_worker(SimpleNamespace(workers=SimpleNamespace(num_gpus=0.5))) == expected
