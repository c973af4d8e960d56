"""The dtype that a device computes natively, which is the default; autocast changes none."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from flux_batch.model.optimize.kernels import cpu_info

# Compute capabilities: bfloat16 from Ampere on, float16 from Volta on (CUDA C++ Programming Guide, arithmetic
# instructions).
_BFLOAT16_CAPABILITY = (8, 0)
_FLOAT16_CAPABILITY = (7, 0)


def native_dtype(device: torch.device | str) -> torch.dtype:
    """Return the narrowest dtype at full speed in which FLUX.1 stays finite.

    CUDA: bfloat16 from Ampere on, float16 on Volta and Turing, float32 before. MPS: float16 (not run there). CPU:
    bfloat16 if it has instructions for it, else float32.
    """
    device = torch.device(device)
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability >= _BFLOAT16_CAPABILITY:
            return torch.bfloat16
        return torch.float16 if capability >= _FLOAT16_CAPABILITY else torch.float32
    if device.type == "mps":
        return torch.float16
    return torch.bfloat16 if _cpu_multiplies_bfloat16() else torch.float32


def _cpu_multiplies_bfloat16() -> bool:
    """Return whether torch's products on this CPU use instructions for bfloat16.

    Without them oneDNN converts: on an EPYC with AVX2 a product took 6 times as long as in float32, a convolution 58
    times. torch's own check already passes on AVX512BW, where bfloat16 is emulated. ATEN_CPU_CAPABILITY and
    ONEDNN_MAX_CPU_ISA, which can switch instructions off, are respected.
    """
    if platform.machine().lower() in ("aarch64", "arm64"):
        return has_cpu_feature("bf16") and onednn_takes_bfloat16()
    if torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2") or not onednn_takes_bfloat16():
        return False
    return has_cpu_feature("avx512_bf16") or has_cpu_feature("amx_bf16")


def onednn_takes_bfloat16() -> bool:
    """Return whether oneDNN multiplies in bfloat16 here (on ARM through the Compute Library)."""
    is_arm = platform.machine().lower() in ("aarch64", "arm64")
    mkldnn = torch.ops.mkldnn
    return bool(mkldnn._is_mkldnn_acl_supported() if is_arm else mkldnn._is_mkldnn_bf16_supported())


def has_cpu_feature(name: str) -> bool:
    """Return whether the CPU has a feature, by the name that torch and Linux use."""
    if hasattr(torch.cpu, "get_capabilities"):  # from torch 2.12 on
        return bool(torch.cpu.get_capabilities().get(name, False))
    return name in cpu_info("flags").split()


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype as in the settings, e.g. "bfloat16"."""
    return str(dtype).removeprefix("torch.")


@contextmanager
def without_autocast() -> Iterator[None]:
    """Run the block in the dtypes of its tensors, whatever a program casts to."""
    with ExitStack() as stack:
        for kind in ("cpu", "cuda", "mps"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield
