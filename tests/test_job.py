import json
import re
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from flux_batch import job
from flux_batch.config.schema import JobConfig, ModelConfig
from flux_batch.download.revision import model_revision
from flux_batch.engine.local import LocalEngine
from flux_batch.engine.stop import Stop
from flux_batch.errors import CheckpointError, Interrupted, JobError, PlanMismatch, SourceError, StoreRefused
from flux_batch.job import foresee, preview, run, with_absolute_paths
from flux_batch.report.gallery.write import write_gallery
from flux_batch.report.progress.status import format_status, read_status
from flux_batch.report.summary import RunReport
from flux_batch.report.verify import verify
from flux_batch.storage.store import Store
from helpers.fakes import SLOW_S, FakePipeline, make_fake_pipeline
from helpers.job_files import make_job, metadata, write_job, write_prompts
from helpers.waiting import wait_until


def render(config: JobConfig) -> RunReport:
    return run(config, engine=LocalEngine(), make_pipeline=make_fake_pipeline)


def no_pipeline(model: ModelConfig) -> FakePipeline:
    raise AssertionError("nothing was to be rendered")


@pytest.mark.parametrize("layout", ["webdataset", "files", "parquet"])
def test_a_run_makes_every_image_once_and_says_so(tmp_path: Path, layout: str) -> None:
    config = make_job(tmp_path, output={"format": layout})
    report = render(config)
    assert (report.num_images, report.num_failed, report.num_new_images, report.exit_code) == (10, 0, 10, 0)
    assert [row["prompt"] for row in metadata(config)] == [f"image {number}" for number in range(10)]
    assert [row["key"] for row in metadata(config)][3:6] == ["000000003", "000010000", "000010001"]
    assert json.loads((tmp_path / "out/_run/report.json").read_text())["num_images"] == 10
    assert (tmp_path / "out/_SUCCESS").exists()
    assert (tmp_path / "out/README.md").read_text().startswith("---\nconfigs:")
    assert not list((tmp_path / "out/_run/tmp").iterdir())


def test_the_report_tells_the_next_stage_what_the_run_came_to(tmp_path: Path) -> None:
    rows = [
        {"prompt": text, "width": width} for text, width in [("a [slow]", 16), (None, 16), ("b", 1000), ("[raise]", 16)]
    ]
    config = make_job(tmp_path, rows * 2, failures={"max_ratio": 1}, workers={"num_gpus": 0.5})
    stop = Stop()

    class Stopping(FakePipeline):
        def __call__(self, *args: Any, **others: Any) -> Any:
            stop.request("enough")  # stops after the current shard, which is one batch
            return super().__call__(*args, **others)

    with pytest.raises(Interrupted, match="1 of 2 shards are committed"):
        run(config, engine=LocalEngine(), make_pipeline=lambda model: Stopping(), stop=stop)
    page = render(config)._repr_html_()
    assert "<caption>flux-batch: exit code 0</caption><tr><th>images</th><td>8, 6 of them failed</td></tr>" in page
    assert "<tr><th>failed: RowError</th><td>2</td></tr>" in page
    report = json.loads((tmp_path / "out/_run/report.json").read_text())
    assert (report["num_images"], report["num_failed"], report["exit_code"], report["is_complete"]) == (8, 6, 0, True)
    assert report["failures"] == {"InvalidSetting": 2, "RowError": 2, "RuntimeError": 2}
    assert report["device_s"] >= SLOW_S
    assert report["device_s_of_run"] - report["device_s"] > 0.99 * SLOW_S  # both are rounded
    assert report["gpu_s_of_run"] == pytest.approx(report["device_s_of_run"] / 2, abs=1e-3)
    assert report["num_new_images"] == 4  # the others were made before
    assert 0 < report["images_per_s"] <= 4 / SLOW_S
    assert (report["model"]["uri"], report["model"]["dtype"]) == ("demo", "float32")
    assert report["model"]["revision"] == model_revision("demo")
    assert all(report["versions"][name] for name in ("python", "flux-batch", "torch", "ray"))


