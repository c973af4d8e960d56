"""The number of kernels in FLUX.1's compiled blocks for an H100, counted without one.

Blocks are lowered to Triton's source only: nothing is compiled or run. Inductor asks for the device's properties, which
torch for CPUs does not have, so both get those of an H100. It needs the package triton, and uses private names of
torch 2.13.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux_batch.bench.figures import table
from flux_batch.bench.pipeline.no_device import NoDevice, register_guard
from flux_batch.bench.pipeline.random_model import SIZES
from flux_batch.errors import JobError
from flux_batch.model.layers import DoubleStreamBlock, SingleStreamBlock
from flux_batch.model.optimize.compile import use_compilable_functions
from flux_batch.model.optimize.quantize import apply_fp8

_CUDA = torch.device("cuda")
# How inductor names the kernels it writes: torch/_inductor/codegen/triton.py.
_KINDS = {"poi": "elementwise", "red": "reductions", "per": "reductions of short rows"}
_TEXT_TOKENS, _IMAGE_TOKENS = 512, 4096
# The properties of an H100 that inductor asks for: https://docs.nvidia.com/cuda/hopper-tuning-guide/
_H100 = SimpleNamespace(
    name="H100",
    major=9,
    minor=0,
    multi_processor_count=132,
    warp_size=32,
    gcnArchName="",
    L2_cache_size=50 << 20,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    regs_per_multiprocessor=65536,
    total_memory=80 << 30,
    shared_memory_per_block=48 << 10,
    shared_memory_per_block_optin=227 << 10,
    shared_memory_per_multiprocessor=228 << 10,
)


def bench_lowering() -> dict[str, Any]:
    """Count the kernels of a double and a single block in bfloat16 and fp8. Raises: JobError if it is impossible."""
    if importlib.util.find_spec("triton") is None:
        raise JobError("bench lowering: triton is not installed; pip install triton")
    try:
        register_guard()
    except RuntimeError as error:
        raise JobError(f"bench lowering: {error}") from error
    blocks = {
        f"{kind} block, {'fp8' if fp8 else 'bfloat16'}": _kernels_of(kind, fp8)
        for kind in ("double", "single")
        for fp8 in (False, True)
    }
    return {"benchmark": "lowering", "device": "H100, not there", "torch": str(torch.__version__), "blocks": blocks}


def format_lowering(figures: dict[str, Any]) -> str:
    """Return the counts as a table, by inductor's kinds; the names of kernels are in the figures."""
    rows = []
    for name, found in figures["blocks"].items():
        counts = (sum(each.startswith(f"triton_{kind}_") for each in found["triton"]) for kind in _KINDS)
        rows.append([name, str(len(found["triton"])), *map(str, counts), str(len(found["calls"]))])
    return table([["block", "kernels", *_KINDS.values(), "library calls"], *rows])


def _kernels_of(kind: str, fp8: bool) -> dict[str, list[str]]:
    """Return the kernels and library calls of a block of FLUX.1-dev's size, in order."""
    block = _block(kind, fp8)  # built before the mode, in which modules cannot change their dtype
    with _h100(), NoDevice(allow_non_fake_inputs=True) as mode:
        _move(block)
        source = _lowered(*_call(block), mode)
    return {
        "triton": re.findall(r"^\s+(triton_\w+)\.run\(", source, re.M),
        "calls": re.findall(r"^\s+(?:\w+ = )?(?:extern_kernels|torch\.ops\.aten)\.(\w+)", source, re.M),
    }


def _block(kind: str, fp8: bool) -> nn.Module:
    """Return a block without numbers, in bfloat16 or with fp8 matrices."""
    params = SIZES["dev"].transformer
    with torch.device("meta"):
        sizes = params.hidden_size, params.num_heads, params.mlp_hidden_dim
        block = DoubleStreamBlock(*sizes, params.qkv_bias) if kind == "double" else SingleStreamBlock(*sizes)
    blocks = nn.ModuleList([block.bfloat16().requires_grad_(False)])
    if fp8:
        apply_fp8(nn.ModuleDict({f"{kind}_blocks": blocks}), matmul=True)
    return blocks[0]


def _move(block: nn.Module) -> None:
    """Move a block to the simulated device, prepared as a pipeline compiles it there."""
    for module in block.modules():
        for name, value in module.named_parameters(recurse=False):
            on_device = torch.empty(value.shape, dtype=value.dtype, device=_CUDA)
            module._parameters[name] = nn.Parameter(on_device, requires_grad=False)
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=_CUDA)
    use_compilable_functions(block, _CUDA)


def _call(block: nn.Module) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
    """Return a call of a block, and its inputs for 1024 x 1024 pixels."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device=_CUDA)

    params = SIZES["dev"].transformer
    tokens, hidden = _TEXT_TOKENS + _IMAGE_TOKENS, params.hidden_size
    pe = torch.empty((tokens, sum(params.axes_dim) // 2, 2), device=_CUDA)
    if isinstance(block, DoubleStreamBlock):
        modulation = empty(1, 1, 6 * hidden), empty(1, 1, 6 * hidden)
        inputs = empty(1, _IMAGE_TOKENS, hidden), empty(1, _TEXT_TOKENS, hidden), *modulation, pe
        return lambda img, txt, img_mod, txt_mod, pe: block(img, txt, (img_mod, txt_mod), pe), inputs
    return lambda x, mod, pe: block(x, mod, pe, tokens), (empty(1, tokens, hidden), empty(1, 1, 3 * hidden), pe)


def _lowered(function: Callable[..., Any], inputs: tuple[Tensor, ...], mode: NoDevice) -> str:
    """Return the program that inductor writes for a function."""
    from torch._inductor.debug import DebugContext
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.fx_passes.post_grad import post_grad_passes, view_to_reshape
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V
    from torch.fx.experimental.proxy_tensor import make_fx

    with torch.no_grad():
        traced = make_fx(function, decomposition_table=select_decomp_table())(*inputs)
    view_to_reshape(traced)  # type: ignore[no-untyped-call]
    graph = GraphLowering(traced, example_inputs=inputs, shape_env=None, is_inference=True)
    with V.set_debug_handler(DebugContext()), V.set_fake_mode(mode), V.set_graph_handler(graph):
        post_grad_passes(traced, True)
        graph.run(*inputs)
        program, _ = graph.codegen()
    return str(program.value)


@contextmanager
def _h100() -> Iterator[None]:
    """Make torch see an H100, on which attention is cuDNN's."""
    from torch._dynamo.device_interface import CudaInterface

    def answer(value: Any) -> Callable[..., Any]:
        return lambda *_: value

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found: Tensor = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, False)[0]
        return found

    answers: list[tuple[Any, dict[str, Any]]] = [
        (
            torch.cuda,
            {
                "is_available": True,
                "current_device": 0,
                "device_count": 1,
                "get_device_properties": _H100,
                "get_device_capability": (9, 0),
                "_exchange_device": -1,
                "_maybe_exchange_device": -1,
            },
        ),
        (
            CudaInterface,
            {
                "is_available": True,
                "current_device": 0,
                "get_device_properties": _H100,
                "get_compute_capability": 90,
            },
        ),
        (CudaInterface.Worker, {"current_device": 0, "get_device_properties": _H100}),
        (torch.utils._triton, {"triton_hash_with_backend": "none"}),
    ]
    with ExitStack() as stack:
        for place, named in answers:
            for name, value in named.items():
                given = answer(value) if place in (torch.cuda, torch.utils._triton) else staticmethod(answer(value))
                stack.enter_context(patch.object(place, name, given))
        stack.enter_context(patch.object(F, "scaled_dot_product_attention", attention))
        yield
