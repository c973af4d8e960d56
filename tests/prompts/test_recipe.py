"""Prompts from a recipe: rows independent of shards, the requested shares, and no hostile templates."""

from __future__ import annotations

import math
import threading
from collections import Counter
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from flux_batch.config.schema import JobConfig, PromptsConfig, SamplingConfig
from flux_batch.errors import JobError, SourceError
from flux_batch.plan.plan import Plan, make_plan
from flux_batch.prompts.recipe import Recipe
from flux_batch.prompts.samplers import draw, sampled
from flux_batch.prompts.source import PromptSource
from flux_batch.prompts.template import PromptTemplate
from flux_batch.records import FailedRow, ImageRequest

CATS: dict[str, Any] = {
    "animal": ["cat", "dog", "heron"],
    "weather": {"choice": {"rain": 0.2, "sun": 0.8}},
    "lens": {"uniform": [24, 85]},
    "breed": {"by": "animal", "cat": ["tabby", "siamese"], "dog": ["pug"], "heron": ["grey"]},
    "width": [512, 1024],
    "age": {"integer": [1, 6]},
    "size": {"normal": [10, 2]},
}
TEMPLATE = "A {{ animal }} ({{ breed }}) in {{ weather }}, {{ lens | round | int }} mm"


def rows_of(config: PromptsConfig, shard_size: int = 7, **sampling: Any) -> tuple[Plan, list[ImageRequest | FailedRow]]:
    plan = make_plan(config, shard_size)
    source = PromptSource(config)
    return plan, [row for shard in plan.shards for row in source.read(shard, SamplingConfig(**sampling))]


def recipe(rows: int = 50, **changes: Any) -> PromptsConfig:
    return PromptsConfig(**{"rows": rows, "samplers": CATS, "template": TEMPLATE, **changes})


def test_rows_are_the_same_whatever_the_shards_and_differ_by_the_seed_of_the_run() -> None:
    _, rows = rows_of(recipe())

    assert [(row.id, row.prompt, row.passthrough) for row in rows] == [
        (row.id, row.prompt, row.passthrough) for row in rows_of(recipe(), 50)[1]
    ]
    assert [row.prompt for row in rows] != [row.prompt for row in rows_of(recipe(), seed=1)[1]]
    assert [row.id for row in rows[:2]] == ["rows:0", "rows:1"]
    assert len({row.prompt for row in rows}) > 30


def test_values_are_columns_of_the_metadata_and_settings_of_the_row() -> None:
    plan, rows = rows_of(recipe())

    assert {field.name: str(field.type) for field in plan.passthrough} == {
        **{"animal": "string", "weather": "string", "lens": "double", "breed": "string"},
        **{"width": "int64", "age": "int64", "size": "double"},
    }
    for row in rows:
        assert isinstance(row, ImageRequest)
        values = row.passthrough
        assert row.sampling.width == values["width"]
        lens = round(values["lens"])
        assert row.prompt == f"A {values['animal']} ({values['breed']}) in {values['weather']}, {lens} mm"
        assert values["breed"] in CATS["breed"][values["animal"]]
        assert 1 <= values["age"] <= 6
        assert 24 <= values["lens"] < 85


def test_one_sampler_does_not_move_another() -> None:
    fewer = {name: CATS[name] for name in ("weather", "animal")}

    _, rows = rows_of(recipe(samplers=fewer, template="{{ animal }} {{ weather }}"))

    assert [row.prompt for row in rows] == [
        f"{row.passthrough['animal']} {row.passthrough['weather']}" for row in rows_of(recipe())[1]
    ]


def shares(config: PromptsConfig, name: str) -> Counter[Any]:
    _, rows = rows_of(config, 1000)
    return Counter(row.passthrough[name] for row in rows)


@pytest.mark.slow
def test_the_shares_of_100_000_rows_are_those_of_the_weights() -> None:
    num_rows = 100_000
    samplers = Recipe(
        recipe(samplers={name: CATS[name] for name in ("weather", "animal", "breed")}, template="a")
    ).samplers
    expected = {"rain": 0.2, "sun": 0.8, "cat": 1 / 3, "dog": 1 / 3, "heron": 1 / 3, "tabby": 1 / 6, "pug": 1 / 3}

    found: Counter[Any] = Counter()
    for number in range(num_rows):
        found.update(sampled(samplers, partial(draw, 0, f"rows:{number}"), {}).values())

    for value, share in expected.items():
        error = math.sqrt(share * (1 - share) / num_rows)
        assert abs(found[value] / num_rows - share) < 4 * error


