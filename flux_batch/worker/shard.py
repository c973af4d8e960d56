"""The state of one shard while it is being made: what is wanted, what is there, what is left to do.

Knows items, records and the staging area; does not know what computes images nor how a shard is committed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from flux_batch.config.schema import ImageConfig
from flux_batch.errors import DeviceFatal
from flux_batch.images import encode
from flux_batch.output.layouts import image_key, shard_name
from flux_batch.output.staging import StagedImage, Staging, staged_record
from flux_batch.prompts.input_images import laid_aside
from flux_batch.records import Attempt, FailedRow, ImageRecord, ImageRequest, Shard
from flux_batch.worker.batches import Item, batches
from flux_batch.worker.generate import Made
from flux_batch.worker.recorder import Recorder, message_of, provenance

# Objects of the staging area that are read at once; each holds the images of a batch.
READERS = 8
# An image is given up once that many workers were lost while each made nothing but it.
TRIES_ALONE = 2


@dataclass(frozen=True, slots=True)
class Batch:
    """Items to be made together; `label` names them in announcements, the same for every attempt at the shard."""

    label: str
    items: list[Item]


class ShardRun:
    """One attempt at a shard: `records` by (row, image index), `images` by key, the encoded files on this disk.

    After a worker was lost on the shard, this one is careful: it announces what it makes. A batch whose announcement
    was left behind is taken apart and made last, one image at a time; an image left behind twice is given up.
    """

    def __init__(
        self, shard: Shard, attempt: Attempt, recorder: Recorder, staging: Staging, image: ImageConfig, scratch: Path
    ) -> None:
        self.index = shard.index
        self.name = shard_name(shard.index, staging.num_shards)
        self.scratch = scratch
        self.records: dict[tuple[int, int], ImageRecord] = {}
        self.images: dict[str, Path] = {}
        self._attempt = attempt
        self._recorder = recorder
        self._staging = staging
        self._image = image
        self._items: dict[str, Item] = {}  # by key
        self._begun: set[tuple[int, int]] = set()  # what this attempt makes itself
        self._ours: set[str] = set()  # objects in the staging area
        self._seen: set[str] = set()
        self._tries: Counter[str] = Counter()

    @property
    def num_items(self) -> int:
        """Count the images wanted of the rows that can be used."""
        return len(self._items)

    @property
    def is_careful(self) -> bool:
        """Whether workers were lost on this shard, so that the next loss must tell more than the last."""
        return self._attempt.lost > 0 or bool(self._tries)

    def add(self, row: ImageRequest | FailedRow) -> None:
        """Take in a row; bytes of an image in it wait on the disk, as a shard of them may not fit into memory."""
        if isinstance(row, FailedRow):
            self.records[row.row, 0] = self._recorder.failed_row(self.name, row)
            return
        if row.input_image:
            row = replace(row, input_image=laid_aside(row.input_image, self.scratch))
        self._items |= {image_key(self.name, row.row, index): Item(row, index) for index in range(len(row.seeds))}

    def adopt_staged(self) -> None:
        """Take in what earlier attempts left, once all rows are known."""
        staged = self._staging.list(self.index)
        self._tries = staged.tries
        self._adopt(staged.objects)
        if not self._attempt.from_end:  # a try of the other worker that is at it now may be no loss
            self._give_up()

    def queue(self, size: int) -> list[Batch]:
        """Give what is left to make, in the order to make it.

        Batches are formed of all items, whatever is there already, so that an image has the neighbours it has in an
        undisturbed run; what may have killed a worker comes last, when everything else is safe.
        """
        whole: list[Batch] = []
        suspects: list[Batch] = []
        for number, items in enumerate(batches(self._items.values(), size)):
            left = [item for item in items if item.place not in self.records]
            alone = [Batch(self.key(item), [item]) for item in left]
            if self._tries[f"b{number}"] or any(self._tries[batch.label] for batch in alone):
                suspects += alone
            elif left:
                whole += [Batch(f"b{number}", left)] if len(left) > 1 else alone
        if self._attempt.from_end:
            whole.reverse()
        return whole + sorted(suspects, key=lambda batch: self._tries[batch.label])

    def begin(self, batch: Batch) -> list[Item]:
        """Set out to make a batch. Returns: its items, but for those that another attempt has staged meanwhile."""
        items = [item for item in batch.items if item.place not in self.records]
        self._begun |= {item.place for item in items}
        return items

    @contextmanager
    def announced(self, batch: Batch, worker: str) -> Iterator[None]:
        """Leave a mark that stays only if the process is lost on the way; none unless this attempt is careful."""
        if not self.is_careful:
            yield
            return
        mark = self._staging.announce(self.index, batch.label, worker)
        try:
            yield
        except DeviceFatal:
            raise  # the process leaves, as if it were lost
        except BaseException:
            self._staging.withdraw(mark)
            raise
        self._staging.withdraw(mark)

    def finish(self, made: Made) -> StagedImage:
        """Encode one image to this disk and record it; runs on an encoder thread."""
        tile_size = made.tiles.size if made.tiles else None
        fields = self._recorder.fields(self.name, made.item, tile_size, made.truncated or (None, None))
        if isinstance(made.outcome, Exception):
            error_type, error_message = type(made.outcome).__name__, message_of(made.outcome)
            self.records[made.item.place] = self._recorder.failed(fields, error_type, error_message)
            reason = {"error_type": error_type, "error_message": error_message}
            return StagedImage(fields["key"], staged_record(fields | reason), b"")
        data = encode(made.outcome, self._image, provenance(fields))
        self._keep(fields["key"], data)
        self.records[made.item.place] = self._recorder.made(self.name, fields, data)
        return StagedImage(fields["key"], staged_record(fields), data)

    def stage(self, images: Sequence[Future[StagedImage]]) -> None:
        """Wait for the images of a batch and stage them, the last one too: the next shard is begun by then."""
        name = self._staging.put(self.index, [image.result() for image in images])
        self._ours.add(name)
        self._seen.add(name)

    def look(self) -> bool:
        """Adopt what another attempt at the shard has staged meanwhile.

        Returns: whether all that this one staged is still there; it is removed after a commit.
        """
        ours = self._ours.copy()
        staged = self._staging.list(self.index)
        if any(item.place not in self._begun and item.place not in self.records for item in self._items.values()):
            self._adopt(staged.objects - self._seen)
        return ours <= staged.objects

    def clean(self) -> None:
        """Empty the staging folder, once the shard is committed; nothing to do if nothing was ever in it."""
        if self._seen or self.is_careful or self._attempt.from_end:
            self._staging.remove(self.index)

    def _adopt(self, names: Iterable[str]) -> None:
        with ThreadPoolExecutor(READERS, "adopt") as readers:
            list(readers.map(self._adopt_object, sorted(names)))

    def _adopt_object(self, name: str) -> None:
        self._seen.add(name)
        for image in self._staging.read(self.index, name):
            item = self._items.get(image.key)
            if item is not None and item.place not in self._begun and item.place not in self.records:
                self._adopt_image(item, image)

    def _adopt_image(self, item: Item, image: StagedImage) -> None:
        """Take an image in, unless it was made for another row or by other settings than those of now."""
        record = dict(image.record)
        error = record.pop("error_type", ""), record.pop("error_message", "")
        cut = record.get("clip_truncated"), record.get("t5_truncated")
        fields = self._recorder.fields(self.name, item, record.get("tile_size"), cut)
        if staged_record(fields) != record:
            return
        if image.data:
            self._keep(image.key, image.data)
            self.records[item.place] = self._recorder.made(self.name, fields, image.data)
        else:
            self.records[item.place] = self._recorder.failed(fields, *error)

    def _give_up(self) -> None:
        """Record as failed what may be tried no more."""
        for key, item in self._items.items():
            tries = self._tries[key]
            if tries >= TRIES_ALONE and item.place not in self.records:
                fields = self._recorder.fields(self.name, item, None, (None, None))
                last = f"; the last: {self._attempt.reason}" if self._attempt.reason else ""
                reason = f"{tries} workers were lost while they made this image alone{last}"
                self.records[item.place] = self._recorder.failed(fields, "WorkerLost", reason)

    def _keep(self, key: str, data: bytes) -> None:
        path = self.scratch / key
        path.write_bytes(data)
        self.images[key] = path

    def key(self, item: Item) -> str:
        """Name an image."""
        return image_key(self.name, item.request.row, item.image_index)
