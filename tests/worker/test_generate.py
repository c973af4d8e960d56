"""Batches that fail or do not fit into memory; the size that fits is learned once per image shape."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from flux_batch.errors import DeviceFatal, OutOfMemory
from flux_batch.records import ImageRequest, LoraUse
from flux_batch.sampling_params import SamplingParams
from flux_batch.worker import generate
from flux_batch.worker.batches import ImageTask
from flux_batch.worker.generate import SMALL_TILES, BatchMaker, ImageOutcome, Tiles
from flux_batch.worker.recorder import message_of
from helpers.fakes import FakePipeline

CFG = SamplingParams(width=64, height=32, num_inference_steps=1, cfg_scale=2.0, negative_prompt="bad")
Fits = Callable[[int, bool], bool]  # the number of images, whether in small tiles


class SmallMemory(FakePipeline):
    """Makes only batches that fit; `sizes` has the number of images of each call, negative if tiled."""

    def __init__(self, fits: Fits) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self._fits = fits

    def __call__(self, prompt: Any, **others: Any) -> Any:
        is_small = others.get("tile_size", 1000) <= SMALL_TILES.size
        self.sizes.append(-len(prompt) if is_small else len(prompt))
        if others["width"] == 64 and not self._fits(len(prompt), is_small):
            raise OutOfMemory("CUDA out of memory")
        return super().__call__(prompt, **others)

    def take_sizes(self) -> list[int]:
        sizes, self.sizes = self.sizes, []
        return sizes


def batch(size: int, width: int = 64, prompt: str = "p") -> list[ImageTask]:
    params = SamplingParams(width=width, height=32, num_inference_steps=1)
    requests = [
        ImageRequest(row=row, id="", prompt=f"{prompt}{row}", sampling=params, seeds=(1,)) for row in range(size)
    ]
    return [ImageTask(request, 0) for request in requests]


def maker(
    pipeline: FakePipeline, tiles: Tiles | None = None, on_progress: Callable[[], None] = lambda: None
) -> BatchMaker:
    return BatchMaker(pipeline, (), tiles, on_progress)


def is_made(made: list[ImageOutcome]) -> list[bool]:
    return [isinstance(one.result, np.ndarray) for one in made]


@pytest.mark.parametrize(
    ("size", "fits", "first", "next_"),
    [
        (4, lambda number, small: number < 4, [4, 2, 2], [2, 2]),
        (4, lambda number, small: number < 2, [4, 2, 1, 1, 2, 1, 1], [1, 1, 1, 1]),
        (6, lambda number, small: number < 3, [6, 3, 1, 2, 3, 1, 2], [1, 2, 1, 2]),
        (2, lambda number, small: number == 1 and small, [2, 1, -1, 1, -1], [-1, -1]),
        (3, lambda number, small: True, [3], [3]),
        (2, lambda number, small: False, [2, 1, -1, 1, -1], [-1, -1]),
    ],
)
def test_a_batch_that_did_not_fit_is_not_tried_again(size: int, fits: Fits, first: list[int], next_: list[int]) -> None:
    pipeline = SmallMemory(fits)
    make = maker(pipeline).make

    made = make(batch(size))
    assert pipeline.take_sizes() == first
    assert make(batch(size))[0].tiles == made[0].tiles
    assert pipeline.take_sizes() == next_
    expected = fits(1, True)
    assert is_made(made) == [expected] * size
    # Images of another shape fit.
    assert is_made(make(batch(size, width=32))) == [True] * size
    assert pipeline.take_sizes() == [size]


def test_a_new_worker_makes_the_same_calls() -> None:
    """A resumed run must write the same bytes, so it makes the same calls without the failed ones."""

    def fits(number: int, small: bool) -> bool:
        return number < 2

    old, new = SmallMemory(fits), SmallMemory(fits)
    experienced = maker(old)
    experienced.make(batch(3, prompt="before"))
    old.calls.clear()

    made, again = experienced.make(batch(3)), maker(new).make(batch(3))

    assert old.calls == new.calls
    for one, other in zip(made, again, strict=True):
        assert np.array_equal(np.asarray(one.result), np.asarray(other.result))


def test_other_errors_do_not_lower_the_batch_size() -> None:
    pipeline = SmallMemory(lambda number, small: True)
    make = maker(pipeline).make

    assert is_made(make([*batch(3), *batch(1, prompt="[raise]")])) == [True, True, True, False]
    pipeline.take_sizes()
    make(batch(4))

    assert pipeline.take_sizes() == [4]


class Tensor:
    """A fake tensor that only the local variables of a call refer to."""


class Leaking(FakePipeline):
    """Fails with a tensor in the local variables of the call, and of the call that caused the error."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[weakref.ref[Tensor]] = []

    def __call__(self, prompt: Any, **others: Any) -> Any:
        latents = Tensor()
        self.tensors.append(weakref.ref(latents))
        try:
            self._decode()
        except ValueError as error:
            raise RuntimeError("asked to fail") from error

    def _decode(self) -> None:
        pixels = Tensor()
        self.tensors.append(weakref.ref(pixels))
        raise ValueError("out of range")


