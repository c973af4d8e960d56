"""Which library multiplies in float32 on a CPU: both compute the same, and differ in speed and the last bits.

torch asks MKL, which keeps its AVX-512 kernels for CPUs that Intel made. oneDNN, which torch brings too and asks in
bfloat16, goes by what a CPU can do: on two cores of an AMD EPYC (Zen 5) it multiplied the widest product of a FLUX
block of hidden size 768 at 0.47 TFLOP/s, MKL at 0.22. The choice is by the kind of CPU and never by the clock, which
would change the last bits of images from one worker to the next.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flux_batch.model.layers import Linear
from flux_batch.model.optimize.cpu_info import cpu_info
from flux_batch.model.transformer import Flux


def choose_products(model: Flux) -> None:
    """Let the blocks of a transformer on a CPU multiply in float32 by oneDNN where MKL would be the slower one."""
    weight = model.img_in.weight
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or not is_mkl_slow():
        return
    for module in model.modules():
        if isinstance(module, Linear):
            module.product = product_by_onednn


def is_mkl_slow() -> bool:
    """Whether this CPU has AVX-512 and is none of Intel's, and torch asks MKL and could ask oneDNN."""
    has_both = torch.backends.mkl.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    has_avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return has_both and has_avx512 and cpu_info("vendor_id") not in ("GenuineIntel", "")


# One opaque call for torch.compile, whose own way to this kernel takes nothing but constant weights.
@torch.library.custom_op("flux_batch::product_by_onednn", mutates_args=())
def product_by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Apply a linear layer, float32: x (..., i), weight (o, i), bias (o,) -> (..., o)."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@product_by_onednn.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])
