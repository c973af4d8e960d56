"""jobs/dagster_assets.py and jobs/prefect_flow.py with Dagster and Prefect, where these are installed."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import pytest

JOBS = Path(__file__).parents[2] / "jobs"
REPORT = {"output": "s3://bucket/runs/2026-11-23", "num_images": 4, "num_failed": 1, "device_hours": 0.5}


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, JOBS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def end_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replace flux-batch by a program that records its calls and ends with each of the codes in turn."""

    def put(codes: Sequence[int]) -> None:
        cases = "\n".join(f"{number}) exit {code};;" for number, code in enumerate(codes, start=1) if code)
        notes = f'echo "$*" >> {tmp_path}/calls\ncase $(wc -l < {tmp_path}/calls) in\n{cases}\nesac'
        path = tmp_path / "flux-batch"
        path.write_text(f"#!/bin/bash\n{notes}\necho '{json.dumps(REPORT)}'\n")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    return put


def calls(folder: Path) -> list[str]:
    return (folder / "calls").read_text().splitlines()


CALL = "run s3://bucket/jobs/nightly.yaml --json --logical-date 2026-11-23"
WAYS = pytest.mark.parametrize(
    ("codes", "num_calls", "is_good"),
    [((0,), 1, True), ((75, 1, 0), 3, True), ((2, 0), 1, False), ((3, 0), 1, False)],
)


@WAYS
def test_dagster_tries_again_what_may_end_otherwise(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    end_with: Callable[..., None],
    codes: tuple[int, ...],
    num_calls: int,
    is_good: bool,
) -> None:
    dg = pytest.importorskip("dagster", reason="pip install dagster")
    policy = dg.RetryPolicy
    monkeypatch.setattr(dg, "RetryPolicy", lambda max_retries, delay: policy(max_retries=max_retries))
    module = load("dagster_assets")
    end_with(codes)

    result = dg.materialize([module.images], partition_key="2026-11-23", raise_on_error=False)

    assert result.success == is_good
    assert calls(tmp_path) == [CALL] * num_calls
    assert module.defs.resolve_schedule_def(module.nightly.name).cron_schedule == "0 2 * * *"


@WAYS
def test_prefect_tries_again_what_may_end_otherwise(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    end_with: Callable[..., None],
    codes: tuple[int, ...],
    num_calls: int,
    is_good: bool,
) -> None:
    pytest.importorskip("prefect", reason="pip install prefect")
    from prefect.testing.utilities import prefect_test_harness

    module = load("prefect_flow")
    monkeypatch.setattr(module.render_day, "retry_delay_seconds", 0)
    end_with(codes)

    with prefect_test_harness():
        state = module.flux_nightly("2026-11-23", return_state=True)

    assert state.is_completed() == is_good
    assert calls(tmp_path) == [CALL] * num_calls
