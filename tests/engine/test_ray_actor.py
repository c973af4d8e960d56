"""The actor around a worker, without Ray."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from flux_batch.engine.protocol import Worker
from flux_batch.engine.ray_actor import WorkerActor
from flux_batch.errors import CheckpointError
from flux_batch.telemetry import LOADING
from helpers.waiting import PATIENCE_S


@dataclass
class SlowStart:
    """A worker that loads until `let_go` is set, and then fails."""

    begun: threading.Event = field(default_factory=threading.Event)
    let_go: threading.Event = field(default_factory=threading.Event)

    def open(self) -> Worker:
        self.begun.set()
        assert self.let_go.wait(PATIENCE_S)
        raise CheckpointError("model.safetensors: is missing")


def test_a_worker_that_loads_says_how_long_it_has_been_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("flux_batch.telemetry.time", SimpleNamespace(monotonic=lambda: now))
    factory = SlowStart()
    actor = WorkerActor(factory)
    assert actor.idle_s() == 0.0
    thread = threading.Thread(target=lambda: answers.append(actor.open(0.0)))
    answers: list[object] = []
    thread.start()
    assert factory.begun.wait(PATIENCE_S)
    now += 100.0
    assert actor.idle_s() == 100.0
    LOADING.beat()  # as a download does for each piece
    now += 7.0
    assert actor.idle_s() == 7.0
    factory.let_go.set()
    thread.join()
    assert (len(answers), actor.idle_s()) == (1, 0.0)