@pytest.mark.parametrize("limit", [{"workers": {"max_gpu_hours": 1e-9}}, {}])
def test_a_run_stops_in_order_when_it_has_had_its_hours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: dict[str, Any]
) -> None:
    monkeypatch.setattr("flux_batch.report.progress.progress.TICK_S", 0.01)
    config, stop = make_job(tmp_path, **limit), Stop()
    cost: dict[str, Any] = {} if limit else {"price": 1e9, "max_cost": 1}

    def load(model: ModelConfig) -> FakePipeline:
        wait_until(lambda: stop.is_requested)
        return FakePipeline()

    words = (
        r"^(workers\.max_gpu_hours = 1e-09|--max-cost 1) is reached.*; the same command with a higher limit continues$"
    )
    with pytest.raises(Interrupted, match=words) as stopped:
        run(config, engine=LocalEngine(), make_pipeline=load, stop=stop, **cost)
    assert stopped.value.exit_code == 75
    hours = json.loads((tmp_path / "out/_run/progress.json").read_text())["device_hours"]
    status = read_status(Store(str(tmp_path / "out")))
    assert "is reached; the same command with a higher limit continues" in status["stopped_by"]
    assert f"state    stopped: {status['stopped_by']}" in format_status(status)
    with pytest.raises(JobError, match=words) as again:  # otherwise a scheduler that retries 75 would retry for ever
        run(config, engine=LocalEngine(), make_pipeline=no_pipeline, **cost)  # nothing is begun again
    assert again.value.exit_code == 2
    hint = "workers.max_gpu_hours = 1e-09 is reached; the same command with a higher limit continues"
    assert foresee(config)[2] == ([hint] if limit else [])  # `plan` says it
    assert read_status(Store(str(tmp_path / "out")))["stopped_by"] == status["stopped_by"]
    more = config.model_copy(update={"workers": config.workers.model_copy(update={"max_gpu_hours": None})})
    report = render(more)
    assert (report.is_complete, report.device_hours >= hours) == (True, True)
    assert foresee(config)[2] == []  # nothing is left to do
    assert read_status(Store(str(tmp_path / "out")))["stopped_by"] == ""


def test_a_limit_that_is_reached_keeps_the_images_that_failed(tmp_path: Path) -> None:
    config = make_job(tmp_path, [{"prompt": "a cat"}, {"prompt": "[raise]"}], failures={"max_ratio": 1.0})
    render(config)
    with pytest.raises(JobError, match="--max-cost 1e-12 is reached: 1 of 1 shards are committed"):
        run(config, engine=LocalEngine(), make_pipeline=no_pipeline, retry_failed=True, price=1, max_cost=1e-12)
    assert render(config).num_failed == 1  # the run is still complete


def test_a_finished_run_is_left_alone(tmp_path: Path) -> None:
    config = make_job(tmp_path)
    render(config)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}
    report = run(config, engine=LocalEngine(), make_pipeline=no_pipeline)
    assert (report.num_images, report.num_new_images, report.exit_code) == (10, 0, 0)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()} == before


def test_what_samplers_drew_is_on_the_card_of_a_finished_run(tmp_path: Path) -> None:
    samplers = {"animal": {"choice": {"cat": 1, "a|b": 0}}, "lens": {"uniform": [24, 85]}}
    config = make_job(tmp_path, prompts={"samplers": samplers}, output={"shard_size": 30}, sampling={"height": 32})
    write_prompts(tmp_path / "prompts.parquet", [{"prompt": "x"}] * 25)
    render(config)
    text = (tmp_path / "out/README.md").read_text()
    assert "| animal | cat 100.0% |\n" in text
    low, high, mean = re.search(r"\| lens \| ([\d.]+) to ([\d.]+), mean ([\d.]+) \|", text).groups()  # type: ignore[union-attr]
    assert 24 <= float(low) < float(mean) < float(high) < 85


@pytest.mark.parametrize("layout", ["webdataset", "parquet"])
def test_times_that_python_cannot_hold_travel_through_a_whole_run(tmp_path: Path, layout: str) -> None:
    config = make_job(tmp_path, prompts={"passthrough": ["day", "moment"]}, output={"format": layout})
    days = pa.array([5_000_000, None], pa.int32()).view(pa.date32())
    columns = {"prompt": ["a", "b"], "day": days, "moment": pa.array([1, 2], pa.timestamp("ns"))}
    pq.write_table(pa.table(columns), tmp_path / "prompts.parquet")
    report = render(config)
    assert (report.num_images, report.num_failed, report.errors) == (2, 0, ())
    assert [row["day"] for row in metadata(config)] == ["15659-07-15", None]
    store = Store(config.output.uri)
    assert verify(store).problems == []
    assert write_gallery(store, 9).num_images == 2


