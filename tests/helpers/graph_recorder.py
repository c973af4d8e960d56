"""A stand-in for recording on a CUDA device: a step is run again where a device would launch its record.

As there it reads and writes only memory that was its own when it was recorded; that no Python runs is not checked.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from flux_batch.model.optimize.cuda_graphs import Replay


class GraphRecorder:
    """Counts recordings and launches."""

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
