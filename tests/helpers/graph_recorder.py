"""A replacement for CUDA graph capture that runs a step again where a device would replay its graph.

As with a graph, the step uses only the memory of its capture. Unlike a graph, it may run Python.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from flux_batch.model.optimize.cuda_graphs import Replay


class GraphRecorder:
    """Counts captures and replays."""

    def __init__(self) -> None:
        self.num_records = 0
        self.num_replays = 0

    def __call__(self, step: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        self.num_records += 1
        result = step()

        def replay() -> None:
            self.num_replays += 1
            result.copy_(step())

        return replay, result
