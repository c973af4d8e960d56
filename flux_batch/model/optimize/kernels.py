"""The kernels of CPUs and of MPS, chosen from outside the model; results differ in the last bits only.

The kernels of MPS have not run on one yet.

The choice depends on the kind of device and never on a timing, which would change the last bits of images from worker
to worker.

In float32, torch's matrix products on a CPU use MKL, which runs its AVX-512 kernels on Intel's CPUs only. oneDNN, which
torch uses for bfloat16, chooses by the features of the CPU: on two cores of an AMD EPYC (Zen 5) it computed the widest
product of a FLUX block of hidden size 768 at 0.47 TFLOP/s, MKL at 0.22.
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
# One step at a time: some kernels (bfloat16 with AMX) round a row differently when it is multiplied with others.
_MODULATION_ROWS_ON_CPU = 1


def apply_cpu_kernels(model: Flux) -> None:
    """Make a transformer on a CPU use the fastest kernels; change nothing on another device."""
    weight = model.img_in.weight
    if weight.device.type != "cpu":
        return
    model.modulation_rows = _MODULATION_ROWS_ON_CPU
    uses_onednn = weight.dtype == torch.float32 and _is_mkl_slow()
    for module in model.modules():
        if isinstance(module, (SelfAttention, SingleStreamBlock)):
            module.project = project_apart
        elif isinstance(module, BlockLinear) and uses_onednn and module.matmul is F.linear:  # not compiled yet
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

    On a CPU a single wide product saves no time. Some kernels (bfloat16 with AMX) round it differently than the narrow
    products of diffusers, and a result of more than 32 MB is allocated from the system every time.
    """
    if not isinstance(linear, BlockLinear):
        return project(linear, x, widths, lengths)
    biases = [None] * len(widths) if linear.bias is None else linear.bias.split(widths)
    parts = zip(linear.weight.split(widths), biases, lengths, strict=True)
    if x.dtype == torch.float32:
        return [linear.matmul(x[:, -length:], weight, bias) for weight, bias, length in parts]
    # Multiply all rows and cut afterwards: the same kernels also round a product of fewer rows differently.
    return [linear.matmul(x, weight, bias)[:, -length:] for weight, bias, length in parts]


def onednn_matmul(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Apply a linear layer in float32 by oneDNN: x (..., i), weight (o, i), bias (o,) -> (..., o)."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


# An opaque call for torch.compile, whose own use of this kernel needs constant weights. Uncompiled code does not use
# it, since its first call makes torch import the compiler, which takes as long as importing torch.
opaque_onednn_matmul = torch.library.custom_op("flux_batch::onednn_matmul", onednn_matmul, mutates_args=())


@opaque_onednn_matmul.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def cpu_info(field: str) -> str:
    """Return a field of the first core in /proc/cpuinfo, e.g. `vendor_id` or `model name`; "" if it is absent."""
    with suppress(OSError):
        for line in CPU_INFO.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == field:
                return value.strip()
    return ""


def _is_mkl_slow() -> bool:
    """Return whether oneDNN multiplies faster than MKL: on a CPU with AVX-512 that is not Intel's."""
    has_both = torch.backends.mkl.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    has_avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return has_both and has_avx512 and cpu_info("vendor_id") not in ("GenuineIntel", "")
