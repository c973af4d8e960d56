"""The benchmark of single kernels: attention, products in fp8, the decoder; each with its alternatives."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flux_batch.bench.figures import alternated, number, table
from flux_batch.bench.machine import synchronize
from flux_batch.bench.pipeline.random_model import SIZES, random_autoencoder
from flux_batch.bench.source import SizeName
from flux_batch.model.autoencoder import AutoEncoder
from flux_batch.model.optimize.attention import TORCH_ATTENTION, choose_attention
from flux_batch.model.optimize.compile import apply_compile_to_decoder, set_compile_options
from flux_batch.model.optimize.quantize import fp8_matmul, fp8_matmul_obstacle, to_fp8
from flux_batch.model.params import FluxParams
from flux_batch.sampling_params import num_image_tokens

_Function = Callable[[], Any]
_TEXT_TOKENS = 512
# A size whose number of tokens, with those of a text, is not a multiple of 128.
_ODD_SIZE = (1152, 896)


def bench_kernels(
    size: SizeName, device: torch.device, dtype: torch.dtype, *, side: int, repeats: int, compiled: bool = True
) -> dict[str, Any]:
    """Measure the kernels of a model of a size. compiled: also measure them with torch.compile."""
    params = SIZES[size].transformer
    with torch.inference_mode():
        return {
            "benchmark": "kernels",
            "model": f"random weights, size {size}",
            "device": str(device),
            "side": side,
            "repeats": repeats,
            "attention": _attention(params, device, dtype, side, repeats, compiled),
            "products": _products(params, device, side, repeats),
            "decoder": _decoder(size, device, dtype, side, repeats, compiled),
        }


def _attention(
    params: FluxParams, device: torch.device, dtype: torch.dtype, side: int, repeats: int, compiled: bool
) -> dict[str, Any]:
    """Return the kernel that attention takes, its milliseconds beside torch's own choice, and its error."""
    kernels = choose_attention(device)
    q, k, v = _random_qkv(params, side, side, device, dtype)

    def attend(function: Callable[..., Tensor], chosen: Any) -> Tensor:
        with chosen.first():
            return function(q, k, v)

    plain = F.scaled_dot_product_attention
    runs: dict[str, _Function] = {
        "chosen": partial(attend, plain, kernels),
        "torch": partial(attend, plain, TORCH_ATTENTION),
    }
    if compiled:
        set_compile_options(kernels)  # code compiled with other kernels must not come from torch's cache
        runs["compiled"] = partial(attend, torch.compile(lambda *qkv: plain(*qkv)), kernels)
    ran = {name: _kernels_of(run, device) for name, run in runs.items() if name != "torch"}
    if compiled:
        torch._dynamo.reset()  # the next one comes out of torch's cache of compiled code
        ran["from the cache"] = _kernels_of(runs["compiled"], device)
    odd = _random_qkv(params, *_ODD_SIZE, device, dtype) if side > 512 else (q, k, v)
    with kernels.first():
        found = plain(*odd)
    with sdpa_kernel(SDPBackend.MATH):
        expected = plain(*odd)
    return {
        "chosen": kernels.name,
        "ran": ran,
        "milliseconds": _milliseconds(runs, device, repeats),
        "difference_from_math": float((found - expected).abs().max()),
    }


