"""Which attention kernels are asked first, by device: all compute the same, and differ in speed and the last bit.

The order is fixed by the kind of device and never measured while a run is at work: a choice by the clock would change
the last bits of images from one worker to the next. On Hopper: FlashAttention 3 where its package is installed, else
cuDNN. FLUX.1 at 1024 x 1024 and 28 steps on an H200, published: 4.32 s with SDPA's default, 3.73 s with
FlashAttention 3 (sgl-project/sglang, pull request 19673). Not measured with this code yet.
"""

from __future__ import annotations

import importlib.util
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn.attention import SDPBackend, activate_flash_attention_impl, current_flash_attention_impl, sdpa_kernel

HOPPER = (9, 0)
FLASH_3 = "FA3"
FLASH_3_PACKAGE = "flash_attn_interface"


def attention_order(device: torch.device) -> AbstractContextManager[object]:
    """Prefer the kernels that are fastest on this kind of device, within the context; nothing to choose on a CPU."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < HOPPER:
        return nullcontext()
    rest = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    first = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
    if has_flash_3():
        first.reverse()
    return sdpa_kernel(first + rest, set_priority=True)


def has_flash_3() -> bool:
    """Tell whether FlashAttention 3 is what torch's flash attention is in this process, made so if it is installed."""
    if current_flash_attention_impl() == FLASH_3:
        return True
    if importlib.util.find_spec(FLASH_3_PACKAGE) is None:
        return False
    activate_flash_attention_impl(FLASH_3)
    return True
