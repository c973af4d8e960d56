"""The images of a shard in batches, and the rows of one annotator for them."""

from __future__ import annotations

import hashlib
import io
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
from PIL import Image

from flux_batch.dataset.annotators.load import OpenAnnotator
from flux_batch.errors import AlreadyExists, DeviceFatal, FluxBatchError, NotFound, one_line
from flux_batch.images import to_rgb
from flux_batch.output.annotations import (
    AnnotationFolder,
    ImageDamaged,
    annotation_schema,
    pack_annotations,
    staged_row,
    unpack_annotations,
    unpack_staged_row,
)
from flux_batch.output.formats import DECODE_ERRORS
from flux_batch.output.paths import metadata_file
from flux_batch.output.staging import StagedImage
from flux_batch.records import Attempt, Commit, StoredFile
from flux_batch.report.saved_run import SavedRun

# Seconds for which rows are collected before they are staged: fast annotators would otherwise wait for the storage.
STAGE_AFTER_S = 2.0
# A row fails after this number of workers were lost while they made only this row.
_MAX_LOSSES_ALONE = 2
_MAX_MESSAGE_LENGTH = 1000


@dataclass(frozen=True)
class ImageBatch:
    """Records of images, their bytes and, after decoding, the images or errors in their place."""

    number: int
    records: Sequence[Mapping[str, Any]]
    data: Sequence[bytes | None]
    images: Sequence[Image.Image | Exception] = ()

    def decoded(self, threads: Executor) -> ImageBatch:
        """Return the batch with its decoded images."""
        return replace(self, images=list(threads.map(decoded_image, self.data)))


def read_batches(
    run: SavedRun, shard: int, records: Sequence[Mapping[str, Any]], size: int, scratch: Path
) -> Iterator[ImageBatch]:
    """Yield the images of a committed shard in batches, in the order of their records.

    An image whose bytes are not the recorded ones is None.
    Raises: FluxBatchError if its files are damaged.
    """
    try:
        images = run.images(shard, scratch)
        hashes = {record["key"]: record["sha256"] for record in records}
        ahead: dict[str, bytes | None] = {}  # images out of order; empty unless a file was rewritten in another order
        for number, first in enumerate(range(0, len(records), size)):
            batch = records[first : first + size]
            missing = {record["key"] for record in batch} - set(ahead)
            for key, data in images if missing else ():
                ahead[key] = data if hashlib.sha256(data).hexdigest() == hashes.get(key) else None
                missing.discard(key)
                if not missing:
                    break
            yield ImageBatch(number, batch, [ahead.pop(record["key"], None) for record in batch])
    except (NotFound, *DECODE_ERRORS) as error:
        if isinstance(error, FluxBatchError) and not isinstance(error, NotFound):
            raise
        reason = one_line(error)
        raise FluxBatchError(
            f"{run.store.uri}: shard {shard} is damaged ({reason}); `flux-batch verify` says how"
        ) from error


