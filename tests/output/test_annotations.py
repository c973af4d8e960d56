"""Annotations that are reverted or removed, also with kills and failing storage."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from flux_batch.errors import StoreError
from flux_batch.output.annotations import (
    AnnotationFolder,
    annotation_schema,
    pack_annotations,
    staged_row,
    unpack_staged_row,
)
from flux_batch.output.metadata import pack_metadata
from flux_batch.output.paths import RunFolder, metadata_file
from flux_batch.records import Commit, ImageRecord, StoredFile
from flux_batch.storage.store import Store
from helpers.mortal import Death, Life, MortalStore

SCHEMA = annotation_schema(pa.schema([("score", pa.float64())]))
ROW = {"key": "000000000", "score": 0.5, "error_type": None, "error_message": None}


class AwayStore(Store):
    """A store that does not answer for the file `away`."""

    away = ""

    def read(self, key: str) -> bytes:
        if key == self.away:
            raise StoreError(f"{key}: 503 Service Unavailable")
        return super().read(key)


@pytest.fixture
def store(tmp_path: Path) -> AwayStore:
    """The output of a run of one image, with an annotation of it."""
    store = AwayStore(str(tmp_path))
    store.write(metadata_file("00000"), metadata_of("0" * 64))
    commit_row(store, ROW)
    return store


def metadata_of(sha256: str) -> bytes:
    """Return the metadata of an image with a sha256."""
    record = ImageRecord(
        key="000000000", id="0", image_index=0, prompt="p", model="m", status="success", sha256=sha256, bytes=1
    )
    return pack_metadata([record], pa.schema([]))


def commit_row(store: Store, row: dict[str, Any]) -> None:
    """Write the file of the annotation, and its commit."""
    folder, metadata = folder_of(store), metadata_file("00000")
    store.write(folder.file(0), pack_annotations([row], SCHEMA))
    hashes = {
        key: (len(data), hashlib.sha256(data).hexdigest())
        for key in (folder.file(0), metadata)
        for data in [store.read(key)]
    }
    files = tuple(StoredFile(path=key, bytes=size, sha256=sha256) for key, (size, sha256) in hashes.items())
    num_failed = int(row["error_type"] is not None)
    folder.commits.put(Commit(shard=0, worker="w", num_images=1, num_failed=num_failed, files=files))


def staged_scores(store: Store) -> list[Any]:
    """Return the staged scores of the image."""
    staging = folder_of(store).staging
    images = [image for name in staging.list(0).objects for image in staging.read(0, name)]
    return [(unpack_staged_row(image, SCHEMA) or {})["score"] for image in images]


def folder_of(store: Store) -> AnnotationFolder:
    return AnnotationFolder(RunFolder(store, 1), "clip")


def test_a_reverted_shard_keeps_its_rows_for_the_next_attempt(store: AwayStore) -> None:
    folder = folder_of(store)
    folder.revert(0)

    assert folder.commits.done() == set()
    assert staged_scores(store) == [0.5]


def test_rows_about_other_images_are_not_kept(store: AwayStore) -> None:
    store.write(metadata_file("00000"), metadata_of("1" * 64))
    folder_of(store).revert(0)

    assert staged_scores(store) == []


def test_rows_that_differ_from_those_that_were_committed_are_not_kept(store: AwayStore) -> None:
    folder = folder_of(store)
    store.write(folder.file(0), pack_annotations([ROW | {"score": 0.25}], SCHEMA))
    folder.revert(0)

    assert staged_scores(store) == []


def test_what_a_killed_pass_left_staged_is_not_kept_beside_the_good_rows(tmp_path: Path) -> None:
    store = AwayStore(str(tmp_path))
    store.write(metadata_file("00000"), metadata_of("0" * 64))
    failed = ROW | {"score": None, "error_type": "ValueError"}
    folder = folder_of(store)
    folder.staging.put(0, [staged_row(failed, SCHEMA, "0" * 64)])
    commit_row(store, failed)

    folder.revert(0, keep_failed=False)

    assert staged_scores(store) == []


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


def test_a_removal_that_is_killed_leaves_word_of_what_made_the_rest(store: AwayStore) -> None:
    folder = folder_of(store)
    folder.staging.put(0, [staged_row(ROW, SCHEMA, "0" * 64)])
    store.write(folder.identity, b"{}")
    for last in range(9):
        life = Life(last)
        mortal = type("ItsStore", (MortalStore,), {"life": life})(store.uri)
        with suppress(Death):
            folder_of(mortal).remove()
        if not life.is_over:
            break
        assert store.exists(folder.identity)
        assert not folder.commits.done() or store.exists(folder.file(0)), "a commit is gone before what it names"
    assert store.list("_run") == store.list("annotations") == []


def test_a_commit_that_comes_while_its_file_is_removed_does_not_stay(store: AwayStore) -> None:
    class LateStore(Store):
        """A store in which a worker commits its file right after that file is removed."""

        commit = b""

        def delete(self, key: str) -> None:
            super().delete(key)
            if key.endswith(".parquet") and self.commit:
                self.write("_run/annotations/clip/commits/00000.json", self.commit)
                self.commit = b""

    late = LateStore(store.uri)
    folder = AnnotationFolder(RunFolder(late, 2), "clip")
    late.commit = store.read(folder.commits.key(0))
    store.delete(folder.commits.key(0))

    folder.remove_uncommitted()

    assert folder.commits.done() == set()
    assert store.list("annotations") == []


def test_a_file_without_a_commit_is_removed(store: AwayStore) -> None:
    folder = AnnotationFolder(RunFolder(store, 2), "clip")
    store.write(folder.file(1), b"of a pass that was killed")
    folder.remove_uncommitted()

    assert store.list("annotations") == [folder.file(0)]
