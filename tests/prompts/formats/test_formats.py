from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flux_batch.errors import SourceError
from flux_batch.prompts.formats.open import open_table
from flux_batch.prompts.formats.table import BadRow, Row, RowRange
from flux_batch.storage.store import Store
from helpers.prompt_tables import read_all

per_example = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
# All characters that a text file can contain, which excludes lone surrogates.
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
# Python's text readers treat these as line breaks, but the formats do not.
ODD_BREAKS = "one\x0btwo\x0cthree\x1cfour\x85five\u2028six"


def write_parquet(path: Path, rows: list[Row]) -> None:
    table = pa.Table.from_pylist(rows, pa.schema([("n", pa.int64()), ("prompt", pa.string())]))
    pq.write_table(table, path, row_group_size=3)


def write_jsonl(path: Path, rows: list[Row]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=row["n"] % 2 == 0) + "\n" for row in rows), "utf-8")


def write_csv(path: Path, rows: list[Row]) -> None:
    quoted = [f'{row["n"]},"{row["prompt"].replace(chr(34), chr(34) * 2)}"\n' for row in rows]
    path.write_bytes(("n,prompt\n" + "".join(quoted)).encode())


@per_example
@given(prompts=st.lists(texts.filter(bool), max_size=12), num_rows=st.integers(1, 13))
@pytest.mark.parametrize("write", [write_parquet, write_jsonl, write_csv])
def test_each_row_comes_once_and_in_order(
    tmp_path: Path, write: Callable[[Path, list[Row]], None], prompts: list[str], num_rows: int
) -> None:
    rows: list[Row] = [{"n": number, "prompt": prompt} for number, prompt in enumerate(prompts)]
    path = tmp_path / f"p.{write.__name__.removeprefix('write_')}"
    write(path, rows)

    found = read_all(path, num_rows)

    assert [{**row, "n": int(row["n"])} for row in found if isinstance(row, dict)] == rows


@per_example
@given(
    # A carriage return is a line break in files without line feeds, as on old Macs.
    prompts=st.lists(texts.map(lambda text: re.sub(r"[\r\n]", " ", text).strip()).filter(bool), max_size=12),
    num_rows=st.integers(1, 13),
)
def test_each_line_of_text_comes_once_and_in_order(tmp_path: Path, prompts: list[str], num_rows: int) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes("\n".join(prompts).encode())

    expected = [prompt.removeprefix("\ufeff").strip() for prompt in prompts]
    assert [row["prompt"] for row in read_all(path, num_rows) if isinstance(row, dict)] == [
        prompt for prompt in expected if prompt.strip()
    ]


@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 7, 10, 99])
def test_parquet_ranges_cross_row_groups(tmp_path: Path, num_rows: int) -> None:
    groups = [3, 1, 4, 0, 2]
    schema = pa.schema([("prompt", pa.string())])
    number = 0
    with pq.ParquetWriter(tmp_path / "p.parquet", schema) as writer:
        for size in groups:
            writer.write_table(pa.table({"prompt": [str(number + index) for index in range(size)]}, schema))
            number += size

    assert read_all(tmp_path / "p.parquet", num_rows) == [{"prompt": str(index)} for index in range(10)]


def test_a_range_within_a_large_row_group(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": [str(index) for index in range(20_000)]}), tmp_path / "p.parquet")

    rows = list(open_table(str(tmp_path / "p.parquet"), {}).stream(RowRange(8190, 4), {"prompt"}))

    assert rows == [{"prompt": str(index)} for index in range(8190, 8194)]


def test_a_column_of_images_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flux_batch.prompts.formats.parquet.BATCH_BYTES", 100_000)
    images = [bytes([number]) * 20_000 for number in range(40)]
    pq.write_table(pa.table({"image": images}), tmp_path / "p.parquet", compression="none", use_dictionary=False)
    sizes = []
    read = pq.ParquetFile.iter_batches

    def counting(*arguments: Any, **options: Any) -> Any:
        for batch in read(*arguments, **options):
            sizes.append(batch.num_rows)
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counting)
    rows = open_table(str(tmp_path / "p.parquet"), {}).stream(RowRange(1, 38), {"image"})

    assert next(rows) == {"image": images[1]}
    assert len(sizes) == 1
    assert [row["image"] for row in rows] == images[2:39]  # type: ignore[index]
    assert max(sizes) <= 5


def test_parquet_reads_only_the_columns_asked_for(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [b"x"], "prompt": ["a"]}), tmp_path / "p.parquet")

    assert read_all(tmp_path / "p.parquet", 1) == [{"prompt": "a"}]


@pytest.mark.parametrize(
    "kind", [pa.dictionary(pa.int8(), pa.string()), pa.large_string(), pa.dictionary(pa.int32(), pa.large_string())]
)
def test_parquet_text_of_any_encoding(tmp_path: Path, kind: pa.DataType) -> None:
    column = pa.array(["a", None, "b", "a"], pa.string()).cast(kind)
    pq.write_table(pa.table({"prompt": column}), tmp_path / "p.parquet", row_group_size=2)

    assert read_all(tmp_path / "p.parquet", 3) == [{"prompt": text} for text in ("a", None, "b", "a")]
    assert open_table(str(tmp_path / "p.parquet"), {}).schema().names == ["prompt"]


def test_parquet_text_that_is_not_utf8_costs_its_row_alone(tmp_path: Path) -> None:
    column = pa.array([b"a", b"\xff\xfe", b"b"]).view(pa.string())
    pq.write_table(pa.table({"prompt": column}), tmp_path / "p.parquet")

    first, bad, last = read_all(tmp_path / "p.parquet", 3)

    assert (first, last) == ({"prompt": "a"}, {"prompt": "b"})
    assert isinstance(bad, BadRow)
    assert "not UTF-8" in bad.reason


