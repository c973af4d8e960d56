"""The dtype of a run whose job says `auto`, settled by its first worker, and its kernels: kept or said anywhere."""

from __future__ import annotations

import json
import logging
import weakref
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from flux_batch.config.schema import JobConfig, ModelConfig
from flux_batch.engine.local import LocalEngine
from flux_batch.engine.stop import Stop
from flux_batch.errors import DamagedObject, Interrupted, PlanMismatch
from flux_batch.job import run
from flux_batch.output.gc import find_leftovers
from flux_batch.output.paths import JOB, PRECISION, RunFolder
from flux_batch.report.progress.status import format_status, read_status
from flux_batch.storage.store import Store
from flux_batch.worker.settled_precision import load_settled, settled_model, with_model_of_run
from helpers.fakes import FakePipeline
from helpers.job_files import make_job

AUTO = ModelConfig(uri="demo")


def machine(
    native: str, quantization: str = "none", kind: type[FakePipeline] = FakePipeline, **kernels: Any
) -> Callable[[ModelConfig], FakePipeline]:
    """Return a loader of pipelines on a machine that computes natively in `native`."""

    def load(model: ModelConfig) -> FakePipeline:
        pipeline = kind()
        is_auto = model.dtype == "auto"
        pipeline.precision = {
            "dtype": native if is_auto else model.dtype,
            "quantization": quantization if is_auto else model.quantization,
        }
        pipeline.native_dtype = native
        pipeline.kernels = replace(FakePipeline.kernels, **kernels)
        return pipeline

    return load


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "out"))


def record(store: Store) -> dict[str, Any]:
    """Read what a first worker wrote down, but its kernels, which are those of the fake."""
    found = dict(json.loads(store.read(PRECISION)))
    assert found.pop("kernels") == asdict(FakePipeline.kernels)
    return found


