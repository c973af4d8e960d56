from __future__ import annotations

import gzip
import pickle
import random
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import flux_batch.plan.plan as plan_module
from flux_batch.config.schema import JobConfig, PromptsConfig, SamplingConfig
from flux_batch.errors import PlanMismatch, SourceError
from flux_batch.plan.plan import (
    Outline,
    Plan,
    check_same_job,
    extended,
    make_plan,
    random_rows,
    rules_of_plan,
)
from flux_batch.plan.shards import Shards
from flux_batch.prompts import source
from flux_batch.prompts.listing import PromptFile
from flux_batch.prompts.source import PromptSource
from flux_batch.records import FileRange, ImageRequest, Shard
from helpers.yardstick import work


def write_prompts(path: Path, num_rows: int, *, first: int = 0, **columns: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    prompts = [f"prompt {number}" for number in range(first, first + num_rows)]
    pq.write_table(pa.table({"prompt": pa.array(prompts, pa.string()), **columns}), path, row_group_size=7)
    return path


def prompts(folder: Path, **settings: Any) -> PromptsConfig:
    return PromptsConfig(uri=str(folder), **settings)


def plan_again(plan: Plan, config: PromptsConfig) -> Plan:
    return Plan.from_parquet(plan.to_parquet(), PromptSource(config).files())


def layout(shards: Sequence[Shard]) -> list[tuple[int, str, int, int]]:
    """Return the shard, the file and the rows of each part."""
    return [(shard.index, part.name, part.start, part.num_rows) for shard in shards for part in shard.parts]


def job(**sections: Any) -> JobConfig:
    tree: dict[str, Any] = {"prompts": {"uri": "p.txt"}, "output": {"uri": "out"}, "model": {"uri": "demo"}}
    for section, values in sections.items():
        tree[section] = tree.get(section, {}) | values
    return JobConfig.from_dict(tree)


def test_shards_cover_every_file_in_order(tmp_path: Path) -> None:
    for name, num_rows in (("b", 5), ("a", 20), ("c/d", 10)):
        write_prompts(tmp_path / f"{name}.parquet", num_rows)

    plan = make_plan(prompts(tmp_path), 10)

    assert layout(plan.shards) == [
        (0, "a.parquet", 0, 10),
        (1, "a.parquet", 10, 10),
        (2, "b.parquet", 0, 5),
        (3, "c/d.parquet", 0, 10),
    ]
    assert plan.num_prompts == 35
    assert sum(Outline.from_parquet(plan.to_parquet()).num_rows) == 35


def test_the_same_data_set_gives_the_same_bytes_and_comes_back_from_them(tmp_path: Path) -> None:
    for number in range(20):
        write_prompts(tmp_path / f"{number}.parquet", number + 1, tags=[["x"]] * (number + 1))
    (tmp_path / "lines.txt").write_text("one\ntwo\n\nthree\n")
    config = prompts(tmp_path / "*.parquet", passthrough=("tags",))

    plan = make_plan(config, 3)

    assert make_plan(config, 3).to_parquet() == plan.to_parquet()
    assert plan_again(plan, config) == plan
    assert plan_again(plan, config).passthrough == pa.schema([("tags", pa.list_(pa.string()))])


def test_text_formats_remember_where_each_shard_begins(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("\n\none\ntwo\n\nthree\n")
    config = prompts(path)

    plan = plan_again(make_plan(config, 2), config)

    assert [(part.start, part.num_rows, part.offset) for shard in plan.shards for part in shard.parts] == [
        (0, 2, 2),
        (2, 1, 11),
    ]


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (1, [(0, "a", 0, 1)]),
        (4, [(0, "a", 0, 4)]),
        (6, [(0, "a", 0, 4), (1, "a", 4, 1), (1, "b", 0, 1)]),
        (99, [(0, "a", 0, 4), (1, "a", 4, 1), (1, "b", 0, 3)]),
    ],
)
def test_limit_takes_the_first_rows(tmp_path: Path, limit: int, expected: list[tuple[int, str, int, int]]) -> None:
    write_prompts(tmp_path / "a.parquet", 5)
    write_prompts(tmp_path / "b.parquet", 3)

    plan = make_plan(prompts(tmp_path, limit=limit), 4)

    assert layout(plan.shards) == [(index, f"{name}.parquet", *rows) for index, name, *rows in expected]


