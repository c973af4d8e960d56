import pytest

from flux_batch.bench.load import bench_load, format_load
from flux_batch.bench.source import Source
from flux_batch.errors import CheckpointError
from flux_batch.model.optimize.dtypes import dtype_name, native_dtype


def test_loading_is_measured_in_its_own_process() -> None:
    figures = bench_load(Source(random_weights="tiny", device="cpu"), 1)

    assert 0 < figures["weights_bytes"] < figures["peak_memory_bytes"]
    load_s, import_s = figures["seconds"]["median"], figures["import_seconds"]["median"]
    assert 0 < load_s + import_s < figures["seconds_from_process_start_to_first_step"]["median"]
    assert f"random weights, size tiny, {dtype_name(native_dtype('cpu'))}, cpu" in format_load(figures)


def test_a_missing_model_is_the_same_error_as_in_a_job() -> None:
    with pytest.raises(CheckpointError, match="/nowhere"):
        bench_load(Source(uri="/nowhere"), 1)
