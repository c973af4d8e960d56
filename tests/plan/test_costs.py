"""Hours and cost in a plan, settings that do not pay off, and the existing run in a plan."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from flux_batch.cli import main
from flux_batch.config.schema import JobConfig
from flux_batch.engine.local import LocalEngine
from flux_batch.job import run
from flux_batch.plan.costs import Speed, cost_rows, costs, remember_speed, remembered_speed
from helpers.fakes import FakePipeline, make_fake_pipeline
from helpers.job_files import make_job, write_job

FIGURES = {"num_prompts": 10_000, "num_shards": 40, "memory": {"batch_size": 4, "fits_gb": []}}


def job(folder: Path, **workers: float) -> JobConfig:
    return make_job(folder, workers={"max": 8, "num_gpus": 1, **workers}, output={"shard_size": 250})


def test_hours_and_money_are_those_of_what_is_left(tmp_path: Path) -> None:
    found = costs(job(tmp_path), FIGURES, 3600, Speed(0.5, "given"), 2.5)
    assert (found["device_hours"], found["hours"], found["cost"]) == (2.0, 0.25, 5.0)
    rows = dict(cost_rows(found))
    assert rows["hours"] == "2 GPU-hours at 0.5 images/s a worker (given); 15 min with 8 at work"
    assert rows["cost"] == "5.00 at 2.5 an hour"
    assert "not known: --measure" in dict(cost_rows(costs(job(tmp_path), FIGURES, 3600, None, None)))["hours"]


def test_the_hours_of_a_hundred_million_images_are_written_out(tmp_path: Path) -> None:
    rows = dict(cost_rows(costs(job(tmp_path), FIGURES, 100_000_000, Speed(0.5, "given"), None)))
    assert rows["hours"] == "55556 GPU-hours at 0.5 images/s a worker (given); 6944 h with 8 at work"


def test_what_will_not_pay_is_said(tmp_path: Path) -> None:
    config = job(tmp_path, max=64, max_gpu_hours=1)
    warnings = costs(config, FIGURES, 10_000, Speed(0.01, "given"), None)["warnings"]
    assert [text.split(":")[0] for text in warnings] == [
        "a batch of 4 fits on no card",
        "a shard takes 6.9 h",
        "40 of 64 workers have work",
        "workers.max_gpu_hours = 1 stops the run before it is complete",
    ]
    assert "output.shard_size = 36 makes it an hour" in warnings[1]


def test_the_hours_that_a_run_had_count_to_its_limit(tmp_path: Path) -> None:
    config, sentence = job(tmp_path, max_gpu_hours=10), "workers.max_gpu_hours = 10 stops the run before it is complete"
    begun = {"num_committed": 20, "past_hours": 9.0}
    assert sentence in costs(config, FIGURES, 3600, Speed(0.5, "given"), None, **begun)["warnings"]
    assert sentence not in costs(config, FIGURES, 1800, Speed(0.5, "given"), None, **begun)["warnings"]
    done = {"num_committed": 40, "past_hours": 11.0}
    assert sentence not in costs(config, FIGURES, 0, Speed(0.5, "given"), None, **done)["warnings"]


def test_fewer_prompts_than_workers_are_said_to_reach_so_many(tmp_path: Path) -> None:
    figures = {**FIGURES, "num_prompts": 5, "num_shards": 1}
    warnings = costs(job(tmp_path), figures, 5, None, None)["warnings"]
    assert "1 of 8 workers have work: output.shard_size = 1 gives it to 5" in warnings


def test_a_run_that_was_begun_keeps_its_shards(tmp_path: Path) -> None:
    config = job(tmp_path, max=64)
    found = costs(config, FIGURES, 500, Speed(0.01, "given"), None, num_committed=38)
    assert not any("shard_size" in text for text in found["warnings"])
    assert found["num_workers"] == 2  # the number of shards left


def test_a_worker_that_is_larger_than_this_machine_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = {**FIGURES, "memory": {"batch_size": 1, "fits_gb": [40], "least_bytes": 26_400_000_000}}
    pages = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 23_000_000_000 // 4096}
    monkeypatch.setattr(os, "sysconf", pages.__getitem__)

    def said(num_gpus: float, *, is_here: bool = True) -> list[str]:
        config = job(tmp_path, num_gpus=num_gpus)
        found: list[str] = costs(config, figures, 10, None, None, is_here=is_here)["warnings"]
        return [text for text in found if "this machine" in text]

    (text,) = said(0)
    assert text.startswith("a worker needs 26.4 GB, this machine has ")
    assert (said(1), said(0, is_here=False)) == ([], [])
    figures["memory"] = {"batch_size": 1, "fits_gb": [16], "least_bytes": 1}
    assert said(0) == []


def test_a_speed_is_remembered_for_the_model_and_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLUX_BATCH_CACHE", str(tmp_path / "cache"))
    config = job(tmp_path)
    assert remembered_speed(config, 2.0) is None
    remember_speed(config, 3.0, 2.0)
    found = remembered_speed(config, 4.0)
    assert found is not None
    assert (found.images_per_s, found.origin) == (1.5, "remembered")
    assert remembered_speed(job(tmp_path, num_gpus=0), 4.0) is None
    own = config.model_copy(update={"model": config.model.model_copy(update={"pipeline": "mine:make"})})
    assert remembered_speed(own, 4.0) is None
    (tmp_path / "cache/speeds.json").write_text("[")
    assert remembered_speed(config, 4.0) is None


def test_the_signature_of_a_models_address_is_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLUX_BATCH_CACHE", str(tmp_path / "cache"))
    first, second = (
        make_job(tmp_path, model={"uri": f"https://host/m.safetensors?sig={sig}"}) for sig in ("hush", "b")
    )
    remember_speed(first, 3.0, 2.0)

    assert "hush" not in (tmp_path / "cache/speeds.json").read_text()
    assert remembered_speed(second, 2.0) is not None


def test_a_plan_sees_what_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLUX_BATCH_CACHE", str(tmp_path / "cache"))
    config = make_job(tmp_path, workers={"num_gpus": 0})
    file = str(write_job(config, tmp_path / "job.yaml"))
    assert main(["plan", file]) == 0
    assert "there     nothing yet: a run would begin" in capsys.readouterr().out
    run(config, engine=LocalEngine(), make_pipeline=make_fake_pipeline)
    assert main(["plan", file, "--speed", "0.5"]) == 0
    out = capsys.readouterr().out
    assert "there     3 of 3 shards committed: nothing to do" in out
    assert "hours     0 worker-hours" in out
    for name in ("_SUCCESS", "_run/commits/00001.json"):
        (tmp_path / "out" / name).unlink()
    assert main(["plan", file, "--json", "--speed", "0.5"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["num_images_left"], figures["there"]["num_committed"], figures["is_of_samples"]) == (4, 2, True)
    assert main(["plan", file, "--set", "sampling.num_inference_steps=3"]) == 2
    assert "REFUSED   " in (out := capsys.readouterr().out)
    assert "nothing yet" not in out
    assert "sampling.num_inference_steps: 2 -> 3" in out
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/README.md").write_text("mine")
    assert main(["plan", file, "--set", f"output.uri={tmp_path}/elsewhere"]) == 2
    assert "holds another README.md" in capsys.readouterr().out
    assert main(["plan", file, "--set", f"model.uri={tmp_path}/Demo"]) == 2
    assert "REFUSED   " in capsys.readouterr().out


def test_the_speed_that_is_remembered_counts_no_failed_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known: list[float] = []
    monkeypatch.setattr("flux_batch.job.ray_pool", lambda config: LocalEngine())
    monkeypatch.setattr("flux_batch.job.load_pipeline", lambda model, num_gpus: FakePipeline())
    monkeypatch.setattr("flux_batch.job.remember_speed", lambda config, images_per_s, pflop: known.append(images_per_s))

    def images_in(name: str, *widths: int) -> float:
        rows = [{"prompt": "[slow]", "width": width} for width in widths]
        report = run(make_job(tmp_path / name, rows, workers={"num_gpus": 0}, failures={"max_ratio": 1}))
        return known[-1] * report.device_s if known else 0.0

    assert images_in("none", 1000, 1000) == 0
    assert images_in("some", 16, 1000, 1000, 1000) == pytest.approx(1, rel=0.01)


def test_the_speed_that_is_remembered_is_of_the_work_that_was_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known: list[float] = []
    monkeypatch.setattr("flux_batch.job.ray_pool", lambda config: LocalEngine())
    monkeypatch.setattr("flux_batch.job.load_pipeline", lambda model, num_gpus: FakePipeline())
    monkeypatch.setattr("flux_batch.job.remember_speed", lambda config, images_per_s, pflop: known.append(pflop))
    row = {"prompt": "p", "width": 64, "height": 64, "num_inference_steps": 2}
    rows, settings = [row, row | {"width": 1000}], {key: row[key] for key in row if key != "prompt"}
    failures: dict[str, Any] = {"max_ratio": 1}

    run(make_job(tmp_path / "rows", rows, workers={"num_gpus": 0}, failures=failures))
    run(make_job(tmp_path / "job", [{"prompt": "p"}], workers={"num_gpus": 0}, sampling=settings))

    assert known[0] == known[1] > 0
