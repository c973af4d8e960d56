"""The benchmark of single kernels, at a size for any machine."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flux_batch.bench.pipeline import kernels
from flux_batch.bench.pipeline.kernels import bench_kernels, format_kernels
from flux_batch.model.optimize.attention import AttentionKernels


def test_each_kernel_is_measured_beside_the_others() -> None:
    figures = bench_kernels("tiny", torch.device("cpu"), torch.float32, side=64, repeats=2, compiled=False)
    assert figures["attention"]["chosen"] == "torch"
    assert figures["attention"]["difference_from_math"] < 1e-5
    assert set(figures["attention"]["milliseconds"]) == {"chosen", "torch"}
    assert set(figures["decoder"]) == {"contiguous", "channels last"}
    # The matrix products of a single block of the tiny model, with 16 image tokens and 512 text tokens.
    assert list(figures["products"]) == ["528 x 64 x 448", "528 x 320 x 64"]
    for ms in figures["products"].values():
        assert list(ms) == ["bfloat16", "fp8", "fp8, fast accumulation"]
    text = format_kernels(figures)
    assert text.startswith("random weights, size tiny, cpu: 64 x 64, medians of 2")
    assert "attention  torch is chosen" in text
    assert "528 x 64 x 448, fp8, fast accumulation" in text


def test_what_is_compiled_is_kept_apart_for_each_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    tags: list[str] = []

    def compiled(function: Any) -> Any:
        tags.append(torch.compiler.config.cache_key_tag)
        return function

    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(kernels, "apply_compile_to_decoder", lambda model: None)
    monkeypatch.setattr(torch.compiler.config, "cache_key_tag", "")
    for name in ("flash3", "cudnn"):
        monkeypatch.setattr(kernels, "choose_attention", lambda device, name=name: AttentionKernels(name))
        bench_kernels("tiny", torch.device("cpu"), torch.float32, side=64, repeats=1)
    assert ["flash3" in tag for tag in tags] == [True, False]
    assert "cudnn" in tags[1]
