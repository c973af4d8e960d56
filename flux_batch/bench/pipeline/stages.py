"""The seconds of a call by stage: the pipeline's methods are timed from outside."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from flux_batch.bench.machine import synchronize
from flux_batch.pipeline.pipeline import FluxImagePipeline

# The part and the name of each timed method, and its stage; nested timed methods count to their own stage.
_METHODS: tuple[tuple[str, str, str], ...] = (
    ("texts", "warn_of_cut", "tokenise"),
    ("texts", "encode", "tokenise"),
    ("clip", "pool", "CLIP"),
    ("t5", "states", "T5"),
    ("", "make_latents", "denoise"),
    ("latents", "decode", "VAE"),
)
# The stage of the rest of a call: the check for NaN and infinity, rounding, the copy to the host.
_REST = "uint8"
STAGES = ("tokenise", "CLIP", "T5", "denoise", "VAE", _REST)


class StageClock:
    """The seconds by stage of timed calls; it waits for the device at both ends of a stage."""

    def __init__(self, device: Any, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self._device = device
        self._clock = clock
        self._inner: list[float] = []  # for each running method: the seconds of timed methods in it

    def timed(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function whose time counts to `stage`, without the time of nested timed functions."""

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
    """Yield a clock and a timed call of the pipeline; restore its methods at the end."""
    clock = StageClock(pipeline.device)
    owners = [getattr(pipeline, part) if part else pipeline for part, _, _ in _METHODS]
    for owner, (_, method, stage) in zip(owners, _METHODS, strict=True):
        setattr(owner, method, clock.timed(stage, getattr(owner, method)))
    try:
        yield clock, clock.timed(_REST, pipeline)
    finally:
        for owner, (_, method, _) in zip(owners, _METHODS, strict=True):
            delattr(owner, method)