def test_a_relative_output_in_a_folder_of_ray_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "session/runtime_resources/working_dir_files/_ray_pkg_1"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    tree = {"prompts": {"uri": "p.csv"}, "output": {"uri": "out/x"}, "model": {"uri": "demo"}}
    with pytest.raises(JobError, match=r"output\.uri = out/x: in a job of Ray a relative path"):
        with_absolute_paths(JobConfig.from_dict(tree))
    tree["output"]["uri"] = str(tmp_path / "out")
    assert with_absolute_paths(JobConfig.from_dict(tree)).prompts.uri == (str(folder / "p.csv"),)


def test_a_run_is_not_resumed_with_another_list_of_a_sampler(tmp_path: Path) -> None:
    words = tmp_path / "words.txt"
    words.write_text("red\nblue\n")
    config = make_job(tmp_path, prompts={"samplers": {"colour": {"file": str(words)}}})
    render(config)
    assert run(config, engine=LocalEngine(), make_pipeline=no_pipeline).num_new_images == 0

    words.write_text("red\ngreen\n")
    with pytest.raises(PlanMismatch, match=r"a list of values in a file, .* has changed"):
        run(config, engine=LocalEngine(), make_pipeline=no_pipeline)


@pytest.mark.parametrize("left", ["", "_SUCCESS"])
def test_a_driver_killed_at_its_last_writes_is_cleared_up_after(tmp_path: Path, left: str) -> None:
    """The driver is killed in the middle of a write, before or after the last object of the run."""
    config = make_job(tmp_path)
    render(config)
    half = tmp_path / "out/_run/tmp/half"
    half.write_bytes(b"...")
    (tmp_path / "out/_run/progress.json").unlink()
    if not left:
        (tmp_path / "out/_SUCCESS").unlink()
    assert run(config, engine=LocalEngine(), make_pipeline=no_pipeline).is_complete
    assert not half.exists()
    assert (tmp_path / "out/_SUCCESS").exists()
    assert (tmp_path / "out/_run/progress.json").exists() == (not left)