def test_files_without_rows_are_no_shards_and_no_rows_at_all_an_error(tmp_path: Path) -> None:
    write_prompts(tmp_path / "empty.parquet", 0)
    with pytest.raises(SourceError, match="has no rows"):
        make_plan(prompts(tmp_path), 4)

    write_prompts(tmp_path / "full.parquet", 1)
    assert layout(make_plan(prompts(tmp_path), 4).shards) == [(0, "full.parquet", 0, 1)]


def test_a_changed_file_is_named(tmp_path: Path) -> None:
    write_prompts(tmp_path / "a.parquet", 5)
    write_prompts(tmp_path / "b.parquet", 5)
    config = prompts(tmp_path)
    plan = make_plan(config, 4)

    write_prompts(tmp_path / "b.parquet", 5, first=1)  # the same number of rows with other texts

    with pytest.raises(PlanMismatch, match=r"b\.parquet") as caught:
        plan_again(plan, config)
    assert "a.parquet" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_removed_file_is_named(tmp_path: Path) -> None:
    write_prompts(tmp_path / "a.parquet", 5)
    write_prompts(tmp_path / "b.parquet", 5)
    config = prompts(tmp_path)
    plan = make_plan(config, 4)

    (tmp_path / "a.parquet").unlink()

    with pytest.raises(PlanMismatch, match=r"a\.parquet: is gone"):
        plan_again(plan, config)


def test_an_added_file_is_named(tmp_path: Path) -> None:
    write_prompts(tmp_path / "a.parquet", 5)
    write_prompts(tmp_path / "empty.parquet", 0)
    config = prompts(tmp_path)
    plan = make_plan(config, 4)
    assert plan_again(plan, config).shards == plan.shards

    write_prompts(tmp_path / "b.parquet", 5)

    with pytest.raises(PlanMismatch, match=r"b\.parquet: is new"):
        plan_again(plan, config)


def test_of_many_files_that_differ_the_first_are_named() -> None:
    files = [PromptFile(uri=f"{number}.txt", name=f"{number}.txt", size=1, version="1") for number in range(1000)]
    plan = Plan(Shards.none(), tuple(files), pa.schema([]))

    with pytest.raises(PlanMismatch, match=r"0\.txt: is gone") as caught:
        Plan.from_parquet(plan.to_parquet(), [])
    assert str(caught.value).count("\n") == 21
    assert str(caught.value).endswith("... and 980 other files")


def test_moving_the_data_set_as_a_whole_is_no_change(tmp_path: Path) -> None:
    write_prompts(tmp_path / "here" / "a.parquet", 5)
    plan = make_plan(prompts(tmp_path / "here"), 4)

    (tmp_path / "here").rename(tmp_path / "there")
    moved = plan_again(plan, prompts(tmp_path / "there"))

    assert layout(moved.shards) == layout(plan.shards)
    assert all("/there/" in part.uri for shard in moved.shards for part in shard.parts)


def test_small_files_share_shards(tmp_path: Path) -> None:
    for number in range(1065):
        (tmp_path / f"{number:04}.txt").write_text(f"prompt {number}")
    config = prompts(tmp_path)

    plan = make_plan(config, 256)

    assert [shard.num_rows for shard in plan.shards] == [256, 256, 256, 256, 41]
    assert plan_again(plan, config) == plan
    assert sum(Outline.from_parquet(plan.to_parquet()).num_rows) == 1065
    assert list(Outline.from_parquet(plan.to_parquet()).num_rows) == [256, 256, 256, 256, 41]


def rows_of(plan: Plan, config: PromptsConfig) -> list[tuple[str, str, tuple[int, ...]]]:
    rows = [row for shard in plan.shards for row in PromptSource(config).read(shard, SamplingConfig())]
    return [(row.id, row.prompt, row.seeds) for row in rows if isinstance(row, ImageRequest)]


@pytest.mark.parametrize("shard_size", [1, 3, 10, 999])
def test_rows_are_the_same_whatever_they_share_a_shard_with(tmp_path: Path, shard_size: int) -> None:
    for number, num_rows in enumerate((1, 5, 0, 2, 1, 1, 7)):
        write_prompts(tmp_path / f"{number}.parquet", num_rows, first=10 * number)
        (tmp_path / f"{number}.csv").write_text("prompt\n" + f"text {number}\n" * num_rows)
    config = prompts(tmp_path)

    plan = make_plan(config, shard_size)

    assert rows_of(plan, config) == rows_of(make_plan(config, 4), config)
    assert len(rows_of(plan, config)) == 34
    assert all(shard.num_rows <= shard_size for shard in plan.shards)
    assert [row.row for shard in plan.shards for row in PromptSource(config).read(shard, SamplingConfig())] == [
        row for shard in plan.shards for row in range(shard.num_rows)
    ]