@pytest.mark.parametrize("num_rows", [1, 2, 30, 300])
def test_a_balanced_design_has_the_shares_of_the_weights_exactly(num_rows: int) -> None:
    config = recipe(num_rows, samplers={name: CATS[name] for name in ("weather", "animal")}, template="a")
    config = config.model_copy(update={"design": "balanced"})

    for name, weights in (("weather", {"rain": 0.2, "sun": 0.8}), ("animal", dict.fromkeys(CATS["animal"], 1 / 3))):
        found = shares(config, name)
        assert all(abs(found[value] - share * num_rows) <= 1 for value, share in weights.items())


def test_a_grid_has_every_combination_in_turn() -> None:
    samplers = {"a": ["x", "y"], "b": [1, 2, 3]}
    config = PromptsConfig(rows=8, samplers=samplers, template="{{ a }}{{ b }}", design="grid")

    assert [row.prompt for row in rows_of(config)[1]] == ["x1", "x2", "x3", "y1", "y2", "y3", "x1", "x2"]


def test_samplers_add_columns_to_the_rows_of_files(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("animal,note\ncat,a\nfox,b\n")
    (tmp_path / "words.txt").write_text("red\n\nblue\n")
    samplers = {
        "breed": {"by": "animal", "cat": ["tabby"], "dog": ["pug"]},
        "colour": {"file": str(tmp_path / "words.txt")},
    }
    template = "{{ colour }} {{ breed }} {{ note }}"
    config = PromptsConfig(uri=str(tmp_path / "p.csv"), samplers=samplers, template=template, passthrough=("note",))

    plan, (cat, fox) = rows_of(config)

    assert cat.prompt in ("red tabby a", "blue tabby a")
    assert plan.passthrough.names == ["note", "breed", "colour"]
    assert isinstance(fox, FailedRow)
    assert "sampler breed has no case for animal = 'fox'; it has cat, dog" in fox.error_message


def test_any_field_of_a_row_may_have_a_template(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("animal,side\ncat,64\ndog,\nheron,65\n")
    template = {
        "prompt": "A {{ animal }}",
        "negative_prompt": "{{ 'dog' if animal == 'cat' else '' }}",
        "width": "{{ (side | int) * 2 if side is not none else '' }}",
        "height": "{{ side | default(128) }}",
        "lora": "none",
        "id": "{{ animal }}-1",
    }
    config = PromptsConfig(uri=str(tmp_path / "p.csv"), template=template, columns={"height": "tall"})

    cat, dog, heron = rows_of(config, width=512, negative_prompt="ugly")[1]

    assert isinstance(cat, ImageRequest)
    assert isinstance(dog, ImageRequest)
    assert (cat.id, cat.prompt, cat.sampling.negative_prompt) == ("cat-1", "A cat", "dog")
    assert (cat.sampling.width, cat.sampling.height, cat.loras) == (128, 64, ())
    assert (dog.sampling.width, dog.sampling.height, dog.sampling.negative_prompt) == (512, 128, "")
    assert isinstance(heron, FailedRow)
    assert "width = 130" in heron.error_message
    for wrong, words in (
        ({"widht": "1"}, "'widht' is not a field of a prompt"),
        ({"width": "1"}, "column 'width' of width already comes from samplers or passthrough"),
    ):
        with pytest.raises(ValidationError, match=words):
            PromptsConfig(rows=1, template={"prompt": "a", **wrong}, samplers={"width": [64]})
    with pytest.raises(ValidationError, match="must be a text, or a mapping of fields to texts"):
        PromptsConfig(rows=1, template={"prompt": "a", "width": 64})
    with pytest.raises(JobError, match=r"prompts\.template\.width: line 1: a call is not allowed"):
        Recipe(PromptsConfig(rows=1, template={"prompt": "a", "width": "{{ a() }}"}))


def test_a_whole_number_is_one_case_whether_or_not_a_neighbour_is_missing(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "size": 1}\n{"prompt": "a", "size": 1.0}\n')
    config = PromptsConfig(uri=str(tmp_path / "p.jsonl"), samplers={"word": {"by": "size", 1: ["small"]}})

    assert [row.passthrough["word"] for row in rows_of(config)[1]] == ["small", "small"]


@pytest.mark.parametrize(
    "changes",
    [
        {"template": "{{ text }} {{ when }}"},
        {"template": "{{ text }}", "samplers": {"color": {"by": "when", "today": ["red"]}}},
    ],
)
def test_a_time_that_python_cannot_hold_costs_its_row(tmp_path: Path, changes: dict[str, Any]) -> None:
    days = pa.array([2**31 - 1], pa.date32())
    pq.write_table(pa.table({"text": ["a"], "when": days}), tmp_path / "p.parquet")

    _, (row,) = rows_of(PromptsConfig(uri=str(tmp_path / "p.parquet"), **changes))

    assert isinstance(row, FailedRow)
    assert "days=2147483647" in row.error_message


def test_columns_that_no_sampler_has_are_refused_without_files_too() -> None:
    with pytest.raises(SourceError, match=r"no column 'wwww', which prompts\.columns\.width names"):
        make_plan(recipe(columns={"width": "wwww"}), 7)


def test_a_list_in_a_file_is_text_or_refused_with_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_bytes(b"red\n\n\xff\xfe\nblue\n")

    with pytest.raises(JobError, match=r"words\.txt: line 3: not UTF-8"):
        Recipe(PromptsConfig(rows=1, samplers={"prompt": {"file": str(tmp_path / "words.txt")}}))


def test_the_version_of_a_recipe_is_that_of_its_lines_not_of_a_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    words = {"1": ["red"], "2": ["small"]}
    monkeypatch.setattr(Recipe, "_read_lines", lambda self, uri: list(words[uri[-1]]))

    def versions(day: int) -> tuple[str, str]:
        lists = [{"file": f"https://bucket.example/words?X-Amz-Signature={day}&sheet={sheet}"} for sheet in words]
        recipe = Recipe(PromptsConfig(rows=1, samplers={"prompt": lists[0], "size": lists[1]}))
        return recipe.version, recipe.lists

    first = versions(1)
    assert versions(2) == first
    for sheet in words:
        words[sheet].append("blue")
        assert not set(versions(2)) & set(first)
        words[sheet].pop()


def test_the_version_of_a_recipe_does_not_tell_which_file_was_read_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.txt", "b.yaml", "c.txt"):
        (tmp_path / name).write_text("colours: [red]" if name == "b.yaml" else f"{name} 1\n{name} 2\n")
    config = PromptsConfig(rows=1, template="__a__ __colours__ __c__", wildcards=str(tmp_path))
    version, read = Recipe(config).version, Recipe._read_lines
    others_are_read = threading.Event()

    def read_first_one_last(recipe: Recipe, uri: str) -> list[str]:
        if uri.endswith("a.txt"):
            assert others_are_read.wait(60)
        lines = read(recipe, uri)
        if uri.endswith("c.txt"):
            others_are_read.set()
        return lines

    monkeypatch.setattr(Recipe, "_read_lines", read_first_one_last)
    assert Recipe(config).version == version


@pytest.mark.parametrize(
    ("samplers", "words"),
    [
        ({"a": []}, "prompts.samplers.a: must have at least one value"),
        ({"a": [True, "x"]}, "True is neither a text nor a number; quote yes, no and the like in YAML"),
        ({"a": {"choose": [1]}}, "prompts.samplers.a: 'choose' is not a kind of sampler"),
        ({"a": {"choice": {"x": -1}}}, "weights must be numbers of at least 0, and not all 0"),
        ({"a": {"choice": {"x": 0}}}, "weights must be numbers of at least 0, and not all 0"),
        ({"a": {"uniform": [2, 1]}}, "uniform must be [low, high], and 1 is too small"),
        ({"a": {"normal": [0]}}, "normal must be [mean, standard deviation], two numbers"),
        ({"a": {"integer": [0.5, 1]}}, "integer must be [low, high], two whole numbers"),
        ({"a": {"normal": [10**400, 1]}}, "normal must be [mean, standard deviation], two numbers"),
        ({"a": [2**64]}, "prompts.samplers.a: a whole number is too large"),
        ({"a": [2**60, 0.5]}, "prompts.samplers.a: a whole number is too large"),
        ({"a": {"by": "b", date(2026, 1, 1): [1]}, "b": ["x"]}, "is neither a text nor a number: quote it"),
        (
            {"a": ["half \ud83d"]},
            "prompts.samplers.a: 'half \\ud83d' is not valid Unicode: it holds half",
        ),
        ({"a": "x"}, "must be a list of values, or one of choice, uniform"),
        ({"a": {"by": "b", "x": [1]}, "b": {"by": "a", "1": ["x"]}}, "depend on each other in a circle"),
        ({"a": {"by": "c", "x": [1]}}, "by: 'c' is neither a sampler nor a column"),
        ({"b": [1]}, "prompts.template: 'a' is neither a sampler nor a column; there are b"),
    ],
)
def test_a_sampler_that_cannot_be_is_refused_by_name(samplers: dict[str, Any], words: str) -> None:
    with pytest.raises(JobError) as caught:
        Recipe(PromptsConfig(rows=1, samplers=samplers, template="{{ a }}"))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "template",
    [
        "{% for x in range(10) %}{% for y in range(10**9) %}{% endfor %}{% endfor %}",
        "{{ a.__class__.__mro__ }}",
        "{{ a['__class__'] }}",
        "{{ a['upper'] }}",
        "{{ '%300000000d' is odd }}",
        "{{ a is divisibleby 2 }}",
        "A {{ null }} dog",
        "{{ null | upper }}",
        "{{ 'a ' ~ null }}",
        "{{ a|attr('__class__') }}",
        "{{ range(10**9) }}",
        "{{ 'x' * 10000000000 }}",
        "{{ a * 10000000000 }}",
        "{{ '%0999999999d' % 1 }}",
        "{{ a|center(1000000000) }}",
        "{{ 9 ** 9 ** 9 ** 9 }}",
        "{{ 1.5|round(1000000000) }}",
        "{% set x = a ~ a %}{{ x }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ a" + "|replace('x', 'xx')" * 60 + " }}",
        "{{ '" + "x" * 15_000 + "'" + "|replace('x', 'xxxxxxxxxx')" * 3 + " }}",
        "{{ cycler }}",
        "{{ self }}",
        "{{ " + "(" * 2000 + "a" + ")" * 2000 + " }}",
        "{{ a",
        "x" * 20_001,
    ],
)
def test_a_hostile_template_gives_one_sentence_and_no_prompt(template: str) -> None:
    def render() -> None:
        checked = PromptTemplate(template)
        checked.check_names(["a", "null"])
        checked.render({"a": "x", "null": None})

    with pytest.raises((JobError, ValueError)) as caught:
        render()
    assert 0 < len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("A {{ a }}", "A x"),
        ("{{ 'one' if n > 1 else 'two' }} {{ n * 2 }}", "one 6"),
        ("{% if a == 'x' %}yes{% else %}no{% endif %}", "yes"),
        ("{{ a|upper }} {{ 2.567|round(1) }} {{ none_|default('-') }}", "X 2.6 -"),
        ("{{ n }} < & ' \"", "3 < & ' \""),
        (
            "{{ null|default('grey') }} {{ 'a' if null else 'b' }} {{ null is none }} {{ null == 'x' }}",
            "grey b True False",
        ),
        ("{{ n is number and n is not none and n is gt 2 and 'x' in a }}", "True"),
    ],
)
def test_templates_do_what_they_are_for(template: str, text: str) -> None:
    assert PromptTemplate(template).render({"a": "x", "n": 3, "null": None}) == text


def test_long_texts_are_refused_before_they_are_joined() -> None:
    template = PromptTemplate("{{ " + " ~ ".join(["a"] * 60) + " }}")
    assert template.render({"a": "x" * 1_000}) == "x" * 60_000
    with pytest.raises(ValueError, match="a text of 8000000 characters is too long for a template"):
        template.render({"a": "x" * 8_000_000, "unused": 1})
    assert PromptTemplate("{{ b }}").render({"a": "x" * 8_000_000, "b": "y"}) == "y"


def test_a_recipe_stands_in_the_identity_of_a_job_and_needs_a_source() -> None:
    tree = {"prompts": {"rows": 3, "samplers": {"a": ["x"]}, "template": "{{ a }}"}, "output": {"uri": "o"}}
    job = JobConfig.from_dict(tree | {"model": {"uri": "demo"}})

    assert job.identity()["prompts.samplers"] == {"a": ["x"]}
    assert JobConfig.from_yaml(job.to_yaml()).identity() == job.identity()
    for wrong in ({}, {"uri": "x", "rows": 3}, {"uri": "x", "design": "grid"}):
        with pytest.raises(ValidationError):
            PromptsConfig(**wrong)
