"""Which images are made together, and what each starts from, read ahead of the device.

Knows requests; does not know what computes images nor where they go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, replace
from typing import Any

from flux_batch.errors import RowError
from flux_batch.records import ImageRequest, InputImage

# Batches whose input images are read while one is on the device: enough to hide a slow server, and a bound on memory.
READ_AHEAD = 1

ReadImage = Callable[[InputImage, tuple[int, int]], Any]


@dataclass(frozen=True, slots=True)
class Item:
    """One image to make; `image` is what it starts from, once read, or why that cannot be read."""

    request: ImageRequest
    image_index: int
    image: Any = None

    @property
    def shape(self) -> tuple[Any, ...]:
        """What the images of one batch must have in common."""
        params = self.request.sampling
        return (
            params.width,
            params.height,
            params.num_inference_steps,
            params.uses_cfg,
            params.t5_sequence_length,
            params.sigma_shift,
            params.denoising_strength,
            self.request.input_image is None,
        )

    @property
    def place(self) -> tuple[int, int]:
        """Row in the shard and index of the image."""
        return self.request.row, self.image_index

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.request.sampling.width, self.request.sampling.height


def batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Group images that can share a forward pass, in order of first appearance; a function of the input alone.

    Those of the same LoRAs come one after the other, since to exchange LoRAs takes as long as to load a model.
    """
    groups: dict[tuple[Any, ...], dict[tuple[Any, ...], list[Item]]] = {}
    for item in items:
        groups.setdefault(item.request.loras, {}).setdefault(item.shape, []).append(item)
    for group in (group for of_loras in groups.values() for group in of_loras.values()):
        for first in range(0, len(group), size):
            yield group[first : first + size]


class InputImages:
    """What the images of batches start from, read on threads: each once while batches near each other want it."""

    def __init__(self, readers: Executor, read: ReadImage) -> None:
        self._readers = readers
        self._read = read
        self._reading: dict[tuple[InputImage, tuple[int, int]], Future[Any]] = {}

    def join(self, batch: Sequence[Item], following: Iterable[Sequence[Item]] = ()) -> list[Item]:
        """Give a batch with its images, while those of the following batches are read.

        An image that cannot be read is the RowError that says why. Raises: what else `read` raises.
        """
        window = [item for near in (batch, *following) for item in near]
        wanted = dict.fromkeys((item.request.input_image, item.size) for item in window)
        self._reading = {
            (image, size): self._reading.get((image, size)) or self._readers.submit(self._read, image, size)
            for image, size in wanted
            if image is not None
        }
        return [_with_image(item, self._reading) for item in batch]


def _with_image(item: Item, reading: dict[tuple[InputImage, tuple[int, int]], Future[Any]]) -> Item:
    image = item.request.input_image
    if image is None:
        return item
    try:
        return replace(item, image=reading[image, item.size].result())
    except RowError as error:
        return replace(item, image=error)
