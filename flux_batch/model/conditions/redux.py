"""FLUX.1-Redux: an image becomes tokens after those of the text, computed from SigLIP's states of its patches.

Sources: black-forest-labs/flux 802fb47, src/flux/modules/image_embedders.py; diffusers 0.42.1,
pipelines/flux/modeling_flux.py.
Letters: b batch, n patches, d width of the tower, c width of the text tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux_batch.model.checkpoint.checkpoint import Checkpoint
from flux_batch.model.checkpoint.lazy_state import StoredState
from flux_batch.model.checkpoint.loading import load_weights, naming_errors
from flux_batch.model.params import shape_of


class Redux(nn.Module):
    """The two layers that turn the states of image patches into text tokens."""

    def __init__(self, width: int, hidden: int, context_in_dim: int) -> None:
        super().__init__()
        self.redux_up = nn.Linear(width, hidden)
        self.redux_down = nn.Linear(hidden, context_in_dim)

    @property
    def context_in_dim(self) -> int:
        """The width of the tokens that it returns, that of the text tokens."""
        return self.redux_down.out_features

    def forward(self, states: Tensor) -> Tensor:
        """Return tokens: (b, n, d) -> (b, n, c)."""
        tokens: Tensor = self.redux_down(F.silu(self.redux_up(states)))
        return tokens


def load_redux(checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device) -> Redux:
    """Load the layers of FLUX.1-Redux. Raises: ValueError with the missing keys."""
    what = "FLUX.1-Redux"
    with naming_errors(checkpoint, what):
        hidden, width = shape_of(checkpoint.shapes, "redux_up.weight")
        with torch.device("meta"):
            model = Redux(width, hidden, shape_of(checkpoint.shapes, "redux_down.weight")[0])
    checkpoint.check(what, {name: tensor.shape for name, tensor in model.state_dict().items()})
    return load_weights(model, StoredState(checkpoint, dtype, device))
