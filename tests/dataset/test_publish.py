"""Publications: each file is on the Hub once, in spite of kills and errors, with a correct card."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flux_batch.dataset.export.export import export
from flux_batch.dataset.publish.hub import HubDataset
from flux_batch.dataset.publish.publish import Published, publish
from flux_batch.errors import JobError, StoreError, StoreRefused
from flux_batch.storage.retry import RetryPolicy
from flux_batch.storage.store import Store
from helpers.finished_runs import command, finish
from helpers.hub_datasets import DatasetHub, dataset_hub, publish_to
from helpers.job_files import make_job

# huggingface_hub uses an argument that its HTTP client has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
ADDRESS = "hf://datasets/owner/name"
NUM_IMAGES = 24


class Killed(BaseException):
    """The simulated end of the process in the middle of a request."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    config = make_job(tmp_path_factory.mktemp("run"), [{"prompt": f"image {number}"} for number in range(NUM_IMAGES)])
    finish(config)
    return Store(config.output.uri)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[DatasetHub]:
    with dataset_hub() as hub:
        publish_to(hub, monkeypatch)
        yield hub


def published(store: Store, **options: Any) -> Published:
    dataset = HubDataset(ADDRESS, RetryPolicy(attempts=8, first_wait_s=0.0))
    return publish(store, dataset, **{"licence": "cc-by-4.0", "shard_size": 2, **options})


def test_a_publication_is_the_export_with_a_card(store: Store, hub: DatasetHub, tmp_path: Path) -> None:
    done = published(store)
    assert (done.num_shards, done.num_new_shards, done.splits) == (12, 12, {"train": NUM_IMAGES})
    export(store, Store(str(tmp_path)), format="parquet", shard_size=2)
    shards = {f"train/{path.name}": path.read_bytes() for path in (tmp_path / "train").iterdir()}
    assert {name: data for name, data in hub.files.items() if name.startswith("train/")} == shards
    assert sorted(hub.files.keys() - shards.keys()) == ["README.md", "publication.json", "samples.jpg"]
    assert [len(commit) for commit in hub.commits] == [3, 1, 2, 4, 5]
    card = hub.files["README.md"].decode()
    assert 'load_dataset("owner/name", split="train")' in card
    assert "![samples.jpg](samples.jpg)" in card

    folder = tmp_path / "hub"
    for name, data in hub.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    datasets = pytest.importorskip("datasets")
    rows = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"), split="train")
    assert rows["prompt"] == [f"image {number}" for number in range(NUM_IMAGES)]

    num_commits = len(hub.commits)
    assert published(store).num_new_shards == 0
    assert (len(hub.commits), set(hub.uploads.values())) == (num_commits, {1})
    published(store, licence="cc0-1.0")
    assert hub.commits[num_commits:] == [["README.md"]]


def test_kills_and_refusals_cost_no_file_and_no_second_upload(store: Store, hub: DatasetHub) -> None:
    assert publish_through_kills(store, hub, num_shards=12) >= 3


@pytest.mark.long
def test_two_hundred_shards_arrive_once_each_through_a_kill_at_every_tenth_request(
    tmp_path: Path, hub: DatasetHub
) -> None:
    config = make_job(tmp_path, [{"prompt": f"image {number}"} for number in range(400)])
    finish(config)
    assert publish_through_kills(Store(config.output.uri), hub, num_shards=200) >= 50


def publish_through_kills(store: Store, hub: DatasetHub, num_shards: int) -> int:
    """Publish with a kill at every tenth request and errors at every seventh. Returns: the number of kills."""
    dice = random.Random(6)
    kills = 0

    def refuse_every_seventh(number: int) -> None:
        hub.failing = {number + 1: dice.choice([429, 412, 500])} if number % 7 == 0 else {}

    hub.on_request = refuse_every_seventh
    hub.lost = {1, 3, 4}
    from huggingface_hub.utils import _http

    client = _http.get_session()
    send, sent = client.send, 0

    def mortal(*arguments: Any, **options: Any) -> Any:
        nonlocal sent
        sent += 1
        if sent % 10 == 0:
            raise Killed
        return send(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client, "send", mortal)
        for _ in range(5 * num_shards):
            try:
                done = published(store, format="webdataset")
            except Killed:
                kills += 1
                continue
            break
        else:
            raise AssertionError(f"not done after {kills} kills: {hub.commits}")
    assert done.num_shards == num_shards
    committed = [name for commit in hub.commits for name in commit]
    assert sorted(committed) == sorted(hub.files)  # each file is in one commit
    assert sorted(name for name in hub.files if name.startswith("train/")) == [
        f"train/{number:05d}.tar" for number in range(num_shards)
    ]
    assert set(hub.uploads.values()) == {1}
    assert len(hub.uploads) == num_shards + 1  # the shards and the file of samples
    undisturbed = {**hub.files}
    hub.on_request, hub.failing, hub.lost = lambda number: None, {}, set()
    hub.files, hub.commits, hub.objects = {}, [], {}
    published(store, format="webdataset")
    assert hub.files == undisturbed
    return kills


