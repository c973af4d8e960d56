"""The batches of images that are made together, and their input images, read ahead.

This module knows requests, but not how images are computed or where they go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field, replace
from typing import Any

from flux_batch.errors import RowError
from flux_batch.records import FailedRow, ImageRequest, RowImages, retry_seed
from flux_batch.redaction import plain_text

# Batches whose input images are read while one is computed: this hides slow servers and limits memory.
READ_AHEAD = 1

# A function that reads a row's images for an output of this size; None takes the size of the first reference image.
# It returns them by argument of the pipeline's call, or an error in their place.
ReadImages = Callable[[RowImages, tuple[int, int] | None], Mapping[str, Any] | Exception]


@dataclass(frozen=True, slots=True)
class ImageTask:
    """One image to make; `retry` is 0 for its first try.

    images: the decoded images that its row names, by argument of the pipeline's call; empty until they are read.
    error: the reason if one of them cannot be read.
    """

    request: ImageRequest
    image_index: int
    images: Mapping[str, Any] = field(default_factory=dict)
    error: Exception | None = None
    retry: int = 0

    @property
    def seed(self) -> int:
        """The seed of this try."""
        return retry_seed(self.request.seeds[self.image_index], self.retry)

    @property
    def shape(self) -> tuple[Any, ...]:
        """The settings that all images of one batch share."""
        params = self.request.sampling
        return *params.shared, params.uses_cfg, self.request.images.counts

    @property
    def position(self) -> tuple[int, int]:
        """The row in the shard and the index of the image in its row."""
        return self.request.row, self.image_index

    @property
    def size(self) -> tuple[int, int] | None:
        """Width and height in pixels; None until they are known from the reference image."""
        params = self.request.sampling
        return None if self.request.size_from_reference else (params.width, params.height)

    @property
    def sources(self) -> Sequence[Any]:
        """The images before an edit, once they are read: the reference images; without any, the input image."""
        references: Sequence[Any] = self.images.get("reference_image", ())
        return references or [self.images[name] for name in ("input_image",) if name in self.images]

    @property
    def read_shape(self) -> tuple[Any, ...]:
        """The settings that all images of one call share; known once the row's images are read."""
        return *self.shape, *(image.size for image in self.images.get("reference_image", ()))

    def sized(self, width: int, height: int) -> ImageTask:
        """Return the same task with the size that comes from a reference image."""
        sampling = replace(self.request.sampling, width=width, height=height)
        return replace(self, request=replace(self.request, sampling=sampling, size_from_reference=False))

    def guided(self, guidance: float) -> ImageTask:
        """Return the same task with the embedded guidance that comes from the model."""
        sampling = replace(self.request.sampling, embedded_guidance=guidance)
        return replace(self, request=replace(self.request, sampling=sampling, guidance_from_model=False))


def with_sources(row: ImageRequest | FailedRow, count: int) -> ImageRequest | FailedRow:
    """Return a row; a failed row if its number of source images is not that of the output."""
    if isinstance(row, FailedRow) or not count or len(row.images.sources) == count:
        return row
    reason = (
        f"{plain_text(row.id)}: has {len(row.images.sources)} source images, but output.sources = {count}: name that "
        "number in reference_image, or one in input_image"
    )
    return FailedRow(
        row=row.row,
        id=row.id,
        prompt=row.prompt,
        error_type="RowError",
        error_message=reason,
        passthrough=row.passthrough,
    )


def grouped(tasks: Iterable[ImageTask]) -> list[list[ImageTask]]:
    """Return the tasks of a batch in groups that can share a call."""
    groups: dict[tuple[Any, ...], list[ImageTask]] = {}
    for task in tasks:
        groups.setdefault(task.read_shape, []).append(task)
    return list(groups.values())


def tasks_of(request: ImageRequest) -> list[ImageTask]:
    """Return a task for each image that a row requests."""
    return [ImageTask(request, index) for index in range(len(request.seeds))]


def batches(tasks: Iterable[ImageTask], size: int) -> Iterator[list[ImageTask]]:
    """Yield groups of at most `size` images that can share a forward pass.

    They come in order of first appearance, and depend only on the tasks. Groups with the same LoRAs are consecutive,
    since switching LoRAs takes as long as loading a model.
    """
    groups: dict[tuple[Any, ...], dict[tuple[Any, ...], list[ImageTask]]] = {}
    for task in tasks:
        groups.setdefault(task.request.loras, {}).setdefault(task.shape, []).append(task)
    for group in (group for same_loras in groups.values() for group in same_loras.values()):
        for first in range(0, len(group), size):
            yield group[first : first + size]


class InputImages:
    """The input images of batches, read on threads; images shared by nearby batches are read once."""

    def __init__(self, readers: Executor, read: ReadImages) -> None:
        self._readers = readers
        self._read = read
        self._reading: _Reading = {}

    def join(self, batch: Sequence[ImageTask], following: Iterable[Sequence[ImageTask]] = ()) -> list[ImageTask]:
        """Return a batch with its input images; begin to read those of `following` batches.

        A task whose images cannot be read has a RowError as its `error`. Raises: any other error of `read`.
        """
        window = [task for near in (batch, *following) for task in near]
        wanted = dict.fromkeys((task.request.images, task.size) for task in window)
        self._reading = {
            (images, size): self._reading.get((images, size)) or self._readers.submit(self._read, images, size)
            for images, size in wanted
            if images.counts
        }
        return [_with_images(task, self._reading) for task in batch]


_Reading = dict[tuple[RowImages, tuple[int, int] | None], Future[Mapping[str, Any] | Exception]]


def _with_images(task: ImageTask, reading: _Reading) -> ImageTask:
    if not task.request.images.counts:
        return task
    try:
        found = reading[task.request.images, task.size].result()
    except RowError as error:
        found = error
    if isinstance(found, RowError):  # rows may share this error, so each one adds its id
        found = RowError(f"{plain_text(task.request.id)}: {found}")
    if isinstance(found, Exception):
        return replace(task, error=found)
    sized = task.sized(*found["reference_image"][0].size) if task.request.size_from_reference else task
    return replace(sized, images=found)
