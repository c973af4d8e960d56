"""Every output format with all commands that read or remove its files; a new format needs only its name here."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path
from typing import get_args

import pytest
import yaml

from flux_batch.config.schema import JobConfig, OutputConfig
from flux_batch.engine.local import LocalEngine
from flux_batch.job import run
from flux_batch.output.gc import find_leftovers, remove_leftovers
from flux_batch.output.paths import METADATA, TRAIN
from flux_batch.output.revert import revert
from flux_batch.output.staging import Staging
from flux_batch.report.gallery.content import read_gallery
from flux_batch.report.saved_run import SavedRun
from flux_batch.report.verify import verify
from flux_batch.storage.store import Store
from helpers.fakes import make_fake_pipeline
from helpers.job_files import data_files, make_job

FORMATS = get_args(OutputConfig.model_fields["format"].annotation)


def render(folder: Path, name: str) -> JobConfig:
    rows = [{"prompt": f"image {number}" + (" [raise]" if number == 5 else "")} for number in range(8)]
    config = make_job(folder, rows, output={"format": name}, failures={"max_ratio": 1.0})
    run(config, engine=LocalEngine(), make_pipeline=make_fake_pipeline)
    return config


@pytest.mark.parametrize("name", FORMATS)
def test_whoever_reads_a_run_finds_the_files_of_its_format(tmp_path: Path, name: str) -> None:
    config = render(tmp_path, name)
    store = Store(config.output.uri)

    verdict = verify(store)
    assert (verdict.problems, verdict.num_images, verdict.num_failed) == ([], 7, 1)
    assert not verdict.leftovers
    gallery = read_gallery(store, 100)
    assert len(gallery.images) == gallery.num_images == 7
    assert all(image.thumbnail and not image.problem for image in gallery.images)
    card = yaml.safe_load(store.read("README.md").decode().split("---")[1])
    pattern = card["configs"][0]["data_files"][0]["path"]
    assert all(fnmatch(key, pattern) for key in store.list(TRAIN))


@pytest.mark.parametrize("name", FORMATS)
def test_a_reverted_shard_leaves_no_file_and_is_made_again_from_what_was_staged(tmp_path: Path, name: str) -> None:
    config = render(tmp_path, name)
    whole = data_files(Path(config.output.uri))
    saved = SavedRun.open(Store(config.output.uri))

    revert(saved.folder, saved.output_format, [1])

    assert saved.commits.done() == {0}
    assert not [key for key in saved.store.list(TRAIN) + saved.store.list(METADATA) if "/00001" in key]
    assert Staging(saved.folder).shards() == {1}
    assert {leftover.kind for leftover in find_leftovers(saved.folder)} == set()
    report = run(config, engine=LocalEngine(), make_pipeline=make_fake_pipeline)
    assert report.is_complete
    assert data_files(Path(config.output.uri)) == whole


@pytest.mark.parametrize("name", FORMATS)
def test_files_that_no_commit_names_are_found_and_removed(tmp_path: Path, name: str) -> None:
    config = render(tmp_path, name)
    whole = data_files(Path(config.output.uri))
    saved = SavedRun.open(Store(config.output.uri))
    saved.store.delete("_run/commits/00001.json")
    saved.store.write(f"{TRAIN}/notes.txt", b"of a person")
    saved.store.write("_run/commits/00001", b"{}")

    found = list(find_leftovers(saved.folder))

    uncommitted = {leftover.key for leftover in found if leftover.kind == "uncommitted"}
    assert uncommitted == {key for key in whole if "/00001" in key} | {"_run/failed/00001.parquet"}
    assert {leftover.key for leftover in found} - uncommitted == {f"{TRAIN}/notes.txt", "_run/commits/00001"}
    assert remove_leftovers(saved.folder, saved.output_format, found) == len(found)
    assert list(find_leftovers(saved.folder)) == []
    assert verify(saved.store).num_committed == 1