def test_images_that_were_made_again_are_another_publication(tmp_path: Path, hub: DatasetHub) -> None:
    for seed in (0, 1):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        config = make_job(tmp_path, sampling={"seed": seed})
        finish(config)
        if seed == 0:
            published(Store(config.output.uri))
    files = {**hub.files}
    with pytest.raises(JobError, match="holds another export: the images are others, or were made again; take another"):
        published(Store(config.output.uri))
    assert hub.files == files


def test_another_data_set_is_left_alone(store: Store, hub: DatasetHub, capsys: pytest.CaptureFixture[str]) -> None:
    published(store)
    with pytest.raises(JobError, match="holds another export: shard_size is 2 there, 5 here"):
        published(store, shard_size=5)
    hub.files = {"train/mine.parquet": b"x", ".gitattributes": b""}
    with pytest.raises(JobError, match=r"has files of another data set, as train/mine.parquet"):
        published(store)
    assert hub.files.keys() == {"train/mine.parquet", ".gitattributes"}
    for arguments, sentence in (
        ([ADDRESS], "--license is missing: say under which licence"),
        (["hf://models/a/b", "--license", "other"], "must be hf://datasets/OWNER/NAME"),
        ([ADDRESS, "--license", "other", "--selection", "none"], "there is no selection 'none'"),
    ):
        code, said = command(capsys, "publish", store.uri, *arguments)
        assert (code, sentence in said, "Traceback" in said) == (2, True, False)


def test_a_token_that_may_not_write_is_a_sentence(store: Store, hub: DatasetHub) -> None:
    hub.token, number = "another", hub.requests
    with pytest.raises(StoreRefused, match="the Hub answered 401: log in by `hf auth login`"):
        published(store)
    assert hub.requests <= number + 3  # no upload: only requests whether the Hub answers and the data set exists


def test_the_command_says_what_it_did(store: Store, hub: DatasetHub, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["publish", store.uri, ADDRESS, "--license", "other", "--shard-size", "12", "--json"]
    code, said = command(capsys, *arguments)
    assert (code, json.loads(said)["num_new_shards"]) == (0, 2)


def test_without_a_token_nothing_is_read_or_asked(
    hub: DatasetHub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    code, said = command(capsys, "publish", str(tmp_path / "none"), ADDRESS, "--license", "other")
    assert (code, hub.requests) == (2, 0)
    assert f"{ADDRESS}: there is no token for the Hub: log in by `hf auth login`, or set HF_TOKEN" in said


def test_a_hub_is_waited_for_once_it_has_answered(hub: DatasetHub, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def silent(name: str, times: int) -> None:
        def call(*arguments: object, **options: object) -> list[str]:
            calls.append(name)
            if calls.count(name) <= times:
                raise ConnectionError("refused")
            return []

        monkeypatch.setattr(f"huggingface_hub.HfApi.{name}", call)

    dataset = HubDataset(ADDRESS, RetryPolicy(600.0, first_wait_s=0.0))
    silent("create_repo", 8)
    silent("dataset_info", 9)
    with pytest.raises(StoreError, match="the Hub cannot be reached: refused"):
        dataset.create(private=False)
    assert calls == ["dataset_info"] * 3
    silent("dataset_info", 5)
    dataset.create(private=False)
    assert (calls.count("dataset_info"), calls.count("create_repo")) == (6, 9)
    silent("list_repo_tree", 8)
    assert dataset.files() == {}
    assert (calls.count("dataset_info"), calls.count("list_repo_tree")) == (6, 9)
