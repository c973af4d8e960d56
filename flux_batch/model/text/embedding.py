"""The tables of embeddings of the text encoders."""

from __future__ import annotations

import torch
from torch import nn


def blank_table(num_embeddings: int, width: int) -> nn.Embedding:
    """Return a table with uninitialized weights (num_embeddings, width).

    nn.Embedding itself initializes them randomly. On meta this makes torch import its compiler, which takes as long as
    importing torch.
    """
    return nn.Embedding.from_pretrained(torch.empty(num_embeddings, width), freeze=False)
