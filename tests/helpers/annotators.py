"""Good and bad annotators of users; marks in a prompt make them misbehave, as in fakes.py."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

CALLS: list[list[str]] = []  # keys of each call in this process


class Prompts:
    """Columns: the length of each prompt, and the red of the first pixel."""

    columns = pa.schema([("length", pa.int32()), ("red", pa.uint8())])
    version = "1"

    def __init__(self, scale: int = 1, device: str = "cpu") -> None:
        self.scale = scale

    execution_options = frozenset({"device"})

    def __call__(self, images: Sequence[Image.Image], records: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        CALLS.append([record["key"] for record in records])
        for record in records:
            misbehave(record["prompt"])
        lengths = [self.scale * len(record["prompt"]) for record in records]
        return {"length": lengths, "red": np.array([image.getpixel((0, 0))[0] for image in images], dtype=np.uint8)}


class Paced(Prompts):
    """The same columns, slowed down by `pace_s` per image."""

    execution_options = frozenset({"pace_s"})

    def __init__(self, pace_s: float = 0.0) -> None:
        super().__init__()
        self._pace_s = pace_s

    def __call__(self, images: Sequence[Image.Image], records: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        time.sleep(self._pace_s * len(images))
        return super().__call__(images, records)


class Harm:
    """Does harm at marks in prompts; only the images with a mark may fail."""

    columns = pa.schema([("length", pa.int32())])

    def __call__(self, images: Sequence[Image.Image], records: Sequence[Mapping[str, Any]]) -> Any:
        for record in records:
            misbehave(record["prompt"])
        if any("[eat]" in record["prompt"] for record in records):
            _eat_memory()
        return {"length": ["long" if "[lie]" in record["prompt"] else len(record["prompt"]) for record in records]}


def _eat_memory() -> None:
    """Allocate memory until a limit of 256 MiB, which does not affect the machine, is used up."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20), before[1]))
    eaten = []
    try:
        while True:
            eaten.append(bytearray(16 << 20))
    finally:
        eaten.clear()
        resource.setrlimit(resource.RLIMIT_AS, before)


class Reds(Prompts):
    """The same columns, without execution options."""

    execution_options = frozenset()


def misbehave(prompt: str) -> None:
    if "[sour]" in prompt:
        raise RuntimeError("cannot judge\nthis")
    if "[kill]" in prompt:
        os._exit(66)
    while "[freeze]" in prompt:
        time.sleep(1)


class Answers:
    """Returns `answer(images)`."""

    columns = pa.schema([("score", pa.float32())])

    def __init__(self, answer: Callable[[Sequence[Image.Image]], Any]) -> None:
        self.answer = answer

    def __call__(self, images: Sequence[Image.Image], records: Sequence[Mapping[str, Any]]) -> Any:
        return self.answer(images)


class NoColumns:
    """An annotator without `columns`."""


def broken(**options: Any) -> Any:
    """Raise an OSError, as an annotator whose weights are missing."""
    raise OSError("no weights")


class Redness:
    """A metric as in DiffSynth-Studio."""

    def __init__(self, scale: int) -> None:
        self.scale = scale

    @classmethod
    def from_pretrained(cls, scale: int) -> Redness:
        return cls(scale)

    def compute(self, prompt: str, image: Image.Image) -> float:
        return self.scale * float(image.getpixel((0, 0))[0])  # type: ignore[index]


class FirstRed:
    """The red of the first pixel, from 0 to 1."""

    columns = pa.schema([("red", pa.float64())])

    def __call__(self, images: Sequence[Image.Image], records: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        for record in records:
            misbehave(record["prompt"])
        return {"red": [image.getpixel((0, 0))[0] / 255 for image in images]}  # type: ignore[index]
