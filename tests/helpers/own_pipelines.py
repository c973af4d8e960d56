"""Pipelines of users for `model.pipeline`: one that works, and some that do not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

NOTHING = 1


class Noise:
    """Makes images of noise, but none for a prompt with `[refuse]`."""

    settings = frozenset({"num_inference_steps"})

    def __init__(self, model: Any, *, device: str, grain: int = 255) -> None:
        self.grain = grain

    def __call__(
        self, prompt: Sequence[str], *, seed: Sequence[int], width: int, height: int, num_inference_steps: int
    ) -> list[Any]:
        draws = [np.random.default_rng(each) for each in seed]
        images = [draw.integers(0, self.grain, (height, width, 3), dtype=np.uint8) for draw in draws]
        return [
            ValueError("it will not") if "[refuse]" in text else one for text, one in zip(prompt, images, strict=True)
        ]


class Short(Noise):
    """Has no memory for a prompt with `[short]`."""

    def __call__(self, prompt: Sequence[str], **others: Any) -> list[Any]:
        if any("[short]" in text for text in prompt):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().__call__(prompt, **others)


class Broken:
    def __init__(self, model: Any, *, device: str) -> None:
        raise ValueError("no weights")


class Silent:
    def __init__(self, model: Any, *, device: str) -> None:
        pass


class Misspelt(Silent):
    settings = ("num_inference_step",)
