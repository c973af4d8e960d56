"""`quality`: which try of an image is kept, and that a run which was killed keeps the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from flux_batch.cli import main
from flux_batch.config.running import QualityConfig
from flux_batch.config.schema import JobConfig
from flux_batch.engine.local import LocalEngine
from flux_batch.errors import JobError
from flux_batch.images import read_provenance
from flux_batch.job import run
from flux_batch.records import Attempt, retry_seed
from flux_batch.worker.quality import Choice, Try, choose, is_open
from helpers.fakes import fake_image
from helpers.finished_runs import Making, command
from helpers.job_files import data_files, make_job, metadata, write_job
from helpers.mortal import Death, Life, one_shard_job, open_worker

SCORE = "helpers.annotators:FirstRed"
QUALITY = {"score": SCORE, "at_least": 0.5}


def tries(*scores: float | str | None) -> list[Try]:
    return [Try(score != "failed", score if isinstance(score, float) else None) for score in scores]


@pytest.mark.parametrize(
    ("keep", "scores", "goes_on", "choice"),
    [
        ("first", tries(0.6), False, Choice(0, True)),
        ("first", tries(0.5), False, Choice(0, True)),
        ("first", tries(0.4), True, Choice(0, False)),
        ("first", tries(0.4, 0.7), False, Choice(1, True)),
        ("first", tries(0.4, 0.2, 0.3), False, Choice(0, False)),
        ("first", tries(0.4, 0.4), True, Choice(0, False)),
        ("best", tries(0.6), True, Choice(0, True)),
        ("best", tries(0.6, 0.9, 0.9), False, Choice(1, True)),
        ("first", tries(None), False, Choice(0, False)),
        ("first", tries("failed"), False, Choice(0, False)),
        ("best", tries(-1.0, None), False, Choice(0, False)),
        ("best", tries(0.1, "failed"), False, Choice(0, False)),
    ],
)
def test_the_scores_alone_decide(keep: Any, scores: list[Try], goes_on: bool, choice: Choice) -> None:
    quality = QualityConfig(score="x", at_least=0.5, max_tries=3, keep=keep)
    assert (is_open(scores, quality), choose(scores, quality)) == (goes_on, choice)


def expected(row: Mapping[str, Any], seed: int, max_tries: int) -> list[tuple[int, float]]:
    """Return seed and score of each try of an image, made here one by one."""
    made = []
    for retry in range(max_tries):
        image = fake_image(row["prompt"], seed=retry_seed(seed, retry), width=16, height=16, num_inference_steps=2)
        made.append((retry_seed(seed, retry), image[0, 0, 0] / 255))
        if made[-1][1] >= QUALITY["at_least"]:
            break
    return made


def test_images_are_tried_again_until_they_hold_and_the_metadata_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_job(tmp_path, _rows(24), output={"format": "parquet", "shard_size": 12}, quality=QUALITY)
    plain = make_job(tmp_path / "plain", _rows(24), output={"shard_size": 12})
    making = Making()
    assert run(config, engine=LocalEngine(), make_pipeline=making).is_complete
    assert run(plain, engine=LocalEngine(), make_pipeline=Making()).is_complete

    rows, seeds = metadata(config), [row["seed"] for row in metadata(plain)]
    for row, seed in zip(rows, seeds, strict=True):
        made = expected(row, seed, 4)
        best = made[-1] if made[-1][1] >= 0.5 else max(made, key=lambda one: one[1])
        assert (row["tries"], row["seed"], row["score"]) == (len(made), best[0], pytest.approx(best[1]))
        assert row["accepted"] == (best[1] >= 0.5)
    assert {row["tries"] for row in rows} == {1, 2, 3, 4}
    assert "tries" not in metadata(plain)[0]
    assert (
        f"| quality | {SCORE} of at least 0.5, in at most 4 tries" in Path(config.output.uri, "README.md").read_text()
    )
    assert "all is well" in command(capsys, "verify", config.output.uri)[1]
    calls = [len(call) for pipeline in making.pipelines for call in pipeline.calls]
    assert sum(calls) == sum(row["tries"] for row in rows)
    assert calls.count(1) <= 2 * 4, "one batch a round is not full"


def _rows(number: int) -> list[dict[str, Any]]:
    return [{"prompt": f"image {index}"} for index in range(number)]


def test_the_image_carries_the_seed_of_the_try_that_is_kept(tmp_path: Path) -> None:
    config = make_job(tmp_path, _rows(8), output={"format": "files", "shard_size": 8}, quality=QUALITY)
    run(config, engine=LocalEngine(), make_pipeline=Making())
    for row in metadata(config):
        assert read_provenance(Path(config.output.uri, row["file_name"]).read_bytes())["seed"] == row["seed"]


def test_what_no_try_made_good_fails_if_the_job_says_so(tmp_path: Path) -> None:
    quality = {**QUALITY, "max_tries": 2, "otherwise": "fail"}
    config = make_job(tmp_path, [*_rows(11), {"prompt": "[raise]"}], failures={"max_ratio": 1.0}, quality=quality)
    report = run(config, engine=LocalEngine(), make_pipeline=Making())
    rows = metadata(config)
    failed = [row for row in rows if row["error_type"] == "BelowQuality"]
    assert failed
    assert report.failures == {"BelowQuality": len(failed), "RuntimeError": 1}
    assert all(row["tries"] == 2 and not row["accepted"] and row["file_name"] is None for row in failed)
    assert f"in 2 tries; quality.at_least is 0.5 of {SCORE}" in failed[0]["error_message"]
    assert (rows[-1]["tries"], rows[-1]["score"], rows[-1]["accepted"]) == (1, None, False)


@pytest.mark.slow
@pytest.mark.parametrize(("keep", "step"), [("first", 2), ("best", 5)])
def test_a_run_that_is_killed_at_any_write_keeps_the_same_tries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: str, step: int
) -> None:
    sections = {"quality": {**QUALITY, "keep": keep, "max_tries": 3}}
    whole = one_shard_job(tmp_path / "whole", **sections)
    open_worker(whole, monkeypatch)[0].make(*_first(whole, monkeypatch)).finish()
    undisturbed = data_files(Path(whole.output.uri))
    lost = []
    for last in range(0, 100, step):
        config = one_shard_job(tmp_path / f"at{last}", **sections)
        life = Life(last)
        worker, pipeline, plan = open_worker(config, monkeypatch, life)
        with suppress(Death):
            worker.make(plan.shards[0], Attempt()).finish()
        if not life.is_over:
            break
        worker, second, plan = open_worker(config, monkeypatch)
        worker.make(plan.shards[0], Attempt(lost=last // step % 2)).finish()
        assert data_files(Path(config.output.uri)) == undisturbed, f"killed at write {last}"
        lost.append(len(pipeline.made) + len(second.made))
    assert len(lost) > 4
    assert max(lost) - min(lost) <= 4, "at most the batch in hand and the one on its way"


def _first(config: JobConfig, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Attempt]:
    return open_worker(config, monkeypatch)[2].shards[0], Attempt()


def test_a_second_worker_on_the_shard_keeps_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, config = (one_shard_job(tmp_path / name, quality=QUALITY) for name in ("whole", "both"))
    open_worker(whole, monkeypatch)[0].make(*_first(whole, monkeypatch)).finish()
    worker, _, plan = open_worker(config, monkeypatch)
    other, _, _ = open_worker(config, monkeypatch)
    made = worker.make(plan.shards[0], Attempt())
    other.make(plan.shards[0], Attempt(reverse_order=True)).finish()
    made.finish()
    assert data_files(Path(config.output.uri)) == data_files(Path(whole.output.uri))


def test_failed_rows_are_tried_again_beside_the_images_that_are_kept(tmp_path: Path) -> None:
    rows = [*_rows(7), {"prompt": "image 7 [raise]"}]
    config = make_job(tmp_path, rows, output={"shard_size": 8}, failures={"max_ratio": 1.0}, quality=QUALITY)
    run(config, engine=LocalEngine(), make_pipeline=Making())
    before = metadata(config)

    making = Making()
    run(config, engine=LocalEngine(), make_pipeline=making, retry_failed=True)

    assert metadata(config) == before
    kept = {row["prompt"] for row in before if row["tries"] == 1 and row["accepted"]}
    assert kept
    assert not kept & set(making.prompts)


def test_plan_counts_the_tries(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = write_job(make_job(tmp_path, quality={**QUALITY, "accept_rate": 0.5, "max_tries": 3}), tmp_path / "job.yaml")
    assert main(["plan", str(job), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tries_per_image"] == 1.75
    assert main(["plan", str(job)]) == 0
    assert "1.75 tries an image, at most 3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("quality", "prompts", "sentence"),
    [
        ({"score": "no", "at_least": 1}, {}, "no: is not an annotator"),
        ({"score": "phash", "at_least": 1}, {}, "must be a column of numbers: it has none"),
        ({"score": "exposure.glare", "at_least": 1}, {}, "must be a column of numbers: mean_level, "),
        ({"score": "sharpness"}, {}, "quality.at_least: missing"),
        ({"score": "sharpness", "at_least": 1, "keep": "last"}, {}, "quality.keep"),
        ({"score": "no.such:score", "at_least": 1}, {}, "quality.score = no.such:score: cannot be imported"),
        (
            {"score": "clip", "at_least": 1, "options": {"modle": "x"}},
            {},
            r"quality.score = clip: got an unexpected .* 'modle'; its options are model, .* \(quality.options: ",
        ),
        ({"score": "sharpness", "at_least": 1, "tries": 2}, {}, "quality.tries: unknown key"),
        ({"score": "sharpness", "at_least": 1}, {"passthrough": ["score"]}, "adds the column 'score'"),
    ],
)
def test_a_wrong_quality_is_one_sentence(
    tmp_path: Path, quality: dict[str, Any], prompts: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(JobError, match=sentence):
        run(
            make_job(tmp_path, [{"prompt": "a", "score": 1}], quality=quality, prompts=prompts),
            engine=LocalEngine(),
            make_pipeline=Making(),
        )
    if "column" not in sentence:  # that of an annotator is known once it is open
        assert not (tmp_path / "out").exists()


def test_another_quality_is_another_run(tmp_path: Path) -> None:
    run(make_job(tmp_path, quality=QUALITY), engine=LocalEngine(), make_pipeline=Making())
    for other in ({"quality": {**QUALITY, "at_least": 0.6}}, {}):
        with pytest.raises(JobError, match=r"quality.at_least: 0.5 -> "):
            run(make_job(tmp_path, **other), engine=LocalEngine(), make_pipeline=Making())
    accept = make_job(tmp_path, quality={**QUALITY, "accept_rate": 0.5})
    assert run(accept, engine=LocalEngine(), make_pipeline=Making()).is_complete
