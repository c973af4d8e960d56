"""A checkpoint as a lazy state dict: dense tensors of one dtype on one device, each read on access."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flux_batch.model.checkpoint.checkpoint import FP8_DTYPES, Checkpoint, StoredTensor, open_safetensors
from flux_batch.model.checkpoint.gguf_blocks import dequantize
from flux_batch.model.checkpoint.gguf_header import QUANTIZED_DTYPES, stored_size

_GGUF_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Numbers to decode at a time, so that their fp32 form needs little memory even for a large tensor.
CHUNK_NUMBERS = 2**20


@dataclass(frozen=True, slots=True)
class Pieces:
    """The pieces of a tensor in a file: their names, and the function that joins them."""

    names: Sequence[str]
    join: Callable[[Sequence[Tensor]], Tensor]


class StoredState(Mapping[str, Tensor]):
    """A checkpoint as a state dict that reads each tensor on demand, without a copy.

    Files are mapped: on the CPU, a tensor that needs no conversion shares the mapped pages of the file. `parts`: the
    pieces of each tensor, by name, if the file has another layout; `dtypes`: exceptions from `dtype`, by tensor name.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        *,
        parts: Mapping[str, Pieces] | None = None,
        dtypes: Mapping[str, torch.dtype] | None = None,
    ) -> None:
        self._tensors = checkpoint.tensors
        self._parts = parts
        self._files = {path: _map_file(path, tensor) for path, tensor in _tensor_of_each_file(checkpoint).items()}
        self._dtype = dtype
        self._dtypes = dtypes or {}
        self.device = device

    def __getitem__(self, name: str) -> Tensor:
        """Return the tensor `name`, decoded; fp8 times its scale is computed in fp32 and rounded once."""
        return self.read(name, self.dtype(name))

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """Return the tensor `name` in another dtype."""
        if self._parts is None:
            return self._dense(self._tensors[name], dtype)
        parts = self._parts[name]
        return parts.join([self._dense(self._tensors[part], dtype) for part in parts.names])

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of the tensor `name` as this state reads it."""
        return self._dtypes.get(name, self._dtype)

    def fp8(self, name: str) -> tuple[Tensor, Tensor] | None:
        """Return an fp8 tensor as it is stored, and its scale: fp32, () or (rows, 1). None for another dtype."""
        parts = Pieces((name,), lambda pieces: pieces[0]) if self._parts is None else self._parts[name]
        stored = [self._tensors[part] for part in parts.names]
        if len({tensor.dtype for tensor in stored}) > 1 or stored[0].dtype not in FP8_DTYPES:
            return None
        weights = [self._as_stored(tensor) for tensor in stored]
        # As bytes: not every device joins fp8 tensors.
        joined = parts.join([weight.to(self.device).view(torch.uint8) for weight in weights]).view(weights[0].dtype)
        scales = [self._scale(tensor) for tensor in stored]
        if len(scales) == 1 and scales[0].ndim == 0:
            return joined, scales[0].to(self.device)
        rows = [scale.expand(len(weight), 1) for scale, weight in zip(scales, weights, strict=True)]
        return joined, parts.join(rows).to(self.device)

    def _dense(self, stored: StoredTensor, dtype: torch.dtype) -> Tensor:
        tensor = self._as_stored(stored)
        if stored.scale is not None:
            scale = self._scale(stored).expand(len(tensor), 1).to(self.device)
            return self._decoded(tensor, stored, dtype, lambda rows, at: rows.float() * scale[at])
        if stored.dtype in QUANTIZED_DTYPES:
            return self._decoded(tensor, stored, dtype, lambda rows, _: dequantize(rows, stored.dtype))
        # Convert on the device: stored numbers are usually narrower, so there are fewer bytes to copy.
        return tensor.to(self.device).to(dtype)

    def _decoded(
        self, tensor: Tensor, stored: StoredTensor, dtype: torch.dtype, decode: Callable[[Tensor, slice], Tensor]
    ) -> Tensor:
        """Return a decoded tensor, decoding some rows at a time in fp32."""
        dense = torch.empty(stored.shape, dtype=dtype, device=self.device)
        rows, out = tensor.reshape(-1, tensor.shape[-1]), dense.view(-1, stored.shape[-1])
        step = max(1, CHUNK_NUMBERS // stored.shape[-1])
        for start in range(0, len(out), step):
            at = slice(start, start + step)
            try:
                out[at] = decode(rows[at].to(self.device), at)
            except ValueError as error:
                raise ValueError(f"{stored.key} in {stored.path}: {error}") from error
        return dense

    def _as_stored(self, stored: StoredTensor) -> Tensor:
        """Return a tensor as it is stored, mapped; packed GGUF rows are bytes."""
        file = self._files[stored.path]
        if stored.offset is None:
            tensor: Tensor = file.get_tensor(stored.key)
            return tensor
        whole = file[stored.offset : stored.offset + stored_size(stored.key, stored.shape, stored.dtype)]
        if stored.dtype in QUANTIZED_DTYPES:
            return whole.view(*stored.shape[:-1], -1)
        return whole.view(_GGUF_DTYPES[stored.dtype]).view(stored.shape)

    def _scale(self, stored: StoredTensor) -> Tensor:
        """Return the scale of an fp8 tensor in fp32: () or (rows, 1)."""
        if stored.scale is None:
            return torch.ones((), dtype=torch.float32, device="cpu")
        scale = self._as_stored(stored.scale).float()
        if not scale.isfinite().all():
            raise ValueError(f"{stored.scale.key} in {stored.path} is not finite: it is damaged, download it again")
        return scale.reshape(()) if scale.numel() == 1 else scale.reshape(-1, 1)

    def __deepcopy__(self, memo: object) -> StoredState:
        return self  # the files are read-only and mapped once

    def __contains__(self, name: object) -> bool:
        # Mapping.__contains__ would read the tensor.
        return name in (self._tensors if self._parts is None else self._parts)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors if self._parts is None else self._parts)

    def __len__(self) -> int:
        return len(self._tensors if self._parts is None else self._parts)


def _tensor_of_each_file(checkpoint: Checkpoint) -> dict[Path, StoredTensor]:
    """Return one tensor of each file of a checkpoint."""
    return {tensor.path: tensor for tensor in checkpoint.tensors.values()}


def _map_file(path: Path, tensor: StoredTensor) -> Any:
    """Map a file without reading it. Returns: safetensors' reader, or the bytes of a GGUF file."""
    if tensor.offset is None:
        return open_safetensors(path)
    return torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
