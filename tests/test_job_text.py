"""YAML: its types are safe, its messages quote nothing, and no few lines of it fill the memory."""

from __future__ import annotations

import time
import traceback

import pytest

from flux_batch.errors import JobError
from flux_batch.job_text import load_yaml


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
    tree = load_yaml("a: &a {x: 1, y: 2}\nb: &b {<<: *a, y: 3}\nc: {<<: [*b, *a], z: 4}\n", "job.yaml")
    assert (tree["b"], tree["c"]) == ({"x": 1, "y": 3}, {"x": 1, "y": 3, "z": 4})


def doubled(levels: int) -> str:
    lines = ["a0: &a0 {x: 1}", *(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}" for n in range(1, levels))]
    return "\n".join(lines)


@pytest.mark.parametrize(
    "text", [doubled(40), "a: &a {x: 1}\nb: {<<: [" + "*a, " * 1000 + "]}", "a: &a {x: 1}\nb:\n" + "  <<: *a\n" * 1000]
)
def test_a_bomb_of_merges_is_refused_before_it_goes_off(text: str) -> None:
    started = time.monotonic()
    with pytest.raises(JobError, match="too much is merged"):
        load_yaml(text, "job.yaml")
    assert time.monotonic() - started < 2


def test_a_bomb_of_aliases_stays_small() -> None:
    lines = ["a0: &a0 [x]", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 60))]
    assert len(load_yaml("\n".join(lines), "job.yaml")) == 60


def test_depth_without_end_is_refused() -> None:
    with pytest.raises(JobError, match="not valid YAML"):
        load_yaml("[" * 100_000, "job.yaml")
