"""Batches of images that may share a forward pass, and input images that are read ahead."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

import pytest

from flux_batch.errors import RowError, StoreError
from flux_batch.records import ImageRequest, InputImage, RowImages
from flux_batch.sampling_params import SamplingParams
from flux_batch.worker.batches import READ_AHEAD, ImageTask, InputImages, ReadImages, batches


def task(row: int = 0, image: str = "", mask: str = "", **sampling: Any) -> ImageTask:
    start, repaint = (InputImage(name=name, uri=name) if name else None for name in (image, mask))
    images, params = RowImages(input_image=start, mask_image=repaint), SamplingParams(**sampling)
    return ImageTask(ImageRequest(row=row, id="x", prompt="p", sampling=params, seeds=(1,), images=images), 0)


def start_of(images: RowImages) -> str:
    """Return the name of an input image."""
    assert images.input_image is not None
    return images.input_image.name


def with_images(todo: Sequence[list[ImageTask]], readers: Executor, read: ReadImages) -> Iterator[list[ImageTask]]:
    """Yield the batches with their input images, as a worker does."""
    images = InputImages(readers, read)
    for number, batch in enumerate(todo):
        yield images.join(batch, todo[number + 1 : number + 1 + READ_AHEAD])


@pytest.mark.parametrize(
    "other",
    [
        {"width": 64},
        {"height": 64},
        {"num_inference_steps": 9},
        {"cfg_scale": 2.0},
        {"t5_sequence_length": 9},
        {"sigma_shift": 3.0},
        {"denoising_strength": 0.5},
        {"image": "a.png"},
        {"image": "a.png", "mask": "b.png"},
    ],
)
def test_images_of_other_settings_get_a_batch_of_their_own(other: dict[str, Any]) -> None:
    assert [len(batch) for batch in batches([task(0), task(1, **other), task(2)], 9)] == [2, 1]


def test_images_that_differ_in_other_ways_share_a_batch() -> None:
    tasks = [
        task(0, "a.png", denoising_strength=0.5),
        task(1, "b.png", denoising_strength=0.5, embedded_guidance=1.0, negative_prompt="x"),
    ]
    assert list(batches(tasks, 9)) == [tasks]
    assert list(batches(tasks, 1)) == [tasks[:1], tasks[1:]]


def test_batches_are_formed_in_order_of_first_appearance() -> None:
    wide, tall = {"width": 64, "height": 32}, {"width": 32, "height": 64}
    tasks = [task(0, **wide), task(1, **tall), task(2, **wide), task(3, **wide), task(4, **wide, cfg_scale=2.0)]

    found = [[one.request.row for one in batch] for batch in batches(tasks, 2)]

    assert found == [[0, 2], [3], [1], [4]]


def test_images_come_with_their_batch() -> None:
    todo = [[task(0, "a"), task(1)], [task(2, "b"), task(3, "a")], [task(4, "a", width=64)]]
    with ThreadPoolExecutor(2) as readers:
        found = list(with_images(todo, readers, lambda images, size: {"input_image": (start_of(images), size)}))

    assert [[one.images.get("input_image") for one in batch] for batch in found] == [
        [("a", (1024, 1024)), None],
        [("b", (1024, 1024)), ("a", (1024, 1024))],
        [("a", (64, 1024))],
    ]
    assert [[one.request.row for one in batch] for batch in found] == [[0, 1], [2, 3], [4]]


def test_only_the_next_batch_is_read_ahead() -> None:
    read: list[str] = []
    ahead = threading.Event()

    def reader(images: RowImages, size: tuple[int, int]) -> dict[str, str]:
        read.append(start_of(images))
        if read[-1] == "1":
            ahead.set()
        return {"input_image": start_of(images)}

    todo = [[task(number, str(number))] for number in range(5)]
    with ThreadPoolExecutor(1) as readers:
        found = with_images(todo, readers, reader)
        next(found)
        assert ahead.wait(5)
        readers.submit(lambda: None).result()
        assert read == ["0", "1"]
        assert [batch[0].images["input_image"] for batch in found] == ["1", "2", "3", "4"]


def test_the_same_image_is_read_once() -> None:
    count: Counter[str] = Counter()

    def reader(images: RowImages, size: tuple[int, int]) -> dict[str, str]:
        count[start_of(images)] += 1
        return {}

    todo = [[task(2 * number, "a"), task(2 * number + 1, "a")] for number in range(4)]
    with ThreadPoolExecutor(4) as readers:
        list(with_images(todo, readers, reader))
    assert count == {"a": 1}


def test_a_bad_image_fails_its_rows_and_an_unavailable_storage_the_attempt() -> None:
    def reader(images: RowImages, size: tuple[int, int]) -> dict[str, str]:
        if start_of(images) == "bad":
            raise RowError("no image")
        if start_of(images) == "away":
            raise StoreError("no answer")
        return {"input_image": start_of(images)}

    with ThreadPoolExecutor(1) as readers:
        (batch,) = with_images([[task(0, "a"), task(1, "bad"), task(2, "b"), task(3, "bad")]], readers, reader)
        found = [one.images.get("input_image", str(one.error)) for one in batch]
        assert found == ["a", f"{batch[1].request.id}: no image", "b", f"{batch[3].request.id}: no image"]
        assert isinstance(batch[1].error, RowError)
        with pytest.raises(StoreError):
            list(with_images([[task(0, "away")]], readers, reader))
