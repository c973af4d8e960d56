"""The device and dtype of a pipeline: defaults, names, and what fits into memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from flux_batch.errors import InvalidSetting
from flux_batch.model.checkpoint.detect import read_shapes
from flux_batch.model.footprint import weight_bytes
from flux_batch.model.optimize.dtypes import dtype_name, native_dtype
from flux_batch.model.optimize.host_memory import free_memory
from flux_batch.pipeline.errors import checkpoint_errors
from flux_batch.sampling_params import Quantization

# Values that mean the default dtype.
AUTO = (None, "auto")
# The share of free memory that weights may take: the rest is for activations, libraries and the system.
_SHARE_FOR_WEIGHTS = 0.8


def must_be_narrow(device: torch.device, dtype: torch.dtype, paths: Sequence[Path]) -> bool:
    """Return whether the model at `paths` fits into memory in float32 only with narrow matrices.

    False unless the device is a CPU: only a CPU widens the matrices for each product. Raises: CheckpointError.
    """
    if device.type != "cpu" or dtype != torch.float32:
        return False
    with checkpoint_errors():
        shapes = read_shapes(paths)
    return not fits_into_memory(sum(weight_bytes(part, each, "float32") for part, each in shapes.items()))


def default_device() -> torch.device:
    """Return the GPU of this process, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def to_device(device: str | torch.device | int) -> torch.device:
    """Return the device of that name. Raises: InvalidSetting for an invalid name, or a device that does not exist."""
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        what = f"device = {device!r}: must be the name of a device, as cuda or cpu"
        raise InvalidSetting(what, field="device") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise InvalidSetting(f"device = {device}: there is no CUDA device here; use cpu", field="device")
    if found.type == "cuda" and found.index and found.index >= torch.cuda.device_count():
        last = torch.cuda.device_count() - 1
        raise InvalidSetting(f"device = {device}: the last CUDA device here is cuda:{last}", field="device")
    return found


def _default_dtype(device: torch.device, quantization: Quantization = "none") -> torch.dtype:
    """Return the native dtype of a device, unless `quantization` needs another one."""
    if quantization == "fp8_matmul":
        return torch.bfloat16
    return torch.float32 if quantization == "bfloat16" else native_dtype(device)


def to_dtype(name: torch.dtype | str | None, device: torch.device, quantization: Quantization = "none") -> torch.dtype:
    """Return the dtype of that name, the default for None and `auto`.

    Raises: InvalidSetting for a dtype in which images cannot be computed.
    """
    if name in AUTO:
        return _default_dtype(device, quantization)
    dtype = getattr(torch, name, None) if isinstance(name, str) else name
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise InvalidSetting(f"torch_dtype = {name}: must be bfloat16, float16, float32 or auto", field="torch_dtype")
    return dtype


def fits_into_memory(num_bytes: int) -> bool:
    """Return whether weights of that size fit into free memory; True if its size is unknown."""
    free = free_memory()
    return free is None or num_bytes <= _SHARE_FOR_WEIGHTS * free


def slow_dtype(device: torch.device, dtype: torch.dtype) -> str:
    """Return the name of a device's native dtype if `dtype` is slow there, else ""."""
    native = native_dtype(device)
    return "" if dtype in (native, torch.float32) else dtype_name(native)
