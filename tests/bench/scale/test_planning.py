from pathlib import Path

import pyarrow.parquet as pq

from flux_batch.bench.scale.planning import bench_plan, format_plan, write_prompts


def test_rows_fewer_than_files_are_planned() -> None:
    figures = bench_plan(2, 8, 100, 1)
    assert (figures["files"], figures["shards"]) == (2, 1)
    assert "2 rows in 2 files -> 1 shards" in format_plan(figures)


def test_every_prompt_is_written_once_in_row_groups(tmp_path: Path) -> None:
    paths = write_prompts(tmp_path, 70_001, 2, 10_000)

    ids = [row for path in paths for row in pq.read_table(path)["id"].to_pylist()]
    assert ids == [f"row-{row}" for row in range(70_001)]
    assert [pq.ParquetFile(path).num_row_groups for path in paths] == [4, 4]
