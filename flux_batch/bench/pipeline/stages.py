"""Where the seconds of one call of the pipeline go: its methods are timed from outside, while it does what it does."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from flux_batch.bench.machine import synchronize
from flux_batch.pipeline.pipeline import FluxImagePipeline

# The stage to which the time of a method counts, less that of the methods it calls: where it is found, what it is.
METHODS: tuple[tuple[str, str, str], ...] = (
    ("", "warn_of_cut_texts", "tokenise"),
    ("", "encode", "tokenise"),
    ("clip", "pool", "CLIP"),
    ("t5", "states", "T5"),
    ("", "make_latents", "denoise"),
    ("", "decode", "VAE"),
)
# What is left of the call: the check for numbers that are not finite, rounding, and the way to the host.
REST = "uint8"
STAGES = ("tokenise", "CLIP", "T5", "denoise", "VAE", REST)


class StageClock:
    """Seconds by stage of the calls made while it is attached; the device is waited for wherever a stage ends."""

    def __init__(self, device: Any, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self._device = device
        self._clock = clock
        self._inner: list[float] = []  # of each method under way: what its callees took

    def timed(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, its time counted to `stage` but for that of timed functions in it."""

        def run(*args: Any, **kwargs: Any) -> Any:
            synchronize(self._device)
            started = self._clock()
            self._inner.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                synchronize(self._device)
                taken = self._clock() - started
                self.seconds[stage] += taken - self._inner.pop()
                if self._inner:
                    self._inner[-1] += taken

        return run


@contextmanager
def timed_stages(pipeline: FluxImagePipeline) -> Iterator[tuple[StageClock, Callable[..., Any]]]:
    """Give the clock of a pipeline and a way to call it; its methods are as they were afterwards."""
    clock = StageClock(pipeline.device)
    owners = [getattr(pipeline, part) if part else pipeline for part, _, _ in METHODS]
    for owner, (_, method, stage) in zip(owners, METHODS, strict=True):
        setattr(owner, method, clock.timed(stage, getattr(owner, method)))
    try:
        yield clock, clock.timed(REST, pipeline)
    finally:
        for owner, (_, method, _) in zip(owners, METHODS, strict=True):
            delattr(owner, method)
