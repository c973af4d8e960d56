"""A pipeline for an Apple GPU, without float64 and complex numbers, as far as a CPU can test it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flux_batch import FluxImagePipeline
from flux_batch.model.optimize.kernels import apply_mps_kernels
from flux_batch.model.transformer import position_tables
from flux_batch.pipeline.precision import default_device
from helpers.tiny_calls import CPU, SMALL

CALL = {"prompt": "x", "negative_prompt": "y", "cfg_scale": 2.0, "seed": 3, "output_type": "pt", **SMALL}


class Lacking(TorchDispatchMode):
    """Collects operations whose results MPS cannot hold, except vectors: sigmas are always on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (
                tensor.is_complex() or (tensor.dtype == torch.float64 and tensor.ndim > 1)
            ):
                self.found.add(f"{func} {tensor.dtype} {tensor.device}")
        return result


def found_in_call(pipe: FluxImagePipeline, **changes: Any) -> tuple[Tensor, set[str]]:
    with Lacking() as lacking:
        image: Any = pipe(**{**CALL, **changes})
    return image, lacking.found


def test_a_call_computes_neither_in_float64_nor_with_complex_numbers(repository: Path) -> None:
    pipe = FluxImagePipeline.from_pretrained(repository, **CPU)
    expected, found = found_in_call(pipe)
    assert any("complex64" in each for each in found)
    assert any("float64" in each for each in found)  # the table of positions is computed on the CPU and moved
    apply_mps_kernels(pipe.transformer, torch.device("mps"))
    image, found = found_in_call(pipe)
    assert found == set()
    torch.testing.assert_close(image, expected, atol=1e-5, rtol=0)


def test_a_position_table_is_made_on_the_cpu(repository: Path) -> None:
    pipe = FluxImagePipeline.from_pretrained(repository, **CPU)
    with Lacking() as lacking:
        table = position_tables(pipe.transformer, torch.device("meta"))(7, 8, 12)
    assert table.is_meta
    assert {each.split()[-1] for each in lacking.found} == {"cpu"}


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"), [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")]
)
def test_the_default_device_is_a_gpu_if_there_is_one(
    monkeypatch: pytest.MonkeyPatch, cuda: bool, mps: bool, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert default_device().type == expected