@pytest.mark.parametrize("ending", [b"\n", b"\r\n"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("header", [b"prompt,n", b'"prompt","n"'])
def test_csv_of_any_writer(tmp_path: Path, ending: bytes, bom: bytes, last: bool, header: bytes) -> None:
    lines = [header, b'"a ""quoted"", word",1', b'"two', b'lines",2', b"", b"plain,3", '"ü, 猫",4'.encode()]
    (tmp_path / "p.csv").write_bytes(bom + ending.join(lines) + ending * last)

    assert read_all(tmp_path / "p.csv", 2) == [
        {"prompt": 'a "quoted", word', "n": "1"},
        {"prompt": f"two{ending.decode()}lines", "n": "2"},
        {"prompt": "plain", "n": "3"},
        {"prompt": "ü, 猫", "n": "4"},
    ]


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("num_rows", [1, 3, 99])
def test_json_lines_that_are_no_objects_cost_themselves_alone(tmp_path: Path, bom: bytes, num_rows: int) -> None:
    lines = [
        b'{"prompt": "a"}',
        b"",
        b'{"prompt": ',
        b'["a"]',
        b"null",
        b'{"prompt": "\xff"}',
        b"[" * 100_000,
        rb'{"prompt": "\ud83d\ude00"}',
        rb'{"prompt": "\ud83d"}',
        rb'{"other": {"\udead": 1}}',
        b'\t{"prompt": null}\r',
    ]
    (tmp_path / "p.jsonl").write_bytes(bom + b"\n".join(lines))

    found = read_all(tmp_path / "p.jsonl", num_rows)

    assert [row for row in found if isinstance(row, dict)] == [{"prompt": "a"}, {"prompt": "😀"}, {"prompt": None}]
    assert [isinstance(row, BadRow) for row in found] == [False, *[True] * 5, False, True, True, False]
    reasons = [row.reason for row in found if isinstance(row, BadRow)]
    assert [reason.split(":")[0] for reason in reasons] == [
        "not valid JSON",
        "not a JSON object",
        "not a JSON object",
        "not valid JSON",
        "not valid JSON",
        "not valid JSON",
        "not valid JSON",
    ]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, 2], pa.int64()),
        ([1, None], pa.int64()),
        ([1, 2.5], pa.float64()),
        ([True, False], pa.bool_()),
        ([True, 1], pa.string()),
        (["a", 1], pa.string()),
        ([{"a": 1}, None], pa.string()),
        ([None, None], pa.null()),
        ([2**63], pa.string()),
    ],
)
def test_json_columns_have_the_type_that_holds_all_values(
    tmp_path: Path, values: list[Any], expected: pa.DataType
) -> None:
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"n": value}) + "\n" for value in values))

    assert open_table(str(tmp_path / "p.jsonl"), {}).schema() == pa.schema([("n", expected)])


def test_text_lines_end_at_line_feeds_alone(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes(b"\xef\xbb\xbf  one \r\n\n \t\n" + ODD_BREAKS.encode() + b"\n\xff\nlast")

    one, odd, bad, last = read_all(tmp_path / "p.txt", 2)

    assert (one, odd, last) == ({"prompt": "one"}, {"prompt": ODD_BREAKS}, {"prompt": "last"})
    assert isinstance(bad, BadRow)


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl", "p.csv"])
def test_text_formats_keep_odd_line_breaks(tmp_path: Path, name: str) -> None:
    line = {
        "p.txt": ODD_BREAKS,
        "p.jsonl": json.dumps({"prompt": ODD_BREAKS}, ensure_ascii=False),
        "p.csv": f'prompt\n"{ODD_BREAKS}"',
    }
    (tmp_path / name).write_bytes(line[name].encode())

    assert read_all(tmp_path / name, 1) == [{"prompt": ODD_BREAKS}]


def test_suffixes_may_be_capitals(tmp_path: Path) -> None:
    (tmp_path / "P.TXT").write_text("a")

    assert read_all(tmp_path / "P.TXT", 1) == [{"prompt": "a"}]


def broken_parquet(path: Path, damage: str) -> None:
    pq.write_table(pa.table({"prompt": [f"some text {index}" * 20 for index in range(1000)]}), path)
    data = path.read_bytes()
    middle = len(data) // 3
    path.write_bytes(
        {
            "truncated": data[:-10],
            "footer lost": data[: len(data) // 2],
            "another format": b"prompt\na\n",
            "pages overwritten": data[:middle] + os_random(200) + data[middle + 200 :],
        }[damage]
    )


def os_random(size: int) -> bytes:
    return bytes((index * 7919 + 13) % 256 for index in range(size))


@pytest.mark.parametrize("damage", ["truncated", "footer lost", "another format", "pages overwritten"])
def test_a_damaged_parquet_file_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "bad.parquet"
    broken_parquet(path, damage)

    with pytest.raises(SourceError, match="not a readable Parquet file") as caught:
        read_all(path, 10)
    assert "bad.parquet" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.s3
def test_a_large_text_file_in_a_bucket_is_read_in_blocks(s3_store: Any) -> None:
    lines = b"".join(b'{"prompt": "%d %s"}\n' % (number, b"x" * 200) for number in range(20_000))
    # 4 MB; reading a block per line would read 80 GB.
    Store(s3_store.uri, s3_store.storage_options).write("p.jsonl", lines)

    table = open_table(f"{s3_store.uri}/p.jsonl", s3_store.storage_options)
    ranges = list(table.split(1000))

    assert len(ranges) == 20
    assert str(next(table.stream(ranges[7], {"prompt"}))["prompt"]).startswith("7000 ")  # type: ignore[index]
