"""The survey of rows before a run: failures, repeats, truncated prompts and special tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from flux_batch.cli import main
from flux_batch.config.schema import JobConfig
from flux_batch.errors import RowError
from flux_batch.plan.plan import make_plan
from flux_batch.plan.survey import MAX_REASONS, Survey, survey, survey_rows
from flux_batch.records import RowImages
from flux_batch.sampling_params import own_size, preferred_size

ROWS = [
    {"prompt": "a cat", "id": "1"},
    {"prompt": "A  cat!", "id": "2"},
    {"prompt": "a cat", "id": "1"},
    {"prompt": "ends here <|endoftext|> not here", "id": "4"},
    {"prompt": "</s> and <extra_id_0>", "id": "5"},
    {"prompt": "<|end of text|> <s> <extra_id_100>", "id": "6"},
    {"prompt": "word " * 2000, "id": "7"},
    {"prompt": "", "id": "8"},
    {"prompt": "a {red|blue} __animal__ | __init__.py {x}", "id": "11"},
    {"prompt": "p", "width": 63, "id": "9"},
    {"prompt": "q", "width": 65, "id": "10"},
]


def job(folder: Path, model: str = "demo", **prompts: Any) -> JobConfig:
    path = folder / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    tree = {"prompts": {"uri": str(path), **prompts}, "output": {"uri": str(folder / "out")}, "model": {"uri": model}}
    (folder / "job.yaml").write_text(json.dumps(tree))
    return JobConfig.from_dict(tree)


def counted(config: JobConfig, max_rows: int | None = None) -> Survey:
    return survey(config, make_plan(config.prompts, 3), max_rows)


def test_rows_are_counted_by_what_is_odd_about_them(tmp_path: Path) -> None:
    found = counted(job(tmp_path))

    assert (found.num_rows, found.num_failed) == (11, 3)
    assert (found.num_repeated_ids, found.num_repeated_prompts, found.num_near_duplicates) == (1, 1, 1)
    assert (found.num_special_tokens, found.num_wildcards) == (2, 1)
    assert (found.num_clip_truncated, found.num_t5_truncated) == (1, 1)
    assert found.failures["column 'prompt' is empty: a prompt is needed"] == 1
    assert found.failures["width = ...: must be a multiple of 16; the nearest are ..."] == 2
    assert found.examples["column 'prompt' is empty: a prompt is needed"] == ["p.jsonl:7 (line 8)"]
    json.dumps(found.to_json())
    text = "\n".join(text for _, text in survey_rows(found, 11))
    assert "3 rows cannot be rendered" in text
    assert "2 rows hold a special token" in text
    assert "2: width = ...: must be a multiple of 16; the nearest are ..." in text


def test_reasons_that_differ_by_their_place_are_one_and_others_are_bounded(tmp_path: Path) -> None:
    config = job(tmp_path)
    lines = ["{" * (1 + at % 7) + " " * at + "x" for at in range(30)]
    Path(config.prompts.uri[0]).write_text("\n".join([*lines, '{"prompt": "a"}']))
    found = counted(config)
    assert (found.num_failed, len(found.failures)) == (30, 1)

    named = [{"prompt": "a", "lora": f"nobody-{at}"} for at in range(2 * MAX_REASONS)]
    Path(config.prompts.uri[0]).write_text("\n".join(map(json.dumps, named)))
    found = counted(config)
    assert found.num_failed == 2 * MAX_REASONS
    assert len(found.failures) <= MAX_REASONS + 1


def test_only_the_first_rows_are_counted_and_a_missing_model_is_said(tmp_path: Path) -> None:
    found = counted(job(tmp_path, model=str(tmp_path / "none")), 4)

    assert (found.num_rows, found.num_failed, found.num_special_tokens) == (4, 0, 1)
    assert found.num_clip_truncated is None
    text = "\n".join(text for _, text in survey_rows(found, 10))
    assert "all of the first 4 rows can be rendered" in text
    assert "1 of the first 4 rows repeats a prompt word for word" in text
    assert "truncated prompts were not counted: " in text


def test_settings_that_differ_from_the_job_are_counted(tmp_path: Path) -> None:
    config = job(tmp_path)
    rows = [{"prompt": f"{'long ' * 30}{at}", "width": 64 + 16 * (at % 3), "seed": 7} for at in range(6)]
    rows += [{"prompt": "several", "num_images_per_prompt": 3, "cfg_scale": 2}]
    Path(config.prompts.uri[0]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = counted(config)
    assert found.overrides == {"width": 6, "num_images_per_prompt": 1, "cfg_scale": 1}
    assert found.sizes == {"1024 x 1024": 3, "64 x 1024": 2, "80 x 1024": 2, "96 x 1024": 2}
    assert found.num_images == 9
    shown = dict(survey_rows(found, 7))
    assert shown["overrides"].startswith("width in 6 rows, ")
    assert shown["sizes"].startswith("1024 x 1024: 3, ")
    assert shown["first"].endswith("long lo...")


def test_images_of_rows_are_counted_by_their_columns(tmp_path: Path) -> None:
    config = job(tmp_path)
    rows = [{"prompt": "p", "reference_image": f"{at}.png"} for at in range(3)]
    rows += [{"prompt": "p", "input_image": "0.png", "mask_image": "1.png", "width": 64}]
    Path(config.prompts.uri[0]).write_text("".join(json.dumps(row) + "\n" for row in rows))

    found = counted(config)

    assert found.overrides == {"reference_image": 3, "input_image": 1, "mask_image": 1, "width": 1}
    shown = dict(survey_rows(found, 4))
    assert shown["overrides"].startswith("reference_image in 3 rows, ")
    assert shown["sizes"].startswith("as the reference: 3")


def test_a_size_that_only_references_know_is_shown_and_planned_with(tmp_path: Path) -> None:
    config = job(tmp_path)
    Path(config.prompts.uri[0]).write_text('{"prompt": "p", "reference_image": "0.png"}\n')
    found = counted(config)
    assert dict(survey_rows(found, 1))["sizes"] == "as the reference: 1"
    assert found.sized(config) == config  # the image does not exist yet

    Image.new("RGB", (100, 52)).save(tmp_path / "0.png")
    sampling = counted(config).sized(config).sampling
    assert (sampling.width, sampling.height) == preferred_size(100, 52)
    own = config.model_copy(update={"sampling": config.sampling.model_copy(update={"resize_references": False})})
    sampling = counted(own).sized(own).sampling
    assert (sampling.width, sampling.height) == own_size(100, 52)


def test_a_reference_that_cannot_be_read_is_tried_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = job(tmp_path)
    rows = [{"prompt": "p", "reference_image": f"{at}.png"} for at in range(20)]
    Path(config.prompts.uri[0]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    tried: list[object] = []

    def load(images: RowImages, *_: object, **__: object) -> None:
        tried.append(images)
        raise RowError("reference_image 0.png: there is no file")

    monkeypatch.setattr("flux_batch.plan.survey.load_images", load)
    assert counted(config).sizes == {"as the reference": 20}
    assert len(tried) == 1


def test_validate_reads_every_row_and_ends_as_the_run_would(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job(tmp_path)
    command = ["validate", str(tmp_path / "job.yaml"), "--json"]

    assert main(command) == 3
    assert json.loads(capsys.readouterr().out)["rows"]["num_failed"] == 3
    assert main([*command, "--set", "failures.max_ratio=0.3"]) == 0
    assert main([*command, "--set", "prompts.columns={prompt: caption}"]) == 2
    assert not (tmp_path / "out").exists()