def test_random_rows_are_those_of_the_whole_whatever_their_format(tmp_path: Path) -> None:
    write_prompts(tmp_path / "a.parquet", 5)
    (tmp_path / "b.csv").write_text('prompt,id\n"two\nlines",\nx,7\n\n' + "y,\n" * 5)
    (tmp_path / "c.txt").write_text("one\n\ntwo\nthree\nfour\n")
    (tmp_path / "d.txt").write_text("alone\n")
    (tmp_path / "e.json").write_text('["p", "q"]')
    with tarfile.open(tmp_path / "f.tar", "w") as tar:
        for name in ("a", "b", "c"):
            (tmp_path / "caption").write_text(name)
            tar.add(tmp_path / "caption", f"{name}.txt")
    for number, opened in enumerate((pa.ipc.new_file, pa.ipc.new_stream)):
        table = pa.table({"prompt": [f"arrow {number} {row}" for row in range(11)]})
        with opened(str(tmp_path / f"g{number}.arrow"), table.schema) as file:
            file.write_table(table, max_chunksize=3)
    config = prompts(tmp_path)
    plan = make_plan(config, 4)
    whole = rows_of(plan, config)

    every = random_rows(plan, config, 99)
    some = random_rows(plan, config, 6)

    assert len(whole) == 5 + 7 + 4 + 1 + 2 + 3 + 2 * 11
    assert rows_of(every, config) == whole
    assert [part.num_rows for part in every.shards[0].parts] == [1] * len(whole)
    found = rows_of(some, config)
    assert len(found) == 6
    assert found == [row for row in whole if row in found]
    assert plan_again(some, config) == some


def test_a_plan_of_the_first_version_goes_on_as_it_was(tmp_path: Path) -> None:
    for name in ("a.parquet", "_x/b.parquet"):
        write_prompts(tmp_path / name, 3)
    (tmp_path / "c.tsv").write_text("prompt\na\n")
    config = prompts(tmp_path)
    files = {file.name: file for file in PromptSource(config, rules=1).files()}
    old = Plan(
        shards=Shards.none().extended(
            [FileRange(uri=file.uri, name=name, start=0, num_rows=3)] for name, file in files.items()
        ),
        files=tuple(files.values()),
        passthrough=pa.schema([]),
        rules=1,
    )
    data = old.to_parquet()

    assert list(files) == ["_x/b.parquet", "a.parquet"]
    assert rules_of_plan(data) == 1
    assert Plan.from_parquet(data, PromptSource(config, rules_of_plan(data)).files()) == old
    assert extended(old, config, 4) is old


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"sampling": {"num_inference_steps": 4}}, "sampling.num_inference_steps: 28 -> 4"),
        ({"sampling": {"guidance_scale": 4.0}}, "sampling.embedded_guidance: None -> 4.0"),
        ({"sampling": {"seed": 1}}, "sampling.seed: 0 -> 1"),
        ({"model": {"uri": "other"}}, "model.uri: 'demo' -> 'other'"),
        ({"model": {"dtype": "float32"}}, "model.dtype"),
        ({"output": {"shard_size": 10}}, "output.shard_size: 256 -> 10"),
        ({"output": {"image": {"type": "webp"}}}, "output.image.type: 'png' -> 'webp'"),
        ({"output": {"format": "files"}}, "output.format"),
        ({"prompts": {"passthrough": ["x"]}}, "prompts.passthrough"),
        ({"prompts": {"columns": {"prompt": "text"}}}, "prompts.columns"),
        ({"prompts": {"limit": 3}}, "prompts.limit: None -> 3"),
    ],
)
def test_a_changed_job_is_refused_with_the_difference(sections: dict[str, Any], key: str) -> None:
    with pytest.raises(PlanMismatch) as caught:
        check_same_job(job(), job(**sections))

    assert key in str(caught.value)
    assert str(caught.value).count("->") == 1


@pytest.mark.parametrize(
    "sections",
    [
        {"workers": {"max": 2, "batch_size": 9}},
        {"failures": {"max_ratio": 1.0}},
        {"prompts": {"uri": "elsewhere.txt", "storage_options": {"key": "new"}}},
        {"output": {"uri": "elsewhere"}},
    ],
)
def test_where_and_how_a_job_runs_may_change(sections: dict[str, Any]) -> None:
    check_same_job(job(), job(**sections))


