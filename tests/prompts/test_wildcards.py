"""Wildcards in the syntax of two user interfaces; draws depend on the run's seed, the row and the name."""

from __future__ import annotations

import math
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from flux_batch.config.schema import PromptsConfig, SamplingConfig
from flux_batch.errors import JobError
from flux_batch.plan.plan import make_plan
from flux_batch.prompts.samplers import draw
from flux_batch.prompts.source import PromptSource
from flux_batch.prompts.wildcards import Wildcards
from flux_batch.records import FailedRow, ImageRequest

LISTS = {
    "animal": ["# comment", "cat", "__bird__ of prey"],
    "bird": ["heron", "{grey|white} owl"],
    "colour/warm": ["red"],
    "colour/cold": ["3::blue", "0::teal"],
    "circle": ["__circle__"],
    "many": ["__many2____many2__"],
    "many2": ["__many3__ __many3__ __many3__ __many3__"],
    "many3": ["__animal__ " * 200],
    "long": ["x" * 60_000],
}


def filled(text: str, row: int = 0, seed: int = 0) -> str:
    return Wildcards(LISTS, "lists").filled(text, partial(draw, seed, f"p.txt:{row}"))


def outcomes(text: str, num_rows: int = 200) -> Counter[str]:
    return Counter(filled(text, row) for row in range(num_rows))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain", {"plain"}),
        ("a {red|blue} hat", {"a red hat", "a blue hat"}),
        ("{a}{}{|b}", {"a", "ab"}),
        ("__animal__", {"cat", "heron of prey", "grey owl of prey", "white owl of prey"}),
        ("__colour/*__", {"red", "blue"}),
        ("__colour/cold__", {"blue"}),
        ("{0::a|2::b}", {"b"}),
        ("{ {a|b}|c }", {" a", " b", "c "}),
        ("{2$$a|b}", {"a, b", "b, a"}),
        ("{2$$ and $$a|b|c}", {f"{x} and {y}" for x in "abc" for y in "abc" if x != y}),
        ("{1-2$$a|b}", {"a", "b", "a, b", "b, a"}),
        ("{-1$$a|b}", {"", "a", "b"}),
        ("{1-$$a|b}", {"a", "b", "a, b", "b, a"}),
        ("{9$$a|b}", {"a, b", "b, a"}),
        ("{2$$__colour/*__}", {"red, blue", "blue, red"}),
        ("{1-2$$ and $$__colour/*__}", {"red", "blue", "red and blue", "blue and red"}),
        ("{1-$$__colour/*__}", {"red", "blue", "red, blue", "blue, red"}),
        ("{9$$__colour/*__}", {"red, blue", "blue, red"}),
        ("{1$$__colour/*__}", {"red", "blue"}),
        ("{__colour/*__}", {"red", "blue"}),
        (r"\{a\|b\} a | b \n", {r"{a|b} a | b \n"}),
        ("snake_case, __, a __ b, $5, 1::2", {"snake_case, __, a __ b, $5, 1::2"}),
    ],
)
def test_texts_are_drawn_as_in_the_user_interfaces(text: str, expected: set[str]) -> None:
    assert set(outcomes(text)) == expected


def test_shares_are_those_of_the_weights() -> None:
    found = outcomes("{3::a|b|0.5::c}", 3000)

    for value, weight in (("a", 3), ("b", 1), ("c", 0.5)):
        share = weight / 4.5
        assert abs(found[value] / 3000 - share) < 4 * math.sqrt(share * (1 - share) / 3000)


def test_a_draw_depends_on_the_seed_the_row_and_its_name_alone() -> None:
    text = "{a|b|c|d} __bird__ {a|b|c|d}"

    assert outcomes(text) == outcomes(text)
    assert [filled(text, row) for row in range(9)] != [filled(text, row, seed=1) for row in range(9)]
    assert any(first != last for first, *_, last in (filled(text, row).split() for row in range(20)))
    # Another choice beside it does not change the draw.
    assert [filled(f"{{x|y}} {text}", row).partition(" ")[2] for row in range(20)] == [
        filled(text, row) for row in range(20)
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("__anmal__", "__anmal__: no such list in lists; did you mean 'animal'"),
        ("a {red|blue", "a { is not closed: {red|blue"),
        ("{red|blue} hat}", "a } is not opened"),
        ("{0::a|0::b}", "all weights are 0"),
        ("__circle__", "in a circle"),
        ("__many__", "more than 1000 wildcards and choices"),
        ("__long____long__", "longer than 100000 characters"),
        ("{" * 40 + "}" * 40, "nested deeper than 30"),
        ("{2$$" + "__long__|" * 9 + "}", "longer than 100000 characters"),
    ],
)
def test_what_cannot_be_drawn_is_one_sentence(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]*$") as caught:
        filled(text)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 300


