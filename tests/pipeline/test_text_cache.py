"""Texts are encoded by themselves, once, and forgotten oldest first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from flux_batch.model.conditioned import Conditioning
from flux_batch.pipeline.text_cache import EncodedTexts


class Encoder:
    """Says of a text its length, in 4 + 4 bytes a token; `asked` has each text it was given."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []

    def __call__(self, text: str, length: int) -> Conditioning:
        self.asked.append((text, length))
        return Conditioning(torch.full((1, length, 1), float(len(text))), torch.full((1, length), float(len(text))))


def test_each_text_is_encoded_once_and_every_prompt_gets_its_own() -> None:
    encoder = Encoder()
    texts = EncodedTexts(encoder)
    said = texts(["a", "", "ccc", "a"], 2)
    assert said.txt[:, :, 0].tolist() == [[1, 1], [0, 0], [3, 3], [1, 1]]
    assert said.y.tolist() == [[1, 1], [0, 0], [3, 3], [1, 1]]
    assert texts(["ccc"], 2).txt.tolist() == [[[3], [3]]]
    assert encoder.asked == [("a", 2), ("", 2), ("ccc", 2)]


def test_another_length_and_other_weights_are_another_text() -> None:
    encoder = Encoder()
    texts = EncodedTexts(encoder)
    for length, version in ((2, None), (3, None), (3, ("lora", 1.0)), (3, None), (3, ("lora", 0.5))):
        assert texts(["a"], length, version).txt.shape == (1, length, 1)
    assert encoder.asked == [("a", 2), ("a", 3), ("a", 3), ("a", 3)]


def test_the_text_that_was_used_longest_ago_is_forgotten() -> None:
    encoder = Encoder()
    texts = EncodedTexts(encoder, max_bytes=3 * 8)
    for text in ("a", "b", "c", "a", "d", "a", "b"):
        texts([text], 1)
    assert [text for text, _ in encoder.asked] == ["a", "b", "c", "d", "b"]


def test_a_batch_larger_than_the_memory_is_encoded_whole() -> None:
    encoder = Encoder()
    texts = EncodedTexts(encoder, max_bytes=0)
    assert texts(["a", "bb", "a"], 1).y.tolist() == [[1], [2], [1]]
    assert [text for text, _ in encoder.asked] == ["a", "bb"]


class Away(Encoder):
    """Encoders that can be asked within a visit alone; `visits` has the texts of each."""

    def __init__(self) -> None:
        super().__init__()
        self.visits: list[list[str]] = []

    @contextmanager
    def visit(self) -> Iterator[None]:
        self.asked = []
        yield
        self.visits.append([text for text, _ in self.asked])
        self.asked = None  # type: ignore[assignment]


def test_what_is_expected_is_encoded_in_one_visit() -> None:
    encoders = Away()
    texts = EncodedTexts(encoders, visit=encoders.visit)
    texts.expected = [("a", 1), ("", 1), ("ccc", 2), ("a", 1)]
    assert texts(["a"], 1).y.tolist() == [[1]]
    assert texts([""], 1).y.tolist() == [[0]]
    assert texts(["ccc"], 2).y.tolist() == [[3, 3]]
    assert encoders.visits == [["a", "", "ccc"]]
    texts(["unexpected"], 1)
    assert encoders.visits[1:] == [["unexpected"]]


def test_a_visit_takes_as_many_texts_as_there_is_room_for_and_the_next_one_goes_on() -> None:
    encoders = Away()
    texts = EncodedTexts(encoders, max_bytes=3 * 8, visit=encoders.visit)
    texts.expected = [(text, 1) for text in "abcdefg"]
    for text in "abcdefg":
        texts([text], 1)
    assert encoders.visits == [["a", "b", "c"], ["d", "e", "f"], ["g"]]