def test_the_error_of_a_batch_holds_no_tensor_while_the_next_is_made() -> None:
    pipeline = Leaking()
    gc.disable()  # objects that wait for the collector still use memory
    try:
        made = maker(pipeline).make(batch(2))
        assert [tensor() for tensor in pipeline.tensors] == [None] * 6
    finally:
        gc.enable()
    messages = [message_of(one.result) for one in made if isinstance(one.result, Exception)]
    assert len(messages) == 2
    assert all(message.startswith("asked to fail (test_generate.py:") for message in messages)


def test_tiles_are_recorded_where_they_were_used() -> None:
    whole = maker(SmallMemory(lambda number, small: small)).make(batch(1))
    asked = maker(SmallMemory(lambda number, small: True), Tiles(128, 64)).make(batch(1))
    none = maker(SmallMemory(lambda number, small: True)).make(batch(1))

    assert [made[0].tiles for made in (whole, asked, none)] == [SMALL_TILES, Tiles(128, 64), None]


def test_every_call_is_progress_until_the_device_is_lost() -> None:
    signs: list[int] = []
    make = maker(SmallMemory(lambda number, small: number < 2), on_progress=lambda: signs.append(1)).make
    make(batch(2))
    assert len(signs) == 3

    class Broken(FakePipeline):
        def __call__(self, *args: Any, **others: Any) -> Any:
            self.calls.append([])
            raise DeviceFatal("gone")

    broken = Broken()
    with pytest.raises(DeviceFatal):
        maker(broken).make(batch(4))
    assert broken.num_calls == 1


class Offloading(FakePipeline):
    """A pipeline with its text encoders in host memory."""

    offloads_text_encoders = True


def test_the_texts_of_a_shard_are_encoded_once_for_each_set_of_loras() -> None:
    pipeline = Offloading()
    ours = maker(pipeline)
    plain, styled = batch(3), batch(2, prompt="q")
    style = (LoraUse(name="style", uri="style", scale=1.0),)
    styled = [ImageTask(replace(task.request, loras=style, sampling=CFG), 0) for task in styled]
    ours.start_shard([*plain, *styled])
    for group in (plain[:2], plain[2:], styled[:1], styled[1:]):
        assert is_made(ours.make(group)) == [True] * len(group)
    assert pipeline.encoded == [["p0", "p1", "p2"], ["q0", "bad", "q1"]]


def test_images_from_encoded_texts_are_those_from_the_texts() -> None:
    def images(pipeline: FakePipeline) -> list[Any]:
        ours = maker(pipeline)
        tasks = [ImageTask(replace(task.request, sampling=CFG), 0) for task in batch(4)]
        ours.start_shard(tasks)
        return [one.result for part in (tasks[:3], tasks[3:]) for one in ours.make(part)]

    for ours, expected in zip(images(Offloading()), images(FakePipeline()), strict=True):
        assert np.array_equal(ours, expected)


def test_texts_are_encoded_a_limited_number_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "MAX_TEXTS_AT_ONCE", 3)
    pipeline = Offloading()
    ours = maker(pipeline)
    tasks = [ImageTask(replace(task.request, sampling=CFG), 0) for task in batch(5)]
    ours.start_shard(tasks)
    for task in tasks:
        ours.make([task])
    assert pipeline.encoded == [["p0", "bad", "p1"], ["p2", "bad", "p3"], ["p4", "bad"]]


def test_a_batch_with_more_texts_than_the_limit_is_encoded_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "MAX_TEXTS_AT_ONCE", 1)
    pipeline = Offloading()
    ours, tasks = maker(pipeline), batch(3)
    ours.start_shard(tasks)
    assert is_made(ours.make(tasks)) == [True] * 3
    assert pipeline.encoded == [["p0", "p1", "p2"]]