def rows_of(config: PromptsConfig, shard_size: int = 4) -> list[ImageRequest | FailedRow]:
    source = PromptSource(config)
    return [
        row for shard in make_plan(config, shard_size).shards for row in source.read(shard, SamplingConfig(width=64))
    ]


def write_lists(folder: Path, **lists: str) -> str:
    folder.mkdir(exist_ok=True)
    for name, text in lists.items():
        (folder / f"{name}.txt").write_text(text)
    (folder / "README.txt").write_text("not a list")
    return str(folder)


def test_prompts_of_a_file_are_drawn_and_a_bad_one_costs_itself(tmp_path: Path) -> None:
    lists = write_lists(tmp_path / "lists", animal="cat\ndog\n\n# no\n")
    (tmp_path / "p.txt").write_text("A __animal__\nA {red|blue} __animal__\nA __bird__\n" * 3)
    config = PromptsConfig(uri=str(tmp_path / "p.txt"), wildcards=lists)

    rows = rows_of(config)

    assert [(row.id, row.prompt) for row in rows] == [(row.id, row.prompt) for row in rows_of(config, 9)]
    assert {row.prompt for row in rows[::3]} <= {"A cat", "A dog"}
    assert isinstance(rows[2], FailedRow)
    assert rows[2].error_message.startswith("p.txt:2 (line 3): prompt: __bird__: no such list in ")
    assert rows_of(PromptsConfig(uri=config.uri))[0].prompt == "A __animal__"
    before = PromptSource(config).lists
    (tmp_path / "lists" / "animal.txt").write_text("cat\n")
    assert PromptSource(config).lists != before


def test_yaml_files_hold_lists_by_their_keys(tmp_path: Path) -> None:
    lists = write_lists(tmp_path / "lists", cat="tabby")
    (tmp_path / "lists" / "animals.yaml").write_text("pets:\n  cat: [siamese, 3::manx]\n  dog: [pug]\none: lion\n")
    (tmp_path / "lists" / "more.yml").write_bytes('cat:\n- "a {red|blue} one"\n'.encode("utf-16"))
    config: dict[str, Any] = {"rows": 60, "wildcards": lists}

    def prompts(template: str) -> set[Any]:
        return {row.prompt for row in rows_of(PromptsConfig(template=template, **config))}

    assert prompts("__pets/*__") == {"siamese", "manx", "pug"}
    assert prompts("__one__ __cat__") == {"lion tabby", "lion a red one", "lion a blue one"}
    before = PromptSource(PromptsConfig(template="a", **config)).lists
    (tmp_path / "lists" / "animals.yaml").write_text("pets:\n  cat: [siamese, 3::manx]\n  dog: [poodle]\none: lion\n")
    assert PromptSource(PromptsConfig(template="a", **config)).lists != before
    for text, words in (("- a\n", "it: must be texts"), ("a: [b: c]\n", "a: must be texts"), ("a: [", "line 1: not")):
        (tmp_path / "lists" / "animals.yaml").write_text(text)
        with pytest.raises(JobError, match=f"lists/animals.yaml: {words}"):
            PromptSource(PromptsConfig(template="a", **config))


def test_a_template_may_hold_wildcards_and_a_name_without_a_list_ends_the_job(tmp_path: Path) -> None:
    lists = write_lists(tmp_path / "lists", animal="cat\ndog\n")
    config: dict[str, Any] = {"rows": 9, "samplers": {"n": [1, 2]}, "wildcards": lists}
    template = "{{ n }} __animal__ {red|blue}"

    prompts = {row.prompt for row in rows_of(PromptsConfig(template=template, **config))}

    assert prompts <= {
        f"{n} {animal} {colour}" for n in "12" for animal in ("cat", "dog") for colour in ("red", "blue")
    }
    with pytest.raises(JobError, match=r"^prompts\.template: __fish__: no such list in .*; there are animal$"):
        PromptSource(PromptsConfig(template="__fish__", **config))
    with pytest.raises(JobError, match=r"__animal__: no such list in prompts\.wildcards, which is true and no folder"):
        PromptSource(PromptsConfig(template=template, **config | {"wildcards": True}))
    for folder, words in ((tmp_path / "none", "no such"), (tmp_path / "empty", "no prompts found")):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(JobError, match=rf"^prompts\.wildcards: .*{words}"):
            PromptSource(PromptsConfig(template="a", **config | {"wildcards": str(folder)}))
