"""Annotations of a shard that are reverted: kept for the next attempt, or not touched while storage fails."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from flux_batch.errors import StoreError
from flux_batch.output.annotations import AnnotationFolder, annotation_schema, pack_annotations
from flux_batch.output.metadata import pack_metadata
from flux_batch.output.paths import RunFolder, metadata_file
from flux_batch.records import Commit, ImageRecord
from flux_batch.storage.store import Store

SCHEMA = annotation_schema(pa.schema([("score", pa.float64())]))
ROW = {"key": "000000000", "score": 0.5, "error_type": None, "error_message": None}


class AwayStore(Store):
    """A store that does not answer for a file."""

    away = ""

    def read(self, key: str) -> bytes:
        if key == self.away:
            raise StoreError(f"{key}: 503 Service Unavailable")
        return super().read(key)


@pytest.fixture
def store(tmp_path: Path) -> AwayStore:
    """The output of a run of one image, with an annotation of it."""
    store = AwayStore(str(tmp_path))
    record = ImageRecord(
        key="000000000", id="0", image_index=0, prompt="p", model="m", status="success", sha256="0" * 64, bytes=1
    )
    store.write(metadata_file("00000"), pack_metadata([record], pa.schema([])))
    folder = folder_of(store)
    store.write(folder.file(0), pack_annotations([ROW], SCHEMA))
    folder.commits.put(Commit(shard=0, worker="w", num_images=1, num_failed=0, files=()))
    return store


def folder_of(store: Store) -> AnnotationFolder:
    return AnnotationFolder(RunFolder(store, 1), "clip")


def test_a_reverted_shard_keeps_its_rows_for_the_next_attempt(store: AwayStore) -> None:
    folder = folder_of(store)
    folder.revert(0)

    assert folder.commits.done() == set()
    (name,) = folder.staging.list(0).objects
    assert [image.key for image in folder.staging.read(0, name)] == ["000000000"]


def test_a_damaged_shard_is_reverted_whole(store: AwayStore) -> None:
    folder = folder_of(store)
    store.write(folder.file(0), b"damaged")
    folder.revert(0)

    assert folder.commits.done() == set()
    assert not folder.staging.list(0).objects


@pytest.mark.parametrize("which", ["annotations", "metadata"])
def test_nothing_is_reverted_while_storage_does_not_answer(store: AwayStore, which: str) -> None:
    folder = folder_of(store)
    store.away = folder.file(0) if which == "annotations" else metadata_file("00000")
    with pytest.raises(StoreError, match="503"):
        folder.revert(0)

    store.away = ""
    assert folder.commits.done() == {0}
    assert folder.read(0).to_pylist() == [ROW]
