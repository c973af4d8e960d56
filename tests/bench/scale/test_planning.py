from pathlib import Path

import pyarrow.parquet as pq
import pytest

from flux_batch.bench.scale.planning import bench_plan, format_plan, planned_row, write_prompts


@pytest.mark.parametrize(("rows", "files", "shards"), [(1000, 3, 12), (2, 8, 1)])
def test_all_rows_are_planned(rows: int, files: int, shards: int) -> None:
    figures = bench_plan(rows, files, 100, 2)

    assert figures["shards"] == shards
    assert figures["rows_per_second"] == pytest.approx(rows / figures["seconds"]["median"])
    assert f"{rows} rows" in format_plan(figures)


def test_every_prompt_is_written_once(tmp_path: Path) -> None:
    paths = write_prompts(tmp_path, planned_row, 70_001, 2)

    ids = [row for path in paths for row in pq.read_table(path)["id"].to_pylist()]
    assert ids == [f"row-{row}" for row in range(70_001)]