def test_the_first_worker_settles_the_dtype_of_all_others(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    first, model = load_settled(store, AUTO, machine("float32", "bfloat16"))
    assert (first.precision["dtype"], model.dtype, model.quantization) == ("float32", "float32", "bfloat16")
    assert record(store) == {"dtype": "float32", "quantization": "bfloat16"}

    with caplog.at_level(logging.WARNING):
        other, model = load_settled(store, AUTO, machine("bfloat16"))
    assert other.precision == {"dtype": "float32", "quantization": "bfloat16"}
    assert model.dtype == "float32"
    assert "computes in float32, quantization bfloat16, like the first worker of the run" in caplog.text
    assert "computes natively in bfloat16" in caplog.text


def test_the_later_of_two_first_workers_loads_again(store: Store) -> None:
    loaded = []

    def slow(model: ModelConfig) -> FakePipeline:
        if not loaded:
            load_settled(store, AUTO, machine("bfloat16"))
        loaded.append(model.dtype)
        return machine("float32")(model)

    pipeline, model = load_settled(store, AUTO, slow)
    assert loaded == ["auto", "bfloat16"]
    assert pipeline.precision["dtype"] == model.dtype == "bfloat16"


def test_a_first_pipeline_is_gone_before_another_is_loaded(store: Store) -> None:
    """A GPU has no room for two, and a model may hold itself, as one with hooks does."""
    loaded: list[weakref.ref[FakePipeline]] = []

    def slow(model: ModelConfig) -> FakePipeline:
        if not loaded:
            load_settled(store, AUTO, machine("bfloat16"))
        assert [there() for there in loaded] == [None] * len(loaded)
        pipeline = machine("float32")(model)
        pipeline.itself = pipeline  # type: ignore[attr-defined]
        loaded.append(weakref.ref(pipeline))
        return pipeline

    load_settled(store, AUTO, slow)
    assert len(loaded) == 2


def test_two_first_workers_with_the_same_dtype_load_once(store: Store) -> None:
    loaded = []

    def slow(model: ModelConfig) -> FakePipeline:
        load_settled(store, AUTO, machine("float32"))
        loaded.append(model.dtype)
        return machine("float32")(model)

    assert load_settled(store, AUTO, slow)[1].dtype == "float32"
    assert loaded == ["auto"]


def test_a_quantization_of_the_job_is_kept(store: Store) -> None:
    fp8 = AUTO.model_copy(update={"quantization": "fp8"})
    assert load_settled(store, fp8, machine("float32"))[1].quantization == "fp8"
    assert record(store) == {"dtype": "float32"}
    assert settled_model(store, fp8).quantization == "fp8"
    assert settled_model(store, AUTO).quantization == "none"


def test_a_dtype_of_the_job_is_written_down_and_costs_no_warning(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    float16 = AUTO.model_copy(update={"dtype": "float16"})
    for _ in range(2):
        assert load_settled(store, float16, machine("float32"))[1] == float16
    assert record(store) == {"dtype": "float16", "quantization": "none"}
    assert [each for each in caplog.records if each.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_a_worker_with_other_kernels_says_so(store: Store, dtype: str, caplog: pytest.LogCaptureFixture) -> None:
    model = AUTO.model_copy(update={"dtype": dtype})
    hopper = {"device": "cuda NVIDIA H200", "torch": "2.13.0+cu130", "cuda": "13.0", "cudnn": 92000, "compile": True}
    load_settled(store, model, machine("float32", **hopper, attention="cudnn"))
    load_settled(store, model, machine("float32", **hopper, attention="flash3"))
    assert (
        "this worker computes on cuda NVIDIA H200, attention flash3, compiled, torch 2.13.0+cu130, CUDA 13.0, cuDNN "
        "92000, the first worker of the run on cuda NVIDIA H200, attention cudnn, compiled, " in caplog.text
    )
    store.write(PRECISION, b'{"dtype": "float32", "quantization": "none"}')  # as older versions wrote it
    caplog.clear()
    load_settled(store, model, machine("float32", attention="flash3"))
    assert [each for each in caplog.records if each.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("data", [b"", b"[]", b'{"dtype": "auto", "quantization": "none"}', b'{"dtype": "int8"}'])
def test_a_damaged_file_is_named(store: Store, data: bytes) -> None:
    store.write(PRECISION, data)
    with pytest.raises(DamagedObject, match=r"precision\.json: is damaged .*; delete it"):
        settled_model(store, AUTO)


def begun(tmp_path: Path, native: str, **sections: Any) -> JobConfig:
    """Begin a run on a machine with a native dtype, and stop it after its first shard."""
    config = make_job(tmp_path, **sections)
    stop = Stop()

    class Stopping(FakePipeline):
        def __call__(self, *args: Any, **options: Any) -> Any:
            stop.request("enough")
            return super().__call__(*args, **options)

    with pytest.raises(Interrupted):
        run(config, engine=LocalEngine(), make_pipeline=machine(native, kind=Stopping), stop=stop)
    return config


def test_a_run_keeps_its_dtype_on_another_machine_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = begun(tmp_path, "float32")
    with caplog.at_level(logging.WARNING):
        report = run(config, engine=LocalEngine(), make_pipeline=machine("bfloat16"))
    assert "computes in float32, like the first worker of the run; its device computes natively" in caplog.text
    assert report.model["dtype"] == "float32"
    assert json.loads(report.to_json())["kernels"] == asdict(FakePipeline.kernels)
    status = format_status(read_status(Store(config.output.uri)))
    assert "computes in float32, on cpu AVX2, attention torch, not compiled, torch 2.13.0\n" in status
    assert "demo (float32)" in (tmp_path / "out/README.md").read_text()
    assert [left.key for left in find_leftovers(RunFolder(Store(config.output.uri), 4))] == []


def test_a_run_goes_on_with_the_dtype_that_its_job_had_before(tmp_path: Path) -> None:
    """In older versions, a job file without the key meant bfloat16."""
    begun(tmp_path, "float32", model={"dtype": "bfloat16"})
    report = run(make_job(tmp_path), engine=LocalEngine(), make_pipeline=machine("float32"))
    assert report.model["dtype"] == "bfloat16"


def test_a_job_may_name_the_settled_dtype_and_no_other(tmp_path: Path) -> None:
    begun(tmp_path, "float32")
    with pytest.raises(PlanMismatch, match=r"model\.dtype: 'float32' -> 'bfloat16'"):
        run(make_job(tmp_path, model={"dtype": "bfloat16"}), engine=LocalEngine(), make_pipeline=machine("bfloat16"))
    run(make_job(tmp_path, model={"dtype": "float32"}), engine=LocalEngine(), make_pipeline=machine("bfloat16"))


def test_a_run_keeps_the_compile_it_began_with_where_the_job_says_none(tmp_path: Path, store: Store) -> None:
    config = make_job(tmp_path)
    before, now, other = (
        config.model_copy(update={"model": config.model.model_copy(update={"compile": value})})
        for value in (False, "auto", True)
    )
    store.write(JOB, before.to_yaml().encode())

    assert with_model_of_run(store, now).identity() == before.identity()
    assert with_model_of_run(store, other).model.compile is True


@pytest.mark.parametrize(("before", "now", "kept"), [(3.5, None, 3.5), (3.5, 4.0, 4.0), (5.0, None, None)])
def test_a_run_of_an_older_version_keeps_the_guidance_it_began_with(
    tmp_path: Path, store: Store, before: float, now: float | None, kept: float | None
) -> None:
    store.write(JOB, make_job(tmp_path, sampling={"embedded_guidance": before}).to_yaml().encode())

    config = with_model_of_run(store, make_job(tmp_path, sampling={"embedded_guidance": now}))

    assert config.sampling.embedded_guidance == kept
