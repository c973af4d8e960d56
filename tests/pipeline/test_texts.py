"""The cache of texts: each is encoded alone and once, and the oldest is dropped first."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Barrier, Thread
from typing import Any

import pytest
import torch

from flux_batch import FluxImagePipeline
from flux_batch.model.transformer import PromptEmbeds
from flux_batch.pipeline.texts import TextCache
from helpers.tiny_calls import SMALL


class Encoder:
    """Encodes a text as its length, in 4 + 4 bytes per token; `asked` has each given text."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []

    def __call__(self, text: str, length: int) -> PromptEmbeds:
        self.asked.append((text, length))
        return PromptEmbeds(torch.full((1, length, 1), float(len(text))), torch.full((1, length), float(len(text))))


def test_each_text_is_encoded_once_and_every_prompt_gets_its_own() -> None:
    encoder = Encoder()
    texts = TextCache(encoder)
    encoded = texts(["a", "", "ccc", "a"], 2)
    assert encoded.prompt_embeds[:, :, 0].tolist() == [[1, 1], [0, 0], [3, 3], [1, 1]]
    assert encoded.pooled_prompt_embeds.tolist() == [[1, 1], [0, 0], [3, 3], [1, 1]]
    assert texts(["ccc"], 2).prompt_embeds.tolist() == [[[3], [3]]]
    assert encoder.asked == [("a", 2), ("", 2), ("ccc", 2)]


def test_another_length_and_other_weights_are_another_text() -> None:
    encoder = Encoder()
    texts = TextCache(encoder)
    for length, version in ((2, None), (3, None), (3, ("lora", 1.0)), (3, None), (3, ("lora", 0.5))):
        assert texts(["a"], length, version).prompt_embeds.shape == (1, length, 1)
    assert encoder.asked == [("a", 2), ("a", 3), ("a", 3), ("a", 3)]


def test_the_text_that_was_used_longest_ago_is_forgotten() -> None:
    encoder = Encoder()
    texts = TextCache(encoder, max_bytes=3 * 8)
    for text in ("a", "b", "c", "a", "d", "a", "b"):
        texts([text], 1)
    assert [text for text, _ in encoder.asked] == ["a", "b", "c", "d", "b"]


def test_a_batch_larger_than_the_memory_is_encoded_whole() -> None:
    encoder = Encoder()
    texts = TextCache(encoder, max_bytes=0)
    assert texts(["a", "bb", "a"], 1).pooled_prompt_embeds.tolist() == [[1], [2], [1]]
    assert [text for text, _ in encoder.asked] == ["a", "bb"]


def test_threads_that_encode_the_same_text_at_once_leave_room_for_the_next() -> None:
    both = Barrier(2, timeout=10)

    class Waiting(Encoder):
        def __call__(self, text: str, length: int) -> PromptEmbeds:
            both.wait()
            return super().__call__(text, length)

    texts = TextCache(Waiting(), max_bytes=8)
    for text in ("a", "bb", "ccc"):
        threads = [Thread(target=texts, args=([text], 1)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert texts(["ccc"], 1).pooled_prompt_embeds.tolist() == [[3]]


class Offloaded(Encoder):
    """An encoder that only works inside `on_device`; `visits` has the texts of each such block."""

    def __init__(self) -> None:
        super().__init__()
        self.visits: list[list[str]] = []

    @contextmanager
    def on_device(self) -> Iterator[None]:
        self.asked = []
        yield
        self.visits.append([text for text, _ in self.asked])
        self.asked = None  # type: ignore[assignment]


def test_encoders_come_to_the_device_once_for_all_texts_and_not_for_known_ones() -> None:
    encoders = Offloaded()
    texts = TextCache(encoders, on_device=encoders.on_device)
    texts(["a", "", "ccc", "a"], 1)
    texts(["ccc", "a"], 1)
    assert encoders.visits == [["a", "", "ccc"]]
    texts(["a", "new"], 1)
    assert encoders.visits[1:] == [["new"]]


@pytest.fixture
def _no_garbage_collection() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("_no_garbage_collection")
@pytest.mark.parametrize("quantization", ["none", "fp8"])
def test_a_pipeline_that_is_dropped_leaves_no_weights(repository: Path, quantization: Any) -> None:
    """Its memory is needed by the next one, which a notebook loads at once; Python may not collect until much later."""
    pipe = FluxImagePipeline.from_pretrained(repository, device="cpu", quantization=quantization)
    pipe("x", seed=1, **SMALL)
    parts = [weakref.ref(part) for part in (pipe.transformer, pipe.autoencoder, pipe.clip.model, pipe.t5.model)]
    del pipe
    assert [part() for part in parts] == [None] * 4
