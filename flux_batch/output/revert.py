"""Reverting of commits, so that `run` makes their shards again. If it is killed, the next driver finishes it.

    1. staging      the good images of the shard are staged, so that they need not be made again
    2. _SUCCESS     and the report are removed: the run is no longer complete
    3. note         _run/taken-back/NNNNN says that the commit is being reverted
    4. commit       the log of commits is removed, then the commit: from here on no reader follows the shard's files
    5. files        metadata, failed rows and data are removed; 4 and 5 are repeated if there is a commit again
    6. note         is removed
    7. log          of commits is written again, without those of the reverted shards

After a kill in 1 to 3, the shard is still done; if the note exists, it will be made again. After a kill in 4 to 6, the
next driver finishes the revert before it makes anything: the remaining files would be taken for those of a worker that
came first. A worker whose driver has lost the run may commit the shard between 4 and 6; its commit would name files
that 5 removes, so 4 and 5 are repeated. Reverting needs the lease.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from flux_batch.config.schema import SOURCE_COLUMNS
from flux_batch.errors import NotFound
from flux_batch.output.annotations import AnnotationFolder, annotation_names
from flux_batch.output.commit_log import CommitLog
from flux_batch.output.commits import Commits
from flux_batch.output.formats import DECODE_ERRORS, OutputFormat, StoredSample, iter_samples
from flux_batch.output.metadata import source_fields, unpack_metadata
from flux_batch.output.paths import (
    COMMIT_LOG,
    REPORT,
    REVERTING,
    SUCCESS,
    RunFolder,
    commit_file,
    failed_file,
    metadata_file,
    number_in,
)
from flux_batch.output.staging import StagedImage, Staging, is_judged, staged_record
from flux_batch.storage.scratch import scratch_folder

log = logging.getLogger(__name__)

# The number of shards to revert at once, and of images of each in memory.
_SHARDS_AT_ONCE = 4
_IMAGES_AT_ONCE = 8


def revert(run: RunFolder, output_format: OutputFormat, shards: Sequence[int], *, is_repair: bool = False) -> None:
    """Revert the commits of some shards, and keep their good images in the staging area. Safe to call twice.

    A shard whose commit is damaged or missing is reverted too. is_repair: the other images were good once; they are to
    be made in the same batches as before, so that they get the same bytes.
    """
    if not shards:
        return
    commit_log, _ = CommitLog.saved(Commits(run))
    with ThreadPoolExecutor(_SHARDS_AT_ONCE) as pool:
        list(pool.map(lambda shard: _stage_good_images(run, output_format, shard, is_repair=is_repair), shards))
        for key in (SUCCESS, REPORT):
            run.store.delete(key)
        list(pool.map(lambda shard: remove_shard(run, output_format, shard), shards))
    commit_log.remove(shards)
    commit_log.write()


def finish_reverts(run: RunFolder, output_format: OutputFormat) -> None:
    """Finish the reverts that a killed process started."""
    for name in run.store.children(REVERTING):
        if (shard := number_in(name)) is not None:
            remove_shard(run, output_format, shard)


def remove_shard(run: RunFolder, output_format: OutputFormat, shard: int) -> None:
    """Remove the commit and the files of a shard: steps 3 to 6."""
    name = run.shard_name(shard)
    note, commit = f"{REVERTING}/{name}", commit_file(name)
    run.store.write(note, b"")
    for annotation in annotation_names(run):
        AnnotationFolder(run, annotation).revert(shard)
    _remove_files(run, output_format, name)
    while run.store.exists(commit):
        log.warning("shard %d was committed while its files were removed; it is made again", shard)
        _remove_files(run, output_format, name)
    run.store.delete(note)


def _remove_files(run: RunFolder, output_format: OutputFormat, name: str) -> None:
    """Remove the commit of a shard, the log of commits before it, then its files."""
    for key in (COMMIT_LOG, commit_file(name), metadata_file(name), failed_file(name)):
        run.store.delete(key)
    data = output_format.location(name)
    if run.store.exists(data):  # a file; else it is a folder
        run.store.delete(data)
    else:
        run.store.delete_folder(data)


def _stage_good_images(run: RunFolder, output_format: OutputFormat, shard: int, *, is_repair: bool) -> None:
    """Stage the good images of a shard. If it has no commit, an earlier revert has staged them already."""
    name = run.shard_name(shard)
    if not run.store.exists(commit_file(name)):
        return
    staging = Staging(run)
    staging.remove(shard)
    with scratch_folder() as scratch:
        images = _good_images(run, output_format, name, scratch)
        while some := list(islice(images, _IMAGES_AT_ONCE)):
            staging.put(shard, some, is_repair=is_repair)


def _good_images(run: RunFolder, output_format: OutputFormat, name: str, scratch: Path) -> Iterator[StagedImage]:
    """Yield the images whose bytes are the recorded ones, up to the first unreadable byte."""
    made = _made_rows(run, name)
    files: dict[str, Path] = {}
    for file in sorted({file for key in made for file in output_format.image_files(name, key)}):
        with suppress(NotFound):
            files[file] = run.store.local_file(file, scratch)
    try:
        for sample in iter_samples(output_format, name, files) if files else ():
            row = made.get(sample.key)
            if row and _is_recorded(sample, row, output_format.sources):
                score = {"score": row["score"]} if is_judged(row) else {}
                sources = tuple(sample.sources.values())
                yield StagedImage(sample.key, staged_record(row) | score, sample.image, sources)
    except DECODE_ERRORS:
        return


def _is_recorded(sample: StoredSample, row: Mapping[str, Any], sources: Sequence[str]) -> bool:
    """Return whether a stored image and its source images have the recorded bytes."""
    recorded = {name: row.get(name) for name in SOURCE_COLUMNS} if sources else {}
    is_same = row["sha256"] == hashlib.sha256(sample.image).hexdigest()
    return is_same and recorded == source_fields(sample.sources.values())


def _made_rows(run: RunFolder, name: str) -> Mapping[str, Mapping[str, Any]]:
    """Return the metadata rows of a shard's images by key; {} if they cannot be read."""
    try:
        data = run.store.read(metadata_file(name))
    except NotFound:
        return {}
    try:
        return {row["key"]: row for row in unpack_metadata(data) if row["status"] == "success"}
    except DECODE_ERRORS:
        return {}
