"""Formats are recognised by the content of a file first, and then by its name."""

from __future__ import annotations

import gc
import gzip
import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from flux_batch.errors import SourceError
from flux_batch.prompts.formats.open import TABLE_FORMATS, format_of_name, open_table
from flux_batch.prompts.formats.table import BadRow, RowRange
from helpers.prompt_tables import read_all

ROWS = [{"n": number, "prompt": f"prompt {number}"} for number in range(7)]


def arrow_stream(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    return sink.getvalue()


def arrow_file(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return sink.getvalue()


def feather(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pyarrow.feather.write_feather(table, sink)
    return sink.getvalue()


def parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


JSON = {
    "array of objects": json.dumps(ROWS, indent=1),
    "object of columns": json.dumps({"n": [row["n"] for row in ROWS], "prompt": [row["prompt"] for row in ROWS]}),
    "as pandas writes it": json.dumps({name: {str(i): row[name] for i, row in enumerate(ROWS)} for name in ROWS[0]}),
    "array beside other things": json.dumps({"version": 1, "authors": ["x"], "data": ROWS}),
    "lines": "".join(json.dumps(row) + "\n" for row in ROWS),
}


@pytest.mark.parametrize("num_rows", [1, 3, 99])
@pytest.mark.parametrize("what", ["arrow", "stream", "feather", "parquet", *JSON])
def test_tables_are_read_whatever_the_suffix(tmp_path: Path, what: str, num_rows: int) -> None:
    table = pa.Table.from_pylist(ROWS)
    writers = {"arrow": arrow_file, "stream": arrow_stream, "feather": feather, "parquet": parquet}
    data = writers[what](table) if what in writers else JSON[what].encode()
    suffixes = ("arrow", "feather", "parquet", "csv", "bin", "") if what in writers else ("json", "data", "")
    for suffix in suffixes:
        path = tmp_path / f"p.{suffix}".rstrip(".")
        path.write_bytes(data)
        assert read_all(path, num_rows) == ROWS
        assert sorted(open_table(str(path), {}).schema().names) == ["n", "prompt"]


@pytest.mark.parametrize("write", [arrow_stream, arrow_file, feather, parquet])
def test_rows_without_a_wanted_column_count(tmp_path: Path, write: Callable[[pa.Table], bytes]) -> None:
    """Samplers may add all columns that a row needs."""
    (tmp_path / "a").write_bytes(write(pa.Table.from_pylist(ROWS)))
    table = open_table(str(tmp_path / "a"), {})
    assert [row for part in table.split(4) for row in table.stream(part, {"absent"})] == [{}] * len(ROWS)


@pytest.mark.parametrize("write", [arrow_stream, arrow_file])
def test_a_range_of_arrow_is_read_from_its_record_batch(tmp_path: Path, write: Callable[[pa.Table], bytes]) -> None:
    path, rows = tmp_path / "a.arrow", ROWS * 20
    kinds = {"plain": pa.string(), "dictionary": pa.dictionary(pa.int8(), pa.string())}
    for kind in kinds.values():
        columns = {"n": [row["n"] for row in rows], "prompt": pa.array([row["prompt"] for row in rows]).cast(kind)}
        path.write_bytes(write(pa.table(columns)))
        table = open_table(str(path), {})
        for each in table.split(4):
            expected = rows[each.start : each.start + each.num_rows]
            assert list(table.stream(each, {"n", "prompt"})) == expected
            # A plan of an older version has no offsets.
            assert list(table.stream(replace(each, offset=0), {"n", "prompt"})) == expected
    if write is arrow_stream:
        path.write_bytes(write(pa.Table.from_pylist(rows)))
        first, *_, last = open_table(str(path), {}).split(4)
        data = bytearray(path.read_bytes())
        data[first.offset >> 24 : (first.offset >> 24) + 8] = b"\xff" * 8
        path.write_bytes(data)
        assert list(open_table(str(path), {}).stream(last, {"n", "prompt"})) == rows[last.start :]
        with pytest.raises(SourceError, match="not a readable Arrow file"):
            list(open_table(str(path), {}).stream(first, {"prompt"}))


def test_an_array_of_texts_is_prompts_and_other_items_fail_alone(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(r'["a", 5, {"prompt": "b"}, {"prompt": "\ud83d"}, ["c"]]')

    a, number, b, half, items = read_all(tmp_path / "p.json", 2)

    assert (a, b) == ({"prompt": "a"}, {"prompt": "b"})
    assert number == items == BadRow("neither a JSON object nor a text")
    assert isinstance(half, BadRow)


def test_a_column_of_objects_is_a_column(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "meta": {"x": 1}}, {"prompt": "b", "meta": {"x": 2}}]
    (tmp_path / "p.json").write_text(json.dumps({name: [row[name] for row in rows] for name in rows[0]}))

    assert read_all(tmp_path / "p.json", 2) == rows


@pytest.mark.parametrize(
    ("text", "words"), [('{"a": 1}', "holds no table"), ("5", "holds no table"), ("[1,", "not valid JSON")]
)
def test_json_that_is_no_table_is_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "p.json").write_text(text)

    with pytest.raises(SourceError, match=rf"p\.json: .*{words}"):
        open_table(str(tmp_path / "p.json"), {}).schema()


def write_tar(path: Path, members: dict[str, bytes], mode: Any = "w") -> None:
    with tarfile.open(path, mode) as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize("num_rows", [1, 2, 9])
@pytest.mark.parametrize(("name", "mode"), [("p.tar", "w"), ("p.tar.gz", "w:gz"), ("p.tgz", "w:gz")])
def test_a_tar_of_captions_is_a_row_for_each_key(tmp_path: Path, num_rows: int, name: str, mode: str) -> None:
    members = {
        "x/0.jpg": b"\xff" * 3000,
        "x/0.json": b'{"n": 5, "id": "u"}',
        "x/0.txt": "ü cat\n".encode(),
        "x/1.txt": b"a dog",
        "x/2.jpg": b"no caption",
        "x/3.txt": b"\xff",
        "x/4.json": b'{"prompt": "p", "n": 6}',
    }
    write_tar(tmp_path / name, members, mode)

    first, second, bad, last = read_all(tmp_path / name, num_rows)

    assert first == {"id": "u", "prompt": "ü cat", "n": 5}
    assert second == {"id": "x/1", "prompt": "a dog"}
    assert isinstance(bad, BadRow)
    assert bad.reason.startswith("x/3.txt: ")
    assert last == {"id": "x/4", "prompt": "p", "n": 6}


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("p.xlsx", b"PK\x03\x04 a zip", r"\.xlsx is not read: save the sheet as CSV"),
        ("p.csv", b"PK\x03\x04 a zip", r"\.zip is not read: unpack it"),
        ("p.db", b"SQLite format 3\x00", r"\.sqlite is not read: export the table as CSV or Parquet"),
        ("p.txt", b"SQLite format 3\x00", r"\.sqlite is not read"),
        ("p.pkl", b"\x80\x04", r"\.pkl is not read: write it as Parquet"),
        ("p.yaml", b"a: 1", r"\.yaml is not read: write it as JSON Lines"),
        ("p.orc", b"ORC", r"\.orc is not read"),
        ("p.dat", b"a cat", r"its format is unknown; prompts must be \.parquet, \.jsonl, \.csv, \.txt"),
        ("prompts", b"a cat", "its format is unknown"),
    ],
)
def test_other_formats_are_refused_with_the_way_to_one_that_is_read(
    tmp_path: Path, name: str, data: bytes, words: str
) -> None:
    (tmp_path / name).write_bytes(data)

    with pytest.raises(SourceError, match=words):
        open_table(str(tmp_path / name), {})


