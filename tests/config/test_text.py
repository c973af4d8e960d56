"""YAML has safe types, quotes no values in errors, and cannot fill the memory with a few lines."""

from __future__ import annotations

import json
import traceback
from typing import Any

import pytest

from flux_batch.config.text import fill_in_dates, load_yaml, parse_moment, read_tree, to_yaml
from flux_batch.errors import JobError
from helpers.yardstick import work


@pytest.mark.parametrize(
    "text",
    [
        "output: {storage_options: {key: hush\n  bad: [",
        "key: *hush",
        "key: !hush x",
        "key: !!int hush",
        "key: !!python/object/apply:os.system [hush]",
        "key: !!python/name:hush",
        "key: 'hush",
        "key: hush: hush",
        "<<: hush",
        "? [hush, {hush: x}]",
    ],
)
def test_neither_the_message_nor_its_traceback_quotes_the_text(text: str) -> None:
    with pytest.raises(JobError, match="not valid YAML") as caught:
        load_yaml(text, "job.yaml")
    assert "hush" not in "".join(traceback.format_exception(caught.value))


def test_the_signs_of_yaml_are_still_named() -> None:
    with pytest.raises(JobError, match=r"job\.yaml: line 1: not valid YAML: expected ',' or ']', but got"):
        load_yaml("a: [b", "job.yaml")


def test_merge_keys_merge() -> None:
    text = "a: &a {NAME: 1, y: 2}\nb: &b {<<: *a, y: 3}\nc: {<<: [*b, *a], z: 4}\nd: {<<: [*a, *b], NAME: 5}\n"
    for name in ("x", "a_longer_name"):  # PyYAML 6.0.4 compares keys by identity
        tree = load_yaml(text.replace("NAME", name), "job.yaml")
        assert (tree["b"], tree["c"]) == ({name: 1, "y": 3}, {name: 1, "y": 3, "z": 4})
        assert tree["d"] == {name: 5, "y": 2}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "sampling: {width: 512, height: 512, width: 1024}",
            "line 1: .*width stands twice .*, first on line 1",
        ),
        (
            "model: {uri: a}\nname: x\nmodel:\n  uri: b\n",
            "line 3: .*model stands twice .*, first on line 1",
        ),
        ("a: [{b: 1,\n  'b': 2}]", "line 2: .*b stands twice .*, first on line 1"),
    ],
)
def test_a_key_that_stands_twice_is_refused_with_both_lines(text: str, words: str) -> None:
    with pytest.raises(JobError, match=words):
        load_yaml(text, "job.yaml")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("-12", -12),
        ("1_000", 1000),
        ("0123", "0123"),
        ("12:30:45", "12:30:45"),
        ("0x1f", "0x1f"),
        ("1e-2", 0.01),
        ("1.0e-2", 0.01),
        ("5.", 5.0),
        (".5", 0.5),
        ("-1E3", -1000.0),
        ("1:30.5", "1:30.5"),
        ("1e", "1e"),
        ("e5", "e5"),
        ("-", "-"),
        ("1.2.3", "1.2.3"),
    ],
)
def test_numbers_are_those_that_people_mean(text: str, value: object) -> None:
    found = load_yaml(f"a: {text}" if text != "-" else "a: '-'", "job.yaml")["a"]
    assert (found, type(found)) == (value, type(value))
    for each in (value, text):
        assert load_yaml(to_yaml({"a": each}), "job.yaml")["a"] == each


def doubled(levels: int) -> str:
    lines = ["a0: &a0 {x: 1}", *(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}" for n in range(1, levels))]
    return "\n".join(lines)


def test_the_escapes_of_json_are_read_as_json_reads_them() -> None:
    text = json.dumps(
        {"p\N{GRINNING FACE}.csv": ["\N{GRINNING FACE}", "é", "\u2028", "\ude00\ud83d", "\ud83d\ud83d\ude00"]}
    )
    assert load_yaml(text, "job.json") == json.loads(text)


def test_merges_of_merges_stay_small_and_a_circle_ends() -> None:
    found: list[dict[str, object]] = []
    assert work(lambda: found.append(load_yaml(doubled(60), "job.yaml"))) < 20
    assert found[0]["a59"] == {"x": 1}
    assert load_yaml("a: &a {<<: *a, first: 1}\nb: {<<: [*a], second: 2}", "")["b"] == {"first": 1, "second": 2}
    with pytest.raises(JobError, match=r"line 2: .*`<<` must name a mapping"):
        load_yaml("a: 1\nb: {<<: [5]}\n", "job.yaml")


@pytest.mark.parametrize(
    "text", ["a: &a {x: 1}\nb: {<<: [" + "*a, " * 1000 + "]}", "a: &a {x: 1}\nb:\n" + "  <<: *a\n" * 1000]
)
def test_a_bomb_of_merges_is_refused_before_it_goes_off(text: str) -> None:
    def read() -> None:
        with pytest.raises(JobError, match="too many `<<` merges"):
            load_yaml(text, "job.yaml")

    assert work(read) < 20


def test_a_bomb_of_aliases_stays_small() -> None:
    lines = ["a0: &a0 [x]", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 60))]
    assert len(load_yaml("\n".join(lines), "job.yaml")) == 60


