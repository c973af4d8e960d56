import gc
import math
import weakref
from typing import Any

import numpy as np
import pytest

from flux_batch.bench.pipeline.lossy import EXACT, Mode, bench_lossy, format_lossy, psnr
from flux_batch.bench.pipeline.pipeline import Call
from flux_batch.bench.source import Source

CALL = Call(width=96, height=96, steps=3, batch_size=2, t5_sequence_length=64)


def test_psnr_follows_its_definition() -> None:
    black, grey = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 16, np.uint8)
    assert psnr(black, grey) == psnr(grey, black) == pytest.approx(20 * math.log10(255 / 16))
    assert psnr(grey, grey) == math.inf


def test_modes_are_compared_with_the_exact_images() -> None:
    modes = [EXACT, Mode("none", 0.9), Mode("fp8", 0.0), Mode("fp8_matmul", 0.1)]
    figures = bench_lossy(Source(dtype="float32", device="cpu"), CALL, 3, modes)
    exact, cached, fp8 = figures["modes"]
    assert [one["mode"] for one in figures["modes"]] == ["exact", "step cache 0.9", "fp8"]
    assert (exact["times_as_fast"], exact["psnr_median"], exact["psnr_least"]) == (1.0, None, None)
    for one in (cached, fp8):
        assert 5 < one["psnr_least"] <= one["psnr_median"] < 80
        assert 0 <= one["facts_that_hold"] <= 1
    text = format_lossy(figures)
    assert "the same" in text
    assert "step cache 0.9" in text
    assert "not measured: fp8_matmul, step cache 0.1: quantization = fp8_matmul: products in fp8 give" in text


def test_images_of_random_weights_are_not_scored() -> None:
    call = Call(width=32, height=32, steps=2, batch_size=1)
    figures = bench_lossy(Source(random_weights="tiny", dtype="float32", device="cpu"), call, 1, [EXACT])
    assert figures["modes"][0]["facts_that_hold"] is None
    assert "not read" in format_lossy(figures)


def test_one_model_is_in_memory_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[Any] = []
    load = Source.load

    def noted(source: Source) -> Any:
        assert not any(model() for model in loaded)
        manager = load(source)
        loaded.append(weakref.ref(manager.transformer))
        return manager

    monkeypatch.setattr(Source, "load", noted)
    gc.disable()  # else it may come by chance
    try:
        call = Call(width=32, height=32, steps=1, batch_size=1)
        bench_lossy(Source(random_weights="tiny", device="cpu"), call, 1, [EXACT, Mode("fp8", 0.0)])
    finally:
        gc.enable()
    assert len(loaded) == 2
