"""A simulated CUDA device: tensors have a shape, a dtype and a device, but no data.

torch derives the shape, dtype and device of each result, so that mixed devices, wrong shapes and wrong layouts raise as
on a GPU. The places where the host would wait for the GPU are recorded; the numbers that it would read there are made
up.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import flux_batch
from flux_batch.bench.pipeline.no_device import NoDevice, register_guard
from flux_batch.model.checkpoint.lazy_state import StoredState

CUDA = torch.device("cuda")
_READS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default}
_COPIES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}
_PROGRAM = Path(flux_batch.__file__).parent


def enter_cuda() -> None:
    """Make this process able to enter a missing CUDA device, or skip the test."""
    try:
        register_guard()
    except RuntimeError as error:
        pytest.skip(str(error))


class Waits(TorchDispatchMode):
    """The places where the host waits for the device, in order, as file and function of the program.

    `numbers` are the results of the next reads of a single number, by default 1. `calls` counts operations.
    """

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []
        self.numbers: list[float] = []
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.calls[func.overloadpacket.__name__] += 1
        if func in _READS:
            if not args[0].is_cuda:
                return 1
            self._note()
            return self.numbers.pop(0) if self.numbers else 1
        result = func(*args, **kwargs)
        if func in _COPIES:
            source = args[1] if func is torch.ops.aten.copy_.default else args[0]
            is_blocking = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
            # torch waits for every copy between host and device that is not non_blocking.
            if is_blocking and source.device.type != result.device.type:
                self._note()
        return result

    def steps(self, steps: Iterable[int]) -> Iterator[int]:
        """Wrap the steps of a denoising loop, and check that the host waits in none of them."""
        before = len(self.places)
        yield from steps
        if waits := self.places[before:]:
            raise AssertionError(f"the host waits for the device in the loop: {waits}")

    def _note(self) -> None:
        """Record the current function of the program."""
        frame: Any = sys._getframe(1)
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(_PROGRAM) and not frame.f_code.co_name.startswith("<"):
                self.places.append(f"{path.stem}.{frame.f_code.co_name}")
                return
            frame = frame.f_back
        self.places.append("elsewhere")


class _NoNumbers(TorchFunctionMode):
    """Replaces the functions that need the data of a tensor."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.numpy:
            return np.zeros(tuple(args[0].shape), str(args[0].dtype).removeprefix("torch."))
        if func is Tensor.pin_memory:
            return _pinned(args[0])
        if func is Tensor.data_ptr:
            return id(args[0])
        if func is Tensor.tolist and args[0].ndim == 1:
            return [each.item() for each in args[0]]
        return func(*args, **(kwargs or {}))


def _pinned(values: Tensor) -> Tensor:
    """Return a tensor as if it were pinned. Raises: RuntimeError for one that torch cannot pin."""
    if values.is_cuda:
        raise RuntimeError("cannot pin a tensor on cuda: only dense CPU tensors can be pinned")
    # torch copies it into pinned memory of the same strides, where no element may be written twice.
    if any(stride == 0 and size > 1 for size, stride in zip(values.shape, values.stride(), strict=True)):
        raise RuntimeError("more than one element of the written-to tensor refers to a single memory location")
    return values


@contextmanager
def fake_cuda(capability: tuple[int, int] = (9, 0)) -> Iterator[Waits]:
    """Simulate a GPU for a block; call `enter_cuda` before. Yields: the waits of the block."""
    generator, as_stored = torch.Generator, StoredState._as_stored
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        patch.setattr(torch.cuda, "get_device_name", lambda device=None: "no GPU")
        patch.setattr(torch, "Generator", lambda device="cpu": generator("cpu"))
        # Inference mode hides the parts of an operation, and so its waits, from the dispatcher.
        patch.setattr(torch, "inference_mode", lambda mode=True: torch.no_grad())
        patch.setattr(StoredState, "_as_stored", lambda *given: _with_numbers(lambda: as_stored(*given)))
        with NoDevice(allow_non_fake_inputs=True), _NoNumbers(), Waits() as waits:
            yield waits


def _with_numbers(read: Callable[[], Tensor]) -> Tensor:
    """Return a tensor with real data, as libraries that map files need it."""
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        return read()
