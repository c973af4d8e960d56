"""Modules whose weights lie in host memory, and come to the device for as long as they are needed there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

# A layer, the name of one of its tensors, and that tensor in host memory.
Place = tuple[nn.Module, str, Tensor]


class Visitors:
    """The modules, from now on in host memory but for their visits; made from weights that are on `device`.

    On CUDA the memory is pinned, so that a visit costs what the bus takes; torch rounds each tensor up to a power of
    two, which makes 13 GB of T5's 9.5 in bfloat16 (counted, not run on a GPU yet). On the CPU nothing moves.
    """

    def __init__(self, modules: Sequence[nn.Module], device: torch.device) -> None:
        self._device = device
        with torch.inference_mode(False), torch.no_grad():
            self._home = [(layer, name, in_host_memory(tensor)) for layer, name, tensor in tensors_of(modules)]
        self._leave()

    @contextmanager
    def visit(self, *, may_change: bool = False) -> Iterator[None]:
        """Have the weights on the device inside. may_change: what they are at the end is what they are from then on."""
        # Weights are no tensors of an inference, whoever calls.
        with torch.inference_mode(False), torch.no_grad():
            try:
                for layer, name, tensor in self._home:
                    put(layer, name, tensor.to(self._device, non_blocking=True))
            except BaseException:
                self._leave()
                raise
        try:
            yield
        finally:
            with torch.inference_mode(False), torch.no_grad():
                if may_change:
                    for layer, name, tensor in self._home:
                        tensor.copy_(getattr(layer, name))
                self._leave()

    def _leave(self) -> None:
        for layer, name, tensor in self._home:
            put(layer, name, tensor)
        if self._home and self._device.type == "cuda":
            # Else what they left would be kept in pieces of their sizes, of which no larger tensor can be made.
            torch.cuda.empty_cache()


def tensors_of(modules: Sequence[nn.Module]) -> Iterator[Place]:
    """Yield the parameters and buffers of modules, each of a layer once."""
    for module in modules:
        for layer in module.modules():
            for name, tensor in [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]:
                yield layer, name, tensor.detach()


def in_host_memory(tensor: Tensor) -> Tensor:
    """Return a copy in host memory, pinned if it comes from CUDA; what is there already as it is."""
    return tensor.cpu().pin_memory() if tensor.is_cuda else tensor.cpu()


def put(layer: nn.Module, name: str, tensor: Tensor) -> None:
    if isinstance(getattr(layer, name), nn.Parameter):
        layer.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    else:
        setattr(layer, name, tensor)
