"""CUDA graphs: a step of the transformer is launched in one piece, not kernel by kernel; knows no schedule.

The first step of a size is recorded: which kernels it launches, and on which memory. Later steps of that size put what
they are given there, launch the record, and copy the result out. The kernels are those that would be launched without,
so that images are the same; what is saved is the host's time, which counts where kernels are short: small images,
small models. The memory of a step stays taken, by the largest size that was recorded.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flux_batch.model.conditioned import ConditionedFlux
from flux_batch.model.sampling import Velocity
from flux_batch.model.transformer import Flux, Modulations

# Sizes that are remembered; one takes some MB beside the memory that all share.
MAX_GRAPHS = 8

# Launches what was recorded.
Replay = Callable[[], None]
# Runs a step and records it: how to launch it again, and where its result lies after that.
Record = Callable[[Callable[[], Tensor]], tuple[Replay, Tensor]]


class Inputs(NamedTuple):
    """What `Flux.velocity` takes."""

    img: Tensor
    txt: Tensor
    modulations: Modulations
    pe: Tensor

    @property
    def size(self) -> tuple[torch.Size, ...]:
        """What must agree for a record to serve."""
        return self.img.shape, self.txt.shape, self.pe.shape

    def tensors(self) -> list[Tensor]:
        """List them all, in one order."""
        return [self.img, self.txt, self.pe, *self.modulations.tensors()]

    def copies(self) -> Inputs:
        """Return the same in memory of their own."""
        img, txt, pe = (dense_copy(tensor) for tensor in (self.img, self.txt, self.pe))
        return Inputs(img, txt, self.modulations.map(dense_copy), pe)


def dense_copy(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


class StepGraph:
    """`Flux.velocity`, recorded for inputs of one size."""

    def __init__(self, model: Flux, inputs: Inputs, record: Record) -> None:
        self._inputs = inputs.copies()
        self._places = self._inputs.tensors()
        self._replay, self._result = record(lambda: model.velocity(*self._inputs))

    def __call__(self, inputs: Inputs) -> Tensor:
        """Return the velocity, in memory that no later step writes to."""
        torch._foreach_copy_(self._places, inputs.tensors())
        self._replay()
        return self._result.clone()


class CudaGraphs:
    """The recorded steps of a transformer on a CUDA device: call it with a `ConditionedFlux` for each denoising loop.

    record: how to record; as CUDA does it if None. max_graphs: sizes that are remembered, those used last.
    Raises: ValueError for a model that is on no CUDA device, unless there is another way to record.
    """

    def __init__(self, model: Flux, record: Record | None = None, max_graphs: int = MAX_GRAPHS) -> None:
        device = model.img_in.weight.device
        if record is None and device.type != "cuda":
            raise ValueError(f"CUDA graphs need a CUDA device, and the transformer is on {device}")
        self.model = model
        self.max_graphs = max_graphs
        self._record = record or CudaRecorder(device)
        self._graphs: OrderedDict[Any, StepGraph] = OrderedDict()
        self._weights: list[int] = []

    def __call__(self, conditioned: ConditionedFlux) -> Velocity:
        """Return what gives the velocities that `conditioned` gives. Loops may take turns; threads may not."""
        weights = [tensor.data_ptr() for tensor in chain(self.model.parameters(), self.model.buffers())]
        if weights != self._weights:  # records tell where they lay, and would go on with what lies there now
            self._graphs.clear()
            self._weights = weights

        def velocity(step: int, img: Tensor) -> Tensor:
            inputs = Inputs(img, conditioned.txt, conditioned.modulations(step), conditioned.pe)
            return self._graph(inputs)(inputs)

        return velocity

    def _graph(self, inputs: Inputs) -> StepGraph:
        graph = self._graphs.get(inputs.size)
        if graph is None:
            while len(self._graphs) >= self.max_graphs:
                self._graphs.popitem(last=False)
            graph = self._graphs[inputs.size] = StepGraph(self.model, inputs, self._record)
        self._graphs.move_to_end(inputs.size)
        return graph


class CudaRecorder:
    """Records what is launched on a device; all records share their memory, as none is launched beside another."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        """Record a step, after a run of it in which libraries choose their kernels and torch.compile compiles."""
        with torch.cuda.device(self._device):
            step()
            graph = torch.cuda.CUDAGraph()
            # Another thread may ask the device for something meanwhile, e.g. how much memory is free.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                result = step()
        return graph.replay, result
