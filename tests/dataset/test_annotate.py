"""Annotating finished images: the files it writes, how it resumes, and the effect of failures."""

from __future__ import annotations

import gc
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import flux_batch.dataset.annotate_shard
import flux_batch.dataset.annotate_worker
from flux_batch.cli import main
from flux_batch.config.schema import JobConfig
from flux_batch.dataset.annotate import AnnotateSettings, annotate
from flux_batch.dataset.annotate_worker import AnnotateWorker
from flux_batch.dataset.annotators.load import AnnotatorSpec
from flux_batch.engine.local import LocalEngine
from flux_batch.engine.stop import Stop
from flux_batch.errors import DamagedObject, Interrupted, JobError, PlanMismatch, StoreRefused
from flux_batch.job import run
from flux_batch.output.annotations import AnnotationFolder
from flux_batch.records import Attempt, Commit, Shard
from flux_batch.report.progress.snapshot import Snapshot
from helpers import annotators
from helpers.annotate_runs import BOTH, PROMPTS, after_calls, annotated, files, open_worker, rows, shard_of
from helpers.finished_runs import LAYOUTS, Making, command, finish, make_run
from helpers.job_files import data_files, make_job, write_prompts
from helpers.waiting import wait_until


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_image_is_read_once_and_has_a_row_by_its_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    config = make_run(tmp_path, layout)
    before = data_files(Path(config.output.uri))
    decoded = []
    decode = flux_batch.dataset.annotate_shard.decoded_image
    monkeypatch.setattr(
        "flux_batch.dataset.annotate_shard.decoded_image", lambda data: decoded.append(data) or decode(data)
    )

    report = annotated(config, *BOTH)

    made = [row for row in _metadata(config) if row["status"] == "success"]
    assert [row["key"] for row in rows(config, "prompts")] == [row["key"] for row in made]
    assert [row["length"] for row in rows(config, "prompts")] == [len(row["prompt"]) for row in made]
    assert all(len(row["phash"]) == 16 and row["error_type"] is None for row in rows(config, "phash"))
    assert len(decoded) == len(made) == 11
    assert data_files(Path(config.output.uri)) == before
    assert (report.exit_code, [one.num_images for one in report.annotations]) == (0, [11, 11])
    assert command(capsys, "gc", config.output.uri, "--dry-run") == (0, "nothing to remove\n")
    assert "all is well" in command(capsys, "verify", config.output.uri)[1]


def test_its_figures_are_live_and_those_of_the_run_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flux_batch.report.progress.progress.TICK_S", 0.001)
    config = make_job(tmp_path, [{"prompt": f"image {number}"} for number in range(8)], output={"shard_size": 8})
    finish(config)
    before = Path(config.output.uri, "_run/progress.json").read_bytes()
    shown: list[Snapshot] = []
    make = annotators.Prompts.__call__

    def when_shown(self: annotators.Prompts, images: Any, records: Any) -> Any:
        at = len(annotators.CALLS)
        wait_until(lambda: any(now.num_done == 2 * at for now in shown))
        return make(self, images, records)

    annotators.CALLS.clear()
    monkeypatch.setattr(annotators.Prompts, "__call__", when_shown)
    annotated(config, BOTH[0], show=shown.append)

    assert {2, 4, 6} <= {now.num_done for now in shown}
    assert {now.num_total for now in shown} == {8}
    assert Path(config.output.uri, "_run/progress.json").read_bytes() == before


def test_no_more_than_a_few_shards_and_commits_are_objects_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_shards = 20
    config = make_job(tmp_path, [{"prompt": "[sour]"} for _ in range(num_shards)], output={"shard_size": 1})
    finish(config)
    alive: dict[type, int] = {}

    def count(kind: type) -> None:
        if kind not in alive:  # looking at all objects is slow
            gc.collect()
            alive[kind] = sum(type(one) is kind for one in gc.get_objects())

    def begin(self: AnnotateWorker, shard: Shard, attempt: Attempt) -> Any:
        count(Shard)
        return make(self, shard, attempt)

    def read_failed(self: AnnotationFolder, shard: int) -> Any:
        count(Commit)
        return read(self, shard)

    make, read = AnnotateWorker.make, AnnotationFolder.read
    monkeypatch.setattr(AnnotateWorker, "make", begin)
    monkeypatch.setattr(AnnotationFolder, "read", read_failed)
    report = annotated(config, BOTH[0])

    assert report.num_new_shards == num_shards
    # The counts when the first shard is begun, and when all commits are counted.
    assert alive[Shard] < num_shards / 2
    assert alive[Commit] < num_shards / 2


def _metadata(config: JobConfig) -> list[dict[str, Any]]:
    paths = sorted(Path(config.output.uri, "metadata").glob("*.parquet"))
    return [row for path in paths for row in pq.read_table(path).to_pylist()]


