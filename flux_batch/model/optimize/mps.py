"""The kernels for Apple's GPUs, chosen from outside the model. Not run on such a GPU yet."""

from __future__ import annotations

import torch

from flux_batch.model.layers import JointAttention
from flux_batch.model.optimize.compile import rotate_in_parts
from flux_batch.model.transformer import Flux


def apply_mps_kernels(model: Flux, device: torch.device) -> None:
    """Make a transformer on MPS rotate without complex numbers, which MPS lacks.

    On another device nothing changes.
    """
    if device.type != "mps":
        return
    for module in model.modules():
        if isinstance(module, JointAttention):
            module.rotate = rotate_in_parts
