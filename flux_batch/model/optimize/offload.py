"""Offloading: modules whose weights stay in host memory and are on the device only while they are used."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Lock

import torch
from torch import Tensor, nn

# A layer, the name of one of its tensors, and that tensor in host memory.
_HostTensor = tuple[nn.Module, str, Tensor]


class _OffloadedModules:
    """Modules whose weights stay in host memory; see `apply_offload`."""

    def __init__(self, host_tensors: list[_HostTensor], device: torch.device) -> None:
        self._host_tensors = host_tensors
        self._device = device
        self._turns = Lock()

    @contextmanager
    def on_device(self, *, may_change: bool = False) -> Iterator[None]:
        """Run the block with the weights on the device. may_change: copy them back to host memory afterwards.

        Threads take turns, since one would otherwise remove the weights that another is using.
        """
        if not self._host_tensors:
            yield
            return
        with self._turns:
            # Weights must not become inference tensors, even if the caller is in inference mode.
            with torch.inference_mode(False), torch.no_grad():
                try:
                    for layer, name, tensor in self._host_tensors:
                        _put(layer, name, tensor.to(self._device, non_blocking=self._device.type == "cuda"))
                except BaseException:
                    self.leave_device()
                    raise
            try:
                yield
            finally:
                with torch.inference_mode(False), torch.no_grad():
                    if may_change:
                        for layer, name, tensor in self._host_tensors:
                            tensor.copy_(getattr(layer, name))
                    self.leave_device()

    def leave_device(self) -> None:
        """Make the modules use their weights in host memory, and free the device's memory."""
        for layer, name, tensor in self._host_tensors:
            _put(layer, name, tensor)
        if self._host_tensors and self._device.type == "cuda":
            # torch would keep the memory in blocks of these sizes, which larger tensors cannot use.
            torch.cuda.empty_cache()


def apply_offload(modules: Sequence[nn.Module], device: torch.device) -> _OffloadedModules:
    """Move the weights of modules from `device` to host memory. Returns: the object that brings them back on demand.

    On CUDA the host memory is pinned, so that copies run at the speed of the bus. torch rounds each pinned tensor up to
    a power of two, so T5's 9.5 GB in bfloat16 take 13 GB (counted, not run on a GPU yet). On the CPU nothing moves.
    """
    with torch.inference_mode(False), torch.no_grad():
        host_tensors = [(layer, name, _in_host_memory(tensor)) for layer, name, tensor in _tensors_of(modules)]
        offloaded = _OffloadedModules(host_tensors, device)
        offloaded.leave_device()
    return offloaded


def _tensors_of(modules: Sequence[nn.Module]) -> Iterator[_HostTensor]:
    """Yield the parameters and buffers of all layers of the modules."""
    for module in modules:
        for layer in module.modules():
            for name, tensor in [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]:
                yield layer, name, tensor.detach()


def _in_host_memory(tensor: Tensor) -> Tensor:
    """Return a copy in host memory, pinned if it comes from CUDA; return a CPU tensor itself."""
    return tensor.cpu().pin_memory() if tensor.is_cuda else tensor.cpu()


def _put(layer: nn.Module, name: str, tensor: Tensor) -> None:
    if isinstance(getattr(layer, name), nn.Parameter):
        layer.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    else:
        setattr(layer, name, tensor)