def test_it_goes_on_with_new_shards_and_new_annotators_only(tmp_path: Path) -> None:
    config = make_job(tmp_path, prompts={"uri": str(tmp_path / "rows")})
    write_prompts(tmp_path / "rows/a.parquet", [{"prompt": f"image {number}"} for number in range(4)])
    finish(config)
    annotated(config, *BOTH)
    first = files(config)
    write_prompts(tmp_path / "rows/b.parquet", [{"prompt": f"more {number}"} for number in range(4)])
    assert run(config, engine=LocalEngine(), make_pipeline=Making(), extend=True).is_complete
    annotators.CALLS.clear()

    report = annotated(config, *BOTH, "sharpness")

    assert [key[:5] for call in annotators.CALLS for key in call] == ["00001"] * 4
    assert [one.num_committed for one in report.annotations] == [2, 2, 2]
    assert {name: files(config)[name] for name in first} == first
    assert annotated(config, *BOTH, "sharpness").num_new_shards == 0


@pytest.mark.parametrize("address", ["auto", "127.0.0.1:1", "nonsense"])
def test_nothing_is_removed_where_no_cluster_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    config = make_run(tmp_path, "files")
    annotated(config, f"prompts={PROMPTS}")
    before = files(config)

    def no_ray(**options: Any) -> None:
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setattr("ray.init", no_ray)
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises((Interrupted, JobError), match=f"RAY_ADDRESS = {address}"):
        annotated(config, f"prompts={PROMPTS}", engine=None, anew=True)
    assert files(config) == before


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "{}"])
def test_a_damaged_description_is_a_sentence_and_is_made_anew(tmp_path: Path, text: str) -> None:
    config = make_run(tmp_path, "webdataset")
    annotated(config, "phash")
    path = tmp_path / "out/_run/annotations/phash/annotator.json"
    path.write_text(text)
    with pytest.raises(DamagedObject, match=r"phash/annotator\.json: is damaged; .*--anew"):
        annotated(config, "phash")
    assert annotated(config, "phash", anew=True).num_new_shards == 3


def test_another_annotator_under_the_same_name_is_refused_with_what_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_run(tmp_path, "webdataset")
    annotated(config, BOTH[0], **{"prompts.scale": 2, "prompts.device": "cpu"})
    first = files(config)

    assert annotated(config, BOTH[0], **{"prompts.scale": 2, "prompts.device": "cuda"}).num_new_shards == 0
    with pytest.raises(PlanMismatch, match=r"options: \{'scale': 2\} -> \{'scale': 3\}"):
        annotated(config, BOTH[0], **{"prompts.scale": 3})
    with pytest.raises(PlanMismatch, match=r"annotator: 'helpers.annotators:Prompts' -> 'phash'"):
        annotated(config, "prompts=phash")
    monkeypatch.setattr(annotators.Prompts, "version", "2")
    with pytest.raises(PlanMismatch, match="version: '1' -> '2'"):
        open_worker(config, BOTH[0], **{"prompts.scale": 2})
    assert files(config) == first
    assert annotated(config, BOTH[0], anew=True).num_new_shards == 3
    assert files(config) != first


def test_an_option_that_a_finished_pass_did_not_have_is_refused(tmp_path: Path) -> None:
    config = make_run(tmp_path, "webdataset")
    annotated(config, *BOTH)

    assert annotated(config, BOTH[0], **{"prompts.device": "cuda"}).num_new_shards == 0
    with pytest.raises(PlanMismatch, match=r"options: \{\} -> \{'scale': 3\}"):
        annotated(config, BOTH[0], **{"prompts.scale": 3})
    with pytest.raises(JobError, match="'scala'; its options are none"):
        annotated(config, "phash", **{"phash.scala": 3})


def test_an_image_that_it_cannot_judge_is_a_null_with_a_reason(tmp_path: Path) -> None:
    prompts = ["a", "b [sour]", "c", "d", "e"]
    config = make_job(tmp_path, [{"prompt": prompt} for prompt in prompts], output={"shard_size": 9})
    finish(config)

    report = annotated(config, *BOTH, batch_size=4)

    assert [row["length"] for row in rows(config, "prompts")] == [1, None, 1, 1, 1]
    bad = rows(config, "prompts")[1]
    assert (bad["error_type"], bad["error_message"]) == ("RuntimeError", "cannot judge this")
    assert all(row["phash"] for row in rows(config, "phash"))
    assert [one.failures for one in report.annotations] == [{"RuntimeError": 1}, {}]
    assert f"RuntimeError, as {bad['key']}: cannot judge this" in str(report)
    annotators.CALLS.clear()
    assert annotated(config, *BOTH, batch_size=4, retry_failed=True).annotations[0].num_failed == 1
    assert annotators.CALLS[0] == [f"00000000{number}" for number in range(4)], "the neighbours of before"
    assert [row["length"] for row in rows(config, "prompts")] == [1, None, 1, 1, 1]


def test_an_image_that_its_file_lacks_is_a_null_with_a_reason(tmp_path: Path) -> None:
    config = make_job(tmp_path, [{"prompt": "a"}, {"prompt": "b"}])
    finish(config)
    path = Path(config.output.uri, "train/00000.tar")
    with tarfile.open(path) as tar:
        kept = [(member, tar.extractfile(member).read()) for member in tar if "000000001." not in member.name]  # type: ignore[union-attr]
    with tarfile.open(path, "w") as tar:
        for member, data in kept:
            tar.addfile(member, io.BytesIO(data))

    annotated(config, "phash")

    assert [row["error_type"] for row in rows(config, "phash")] == [None, "ImageDamaged"]


