"""The attention kernels of the denoising loop, chosen by device and tried before use.

On Hopper, the denoising loop uses FlashAttention 3 if its package is installed, else cuDNN. Text encoders and the
autoencoder keep torch's own order, which begins with cuDNN if torch trusts its version.
FlashAttention 3 replaces torch's flash attention in the whole process, since torch offers no other switch. The order of
kernels is also a setting of the process and not guarded by a lock: if calls overlap in threads, the end of one can
switch the other to torch's order, which changes the last bits of its images. Published for FLUX.1 at 1024 x 1024 and 28
steps on an H200: 4.32 s with SDPA's default, 3.73 s with FlashAttention 3 (sgl-project/sglang, pull request 19673). At
FLUX's lengths cuDNN is as fast on an H100: 631 and 632 TFLOP/s (pytorch/pytorch, issue 142132). Other GPUs keep torch's
order: on Ampere flash attention is faster than cuDNN (huggingface/transformers, pull request 48163), and on datacenter
Blackwell torch itself prefers cuDNN. None of this was measured with this code yet.
"""

from __future__ import annotations

import importlib.util
import logging
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention import (
    SDPBackend,
    activate_flash_attention_impl,
    current_flash_attention_impl,
    restore_flash_attention_impl,
    sdpa_kernel,
)

from flux_batch.model.optimize.device_failure import raise_device_failure

# The only major compute capability that FlashAttention 3 supports (torch 2.13, torch/nn/attention/_fa3.py).
_HOPPER = 9
_FLASH_3 = "FA3"
_FLASH_3_PACKAGE = "flash_attn_interface"
# Up to this version, cuDNN's attention can read out of bounds at lengths that are not multiples of 128, so torch 2.13
# prefers only later ones (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp; pytorch issue 169849).
_LAST_UNSAFE_CUDNN = 91500
# Kernels add in different orders, so bfloat16 numbers below 1 differ in a few of their last bits.
_MOST_DIFFERENCE = 2**-6

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class AttentionKernels:
    """The kernels that attention tries, in this order; an empty order is torch's own."""

    name: str = "torch"
    order: tuple[SDPBackend, ...] = ()

    def first(self) -> AbstractContextManager[object]:
        """Return a context in which attention tries these kernels first."""
        return sdpa_kernel(list(self.order), set_priority=True) if self.order else nullcontext()


TORCH_ATTENTION = AttentionKernels()


def choose_attention(device: torch.device) -> AttentionKernels:
    """Return the fastest attention kernels that work on this device."""
    # AMD's GPUs also have the device type cuda, and the MI200 and MI300 report the major capability 9.
    if device.type != "cuda" or torch.version.hip is not None:
        return TORCH_ATTENTION
    if torch.cuda.get_device_capability(device)[0] != _HOPPER:
        return TORCH_ATTENTION
    rest = SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH
    if _activate_flash_3(device):
        return AttentionKernels("flash3", rest)
    cudnn = torch.backends.cudnn.version() or 0
    if cudnn > _LAST_UNSAFE_CUDNN and attention_works(SDPBackend.CUDNN_ATTENTION, device):
        return AttentionKernels("cudnn", (SDPBackend.CUDNN_ATTENTION, *rest))
    return TORCH_ATTENTION


def attention_works(backend: SDPBackend, device: torch.device) -> bool:
    """Return whether a kernel computes a small attention correctly; log the reason if it does not.

    Raises: the error of a device that has failed.
    """
    generator = torch.Generator().manual_seed(0)
    # FLUX's head size and layout, and a length that is not a multiple of any kernel's tile.
    numbers = torch.randn(3, 1, 200, 2, 128, generator=generator, device="cpu")
    q, k, v = numbers.to(device, torch.bfloat16).transpose(2, 3)
    reason = ""
    try:
        for queries in (q, q[:, :, -72:]):  # the last block has queries of the image only
            with sdpa_kernel(backend):
                found = F.scaled_dot_product_attention(queries, k, v)
            with sdpa_kernel(SDPBackend.MATH):
                expected = F.scaled_dot_product_attention(queries, k, v)
            if not torch.allclose(found, expected, rtol=0, atol=_MOST_DIFFERENCE):
                reason = "its numbers are wrong"
        if not reason:
            return True
    except Exception as error:  # of any class: a package of another version, a library without a plan
        raise_device_failure(error, device)
        reason = str(error)
    log.warning("attention by %s does not work here, the next kernel is taken: %s", backend.name, reason)
    return False


def _activate_flash_3(device: torch.device) -> bool:
    """Replace torch's flash attention in this process by FlashAttention 3. Returns: True if it exists and works."""
    if current_flash_attention_impl() == _FLASH_3:
        return True
    if importlib.util.find_spec(_FLASH_3_PACKAGE) is None:
        return False
    try:
        activate_flash_attention_impl(_FLASH_3)
    except Exception as error:  # of any class: the package is imported
        log.warning("%s cannot be used, the next kernel is taken: %s", _FLASH_3_PACKAGE, error)
        return False
    if attention_works(SDPBackend.FLASH_ATTENTION, device):
        return True
    restore_flash_attention_impl()
    return False
