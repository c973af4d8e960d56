"""The stages of training, which resume where they were stopped.

Every step draws from generators seeded by (seed, stage, step), so that a resumed stage draws the same numbers.
"""

from __future__ import annotations

import hashlib
import os
import random
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

SAVE_EVERY_S = 120.0
_PRINT_EVERY_S = 15.0
WARM_UP = 50


class Stage:
    """The steps of one stage and the file of its state."""

    def __init__(self, folder: Path, name: str, num_steps: int, seed: int) -> None:
        self.path = folder / f"{name}.pt"
        self.name = name
        self.num_steps = num_steps
        self.seed = seed

    @property
    def is_done(self) -> bool:
        """True if all steps are done."""
        return self.path.exists() and load(self.path)["step"] >= self.num_steps

    def steps(self, state: Mapping[str, Any]) -> Iterator[int]:
        """Yield the remaining steps; first load `state` (parts with a state dict), then save it every two minutes."""
        start = 0
        if self.path.exists():
            saved = load(self.path)
            start = saved.pop("step")
            for name, part in state.items():
                part.load_state_dict(saved[name])
        saved_at = time.monotonic()
        for step in range(start, self.num_steps):
            yield step
            if time.monotonic() - saved_at > SAVE_EVERY_S:
                self.save(step + 1, state)
                saved_at = time.monotonic()
        if start < self.num_steps:
            self.save(self.num_steps, state)

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Write the state to a file beside, then rename it."""
        partial = self.path.with_suffix(".partial")
        torch.save({"step": step, **{name: part.state_dict() for name, part in state.items()}}, partial)
        os.replace(partial, self.path)

    def rng(self, step: int) -> random.Random:
        """Return the source of a step's random choices."""
        return random.Random(self.number(step))

    def generator(self, step: int) -> torch.Generator:
        """Return the source of a step's noise, on the CPU."""
        return torch.Generator().manual_seed(self.number(step))

    def number(self, step: int) -> int:
        """Return a seed for a step."""
        text = f"{self.seed} {self.name} {step}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest())

    def share_of_rate(self, step: int, level_until: float = 0.0) -> float:
        """Return the learning rate as a share of its peak: it rises briefly, stays, then falls linearly to 0."""
        left = (1.0 - step / self.num_steps) / (1.0 - level_until)
        return min((step + 1) / WARM_UP, 1.0, left)


class Meter:
    """Running means of the values that a stage measures, printed every 15 seconds."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.means: dict[str, float] = {}
        self.started_at = self.printed_at = time.monotonic()
        self.first_step: int | None = None

    def add(self, step: int, **values: float) -> None:
        """Add the values of a step, and print a line if the last is old."""
        if self.first_step is None:
            self.first_step = step
        for name, value in values.items():
            self.means[name] = value if name not in self.means else 0.97 * self.means[name] + 0.03 * value
        now = time.monotonic()
        if now - self.printed_at > _PRINT_EVERY_S or step == self.stage.num_steps - 1:
            self.printed_at = now
            pace = (now - self.started_at) / (step - self.first_step + 1)
            text = "  ".join(f"{name} {value:.4f}" for name, value in self.means.items())
            print(f"{self.stage.name} {step + 1}/{self.stage.num_steps}  {text}  {pace:.3f} s/step", flush=True)


def load(path: Path) -> dict[str, Any]:
    """Load the saved state of a stage."""
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state