@dataclass
class ShardAnnotation:
    """One attempt of one annotator at a shard. `rows`: by key, each with its values or the reason why it has none.

    After a worker was lost on the shard, each batch is marked as started, and staged before the next one. A batch whose
    mark was left behind is made last, one image at a time; an image whose mark was left behind twice fails.
    """

    folder: AnnotationFolder
    annotator: OpenAnnotator
    shard: int
    records: Sequence[Mapping[str, Any]]
    batch_size: int
    attempt: Attempt
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: float = 0.0
    _pending: list[StagedImage] = field(default_factory=list)
    _pending_since: float = 0.0
    _losses: Counter[str] = field(default_factory=Counter)  # by label: marks that lost workers left behind

    def __post_init__(self) -> None:
        self.name = self.folder.run.shard_name(self.shard)
        self._schema: pa.Schema = annotation_schema(self.annotator.checked.columns)
        self._hashes = {record["key"]: record["sha256"] for record in self.records}
        self._suspects: set[str] = set()

    @property
    def has_losses(self) -> bool:
        """True if a worker was lost while it made rows of this shard."""
        return bool(self._losses)

    def adopt_staged(self) -> None:
        """Adopt the rows that earlier attempts have staged."""
        staged = self.folder.staging.list(self.shard)
        self._losses = staged.tries
        for name in sorted(staged.objects):
            for one in self.folder.staging.read(self.shard, name):
                if one.key in self._hashes and one.record.get("sha256") == self._hashes[one.key]:
                    row = unpack_staged_row(one, self._schema)
                    if row is not None:
                        self.rows.setdefault(one.key, row)
        if not self.attempt.reverse_order:  # a mark may belong to the other worker, which works on this shard now
            for key in self._hashes:
                if self._losses[key] >= _MAX_LOSSES_ALONE and key not in self.rows:
                    self._add(key, _reason("WorkerLost", self._lost(self._losses[key])))
        for number, first in enumerate(range(0, len(self.records), self.batch_size)):
            keys = [record["key"] for record in self.records[first : first + self.batch_size]]
            if any(self._losses[label] for label in (f"b{number}", *keys)):
                self._suspects.update(keys)

    @property
    def has_suspects(self) -> bool:
        """True if a row that may have killed a worker is still missing."""
        return any(key not in self.rows for key in self._suspects)

    def wants(self, batch: ImageBatch, *, alone: bool) -> bool:
        """Return whether rows of a batch are missing: rows of suspects if `alone`, else all other rows."""
        keys = (record["key"] for record in batch.records)
        return any(key not in self.rows and (key in self._suspects) == alone for key in keys)

    def annotate(self, batch: ImageBatch, worker: str, *, alone: bool, is_isolated: bool) -> Counter[str]:
        """Make the rows of a batch. Returns: the number of rows without values, by reason. Raises: DeviceFatal."""
        staging = self.folder.staging
        label = batch.records[0]["key"] if alone else f"b{batch.number}"
        mark = staging.mark_started(self.shard, label, worker) if is_isolated else ""
        started = time.monotonic()
        try:
            outcomes = self._call(batch)
        except DeviceFatal:
            self.stage()
            raise  # this process ends, and its mark stays like that of a lost worker
        except BaseException:
            if mark:
                staging.unmark(mark)
            raise
        self.seconds += time.monotonic() - started
        failed: Counter[str] = Counter()
        for record, outcome in zip(batch.records, outcomes, strict=True):
            values = _failed(outcome) if isinstance(outcome, Exception) else outcome
            if record["key"] not in self.rows:
                self._add(record["key"], values)
                failed.update([values["error_type"]] if "error_type" in values else [])
        if is_isolated or time.monotonic() - self._pending_since >= STAGE_AFTER_S:
            self.stage()
        if mark:
            staging.unmark(mark)
        return failed

    def stage(self) -> None:
        """Stage the collected rows."""
        if self._pending:
            self.folder.staging.put(self.shard, self._pending)
            self._pending = []

    def publish(self, worker: str, images: Commit) -> Commit:
        """Write the file and the commit, then empty the staging folder. Returns: the stored commit."""
        rows = [self.rows[record["key"]] for record in self.records]
        path, store = self.folder.file(self.shard), self.folder.run.store
        data = pack_annotations(rows, self._schema)
        try:
            store.put_if_absent(path, data)
        except AlreadyExists:
            data = store.read(path)
            rows = unpack_annotations(data)
        failures = Counter(row["error_type"] for row in rows if row["error_type"])
        metadata = metadata_file(self.name)
        commit = self.folder.commits.put(
            Commit(
                shard=self.shard,
                worker=worker,
                num_images=len(rows),
                num_failed=failures.total(),
                files=(
                    StoredFile(path=path, bytes=len(data), sha256=hashlib.sha256(data).hexdigest()),
                    *(file for file in images.files if file.path == metadata),
                ),
                failures=dict(sorted(failures.items())),
                device_s=round(self.seconds, 3),
            )
        )
        self.folder.staging.remove(self.shard)
        return commit

    def _call(self, batch: ImageBatch) -> list[dict[str, Any] | Exception]:
        """Return values or an error for each image; the annotator never gets images that cannot be decoded."""
        good = [number for number, image in enumerate(batch.images) if not isinstance(image, Exception)]
        images: list[Any] = [batch.images[number] for number in good]
        rows = self.annotator.checked.rows(images, [batch.records[number] for number in good]) if good else []
        outcomes: list[Any] = list(batch.images)
        for number, row in zip(good, rows, strict=True):
            outcomes[number] = row
        return outcomes

    def _add(self, key: str, values: Mapping[str, Any]) -> None:
        row = {**dict.fromkeys(self._schema.names), "key": key, **values}
        if not self._pending:
            self._pending_since = time.monotonic()
        self.rows[key] = row
        self._pending.append(staged_row(row, self._schema, self._hashes[key]))

    def _lost(self, number: int) -> str:
        last = f"; the last: {self.attempt.reason}" if self.attempt.reason else ""
        return f"{number} workers were lost while they annotated this image alone{last}"


def decoded_image(data: bytes | None) -> Image.Image | Exception:
    """Return an image in RGB, or the error in its place."""
    if data is None:
        return ImageDamaged("the files of its shard do not hold it as recorded; `flux-batch verify` says why")
    try:
        with Image.open(io.BytesIO(data)) as image:
            return to_rgb(image)
    except Exception as error:  # Pillow raises anything on damaged data
        return error


def _failed(error: Exception) -> dict[str, Any]:
    return _reason(type(error).__name__, one_line(error)[:_MAX_MESSAGE_LENGTH])


def _reason(error_type: str, error_message: str) -> dict[str, Any]:
    return {"error_type": error_type, "error_message": error_message}