class TestOnThisMachine:
    """A run that starts its own cluster, on a machine without a GPU."""

    @pytest.fixture(autouse=True)
    def no_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        monkeypatch.setattr(job, "has_gpu", lambda: False)

    @pytest.mark.parametrize(("num_gpus", "is_said"), [(1, True), (0, False)])
    def test_runs_on_the_cpu_and_says_so_in_one_line(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
        num_gpus: int,
        is_said: bool,
    ) -> None:
        pools = []
        monkeypatch.setattr(job, "ray_pool", lambda config: pools.append(config.workers.num_gpus) or LocalEngine())
        config = make_job(tmp_path, workers={"num_gpus": num_gpus})
        run(config, make_pipeline=make_fake_pipeline)
        assert pools == [0]
        assert caplog.text.count("there is no GPU on this machine: the workers run on its CPU") == is_said
        assert f"num_gpus: {float(num_gpus)}" in (tmp_path / "out/_run/job.yaml").read_text()  # as requested
        assert json.loads((tmp_path / "out/_run/report.json").read_text())["gpu_s_of_run"] == 0

    def test_a_preview_runs_on_the_cpu_and_counts_no_gpu(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level("INFO")
        assert preview(make_job(tmp_path), 2, make_pipeline=make_fake_pipeline).num_images == 2
        assert "there is no GPU on this machine" in caplog.text
        assert "worker-seconds" in caplog.text
        assert "GPU-" not in caplog.text

    @pytest.mark.parametrize(
        ("model", "sentence"),
        [({"uri": "/models/absent"}, "no model folder"), ({"loras": [{"uri": "absent.safetensors"}]}, "absent")],
    )
    def test_a_missing_model_is_found_before_anything_is_started_or_written(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: dict[str, Any], sentence: str
    ) -> None:
        monkeypatch.setattr(job, "ray_pool", no_pipeline)
        with pytest.raises(CheckpointError, match=sentence):
            run(make_job(tmp_path, model=model))
        assert not (tmp_path / "out").exists()

    def test_another_cluster_may_have_what_this_machine_has_not(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pools = []
        monkeypatch.setattr("flux_batch.engine.ray_cluster.find_cluster", lambda max_workers, num_gpus: None)
        monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
        monkeypatch.setattr(job, "ray_pool", lambda config: pools.append(config.workers.num_gpus) or LocalEngine())
        with pytest.raises(CheckpointError, match="no model folder"):  # as the worker says
            run(make_job(tmp_path, model={"uri": "/models/absent"}))
        assert pools == [1]


@pytest.mark.parametrize(
    ("address", "error"),
    [("ray://127.0.0.1:1", JobError), ("nonsense", JobError), ("127.0.0.1:1", Interrupted), ("auto", Interrupted)],
)
def test_a_cluster_that_is_not_there_is_found_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str, error: type[Exception]
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(job, "ray_pool", no_pipeline)

    def no_ray(**options: Any) -> None:
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setattr("ray.init", no_ray)
    with pytest.raises(error, match=f"RAY_ADDRESS = {address}"):
        run(make_job(tmp_path))
    assert not (tmp_path / "out").exists()


def test_run_takes_the_path_of_a_job_file(tmp_path: Path) -> None:
    path = write_job(make_job(tmp_path), tmp_path / "job.yaml")
    assert run(path, engine=LocalEngine(), make_pipeline=make_fake_pipeline).is_complete


def test_a_job_made_in_python_is_taken_as_it_stands(tmp_path: Path) -> None:
    """Only a job file has placeholders for a date; in an address given in Python, braces are literal."""
    config = make_job(tmp_path, output={"uri": str(tmp_path / "out-{date}")})
    render(config)
    assert render(config).num_new_images == 0
    assert (tmp_path / "out-{date}/_SUCCESS").exists()


def test_relative_paths_mean_the_folder_of_the_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_job(tmp_path)
    monkeypatch.chdir(tmp_path)
    config = make_job(Path(), model={"uri": "demo"})
    assert config.output.uri == "out"
    assert render(config).output == str(tmp_path / "out")


def test_failed_rows_cost_only_themselves(tmp_path: Path) -> None:
    rows = [{"prompt": text, "width": width} for text, width in [("a", 16), (None, 16), ("b", 1000), ("[raise]", 16)]]
    config = make_job(tmp_path, rows, failures={"max_ratio": 0.5})
    report = render(config)
    assert (report.num_images, report.num_failed, report.exit_code) == (4, 3, 3)
    assert [row["status"] for row in metadata(config)] == ["success", "failed", "failed", "failed"]
    reasons = [row["error_message"] for row in metadata(config)]
    assert reasons[1] == "prompts.parquet:1: column 'prompt' is null: a prompt is needed"
    assert "width = 1000: must be a multiple of 16; the nearest are 992 and 1008" in reasons[2]
    assert "asked to fail" in reasons[3]
    assert (tmp_path / "out/_SUCCESS").exists()
    assert (tmp_path / "out/_run/failed/00000.parquet").exists()


def test_fewer_failures_than_allowed_are_a_success(tmp_path: Path) -> None:
    rows = [{"prompt": None}] + [{"prompt": "x"}] * 3
    assert render(make_job(tmp_path, rows, failures={"max_ratio": 0.25})).exit_code == 0


def test_a_damaged_prompts_file_costs_its_own_shards_and_is_named(tmp_path: Path) -> None:
    make_job(tmp_path)
    good = write_prompts(tmp_path / "set/a.parquet", [{"prompt": f"image {number}"} for number in range(4)])
    bad = write_prompts(tmp_path / "set/b.parquet", [{"prompt": f"image {number}" * 40} for number in range(4)])
    data = bad.read_bytes()
    bad.write_bytes(data[:20] + b"\xff" * 40 + data[60:])  # within the first page, so that the footer is still readable
    config = make_job(tmp_path, prompts={"uri": str(tmp_path / "set")})
    report = render(config)
    assert (report.num_committed, report.num_images, report.exit_code) == (1, 4, 1)
    assert f"shard 1: {bad}: not a readable Parquet file" in report.errors[0]
    assert not (tmp_path / "out/_SUCCESS").exists()
    assert [row["id"] for row in metadata(config)] == [f"{good.name}:{number}" for number in range(4)]


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [("sampling", "seed", 1), ("output", "shard_size", 5), ("output", "format", "files"), ("prompts", "limit", 9)],
)
def test_a_changed_job_is_refused_with_what_changed(tmp_path: Path, section: str, key: str, value: Any) -> None:
    render(make_job(tmp_path))
    with pytest.raises(PlanMismatch, match=rf"{section}\.{key}: .* -> {value!r}"):
        render(make_job(tmp_path, **{section: {key: value}}))


def test_a_job_may_be_changed_while_it_has_made_nothing(tmp_path: Path) -> None:
    def missing(model: ModelConfig) -> FakePipeline:
        raise CheckpointError("no such model")

    with pytest.raises(CheckpointError):
        run(make_job(tmp_path), engine=LocalEngine(), make_pipeline=missing)
    config = make_job(tmp_path, output={"shard_size": 5})
    assert render(config).num_shards == 2
    assert render(config).num_new_images == 0


def test_more_workers_and_larger_batches_are_the_same_job(tmp_path: Path) -> None:
    render(make_job(tmp_path))
    assert render(make_job(tmp_path, workers={"batch_size": 1, "max": 5})).num_new_images == 0


def test_changed_prompts_are_refused(tmp_path: Path) -> None:
    render(make_job(tmp_path))
    with pytest.raises(PlanMismatch, match=r"prompts\.parquet: was \d+ bytes"):
        render(make_job(tmp_path, [{"prompt": "another"}]))


def test_moved_prompts_are_the_same_prompts(tmp_path: Path) -> None:
    config = make_job(tmp_path)
    render(config)
    uri = str(write_prompts(tmp_path / "elsewhere/prompts.parquet", [{"prompt": f"image {n}"} for n in range(10)]))
    assert render(make_job(tmp_path, prompts={"uri": uri})).num_new_images == 0


def test_an_output_that_holds_something_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_job(tmp_path)
    (tmp_path / "out/train").mkdir(parents=True)
    (tmp_path / "out/train/holiday.jpg").write_bytes(b"mine")
    monkeypatch.setattr(Store, "list", None)  # an output may have ten million objects
    with pytest.raises(JobError, match=r"holds train/holiday\.jpg, but no run"):
        render(config)


def test_an_output_that_cannot_be_written_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreRefused, match="file/out"):
        run(
            make_job(tmp_path, output={"uri": str(tmp_path / "file/out")}),
            engine=LocalEngine(),
            make_pipeline=no_pipeline,
        )


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"prompts": {"uri": "/nowhere/prompts.parquet"}}, "/nowhere/prompts.parquet: no such prompts file"),
        ({"prompts": {"columns": {"prompt": "caption"}}}, "no column 'caption', which prompts.columns.prompt names"),
        ({"prompts": {"passthrough": ["colour"]}}, "no column 'colour', which prompts.passthrough names"),
        (
            {"sampling": {"input_image": "/nowhere/a.png"}},
            r"sampling\.input_image .*: there is no file /nowhere/a\.png",
        ),
    ],
)
def test_bad_input_is_found_before_any_work(tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    with pytest.raises((SourceError, JobError, OSError), match=sentence) as caught:
        run(make_job(tmp_path, **change), engine=LocalEngine(), make_pipeline=no_pipeline)
    assert caught.value.exit_code == 2  # type: ignore[attr-defined]


def test_paths_of_the_job_file_are_relative_to_the_folder_it_is_run_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (16, 16), (9, 9, 9)).save(tmp_path / "images/a.png")
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": "own", "input_image": str(tmp_path / "images/a.png")}, {"prompt": "of the job"}]
    sampling = {"input_image": "images/a.png", "denoising_strength": 0.5}
    config = make_job(tmp_path / "job", rows, sampling=sampling, prompts={"input_image_root": "images"})

    assert render(config).num_failed == 0
    assert {row["input_image"] for row in metadata(config)} == {str(tmp_path / "images/a.png")}


def test_an_empty_data_set_is_an_error(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    config = make_job(tmp_path)
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), tmp_path / "prompts.parquet")
    with pytest.raises(SourceError, match="no rows"):
        render(config)


def test_the_image_of_a_row_does_not_depend_on_how_the_run_is_cut(tmp_path: Path) -> None:
    images = set()
    for number, (shard_size, batch_size) in enumerate([(1, 1), (4, 3), (10, 10)]):
        folder = tmp_path / str(number)
        config = make_job(
            folder, output={"shard_size": shard_size, "format": "files"}, workers={"batch_size": batch_size}
        )
        render(config)
        files = [folder / "out" / row["file_name"] for row in metadata(config)]
        images.add(tuple(Image.open(file).tobytes() for file in files))
    assert len(images) == 1


def test_a_preview_that_comes_to_nothing_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(model: ModelConfig) -> FakePipeline:
        raise KeyboardInterrupt

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    with pytest.raises(KeyboardInterrupt):
        preview(make_job(tmp_path), 2, make_pipeline=interrupted)
    assert list((tmp_path / "temporary").glob("*preview*")) == []
    assert Path(preview(make_job(tmp_path), 2, make_pipeline=make_fake_pipeline).output).parent.name == "temporary"
