"""The rotary tables of the last sizes, which are the same for every picture of a size; knows no picture.

Letters: l text tokens, n image tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from flux_batch.model.sampling import position_ids
from flux_batch.model.transformer import Flux

# Of FLUX.1 at 1024 x 1024 with 512 text tokens one takes 2.4 MB, at 2048 x 2048 8.7 MB.
MAX_TABLES = 8


def position_tables(
    model: Flux, device: torch.device, max_tables: int = MAX_TABLES
) -> Callable[[int, int, int], Tensor]:
    """Return what makes the table of each size once, and remembers the last ones on `device`.

    It takes the number of text tokens, height and width of the latents, and returns `position_table` of text, then of
    such latents: (l + n, head_dim / 2, 2) fp32.
    """

    @lru_cache(max_tables)
    def table(num_txt_tokens: int, height: int, width: int) -> Tensor:
        return model.position_table(position_ids(num_txt_tokens, height, width).to(device))

    return table
