"""`verify` finds no problem in a run whose shards are reverted or made again at the same time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from flux_batch.output.annotations import AnnotationFolder
from flux_batch.output.revert import revert
from flux_batch.report.saved_run import SavedRun
from flux_batch.report.verify import verify
from flux_batch.storage.store import Store
from helpers.annotated import put_annotations
from helpers.finished_runs import LAYOUTS, finish, make_run

SCORE = pa.schema([("score", pa.int32())])


class Watched(Store):
    """A store in which an event happens right after the first read of an object."""

    after = ""
    happens: Callable[[], None]

    def read(self, key: str) -> bytes:
        data = super().read(key)
        if key == self.after:
            self.after = ""
            self.happens()
        return data


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("is_made_again", [False, True])
def test_a_shard_that_is_reverted_while_it_is_read_is_not_broken(
    tmp_path: Path, layout: str, is_made_again: bool
) -> None:
    config = make_run(tmp_path, layout)
    store = Watched(config.output.uri)
    saved = SavedRun.open(Store(store.uri))

    def happens() -> None:
        revert(saved.folder, saved.output_format, [1])
        if is_made_again:
            finish(config)

    store.after, store.happens = "_run/commits/00001.json", happens

    verdict = verify(store)

    assert verdict.problems == []
    assert verdict.num_committed == 2 + is_made_again


@pytest.mark.parametrize("after", ["_run/annotations/clip/commits/00001.json", "_run/commits/00001.json"])
def test_annotations_that_are_reverted_while_they_are_read_are_not_broken(tmp_path: Path, after: str) -> None:
    store = Watched(make_run(tmp_path, "webdataset").output.uri)
    put_annotations(store, "clip", SCORE, lambda row: {"score": 1})
    folder = AnnotationFolder(SavedRun.open(Store(store.uri)).folder, "clip")
    store.after, store.happens = after, lambda: folder.revert(1)

    assert verify(store).problems == []
