"""The rotary tables of the last sizes, which are the same for every picture of a size; knows no picture.

Letters: l text tokens, n image tokens.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor

from flux_batch.model.sampling import position_ids
from flux_batch.model.transformer import Flux

# Of FLUX.1 at 1024 x 1024 with 512 text tokens one takes 2.4 MB, at 2048 x 2048 8.7 MB.
MAX_TABLES = 8


class PositionTables:
    """Makes the table of each size once, and remembers the last ones, up to `max_tables` on the model's device."""

    def __init__(self, model: Flux, device: torch.device, max_tables: int = MAX_TABLES) -> None:
        self._model = model
        self._device = device
        self._max_tables = max_tables
        self._known: OrderedDict[tuple[int, int, int], Tensor] = OrderedDict()

    def __call__(self, num_txt_tokens: int, height: int, width: int) -> Tensor:
        """Return `position_table` of text, then of latents of this size: (l + n, head_dim / 2, 2) fp32."""
        size = num_txt_tokens, height, width
        if size not in self._known:
            self._known[size] = self._model.position_table(position_ids(*size).to(self._device))
            if len(self._known) > self._max_tables:
                self._known.popitem(last=False)
        self._known.move_to_end(size)
        return self._known[size]

    def __len__(self) -> int:
        return len(self._known)
