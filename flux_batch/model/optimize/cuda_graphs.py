"""CUDA graphs: a step of the transformer is launched in one piece instead of kernel by kernel.

The first step of each size is captured: the kernels that it launches and their memory. Later steps of that size copy
the inputs that have changed into that memory, replay the graph, and copy the result out. The kernels and the images are
the same as without a graph. Replaying saves time of the host, which matters if kernels are short: for small images and
small models. The memory of a step stays allocated, for the largest captured size, until `clear`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flux_batch.model.sampling import Velocity
from flux_batch.model.transformer import Denoiser, Flux, Modulations

# The number of sizes whose graphs are kept; each takes some MB beside the memory that all share.
_MAX_GRAPHS = 8

# Replays a captured step.
Replay = Callable[[], None]
# Runs and captures a step. Returns: the function that replays it, and the tensor that then holds the result.
_Record = Callable[[Callable[[], Tensor]], tuple[Replay, Tensor]]


class _Inputs(NamedTuple):
    """The arguments of `Flux.velocity`."""

    img: Tensor
    txt: Tensor
    modulations: Modulations
    pe: Tensor

    @property
    def size(self) -> tuple[torch.Size, ...]:
        """The shapes of all inputs; each combination needs its own graph."""
        return self.img.shape, self.txt.shape, self.pe.shape

    def of_a_step(self) -> list[Tensor]:
        """Return the tensors that change with each step, always in the same order.

        All have one dtype, so that a device copies them at once.
        """
        return [self.img, *self.modulations.tensors()]

    def of_a_loop(self) -> list[Tensor]:
        """Return the tensors that all steps of a denoising loop share."""
        return [self.txt, self.pe]

    def copies(self) -> _Inputs:
        """Return dense copies."""
        img, txt, pe = (_dense_copy(tensor) for tensor in (self.img, self.txt, self.pe))
        return _Inputs(img, txt, self.modulations.map(_dense_copy), pe)


def _dense_copy(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


class _StepGraph:
    """`Flux.velocity`, captured for inputs of one size."""

    def __init__(self, model: Flux, inputs: _Inputs, record: _Record) -> None:
        self._inputs = inputs.copies()
        self._loop = inputs.of_a_loop()  # the tensors that were copied last
        self._replay, self._result = record(lambda: model.velocity(*self._inputs))

    def __call__(self, inputs: _Inputs) -> Tensor:
        """Return the velocity, in memory that no later step writes to."""
        torch._foreach_copy_(self._inputs.of_a_step(), inputs.of_a_step())
        loop = inputs.of_a_loop()
        for own, last, new in zip(self._inputs.of_a_loop(), self._loop, loop, strict=True):
            if new is not last:
                own.copy_(new)
        self._loop = loop
        self._replay()
        return self._result.clone()


class CudaGraphs:
    """The captured steps of a transformer on a CUDA device: call it with a `Denoiser` for each denoising loop.

    record: captures a step, by default as a CUDA graph. max_graphs: the number of most recently used sizes to keep.
    Raises: ValueError for a model that is not on a CUDA device, unless `record` is given.
    """

    def __init__(self, model: Flux, record: _Record | None = None, max_graphs: int = _MAX_GRAPHS) -> None:
        device = model.img_in.weight.device
        if record is None and device.type != "cuda":
            raise ValueError(f"CUDA graphs need a CUDA device, and the transformer is on {device}")
        self.model = model
        self.max_graphs = max_graphs
        self._record = record or _CudaRecorder(device)
        self._graphs: OrderedDict[Any, _StepGraph] = OrderedDict()
        self._addresses: list[int] = []

    def __call__(self, denoiser: Denoiser) -> Velocity:
        """Return a function with the velocities of `denoiser`. Loops may be interleaved, but in one thread only."""
        addresses = [tensor.data_ptr() for tensor in chain(self.model.parameters(), self.model.buffers())]
        if addresses != self._addresses:  # graphs would read the old addresses
            self.clear()
            self._addresses = addresses

        def velocity(step: int, img: Tensor) -> Tensor:
            inputs = _Inputs(img, denoiser.txt, denoiser.modulations(step), denoiser.pe)
            return self._graph(inputs)(inputs)

        return velocity

    def clear(self) -> None:
        """Drop all records, after which others can have their memory; the next step of each size is recorded again.

        torch gives the memory of a record to nothing else as long as one record is left, however little is free.
        """
        self._graphs.clear()

    def _graph(self, inputs: _Inputs) -> _StepGraph:
        graph = self._graphs.get(inputs.size)
        if graph is None:
            while len(self._graphs) >= self.max_graphs:
                self._graphs.popitem(last=False)
            graph = self._graphs[inputs.size] = _StepGraph(self.model, inputs, self._record)
        self._graphs.move_to_end(inputs.size)
        return graph


class _CudaRecorder:
    """Captures steps on a CUDA device; all graphs share their memory, since no two run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        # torch's default capture stream belongs to the device that captured first: it would capture nothing of another.
        self._stream = torch.cuda.Stream(device)

    def __call__(self, step: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        """Capture a step, after one run in which libraries choose their kernels and torch.compile compiles.

        That run uses the capture stream, since libraries allocate memory for each stream.
        """
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                step()
            current.wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            # "thread_local" lets other threads query the device meanwhile, e.g. for its free memory.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                result = step()
        return graph.replay, result