@pytest.mark.parametrize("suffix", [suffix for suffix in TABLE_FORMATS if suffix not in ("tar", "json")])
def test_no_bytes_are_no_rows_and_no_columns_that_matter(tmp_path: Path, suffix: str) -> None:
    for name, data in ((f"p.{suffix}", b""), (f"q.{suffix}", gzip.compress(b""))):
        if data and suffix in ("parquet", "arrow", "feather"):
            continue
        (tmp_path / name).write_bytes(data)
        assert list(open_table(str(tmp_path / name), {}).split(4)) == []


def test_half_a_character_in_a_tar_costs_its_row_and_not_its_columns(tmp_path: Path) -> None:
    members = {"0.json": b'{"prompt": "good"}', "1.json": rb'{"prompt": "p", "\ud83d": 1}'}
    write_tar(tmp_path / "p.tar", members)
    table = open_table(str(tmp_path / "p.tar"), {})

    assert set(table.schema().names) == {"id", "prompt"}
    good, bad = (row for part in table.split(2) for row in table.stream(part, {"prompt"}))
    assert isinstance(bad, BadRow)
    assert bad.reason.startswith("1.json: ")
    assert isinstance(good, dict)


def test_the_members_of_a_tar_are_not_kept(tmp_path: Path) -> None:
    write_tar(tmp_path / "p.tar", {f"{number:03}.txt": b"a" for number in range(500)})
    rows = open_table(str(tmp_path / "p.tar"), {}).stream(RowRange(0, 500), {"prompt"})
    assert len(list(islice(rows, 499))) == 499
    assert 0 < sum(issubclass(type(each), tarfile.TarInfo) for each in gc.get_objects()) < 50