def test_depth_without_end_is_refused() -> None:
    with pytest.raises(JobError, match="not valid YAML"):
        load_yaml("[" * 100_000, "job.yaml")


def test_dates_are_those_of_the_run_wherever_a_text_asks_for_one() -> None:
    tree = {"name": "cats-{date}", "prompts": {"uri": ["s3://b/{date}/", "x"]}, "n": 3, "model": {"uri": "{datetime}"}}
    assert fill_in_dates(tree, parse_moment("2026-11-23T02:30:00+00:00"), "job.yaml") == {
        "name": "cats-2026-11-23",
        "prompts": {"uri": ["s3://b/2026-11-23/", "x"]},
        "n": 3,
        "model": {"uri": "2026-11-23T02-30-00"},
    }
    assert fill_in_dates({"seed": "{day}"}, parse_moment("2026-11-23"), "") == {"seed": "20261123"}
    assert fill_in_dates({"a": "{datetime} {other} {"}, parse_moment("2026-11-23"), "") == {
        "a": "2026-11-23T00-00-00 {other} {"
    }


def test_a_date_is_asked_for_and_never_guessed() -> None:
    with pytest.raises(
        JobError, match=r"job\.yaml: prompts\.uri\.1 needs the date of the run: set it .*--logical-date"
    ):
        fill_in_dates({"prompts": {"uri": ["x", "s3://b/{date}/"]}}, None, "job.yaml")
    assert fill_in_dates({"prompts": {"uri": "{month}"}}, None, "job.yaml") == {"prompts": {"uri": "{month}"}}


@pytest.mark.parametrize(
    ("tree", "sentence"),
    [
        ({"output": {"uri": "out/{dat}"}}, r"output\.uri: {dat} is not a placeholder; did you mean '{date}'\?"),
        ({"output": {"uri": "out/{ Day }"}}, r"output\.uri: { Day } is not a placeholder; did you mean '{day}'\?"),
        ({"name": "cats-{date_time}"}, r"name: {date_time} is not a placeholder; did you mean '{datetime}'\?"),
        (
            {"output": {"uri": "out/{run}"}},
            r"output\.uri: {run} is not a placeholder; there are {day}, {date}, {datetime}$",
        ),
    ],
)
def test_a_placeholder_with_a_slip_is_refused(tree: dict[str, Any], sentence: str) -> None:
    for moment in (None, parse_moment("2026-11-23")):
        with pytest.raises(JobError, match=rf"^job\.yaml: {sentence}"):
            fill_in_dates(tree, moment, "job.yaml")


def test_braces_elsewhere_are_braces() -> None:
    tree = {"name": 3, "prompts": {"uri": "{dat}", "template": "{red|blue} {{ x }}"}, "output": {"uri": "a{b/c}d"}}
    assert fill_in_dates(tree, None, "job.yaml") == tree


@pytest.mark.parametrize("text", ["yesterday", "23.11.2026", "2026-13-01"])
def test_a_date_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(JobError, match=r"--logical-date .*: must be a date"):
        parse_moment(text)


def test_dates_are_filled_into_trees_of_aliases_once() -> None:
    lines = ["a0: &a0 ['{date}']", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 60)), "b: &b [*b]"]
    tree = fill_in_dates(load_yaml("\n".join(lines), "job.yaml"), parse_moment("2026-11-23"), "job.yaml")
    assert tree["a1"] == [["2026-11-23"]] * 2
    assert tree["b"][0] is tree["b"]


def test_an_override_changes_one_of_two_sections_that_share_an_alias() -> None:
    text = "prompts: {storage_options: &both {endpoint_url: here}}\noutput: {storage_options: *both}"
    tree = read_tree(text, "job.yaml", ["output.storage_options.endpoint_url=there"])
    assert tree["prompts"]["storage_options"] == {"endpoint_url": "here"}
    assert tree["output"]["storage_options"] == {"endpoint_url": "there"}


@pytest.mark.parametrize("text", ["quality: null", "quality:", "model: {}"])
def test_an_override_makes_a_section_that_is_null_or_not_there(text: str) -> None:
    assert read_tree(text, "job.yaml", ["quality.score=clip"])["quality"] == {"score": "clip"}
    with pytest.raises(JobError, match=r"^--set a\.b\.c: b is not a section$"):
        read_tree("a: {b: 5}", "job.yaml", ["a.b.c=1"])
