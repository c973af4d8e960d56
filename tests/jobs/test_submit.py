"""jobs/ on a real cluster: two nodes, its job server, and buckets as operators have them.

Needs no GPU: the demo model makes small images.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import fsspec
import pytest
import yaml

from flux_batch.engine.local import LocalEngine
from flux_batch.job import load_job, run
from flux_batch.report.progress.status import read_status
from flux_batch.report.verify import format_verdict, verify
from flux_batch.storage.store import Store
from helpers.airflow_stub import AirflowFailException, load_dag
from helpers.job_files import data_files, write_prompts
from helpers.job_server import ROOT, JobServer, job_server
from helpers.kuberay_submitter import SHELL, submitter_environment, submitting_line
from helpers.s3 import KEY, SECRET, Bucket, S3Server
from helpers.waiting import wait_until

pytestmark = [pytest.mark.ray, pytest.mark.nodes, pytest.mark.s3, pytest.mark.timeout(300)]

# So small that a run takes seconds, with so many steps that it can be met in the middle.
SETTINGS = {
    "model.uri": "demo",
    "sampling.width": "64",
    "sampling.height": "64",
    "sampling.num_inference_steps": "40",
    "sampling.t5_sequence_length": "32",
    "output.shard_size": "2",
    "workers.num_cpus": "0",
    "workers.batch_size": "2",
    "failures.drain_s": "20",
}
ENDED = ("STOPPED", "SUCCEEDED", "FAILED")
KEYS = ("train/{}.tar", "metadata/{}.parquet", "_run/commits/{}.json")


@pytest.fixture(scope="module")
def cluster() -> Iterator[JobServer]:
    with job_server({"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "OMP_NUM_THREADS": "1"}) as server:
        yield server


class Submission:
    """A run of jobs/s3.yaml from a bucket into it, on two workers, one a node, or on one."""

    def __init__(self, cluster: JobServer, bucket: Bucket, folder: Path, num_shards: int, num_workers: int = 2) -> None:
        self._cluster = cluster
        self._folder = folder
        self.num_shards = num_shards
        rows = [{"prompt": f"a large circle in the centre, number {at}"} for at in range(2 * num_shards)]
        self._prompts = write_prompts(folder / "prompts/prompts.parquet", rows)
        Store(bucket.uri, bucket.storage_options).write("prompts/prompts.parquet", self._prompts)
        self.store = Store(f"{bucket.uri}/runs/one", bucket.storage_options)
        settings = SETTINGS | {
            "workers.max": str(num_workers),
            "prompts.uri": f"{bucket.uri}/prompts/",
            "output.uri": self.store.uri,
            "prompts.storage_options.endpoint_url": bucket.storage_options["endpoint_url"],
            "output.storage_options.endpoint_url": bucket.storage_options["endpoint_url"],
        }
        self.arguments = ["jobs/s3.yaml", *(f"--set={key}={value}" for key, value in settings.items())]

    def begin(self) -> str:
        """Submit the job and wait for a commit. Returns: its submission id."""
        name = f"test-{uuid.uuid4().hex[:8]}"
        options = {"SUBMIT": f"--no-wait --submission-id {name}"}
        said = self._cluster.run("jobs/submit.sh", *self.arguments, environment=options)
        assert said.returncode == 0, said.stderr
        wait_until(lambda: len(self.store.list("_run/commits")) >= 1, lambda: self.log(name))
        return name

    def stop(self, name: str) -> None:
        """Stop the job in the middle, and see that it ended in order."""
        # As `ray job stop` does, which takes so long to begin that a run may be through by then.
        urlopen(Request(f"{self._cluster.url}/api/jobs/{name}/stop", method="POST")).close()
        wait_until(lambda: self.state(name) in ENDED, lambda: self.log(name))
        log = self.log(name)
        assert self.state(name) == "STOPPED", log
        assert "SIGTERM: finishing or putting aside the current shards" in log
        assert f"of {self.num_shards} shards are committed; run the same command again" in log
        status = read_status(self.store)
        assert 1 <= status["num_committed"] < self.num_shards
        assert not status["driver"]["is_at_work"]  # it had the time to give its lease back

    def finish(self) -> None:
        """Submit the job and wait for its end."""
        said = self._cluster.run("jobs/submit.sh", *self.arguments)
        assert said.returncode == 0, said.stdout + said.stderr

    def state(self, name: str) -> str:
        with urlopen(f"{self._cluster.url}/api/jobs/{name}") as answer:
            return str(json.load(answer)["status"])

    def log(self, name: str) -> str:
        return self._cluster.log_of(name)

    def versions(self) -> dict[str, tuple[Any, ...]]:
        """Return the version of every object of the committed shards."""
        shards = [Path(key).stem for key in self.store.list("_run/commits")]
        keys = [key.format(shard) for shard in shards for key in KEYS]
        found = [self.store._fs.info(self.store._path(key)) for key in keys]
        return {key: (info["ETag"], info["LastModified"]) for key, info in zip(keys, found, strict=True)}

    def assert_kept(self, before: dict[str, tuple[Any, ...]]) -> None:
        """Check that the run is complete, and that what was committed before was not written again."""
        after = self.versions()
        assert len(after) == len(KEYS) * self.num_shards > len(before)
        assert {key: after[key] for key in before} == before
        verdict = verify(self.store)
        assert (verdict.is_complete, verdict.exit_code) == (True, 0), format_verdict(verdict)

    def assert_as_undisturbed(self) -> None:
        """Hold the data against that of a run on this machine that nothing disturbed."""
        settings = [f"{key}={value}" for key, value in SETTINGS.items()]
        places = [f"prompts.uri={self._prompts.parent}", f"output.uri={self._folder / 'alone'}"]
        run(load_job(ROOT / "jobs/s3.yaml", [*settings, *places]), engine=LocalEngine())
        keys = [key for part in ("train", "metadata") for key in self.store.list(part)]
        assert {key: self.store.read(key) for key in keys} == data_files(self._folder / "alone")


def test_what_was_stopped_goes_on_by_the_hand_of_airflow(
    cluster: JobServer, moto: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = Bucket(moto.make_bucket(), moto.storage_options, moto.name)
    submission = Submission(cluster, bucket, tmp_path, num_shards=8, num_workers=1)
    submission.stop(submission.begin())
    before = submission.versions()
    fs = submission.store._fs
    monkeypatch.setattr(fsspec, "open", lambda uri: fs.open(uri))  # as if the environment named the store
    dag, _ = load_dag(monkeypatch)

    report = dag.render_day(
        "2026-11-23",
        cluster.url,
        ["python", "jobs/generate.py", *submission.arguments, "--logical-date"],
        submission.store.uri,
        {**dag.RUNTIME_ENV, "working_dir": str(ROOT)},
        poll_s=0.5,
    )

    assert (report["is_complete"], report["num_images"]) == (True, 16)
    assert report["num_new_images"] < 16
    submission.assert_kept(before)


def test_a_job_file_that_is_wrong_is_not_tried_again(cluster: JobServer, monkeypatch: pytest.MonkeyPatch) -> None:
    dag, _ = load_dag(monkeypatch)
    command = ["python", "jobs/generate.py", "jobs/s3.yaml", "--set=sampling.width=17", "--logical-date"]
    with pytest.raises(AirflowFailException, match="the job file or its prompts are wrong"):
        dag.render_day("2026-11-23", cluster.url, command, runtime_env={"working_dir": str(ROOT)}, poll_s=0.5)


def test_kuberay_sees_no_failure_where_only_rows_failed(cluster: JobServer, tmp_path: Path) -> None:
    """Its operator starts a new cluster for a job that FAILED, and for no other."""
    job = yaml.safe_load((ROOT / "cluster/kuberay/job/rayjob.yaml").read_text())["spec"]
    write_prompts(tmp_path / "prompts.parquet", [{"prompt": ""}, {"prompt": ""}])
    file = tmp_path / "cats.yaml"
    file.write_text(
        f"prompts: {{uri: {tmp_path}/prompts.parquet}}\noutput: {{uri: {tmp_path}/out}}\nmodel: {{uri: demo}}\n"
    )
    job["entrypoint"] = job["entrypoint"].replace("/app/", f"{ROOT}/").replace("s3://bucket/jobs/cats.yaml", str(file))
    pod = submitter_environment(job, cluster.url, "cats-1", "flux-batch")

    said = cluster.run(*SHELL, submitting_line(job, cluster.url, "cats-1"), environment=pod)

    assert said.returncode == 0, said.stdout + said.stderr  # the submitting Job of Kubernetes is done
    assert "rayjob.py: exit code 3: more rows failed than failures.max_ratio allows" in said.stdout
    assert '"levelname": "' in said.stdout  # a log of JSON: the driver has the environment of the manifest
    with urlopen(f"{cluster.url}/api/jobs/cats-1") as answer:  # as the operator asks
        assert json.load(answer)["status"] == "STOPPED"
    assert json.loads((tmp_path / "out/_run/report.json").read_text())["num_failed"] == 2


@pytest.mark.long
def test_a_job_that_is_stopped_goes_on_with_nothing_made_again(
    cluster: JobServer, s3_store: Bucket, tmp_path: Path
) -> None:
    submission = Submission(cluster, s3_store, tmp_path, 16)
    submission.stop(submission.begin())
    before = submission.versions()

    submission.finish()

    submission.assert_kept(before)
    submission.assert_as_undisturbed()
    complete = submission.versions()
    submission.finish()  # nothing is left to do, and nothing is done
    assert submission.versions() == complete


@pytest.mark.long
def test_the_loss_of_a_node_changes_nothing(cluster: JobServer, s3_store: Bucket, tmp_path: Path) -> None:
    submission = Submission(cluster, s3_store, tmp_path, 16)
    name = submission.begin()
    before = submission.versions()

    cluster.kill_node()
    wait_until(lambda: submission.store.exists("_SUCCESS"), lambda: submission.log(name), timeout_s=120)

    assert "a worker left with its node" in submission.log(name)
    submission.assert_kept(before)
    submission.assert_as_undisturbed()
    cluster.add_node()
