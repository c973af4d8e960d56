"""An export while a driver makes images or annotations again: it has one state, or fails."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from flux_batch.dataset.export.export import export
from flux_batch.dataset.export.source import ExportSource
from flux_batch.engine.local import LocalEngine
from flux_batch.errors import DamagedObject, JobError
from flux_batch.images import Pixels
from flux_batch.job import run
from flux_batch.output.annotations import AnnotationFolder
from flux_batch.output.paths import CARD, metadata_file
from flux_batch.output.revert import revert
from flux_batch.report.saved_run import SavedRun
from flux_batch.storage.store import Store
from helpers.annotated import put_annotations
from helpers.fakes import FakePipeline
from helpers.finished_runs import finish
from helpers.job_files import make_job

SCORE = pa.schema([("score", pa.int32())])


class Begun(Store):
    """A destination that calls `happens` once its card is written, before any image."""

    happens: Callable[[], None]

    def write(self, key: str, data: bytes | Path) -> None:
        super().write(key, data)
        if key == CARD:
            self.happens()


def annotate_again(store: Store) -> None:
    put_annotations(store, "clip", SCORE, lambda row: {"score": 2})


def remove_annotations(store: Store) -> None:
    AnnotationFolder(SavedRun.open(store).folder, "clip").remove()


def revert_shard(store: Store) -> None:
    saved = SavedRun.open(store)
    revert(saved.folder, saved.output_format, [1])


def make_again(store: Store) -> None:
    revert_shard(store)
    store.delete_folder("_run/staging")
    run(SavedRun.open(store).config, engine=LocalEngine(), make_pipeline=lambda model: Inverted())


def begin_another_run(store: Store) -> None:
    """Replace a shard by one with other keys, like a new run in an emptied folder."""
    saved = SavedRun.open(store)
    store.write(metadata_file(saved.name(1)), store.read(metadata_file(saved.name(0))))


class Inverted(FakePipeline):
    """Makes different images from the same rows."""

    def __call__(self, *texts: Any, **others: Any) -> list[Pixels]:
        return [255 - image for image in super().__call__(*texts, **others)]


HAPPENS = [annotate_again, remove_annotations, revert_shard, make_again, begin_another_run]


@pytest.mark.parametrize("happens", HAPPENS)
def test_what_changes_meanwhile_is_not_exported(tmp_path: Path, happens: Callable[[Store], None]) -> None:
    config = make_job(tmp_path, [{"prompt": f"image {number}"} for number in range(8)])
    finish(config)
    store, dest = Store(config.output.uri), Begun(str(tmp_path / "dest"))
    put_annotations(store, "clip", SCORE, lambda row: {"score": 1})
    dest.happens = lambda: happens(store)

    with pytest.raises(JobError, match=r"images of shard \d, or their annotations, were made again meanwhile; .*empty"):
        export(store, dest)

    assert not dest.exists("_SUCCESS")


def test_an_export_may_run_beside_a_run_and_has_what_was_there_when_it_began(tmp_path: Path) -> None:
    config = make_job(tmp_path, [{"prompt": f"image {number}"} for number in range(8)])
    finish(config)
    store, dest = Store(config.output.uri), Begun(str(tmp_path / "dest"))
    revert_shard(store)
    dest.happens = lambda: finish(config)

    exported = export(store, dest)

    assert dict(exported.splits) == {"train": 4}
    assert dest.exists("_SUCCESS")


def test_annotations_are_read_by_one_request_a_shard_and_must_be_those_of_their_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_job(tmp_path, [{"prompt": f"image {number}"} for number in range(8)])
    finish(config)
    store, key = Store(config.output.uri), "annotations/clip/00001.parquet"
    put_annotations(store, "clip", SCORE, lambda row: {"score": 1})
    other = store.read(key)
    put_annotations(store, "clip", SCORE, lambda row: {"score": 2})
    asked: list[str] = []
    read = Store.read
    monkeypatch.setattr(Store, "read", lambda self, key: asked.append(key) or read(self, key))
    source = ExportSource.open(store)
    pieces = source.pieces(1)
    assert source.annotation_digests.keys() == {"clip"}
    asked.clear()

    source.samples(pieces[4], tmp_path)

    assert sorted(asked) == [key, "metadata/00001.parquet"]
    store.write(key, other)
    with pytest.raises(DamagedObject, match=r"clip/00001.parquet: is not as it was committed"):
        source.samples(pieces[4], tmp_path)
