import itertools
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flux_batch.bench.pipeline import stages as module
from flux_batch.bench.pipeline.stages import STAGES, StageClock, timed_stages
from flux_batch.bench.source import Source


def test_a_stage_has_its_own_time_and_not_that_of_the_stages_in_it() -> None:
    now = SimpleNamespace(s=0.0)
    clock = StageClock(torch.device("cpu"), clock=lambda: now.s)

    def wait(seconds: float) -> None:
        now.s += seconds

    t5 = clock.timed("T5", lambda: wait(3.0))
    text = clock.timed("tokenise", lambda: (wait(0.5), t5(), wait(0.25)))
    latents = clock.timed("denoise", lambda: (text(), wait(10.0), text()))
    clock.timed("uint8", lambda: (latents(), wait(2.0)))()

    assert clock.seconds == {"tokenise": 1.5, "CLIP": 0.0, "T5": 6.0, "denoise": 10.0, "VAE": 0.0, "uint8": 2.0}


def test_a_failed_stage_is_counted_and_does_not_confuse_the_next() -> None:
    now = SimpleNamespace(s=0.0)
    clock = StageClock(torch.device("cpu"), clock=lambda: now.s)

    def fail() -> None:
        now.s += 1.0
        raise ValueError

    failing = clock.timed("T5", fail)
    with pytest.raises(ValueError):  # noqa: PT011  which one is clear
        clock.timed("denoise", failing)()
    clock.timed("denoise", lambda: None)()

    assert clock.seconds["T5"] == 1.0
    assert clock.seconds["denoise"] == 0.0


def test_every_stage_is_timed_and_the_pipeline_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    now = itertools.count(0.0)
    monkeypatch.setattr(module, "StageClock", partial(StageClock, clock=lambda: next(now)))
    pipeline = Source(random_weights="tiny", device="cpu", dtype="float32").open()
    arguments: dict[str, Any] = {"width": 32, "height": 32, "num_inference_steps": 2, "seed": [4], "output_type": "np"}

    with timed_stages(pipeline) as (clock, run):
        timed = run(["a circle"], **arguments)
    plain = pipeline(["a circle"], **arguments)  # after it: what was encoded before is not encoded again

    assert (timed[0] == plain[0]).all()
    assert all(clock.seconds[stage] >= 1 for stage in STAGES)
    assert sum(clock.seconds.values()) == next(now) - 1  # from the first look at the clock to the last
    assert "make_latents" not in vars(pipeline)
    assert not {"encode", "warn_of_cut"} & set(vars(pipeline.texts))
    assert "pool" not in vars(pipeline.clip)
    assert "states" not in vars(pipeline.t5)