def test_too_many_images_without_values_end_with_3(tmp_path: Path) -> None:
    config = make_job(tmp_path, [{"prompt": "a"}, {"prompt": "b [sour]"}])
    finish(config)
    spec = [AnnotatorSpec.parse(BOTH[0])]
    report = annotate(config.output.uri, spec, engine=LocalEngine(), settings=AnnotateSettings())
    assert (report.exit_code, report.annotations[0].failed_ratio) == (3, 0.5)
    assert json.loads(report.to_json())["exit_code"] == 3


def test_a_stopped_pass_says_so_and_leaves_the_rest_to_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_run(tmp_path, "webdataset")
    stop = Stop()
    annotators.CALLS.clear()
    after_calls(monkeypatch, 1, lambda: stop.request("stopped by the test"))

    with pytest.raises(Interrupted, match="run the same command again"):
        annotated(config, BOTH[0], stop=stop)
    monkeypatch.undo()

    assert annotated(config, BOTH[0]).annotations[0].num_committed == 3


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--with", "phahs"], "did you mean 'phash'?"),
        (["--with", "phash", "--with", "phash"], "is there twice"),
        (["--with", "no.such:Thing"], "no.such:Thing: cannot be imported: No module named 'no"),
        (["--with", "helpers.annotators:NoColumns"], "an annotator must have `columns`"),
        (["--with", "helpers.annotators:broken"], "cannot be opened: OSError: no weights"),
        (["--with", PROMPTS, "--set", "scala=2"], "its options are scale, device"),
        (["--with", "phash", "--with", "facts", "--set", "x=2"], "must begin with the name of an annotator"),
        (["--with", "phash", "--failures", "max_ration=1"], ": --failures max_ration: unknown key; did you mean"),
        (["--with", "phash", "--failures", "max_ratio"], ": --failures max_ratio: must be KEY=VALUE"),
        (["--with", "phash", "--batch-size", "0"], "batch_size = 0: must be at least 1"),
        (["--with", "phash", "--num-gpus", "nan"], "num_gpus = nan: must be at least 0, and finite"),
    ],
)
def test_a_wrong_command_is_one_sentence(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    sentence: str,
) -> None:
    config = make_run(tmp_path, "webdataset")
    monkeypatch.setattr("flux_batch.dataset.annotate.annotate_pool", lambda *args: LocalEngine())
    code, out = command(capsys, "annotate", config.output.uri, *arguments)
    assert (code, "Traceback" in out) == (2, False)
    assert sentence in out


def test_the_command_prints_a_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_run(tmp_path, "webdataset")
    monkeypatch.setattr("flux_batch.dataset.annotate.annotate_pool", lambda *args: LocalEngine())
    words = ["annotate", config.output.uri, "--with", "exposure", "--with", "noise=sharpness"]
    assert main([*words, "--json"]) == 0
    assert [one["name"] for one in json.loads(capsys.readouterr().out)["annotations"]] == ["exposure", "noise"]
    assert main(words) == 0
    assert "noise     3 of 3 shards, 11 images, 0 without values" in capsys.readouterr().out
    assert "columns   exposure 3, noise 3 of 3 shards annotated" in command(capsys, "status", config.output.uri)[1]
    with pytest.raises(JobError, match="there is no run here"):
        annotate(str(tmp_path), [AnnotatorSpec.parse("phash")], engine=LocalEngine())


def test_a_shard_that_cannot_be_published_is_in_hand_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise StoreRefused("no permission")

    worker = open_worker(make_run(tmp_path, "webdataset"), "exposure")
    made = worker.make(shard_of(0))
    assert worker.metrics.figures().in_hand.keys() == {0}
    monkeypatch.setattr(worker, "publish", refuse)
    with pytest.raises(StoreRefused):
        made.finish()
    assert worker.metrics.figures().in_hand == {}


def test_what_made_annotations_is_written_down_without_signatures() -> None:
    spec = AnnotatorSpec.parse("mine:score", {"weights": "https://host/w.pt?X-Amz-Signature=secret", "level": 2})
    assert spec.identity == {"annotator": "mine:score", "options": {"weights": "https://host/w.pt", "level": 2}}


def test_annotations_that_were_written_down_with_a_signature_go_on(tmp_path: Path) -> None:
    config = make_run(tmp_path, "webdataset")
    options = {"prompts.device": "https://host/gpu?X-Amz-Signature=secret"}
    annotated(config, BOTH[0], **options)
    path = tmp_path / "out/_run/annotations/prompts/annotator.json"
    saved = json.loads(path.read_text())
    path.write_text(json.dumps({**saved, "options": {"device": options["prompts.device"]}}))
    assert annotated(config, BOTH[0], **options).num_new_shards == 0