def test_a_tar_whose_keys_are_scattered_or_whose_end_is_cut_is_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "p.tar", {"0.txt": b"a", "1.txt": b"b", "0.json": b"{}"})
    with pytest.raises(SourceError, match=r"p\.tar: the members of '0' are not consecutive"):
        read_all(tmp_path / "p.tar", 3)

    write_tar(tmp_path / "q.tar", {"0.txt": b"a", "1.txt": b"b"})
    (tmp_path / "q.tar").write_bytes((tmp_path / "q.tar").read_bytes()[: 2 * 512 + 100])
    with pytest.raises(SourceError, match=r"q\.tar: not a readable tar: the file ends within a header"):
        read_all(tmp_path / "q.tar", 3)


@pytest.mark.parametrize(
    ("text", "prompts"),
    [
        ('{"prompt": "a"}\n{"prompt": "b"}\n', ["a", "b"]),
        ('\ufeff{"prompt": "a"}\n', ["a"]),
        ('\r\n {"prompt": "a"}\r\n{"prompt": "b"}', ["a", "b"]),
        ('[\n {"prompt": "a"}\n]', ["a"]),
        ("[prompt],prompt\nx,a\n", ["a"]),
        ("{x},prompt\ny,a\n", ["a"]),
    ],
)
def test_json_that_is_called_csv_is_json(tmp_path: Path, text: str, prompts: list[str]) -> None:
    path = tmp_path / "prompts.csv"
    path.write_text(text, encoding="utf-8")
    assert [row["prompt"] for row in read_all(path, 9) if isinstance(row, dict)] == prompts


@pytest.mark.parametrize("name", ["p.txt", "p.csv", "p.jsonl", "p.html", "p"])
@pytest.mark.parametrize("text", ["<!DOCTYPE html>\n<title>Log in</title>\n", "\ufeff\n<HTML lang=en>\n<p>a cat"])
def test_a_web_page_is_not_taken_for_prompts(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(SourceError, match="is a web page, not prompts"):
        open_table(str(tmp_path / name), {})


@pytest.mark.parametrize("first", ["<html> in neon letters", "<HTML>", "<!doctype html> on a shirt"])
def test_a_prompt_may_begin_like_a_web_page(tmp_path: Path, first: str) -> None:
    (tmp_path / "p.txt").write_text(f"{first}\na cat\n")

    assert [row["prompt"] for row in read_all(tmp_path / "p.txt", 3)] == [first, "a cat"]


def test_a_text_may_begin_like_orc(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("ORC warrior\nan elf\n")

    assert [row["prompt"] for row in read_all(tmp_path / "p.txt", 3)] == ["ORC warrior", "an elf"]


def damaged(data: bytes, seed: int) -> bytes:
    """Return data with bytes cut off, overwritten, inserted or removed."""
    random, changed = Random(seed), bytearray(data)
    first, last = sorted(random.randrange(len(data)) for _ in range(2))
    match seed % 4:
        case 0:
            del changed[first:]
        case 1:
            for _ in range(5):
                changed[random.randrange(len(data))] = random.randrange(256)
        case 2:
            changed[first : first + 9] = random.randbytes(random.randrange(40))
        case 3:
            del changed[first:last]
    return bytes(changed)


@pytest.mark.parametrize("suffix", ["parquet", "arrow", "feather", "stream.arrow", "json", "csv", "tsv", "tar", "tgz"])
def test_damage_is_an_error_that_names_the_file_or_costs_rows(tmp_path: Path, suffix: str) -> None:
    table = pa.Table.from_pylist(ROWS * 5)
    captions = {f"{number}.txt": b"a cat" for number in range(9)} | {"a.json": b'{"prompt": "x"}'}
    write_tar(tmp_path / "whole.tar", captions)
    data = {
        **{"parquet": parquet(table), "arrow": arrow_file(table), "feather": feather(table)},
        **{"stream.arrow": arrow_stream(table), "json": JSON["array of objects"].encode()},
        **{"csv": b'prompt,n\n"a ""b""",1\n"c\nd",2\n' * 9, "tsv": b"prompt\tn\na\t1\n" * 9},
        **{"tar": (tmp_path / "whole.tar").read_bytes(), "tgz": gzip.compress((tmp_path / "whole.tar").read_bytes())},
    }[suffix]
    path = tmp_path / f"p.{suffix}"

    refusals = []
    for seed in range(24):
        path.write_bytes(damaged(data, seed))
        try:
            assert all(isinstance(row, (dict, BadRow)) for row in read_all(path, 3))
        except SourceError as error:
            refusals.append(str(error))
    assert all(path.name in refusal and "\n" not in refusal for refusal in refusals)


def test_the_format_of_a_name_is_without_its_compression() -> None:
    names = ("a.jsonl.gz", "A.TXT.XZ", "a.parquet", "a.tgz", "a", "dir.d/a", "p.gz")
    assert [format_of_name(name) for name in names] == ["jsonl", "txt", "parquet", "tar", "", "", "gz"]
