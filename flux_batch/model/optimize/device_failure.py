"""The failure of a device, as opposed to a failure of the code on it."""

from __future__ import annotations

import torch


def raise_device_failure(error: Exception, device: torch.device) -> None:
    """Raise the error of a trial on a device that is no answer to it: no memory was left, or the device has failed.

    CUDA repeats the error of a device that has failed, e.g. of its memory, at every further call.
    """
    if isinstance(error, torch.OutOfMemoryError):
        raise error
    if device.type == "cuda":
        torch.cuda.synchronize(device)