def test_a_saved_job_agrees_with_itself() -> None:
    config = job(prompts={"passthrough": ["a"], "columns": {"prompt": "x"}}, output={"storage_options": {"key": "k"}})

    check_same_job(JobConfig.from_yaml(config.to_yaml()), config)


def test_a_million_rows_plan_quickly_and_small(tmp_path: Path) -> None:
    rows = pa.table({"prompt": pa.array(["a"] * 100_000)})
    for number in range(10):
        pq.write_table(rows, tmp_path / f"{number}.parquet")
    config = prompts(tmp_path)

    made: list[tuple[bytes, Plan]] = []

    def there_and_back() -> None:
        data = make_plan(config, 256).to_parquet()
        made.append((data, Plan.from_parquet(data, PromptSource(config).files())))

    assert work(there_and_back) < 40
    ((data, again),) = made
    assert again.num_prompts == 1_000_000
    assert len(again.shards) == 10 * 391
    assert len(data) < 100_000
    assert len(pickle.dumps(again.shards[17])) < 400


@pytest.mark.slow
def test_a_plan_of_a_million_files_can_be_read_again(tmp_path: Path) -> None:
    write_prompts(tmp_path / "a.parquet", 5)
    plan = make_plan(prompts(tmp_path), 4)
    table = pq.read_table(pa.BufferReader(plan.to_parquet()))
    with pq.ParquetWriter(tmp_path / "plan", table.schema) as writer:
        writer.write_table(table)
        # pyarrow reads at most 100 MB of a footer by default, which the names of many files exceed, as this text does.
        writer.add_key_value_metadata({"more": "a" * 100_000_001})
    data = (tmp_path / "plan").read_bytes()

    assert rules_of_plan(data) == plan.rules
    assert list(Outline.from_parquet(data).num_rows) == [4, 1]
    assert Plan.from_parquet(data, plan.files) == plan


def test_new_files_become_shards_behind_those_that_are_there(tmp_path: Path) -> None:
    write_prompts(tmp_path / "b.parquet", 5, tag=["x"] * 5)
    config = prompts(tmp_path, passthrough=["tag"])
    plan = make_plan(config, 4)
    assert extended(plan, config, 4) is plan

    write_prompts(tmp_path / "a.parquet", 6, tag=["y"] * 6)
    write_prompts(tmp_path / "empty.parquet", 0, tag=[])
    longer = extended(plan, config, 4)

    assert longer.shards[:2] == plan.shards
    assert layout(longer.shards[2:]) == [
        (2, "a.parquet", 0, 4),
        (3, "a.parquet", 4, 2),
    ]
    assert extended(longer, config, 4) is longer
    assert plan_again(longer, config) == longer  # planned files are not new


def test_a_limit_counts_what_is_planned(tmp_path: Path) -> None:
    write_prompts(tmp_path / "a.parquet", 5)
    config = prompts(tmp_path, limit=7, passthrough=["prompt"])
    plan = make_plan(config, 4)

    write_prompts(tmp_path / "b.parquet", 5)
    longer = extended(plan, config, 4)
    assert [shard.num_rows for shard in longer.shards] == [4, 1, 2]  # the first two are unchanged

    write_prompts(tmp_path / "c.parquet", 5)
    assert extended(longer, config, 4).shards == longer.shards


def test_new_files_that_do_not_fit_into_the_run_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_prompts(tmp_path / "a.parquet", 5, tag=["x"] * 5)
    config = prompts(tmp_path, passthrough=["tag"])
    plan = make_plan(config, 4)
    monkeypatch.setattr(
        "flux_batch.plan.plan.shard_name", lambda index, num_shards: f"{index:0{len(str(num_shards))}d}"
    )
    write_prompts(tmp_path / "b.parquet", 29, tag=["x"] * 29)
    with pytest.raises(PlanMismatch, match="8 new shards make 10 in all, but the names of the 2 existing shards"):
        extended(plan, config, 4)

    write_prompts(tmp_path / "b.parquet", 5, tag=[None] * 5)
    assert extended(plan, config, 4).passthrough == plan.passthrough
    write_prompts(tmp_path / "b.parquet", 5, tag=[1] * 5)
    with pytest.raises(PlanMismatch, match=r"have type int64 in column 'tag' .*, but the run has string"):
        extended(plan, config, 4)


