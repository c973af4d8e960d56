from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flux_batch.plan.plan import make_plan
from flux_batch.plan.work import largest_first
from flux_batch.prompts.source import PromptSource
from helpers.job_files import make_job


def order(folder: Path, cells: dict[str, list[object]], row_group_size: int = 100, **prompts: object) -> list[int]:
    count = len(next(iter(cells.values())))
    config = make_job(folder, [{"prompt": "p"}], prompts=prompts, sampling={"width": 512, "height": 512})
    table = pa.table({"prompt": ["p"] * count, **cells})
    pq.write_table(table, folder / "prompts.parquet", row_group_size=row_group_size)
    shards = make_plan(config.prompts, 2).shards
    found = largest_first(shards.without([number == 1 for number in range(len(shards))]), config)
    assert all(shard == shards[shard.index] for shard in found)
    return [shard.index for shard in found]


@pytest.mark.parametrize("row_group_size", [1, 3, 100])
def test_shards_with_more_pixels_steps_or_images_come_first(tmp_path: Path, row_group_size: int) -> None:
    cells: dict[str, list[object]] = {
        "width": [64, 64, 0, 0, 1024, 1024, None, None, 512],
        "num_inference_steps": [20, 20, 0, 0, 20, 20, 20, 20, 20],
        "num_images_per_prompt": [1, 1, 0, 0, 1, 1, 1, 9, 1],
    }
    assert order(tmp_path, cells, row_group_size) == [3, 2, 4, 0]


def test_without_a_column_of_sizes_the_plan_is_the_order(tmp_path: Path) -> None:
    assert order(tmp_path, {"words": list(range(8))}) == [0, 2, 3]
    assert order(tmp_path, {"width": list("abcdefgh")}) == [0, 2, 3]


def test_files_whose_shards_are_done_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "abc":
        rows = pa.table({"prompt": ["p"] * 150, "num_inference_steps": [1] * 100 + [50] * 50})
        pq.write_table(rows, tmp_path / f"{name}.parquet")
    config = make_job(tmp_path / "job", [{"prompt": "p"}], prompts={"uri": str(tmp_path / "*.parquet")})
    shards = make_plan(config.prompts, 100).shards
    read, numbers_of = [], PromptSource.numbers_of

    def noted(source: PromptSource, uri: str, fields: Sequence[str]) -> object:
        read.append(Path(uri).name)
        return numbers_of(source, uri, fields)

    monkeypatch.setattr(PromptSource, "numbers_of", noted)
    left = largest_first(shards.without([number < 4 for number in range(len(shards))]), config)

    assert [shard.index for shard in left] == [5, 4]
    assert set(read) == {"a.parquet", "c.parquet"}  # a.parquet is asked for its columns


def test_a_column_has_the_name_that_the_job_gives_it(tmp_path: Path) -> None:
    cells: dict[str, list[object]] = {"w": [64, 64, 64, 64, 128, 128, 256, 256], "width": [9] * 8}
    assert order(tmp_path, cells, columns={"width": "w"}) == [3, 2, 0]
