"""The kernels of CPUs and of MPS, chosen from outside the model."""

All compute the same but for the last bits. Those of MPS have not run on one yet.

Every choice is by the kind of the device and never by the clock, which would change the last bits of images from one
worker to the next.

On a CPU in float32 torch asks MKL for matrix products, which keeps its AVX-512 kernels for CPUs that Intel made.
oneDNN, which torch brings too and asks in bfloat16, goes by what a CPU can do: on two cores of an AMD EPYC (Zen 5) it
did the widest product of a FLUX block of hidden size 768 at 0.47 TFLOP/s, MKL at 0.22.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux_batch.model.layers import BlockLinear, JointAttention, SelfAttention, SingleStreamBlock, project
from flux_batch.model.rope import rotate_in_parts
from flux_batch.model.transformer import Flux

CPU_INFO = Path("/proc/cpuinfo")
# One step at a time: for many rows some kernels (bfloat16 with AMX) round each row differently than alone.
_MODULATION_ROWS_ON_CPU = 1


def apply_cpu_kernels(model: Flux) -> None:
    """Make a transformer on a CPU use the kernels that suit it; change nothing on another device."""
    weight = model.img_in.weight
    if weight.device.type != "cpu":
        return
    model.modulation_rows = _MODULATION_ROWS_ON_CPU
    uses_onednn = weight.dtype == torch.float32 and _is_mkl_slow()
    for module in model.modules():
        if isinstance(module, (SelfAttention, SingleStreamBlock)):
            module.project = project_apart
        elif isinstance(module, BlockLinear) and uses_onednn and module.matmul is F.linear:  # not compiled before
            module.matmul = onednn_matmul


def apply_mps_kernels(model: Flux, device: torch.device) -> None:
    """Make a transformer on MPS rotate without complex numbers, which MPS lacks; change nothing on another device."""
    if device.type != "mps":
        return
    for module in model.modules():
        if isinstance(module, JointAttention):
            module.rotate = rotate_in_parts


def project_apart(linear: nn.Module, x: Tensor, widths: Sequence[int], lengths: Sequence[int]) -> Sequence[Tensor]:
    """Return the same as `layers.project`, by one product for each projection.

    On a CPU a single product saves nothing, some kernels (bfloat16 with AMX) round it differently than the narrow ones
    of diffusers, and a result of more than 32 MB is new memory from the system every time.
    """
    if not isinstance(linear, BlockLinear):
        return project(linear, x, widths, lengths)
    biases = [None] * len(widths) if linear.bias is None else linear.bias.split(widths)
    parts = zip(linear.weight.split(widths), biases, lengths, strict=True)
    if x.dtype == torch.float32:
        return [linear.matmul(x[:, -length:], weight, bias) for weight, bias, length in parts]
    # The same kernels round a product of fewer rows differently, too.
    return [linear.matmul(x, weight, bias)[:, -length:] for weight, bias, length in parts]


def onednn_matmul(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Apply a linear layer in float32 by oneDNN: x (..., i), weight (o, i), bias (o,) -> (..., o)."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


# One opaque call for torch.compile, whose own way to this kernel takes nothing but constant weights. Not for others:
# torch imports its compiler when it is first called, which takes as long as torch itself.
opaque_onednn_matmul = torch.library.custom_op("flux_batch::onednn_matmul", onednn_matmul, mutates_args=())


@opaque_onednn_matmul.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def cpu_info(field: str) -> str:
    """Return what Linux says of the first core, e.g. its `vendor_id` or `model name`; "" if it says nothing."""
    with suppress(OSError):
        for line in CPU_INFO.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == field:
                return value.strip()
    return ""


def _is_mkl_slow() -> bool:
    """Return whether oneDNN would multiply faster: an AVX-512 CPU, not Intel's, with MKL in torch."""
    has_both = torch.backends.mkl.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    has_avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return has_both and has_avx512 and cpu_info("vendor_id") not in ("GenuineIntel", "")
