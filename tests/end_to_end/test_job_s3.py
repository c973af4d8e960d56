"""Whole runs from bucket to bucket, on a store that honours conditional writes and on one that does not."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import fsspec
import pytest

from flux_batch.config.schema import JobConfig
from flux_batch.engine.local import LocalEngine
from flux_batch.engine.stop import Stop
from flux_batch.errors import Interrupted, JobError, NotFound, StoreError, StoreRefused
from flux_batch.job import load_job, run
from flux_batch.report.progress.status import read_status
from flux_batch.report.summary import RunReport
from flux_batch.storage import retry
from flux_batch.storage.store import Store
from helpers.counting_proxy import Proxy, counting_proxy
from helpers.fakes import FakePipeline, make_fake_pipeline
from helpers.job_files import make_job, metadata
from helpers.s3 import KEY, SECRET, Bucket, S3Server, free_port
from helpers.tiny_flux import make_tiny_repository
from helpers.web_server import web_server


def render(config: JobConfig) -> RunReport:
    return run(config, engine=LocalEngine(), make_pipeline=make_fake_pipeline)


def job_in(bucket: Bucket, folder: Path, **sections: Any) -> JobConfig:
    """Make a job with prompts and output in the bucket."""
    local = make_job(folder)
    fs, path = fsspec.url_to_fs(bucket.uri, **bucket.storage_options)
    fs.put_file(local.prompts.uri[0], f"{path}/prompts/prompts.parquet")
    place = {"storage_options": bucket.storage_options}
    output = {"uri": f"{bucket.uri}/runs/one", **place} | sections.pop("output", {})
    return make_job(folder, prompts={"uri": f"{bucket.uri}/prompts/", **place}, output=output, **sections)


@pytest.mark.s3
def test_the_model_comes_from_a_bucket_too(moto: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLUX_BATCH_CACHE", str(tmp_path / "cache"))
    uri = f"{moto.make_bucket()}/models/flux"
    fs, path = fsspec.url_to_fs(uri, **moto.storage_options)
    fs.put(f"{make_tiny_repository(tmp_path / 'model')}/", path, recursive=True)
    sampling = {"width": 32, "height": 32, "num_inference_steps": 1}
    options = {"model": {"uri": uri, "dtype": "float32", "storage_options": moto.storage_options}}
    config = make_job(tmp_path, [{"prompt": "a cat"}], sampling=sampling, **options)
    assert run(config, engine=LocalEngine()).exit_code == 0
    assert [(row["status"], row["model"]) for row in metadata(config)] == [("success", uri)]
    assert SECRET not in (tmp_path / "out/_run/job.yaml").read_text()


@pytest.mark.parametrize("layout", ["webdataset", "files", "parquet"])
def test_a_run_from_bucket_to_bucket(s3_store: Bucket, tmp_path: Path, layout: str) -> None:
    config = job_in(s3_store, tmp_path, output={"format": layout})
    assert render(config).exit_code == 0
    assert [row["id"] for row in metadata(config)] == [f"prompts.parquet:{number}" for number in range(10)]
    store = Store(config.output.uri, config.output.storage_options)
    if layout == "files":
        for row in metadata(config):
            assert hashlib.sha256(store.read(row["file_name"])).hexdigest() == row["sha256"]
    assert read_status(store)["is_complete"]
    assert store.list("_run/tmp") == []
    assert SECRET not in store.read("_run/job.yaml").decode()
    assert render(config).num_new_images == 0


def test_a_run_goes_on_where_commits_are_missing(s3_store: Bucket, tmp_path: Path) -> None:
    config = job_in(s3_store, tmp_path)
    render(config)
    store = Store(config.output.uri, config.output.storage_options)
    before = {key: store.read(key) for key in (*store.list("train"), *store.list("metadata"))}
    store.delete("_run/commits/00001.json")
    store.delete("metadata/00001.parquet")
    assert render(config).num_new_images == 4
    assert {key: store.read(key) for key in (*store.list("train"), *store.list("metadata"))} == before


def test_wrong_credentials_are_one_sentence_without_the_secret(s3_store: Bucket, tmp_path: Path) -> None:
    if s3_store.server == "moto":
        pytest.skip("moto lets every key in")
    config = job_in(s3_store, tmp_path)
    wrong = s3_store.storage_options | {"secret": "wrong-secret-77aa"}
    prompts = config.prompts.model_copy(update={"storage_options": wrong})
    with pytest.raises(StoreRefused, match="prompts") as caught:
        render(config.model_copy(update={"prompts": prompts}))
    assert caught.value.exit_code == 2
    assert "wrong-secret" not in str(caught.value)


def test_a_missing_bucket_is_one_sentence(s3_store: Bucket, tmp_path: Path) -> None:
    config = job_in(s3_store, tmp_path, output={"uri": "s3://nowhere-at-all/runs"})
    with pytest.raises(StoreRefused, match="s3://nowhere-at-all/runs") as caught:
        render(config)
    assert caught.value.exit_code == 2


class GoingPipeline(FakePipeline):
    """Calls `act` at its second batch."""

    def __init__(self, act: Callable[[], None]) -> None:
        super().__init__()
        self._act = act

    def __call__(self, prompt: Any, **others: Any) -> Any:
        if self.num_calls == 1:
            self._act()
        return super().__call__(prompt, **others)


def job_through(proxy: Proxy, server: S3Server, folder: Path, **failures: float) -> JobConfig:
    options = server.storage_options | {"endpoint_url": proxy.endpoint_url}
    output = {"uri": f"{server.make_bucket()}/run", "storage_options": options, "shard_size": 4}
    return make_job(folder, output=output, workers={"batch_size": 2}, failures=failures)


@pytest.mark.s3
@pytest.mark.parametrize("fault", ["cut", "hold"])
def test_a_stop_ends_a_run_whose_storage_is_gone_or_silent(moto: S3Server, tmp_path: Path, fault: str) -> None:
    """The run ends long before it would give up waiting for the storage."""
    stop = Stop()
    with counting_proxy(moto.endpoint_url) as proxy:

        def go() -> None:
            proxy.fault = lambda method, path: fault
            stop.request("stopped by SIGTERM")

        config = job_through(proxy, moto, tmp_path, drain_s=1, lease_ttl_s=1)
        with pytest.raises(Interrupted, match="stopped by SIGTERM"):
            run(config, engine=LocalEngine(), make_pipeline=lambda model: GoingPipeline(go), stop=stop)
        proxy.fault = lambda method, path: None
        assert read_status(Store(config.output.uri, moto.storage_options))["num_committed"] < 3
        assert render(config).exit_code == 0


@pytest.mark.s3
def test_a_storage_that_is_gone_for_good_ends_a_run_after_one_outage(moto: S3Server, tmp_path: Path) -> None:
    with counting_proxy(moto.endpoint_url) as proxy:

        def go() -> None:
            proxy.is_down = True

        config = job_through(proxy, moto, tmp_path, outage_s=3)
        with pytest.raises(Interrupted, match=r"storage has been unavailable for \d+ s") as caught:
            run(config, engine=LocalEngine(outage_s=3, backoff_s=0.5), make_pipeline=lambda model: GoingPipeline(go))
    assert caught.value.exit_code == 75


@pytest.mark.s3
def test_a_shard_costs_seven_requests_and_two_for_each_further_batch(
    moto: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Turn off heartbeats, whose number depends on the speed of the machine.
    monkeypatch.setattr("flux_batch.output.lease.pause_s", lambda ttl_s, beats: 600.0)
    with counting_proxy(moto.endpoint_url) as proxy:
        assert render(job_through(proxy, moto, tmp_path)).exit_code == 0
        asked = [(method, unquote(path)) for method, path, _ in proxy.requests]
    of_shard = re.compile(r"/(?:staging|train|metadata|commits|failed)/(\d{5})[./]")
    counts = Counter(found[1] for _, path in asked if (found := of_shard.search(path)))
    lease = [path for _, path in asked if "/_run/lease" in path]
    # The shards have two, two and one batches. One request removes staged objects, without their names in its address.
    assert counts == {"00000": 8, "00001": 8, "00002": 7}, asked
    assert sum(method == "POST" and "delete" in path for method, path in asked) == 2
    assert len(lease) == 6, lease


@pytest.mark.s3
def test_the_job_file_lies_in_a_bucket_too(moto: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = moto.make_bucket()
    Store(uri, moto.storage_options).write("jobs/cats.yaml", make_job(tmp_path).to_yaml().encode())
    with monkeypatch.context() as environment:
        environment.setenv("AWS_ACCESS_KEY_ID", KEY)
        environment.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        environment.setenv("AWS_ENDPOINT_URL", moto.endpoint_url)
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        assert load_job(f"{uri}/jobs/cats.yaml", ["name=cats"]) == make_job(tmp_path).model_copy(
            update={"name": "cats"}
        )
        with pytest.raises(NotFound, match=r"jobs/dogs\.yaml: not found") as caught:
            load_job(f"{uri}/jobs/dogs.yaml")
        assert caught.value.exit_code == 2
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def test_the_job_file_lies_on_a_web_server(tmp_path: Path) -> None:
    config = make_job(tmp_path)
    with web_server() as server:
        address = server.at("/jobs/cats.yaml?version=3", config.to_yaml().encode())
        assert load_job(address) == config
        with pytest.raises(JobError, match="is not a job file with the sections prompts, output and model"):
            load_job(server.at("/list.yaml", b"- 1"))
        with pytest.raises(JobError, match="not in UTF-8"):
            load_job(server.at("/latin.yaml", b"name: \xff"))


def test_a_web_server_that_is_away_is_no_fault_of_the_job_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "ATTEMPTS", 2)
    with pytest.raises(StoreError) as caught:
        load_job(f"http://127.0.0.1:{free_port()}/cats.yaml")
    assert caught.value.exit_code == 75
