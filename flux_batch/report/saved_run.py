"""A run read only from its output, without job file, prompts or secrets.

It is for code that reads the result of a run: verify, gallery, reproduce, compare.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flux_batch.config.schema import JobConfig
from flux_batch.errors import DamagedObject, JobError, NotFound, StoreError
from flux_batch.output.commits import Commits
from flux_batch.output.formats import DECODE_ERRORS, OutputFormat, format_for, iter_images
from flux_batch.output.lease import Lease
from flux_batch.output.metadata import columns_of_job, unpack_metadata, unpack_records
from flux_batch.output.paths import JOB, PLAN, TRAIN, RunFolder, is_within, metadata_file
from flux_batch.plan.plan import Outline
from flux_batch.storage.store import Store


@dataclass(frozen=True)
class SavedRun:
    """The job and the plan stored in an output; the secrets in `config` are redacted."""

    folder: RunFolder
    config: JobConfig
    outline: Outline

    @classmethod
    def open(cls, store: Store) -> SavedRun:
        """Read a run. Raises: JobError if there is no run, DamagedObject if its own files cannot be read."""
        try:
            plan, job = store.read(PLAN), store.read(JOB)
        except NotFound as error:
            raise JobError(f"{store.uri}: there is no run here (no {PLAN})") from error
        try:
            outline = Outline.from_parquet(plan)
            config = JobConfig.from_yaml(job.decode(), origin=store.url(JOB))
        except ValueError as error:  # includes JobError
            raise DamagedObject(f"{store.uri}: {PLAN} or {JOB} is damaged: {error}") from error
        outline = replace(outline, passthrough=columns_of_job(outline.passthrough, config))
        return cls(RunFolder(store, len(outline.num_rows)), config, outline)

    @property
    def store(self) -> Store:
        """The store of the output."""
        return self.folder.store

    @property
    def num_shards(self) -> int:
        """The number of shards in the plan."""
        return self.folder.num_shards

    @property
    def commits(self) -> Commits:
        """The commits of the run."""
        return Commits(self.folder)

    @property
    def output_format(self) -> OutputFormat:
        """The output format of its images."""
        return format_for(self.config.output, self.outline.passthrough)

    def name(self, shard: int) -> str:
        """Return the name of a shard in file names."""
        return self.folder.shard_name(shard)

    def metadata(self, shard: int) -> list[dict[str, Any]]:
        """Read the metadata rows of a committed shard, in order. Raises: NotFound."""
        return unpack_metadata(self.store.read(metadata_file(self.name(shard))))

    def records(self, shard: int) -> list[dict[str, Any]]:
        """Read the same rows in a form for writing them again: see `unpack_records`. Raises: NotFound."""
        return unpack_records(self.store.read(metadata_file(self.name(shard))))

    def images(self, shard: int, scratch: Path) -> Iterator[tuple[str, bytes]]:
        """Yield key and encoded bytes of each image of a committed shard, one by one.

        `scratch` is a folder for copies of files from a bucket. Raises: NotFound, and one of DECODE_ERRORS.
        """
        files = [file.path for file in self.commits.read(shard).files if file.path != metadata_file(self.name(shard))]
        local: Mapping[str, Path] = {path: self.store.local_file(path, scratch) for path in files}
        return iter_images(self.output_format, self.name(shard), local) if local else iter(())

    def image(self, row: Mapping[str, Any]) -> bytes | None:
        """Read the encoded bytes of an image by its metadata row; None if its file is missing or damaged.

        Little is read of other images. Raises: StoreError.
        """
        key, file_name = row["key"], str(row["file_name"])
        if not is_within(file_name, TRAIN):  # rows are not trusted
            return None
        try:
            data = dict(self.output_format.read_images(self.store, file_name, {key: row["bytes"]})).get(key, b"")
        except NotFound:
            return None
        except StoreError:
            raise
        except DECODE_ERRORS:
            return None
        return data if hashlib.sha256(data).hexdigest() == row["sha256"] else None


@contextmanager
def opened_run(store: Store, *, to_write: bool) -> Iterator[SavedRun]:
    """Open a run, and hold its lease inside the block if the block writes.

    Raises: JobError if there is no run; RunHeld if another driver has it.
    """
    run = SavedRun.open(store)
    if not to_write:
        yield run
        return
    with Lease(store) as lease:
        yield SavedRun.open(lease.store)  # the last holder may have extended the plan


def read_json(store: Store, key: str) -> dict[str, Any] | None:
    """Read a JSON object; None if it is missing or damaged. Raises: StoreError."""
    try:
        found = json.loads(store.read(key))
    except (NotFound, ValueError):
        return None
    return found if isinstance(found, dict) else None