def _random_qkv(
    params: FluxParams, width: int, height: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values of an image with its text: (1, heads, tokens, head size) each."""
    tokens = num_image_tokens(width, height) + _TEXT_TOKENS
    shape = (3, 1, params.num_heads, tokens, params.hidden_size // params.num_heads)
    q, k, v = torch.randn(shape, device=device, dtype=torch.float32).to(dtype)
    return q, k, v


def _kernels_of(run: _Function, device: torch.device) -> list[str]:
    """Return the kernels that a function launches on a GPU, sorted by time; [] on a CPU."""
    run()
    if device.type != "cuda":
        return []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        synchronize(device)
    events = sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)
    return [event.key[:80] for event in events if event.self_device_time_total][:3]


def _products(params: FluxParams, device: torch.device, side: int, repeats: int) -> dict[str, Any]:
    """Return the milliseconds of a single block's two products: in bfloat16, and in fp8 with both accumulations."""
    if obstacle := fp8_matmul_obstacle(device):
        return {"obstacle": obstacle}
    rows = num_image_tokens(side, side) + _TEXT_TOKENS
    hidden, wide = params.hidden_size, params.mlp_hidden_dim
    figures: dict[str, Any] = {}
    for inputs, outputs in ((hidden, 3 * hidden + wide), (hidden + wide, hidden)):
        a, b = (torch.randn(n, inputs, device=device).bfloat16() for n in (rows, outputs))
        bias = torch.zeros(outputs, device=device, dtype=torch.bfloat16)
        narrow = *to_fp8(a), *to_fp8(b), bias
        runs: dict[str, _Function] = {
            "bfloat16": partial(F.linear, a, b, bias),
            "fp8": partial(fp8_matmul, *narrow),
            "fp8, fast accumulation": partial(fp8_matmul, *narrow, fast_accumulation=True),
        }
        figures[f"{rows} x {inputs} x {outputs}"] = _milliseconds(runs, device, repeats)
    return figures


def _decoder(
    size: SizeName, device: torch.device, dtype: torch.dtype, side: int, repeats: int, compiled: bool
) -> dict[str, Any]:
    """Return the milliseconds of decoding an image in both memory formats, plain and compiled."""
    plain = random_autoencoder(size, dtype, device)
    downscale, channels = plain.params.downscale, plain.params.z_channels
    latents = torch.randn((1, channels, side // downscale, side // downscale), device=device).to(dtype)
    runs: dict[str, _Function] = {}
    for name, layout in (("contiguous", torch.contiguous_format), ("channels last", torch.channels_last)):
        for is_compiled in (False, True) if compiled else (False,):
            model: AutoEncoder = copy.deepcopy(plain)
            for parameter in model.parameters():
                if parameter.ndim == 4:
                    parameter.data = parameter.data.contiguous(memory_format=layout)
            if is_compiled:
                apply_compile_to_decoder(model)
            runs[f"{name}{', compiled' if is_compiled else ''}"] = partial(model.decode, latents)
    return _milliseconds(runs, device, repeats)


def _milliseconds(runs: Mapping[str, _Function], device: torch.device, repeats: int) -> dict[str, Any]:
    """Return the milliseconds of functions, measured in turn."""

    def waiting(run: _Function, _: int) -> None:
        run()
        synchronize(device)

    seconds = alternated({name: partial(waiting, run) for name, run in runs.items()}, repeats, warm_ups=2)
    return {name: figures.scaled(1000).to_json() for name, figures in seconds.items()}


def format_kernels(figures: dict[str, Any]) -> str:
    """Return the figures as text for people."""
    attention, products = figures["attention"], figures["products"]
    rows = [["", "ms", "least", "most"]]
    groups = {"attention": attention["milliseconds"], "decoder": figures["decoder"]}
    if "obstacle" not in products:
        groups |= products
    for group, runs in groups.items():
        for name, ms in runs.items():
            rows.append([f"{group}, {name}", *(number(ms[key]) for key in ("median", "least", "most"))])
    lines = [
        f"{figures['model']}, {figures['device']}: {figures['side']} x {figures['side']}, medians of "
        f"{figures['repeats']}",
        table(rows),
        f"attention  {attention['chosen']} is chosen, and differs from math by at most "
        f"{number(attention['difference_from_math'])}",
    ]
    lines += [f"kernels    {name}: {', '.join(ran)}" for name, ran in attention["ran"].items() if ran]
    if "obstacle" in products:
        lines.append(f"no fp8     {products['obstacle']}")
    return "\n".join(lines)
