"""The images that are made together, and their input images, read ahead of the device.

Knows requests; does not know what computes images nor where they go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, replace
from typing import Any

from flux_batch.errors import RowError
from flux_batch.records import ImageRequest, InputImage, retry_seed

# Batches whose input images are read while one is on the device: enough to hide a slow server, and a bound on memory.
READ_AHEAD = 1

ReadImage = Callable[[InputImage, tuple[int, int]], Any]


@dataclass(frozen=True, slots=True)
class ImageTask:
    """One image to make; `retry` is 0 for its first try.

    input_image: the decoded image that it starts from, the error if that cannot be read, None if it starts from noise
    or is not read yet.
    """

    request: ImageRequest
    image_index: int
    input_image: Any = None
    retry: int = 0

    @property
    def seed(self) -> int:
        """The seed of this try."""
        return retry_seed(self.request.seeds[self.image_index], self.retry)

    @property
    def shape(self) -> tuple[Any, ...]:
        """The settings that all images of one batch share."""
        params = self.request.sampling
        return *params.shared, params.uses_cfg, self.request.input_image is None

    @property
    def position(self) -> tuple[int, int]:
        """The row in the shard and the index of the image in its row."""
        return self.request.row, self.image_index

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.request.sampling.width, self.request.sampling.height


def tasks_of(request: ImageRequest) -> list[ImageTask]:
    """Return a task for each image that a row asks for."""
    return [ImageTask(request, index) for index in range(len(request.seeds))]


def batches(tasks: Iterable[ImageTask], size: int) -> Iterator[list[ImageTask]]:
    """Yield groups of at most `size` images that can share a forward pass.

    They come in order of first appearance and are a function of the tasks alone. Groups with the same LoRAs follow
    each other, since exchanging LoRAs takes as long as loading a model.
    """
    groups: dict[tuple[Any, ...], dict[tuple[Any, ...], list[ImageTask]]] = {}
    for task in tasks:
        groups.setdefault(task.request.loras, {}).setdefault(task.shape, []).append(task)
    for group in (group for same_loras in groups.values() for group in same_loras.values()):
        for first in range(0, len(group), size):
            yield group[first : first + size]


class InputImages:
    """Input images of batches, read on threads; one that batches near each other share is read once."""

    def __init__(self, readers: Executor, read: ReadImage) -> None:
        self._readers = readers
        self._read = read
        self._reading: dict[tuple[InputImage, tuple[int, int]], Future[Any]] = {}

    def join(self, batch: Sequence[ImageTask], following: Iterable[Sequence[ImageTask]] = ()) -> list[ImageTask]:
        """Return a batch with its input images; begin to read those of `following` batches.

        An image that cannot be read is replaced by its RowError. Raises: any other error of `read`.
        """
        window = [task for near in (batch, *following) for task in near]
        wanted = dict.fromkeys((task.request.input_image, task.size) for task in window)
        self._reading = {
            (image, size): self._reading.get((image, size)) or self._readers.submit(self._read, image, size)
            for image, size in wanted
            if image is not None
        }
        return [_with_input_image(task, self._reading) for task in batch]


def _with_input_image(task: ImageTask, reading: dict[tuple[InputImage, tuple[int, int]], Future[Any]]) -> ImageTask:
    image = task.request.input_image
    if image is None:
        return task
    try:
        return replace(task, input_image=reading[image, task.size].result())
    except RowError as error:
        return replace(task, input_image=error)
