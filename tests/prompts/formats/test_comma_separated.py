"""CSV and TSV files as they occur in practice."""

from __future__ import annotations

from pathlib import Path

import pytest

from flux_batch.errors import SourceError
from flux_batch.prompts.formats.open import open_table
from flux_batch.prompts.formats.table import BadRow, Row
from helpers.prompt_tables import read_all

NUM_ROWS = pytest.mark.parametrize("num_rows", [1, 2, 9])


def read(tmp_path: Path, text: str | bytes, num_rows: int = 9, name: str = "p.csv") -> list[Row | BadRow]:
    (tmp_path / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return read_all(tmp_path / name, num_rows, ("prompt", "seed"))


def names(tmp_path: Path, text: str, name: str = "p.csv") -> list[str]:
    (tmp_path / name).write_text(text)
    return list(open_table(str(tmp_path / name), {}).schema().names)


@NUM_ROWS
def test_rows_that_do_not_fit_cost_themselves_alone(tmp_path: Path, num_rows: int) -> None:
    found = read(tmp_path, "prompt,seed\na,1\nb\nc,3,4\n\nd,\n,7\ne,8,,\n", num_rows)

    assert found == [
        {"prompt": "a", "seed": "1"},
        BadRow("1 fields where the header has 2"),
        BadRow("3 fields where the header has 2"),
        {"prompt": "d", "seed": None},
        {"prompt": None, "seed": "7"},
        {"prompt": "e", "seed": "8"},
    ]


def test_a_column_of_any_length_may_stand_beside(tmp_path: Path) -> None:
    (row,) = read(tmp_path, f"prompt,notes\na,{'x' * 200_000}\n")

    assert isinstance(row, dict)
    assert row["prompt"] == "a"


@NUM_ROWS
def test_bytes_that_are_no_text_fail_their_row(tmp_path: Path, num_rows: int) -> None:
    bad, good = read(tmp_path, b"prompt,seed\ncaf\xe9,1\nb\xef\xbf\xbd,2\n", num_rows)

    assert bad == BadRow("not UTF-8: byte 0xe9 is not a character; save the file as UTF-8")
    assert good == {"prompt": "b\ufffd", "seed": "2"}


@NUM_ROWS
def test_a_quote_that_is_not_closed_costs_its_row_alone(tmp_path: Path, num_rows: int) -> None:
    bad, bird, fish = read(tmp_path, 'prompt,seed\n"a dog,3\na bird,4\na fish,5\n', num_rows)

    assert bad == BadRow('a quote is opened and not closed: "a dog,3')
    assert (bird, fish) == ({"prompt": "a bird", "seed": "4"}, {"prompt": "a fish", "seed": "5"})


@NUM_ROWS
def test_rows_between_two_stray_quotes_are_not_lost(tmp_path: Path, num_rows: int) -> None:
    found = read(tmp_path, 'prompt,seed\nx,1\n"a dog,3\na bird,4\n"a fish",5\n"two\nlines",6\n', num_rows)

    assert found == [
        {"prompt": "x", "seed": "1"},
        BadRow('a quote is opened and not closed: "a dog,3'),
        {"prompt": "a bird", "seed": "4"},
        {"prompt": "a fish", "seed": "5"},
        {"prompt": "two\nlines", "seed": "6"},
    ]


@NUM_ROWS
def test_rows_between_the_stray_quotes_of_two_rows_are_not_lost(tmp_path: Path, num_rows: int) -> None:
    found = read(tmp_path, 'prompt,seed\n"a dog,3\na bird,4\na fish,5\n"a cat,6\nan owl,7\n', num_rows)

    assert [row["seed"] if isinstance(row, dict) else row.reason.partition(": ")[2] for row in found] == [
        '"a dog,3',
        "4",
        "5",
        '"a cat,6',
        "7",
    ]


@NUM_ROWS
def test_lines_that_a_quote_takes_in_and_that_are_no_rows_are_named(tmp_path: Path, num_rows: int) -> None:
    found = read(tmp_path, 'prompt,seed\nx,1\n"a dog,3\nhalf a line\n"again",4\ny,2\n', num_rows)

    assert found == [
        {"prompt": "x", "seed": "1"},
        BadRow("lines 3 to 5: a quote is opened on line 3, and includes the lines after it"),
        {"prompt": "y", "seed": "2"},
    ]


@pytest.mark.parametrize(
    ("header", "row"),
    [
        ("prompt, seed", "a, 3"),
        (" prompt ,seed\t", "a,3"),
        ("prompt,seed,,", "a,3,,"),
        ("prompt,seed,,", "a,3"),
        ("prompt,seed,tag,tag", "a,3,x,y"),
        ("\ufeffprompt,seed", "a,3"),
        ('\ufeff"prompt", "seed"', 'a, "3"'),
    ],
)
def test_headers_of_people_and_spreadsheets(tmp_path: Path, header: str, row: str) -> None:
    (found,) = read(tmp_path, f"{header}\r\n{row}\r\n")

    assert isinstance(found, dict)
    assert {name: found[name] for name in ("prompt", "seed")} == {"prompt": "a", "seed": "3"}


@NUM_ROWS
@pytest.mark.parametrize("sign", [";", "\t"])
def test_columns_may_be_separated_by_semicolons_or_tabs(tmp_path: Path, sign: str, num_rows: int) -> None:
    text = 'prompt;seed\r\na, b;1\r\n"say ""hi""; twice";2\r\n"a dog;3\r\nc;4\r\n'

    assert read(tmp_path, text.replace(";", sign), num_rows) == [
        {"prompt": "a, b", "seed": "1"},
        {"prompt": f'say "hi"{sign} twice', "seed": "2"},
        BadRow(f'a quote is opened and not closed: "a dog{sign}3'),
        {"prompt": "c", "seed": "4"},
    ]
    assert names(tmp_path, "prompt,a;b\n") == ["prompt", "a;b"]


@pytest.mark.parametrize("name", ["p.csv", "p.tsv"])
def test_joined_files_bring_their_marks_and_headers_along(tmp_path: Path, name: str) -> None:
    comma = "," if name == "p.csv" else "\t"
    text = f"\ufeffprompt{comma}seed\na{comma}1\n\ufeffprompt{comma}seed\n\ufeffb{comma}2\n"

    a, header, b = read(tmp_path, text, name=name)

    assert (a, b) == ({"prompt": "a", "seed": "1"}, {"prompt": "b", "seed": "2"})
    assert header == BadRow("this is the header again, as in concatenated files")


@pytest.mark.parametrize("name", ["p.csv", "p.tsv"])
def test_no_bytes_are_no_rows(tmp_path: Path, name: str) -> None:
    assert read(tmp_path, "", name=name) == []
    assert names(tmp_path, "", name) == []


def test_a_header_that_cannot_be_read_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_bytes(b"pr\xe9,n\na,1\n")

    with pytest.raises(SourceError, match=r"p\.csv: the first line, which must name the columns"):
        open_table(str(tmp_path / "p.csv"), {}).schema()


def test_columns_are_those_of_the_header_doubles_included(tmp_path: Path) -> None:
    assert names(tmp_path, "prompt, tag ,,tag\n") == ["prompt", "tag", "tag"]


@NUM_ROWS
def test_a_quote_in_tsv_is_a_character(tmp_path: Path, num_rows: int) -> None:
    text = 'prompt\tseed\r\n"a dog\t1\r\n\r\nsay "hi", twice\t2\r\nb\r\nc\t3\t\r\n'

    assert read(tmp_path, text, num_rows, "p.tsv") == [
        {"prompt": '"a dog', "seed": "1"},
        {"prompt": 'say "hi", twice', "seed": "2"},
        BadRow("1 fields where the header has 2"),
        {"prompt": "c", "seed": "3"},
    ]


@NUM_ROWS
@pytest.mark.parametrize(("name", "comma"), [("p.csv", ","), ("p.tsv", "\t")])
def test_blank_lines_before_the_header_do_not_count(tmp_path: Path, num_rows: int, name: str, comma: str) -> None:
    text = f"\ufeff\r\n  \n{comma}\nprompt{comma}seed\n\na{comma}1\nb{comma}2"
    assert read(tmp_path, text, num_rows, name) == [{"prompt": "a", "seed": "1"}, {"prompt": "b", "seed": "2"}]
    table = open_table(str(tmp_path / name), {})
    lines = [each.line for part in table.split(num_rows) for each in table.each_of(part)]  # type: ignore[attr-defined]
    assert lines == [6, 7]