@pytest.mark.parametrize("layout", ["parquet", "jsonl"])
def test_new_files_without_a_value_fit_columns_of_any_type(tmp_path: Path, layout: str) -> None:
    write_prompts(tmp_path / "a.parquet", 5, score=[0.5] * 5)
    config = prompts(tmp_path, passthrough=["score"])
    plan = make_plan(config, 4)
    if layout == "parquet":
        write_prompts(tmp_path / "b.parquet", 5, score=pa.nulls(5))
    else:
        (tmp_path / "b.jsonl").write_text('{"prompt": "p", "score": null}')
    assert extended(plan, config, 4).passthrough == pa.schema([("score", pa.float64())])


def test_a_changed_file_is_no_new_one(tmp_path: Path) -> None:
    write_prompts(tmp_path / "a.parquet", 5)
    plan = make_plan(prompts(tmp_path), 4)
    write_prompts(tmp_path / "a.parquet", 6)
    write_prompts(tmp_path / "b.parquet", 6)

    files = PromptSource(prompts(tmp_path)).files()
    with pytest.raises(PlanMismatch, match=r"a\.parquet: was") as caught:
        Plan.from_parquet(plan.to_parquet(), files, new_files=True)
    assert "b.parquet" not in str(caught.value)


def test_a_notebook_shows_the_first_shards(tmp_path: Path) -> None:
    write_prompts(tmp_path / "a<b>.parquet", 45)
    plan = make_plan(prompts(tmp_path), 2)
    assert repr(plan) == "Plan(45 prompts of 1 files in 23 shards)"
    page = plan._repr_html_()
    assert page.count("<td>a&lt;b&gt;.parquet</td>") == 20
    assert "<tr><td>19</td><td>a&lt;b&gt;.parquet</td><td>38</td><td>2</td></tr>" in page
    assert page.endswith('<tr><td colspan="4">and 3 more shards</td></tr></table>')
    assert "more shards" not in make_plan(prompts(tmp_path), 3)._repr_html_()


def test_a_file_is_opened_once_for_its_rows_and_its_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(4):
        write_prompts(tmp_path / f"{number}.parquet", 5, **({"tag": ["x"] * 5} if number == 2 else {}))
    opened, open_table = Counter[str](), source.open_table
    monkeypatch.setattr(
        source, "open_table", lambda uri, *given, **options: opened.update([uri]) or open_table(uri, *given, **options)
    )

    assert len(make_plan(prompts(tmp_path), 5).shards) == 4
    assert list(opened.values()) == [1] * 4


@pytest.mark.parametrize(
    ("suffix", "head", "row"),
    [("txt", "", "{}"), ("csv", "prompt,tag", "{},x"), ("jsonl", "", '{{"prompt": "{}", "tag": "x"}}')],
)
def test_a_limit_leaves_the_rest_of_a_text_unread(tmp_path: Path, suffix: str, head: str, row: str) -> None:
    rows = [row.format(number) for number in random.Random(0).sample(range(10**9), 200_000)]
    whole = gzip.compress("\n".join([head, *rows] if head else rows).encode(), 1)
    (tmp_path / f"a.{suffix}.gz").write_bytes(whole[:-1000])  # reading its end is an error

    assert make_plan(prompts(tmp_path, limit=8), 5).num_prompts == 8
    with pytest.raises(SourceError, match="compression is damaged"):
        make_plan(prompts(tmp_path), 5)


def test_a_column_may_have_its_first_value_behind_the_limit(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n' * 9 + '{"prompt": "a", "tag": 1}\n')
    plan = make_plan(prompts(tmp_path, limit=2, passthrough=["tag"]), 5)
    assert (plan.num_prompts, plan.passthrough) == (2, pa.schema([("tag", pa.int64())]))


def test_prompts_may_be_text_behind_the_limit(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": 7}\n{"prompt": "a"}\n')
    assert make_plan(prompts(tmp_path, limit=1), 5).num_prompts == 1


def test_a_limit_leaves_later_files_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(6):
        write_prompts(tmp_path / f"{number}.parquet", 5)
    (tmp_path / "5.parquet").write_bytes(b"PAR1 and damage")
    monkeypatch.setattr(plan_module, "FILES_AT_ONCE", 2)

    assert make_plan(prompts(tmp_path, limit=8), 5).num_prompts == 8
