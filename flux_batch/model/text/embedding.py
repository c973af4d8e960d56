"""The tables of embeddings of the text encoders."""

from __future__ import annotations

import torch
from torch import nn


def blank_table(num_embeddings: int, width: int) -> nn.Embedding:
    """Return a table whose weights are still to be loaded: (num_embeddings, width).

    nn.Embedding itself draws them. On meta this imports the compiler of torch, which takes as long as torch.
    """
    return nn.Embedding.from_pretrained(torch.empty(num_embeddings, width), freeze=False)
