"""FLUX.1-Redux: an image as tokens after those of the text, made of what SigLIP's vision tower sees.

Sources: black-forest-labs/flux 802fb47, src/flux/modules/image_embedders.py; diffusers 0.42.1,
pipelines/flux/modeling_flux.py. The vision tower is that of transformers.
Letters: b batch, n patches, d width of the tower, c width of the text tokens, s side in pixels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux_batch.model.checkpoint.checkpoint import Checkpoint, read_config
from flux_batch.model.checkpoint.lazy_state import StoredState
from flux_batch.model.checkpoint.loading import load_weights, naming_errors
from flux_batch.model.params import Config, Shapes, count_of, shape_of
from flux_batch.model.text import build

# Width of a head of siglip-so400m, and its side in pixels, of which 27 patches of 14 leave 6 unused.
_HEAD_DIM = 72
_SIDE, _NUM_POSITIONS = 384, 729
# Settings that shapes do not tell.
_SETTINGS = ("num_attention_heads", "hidden_act", "layer_norm_eps", "image_size")
# Parts of a SigLIP that are not its vision tower, and the head of the tower, which pools what Redux reads in full.
_PREFIX = "vision_model."
_NOT_OF_TOWER = ("text_model.", "logit_scale", "logit_bias", "head.")


class SiglipEncoder:
    """SigLIP's vision tower: the states of all patches after the last norm."""

    def __init__(self, model: Any) -> None:
        self.model = model

    @property
    def side(self) -> int:
        """The side in pixels of the square that it reads."""
        side: int = self.model.config.image_size
        return side

    @property
    def width(self) -> int:
        """The width of a patch's state."""
        width: int = self.model.config.hidden_size
        return width

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return the states of the patches of images: (b, 3, s, s) in [-1, 1] -> (b, n, d)."""
        weight = self.model.embeddings.patch_embedding.weight
        states: Tensor = self.model(pixel_values=pixels.to(weight)).last_hidden_state
        return states


class Redux(nn.Module):
    """The two layers that turn the states of patches into text tokens."""

    def __init__(self, width: int, hidden: int, context_in_dim: int) -> None:
        super().__init__()
        self.redux_up = nn.Linear(width, hidden)
        self.redux_down = nn.Linear(hidden, context_in_dim)

    @property
    def context_in_dim(self) -> int:
        """The width of the text tokens that it makes."""
        return self.redux_down.out_features

    def forward(self, states: Tensor) -> Tensor:
        """Return tokens: (b, n, d) -> (b, n, c)."""
        tokens: Tensor = self.redux_down(F.silu(self.redux_up(states)))
        return tokens


def load_redux(checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device) -> Redux:
    """Load the layers of FLUX.1-Redux. Raises: ValueError naming what is missing."""
    what = "FLUX.1-Redux"
    with naming_errors(checkpoint, what):
        hidden, width = shape_of(checkpoint.shapes, "redux_up.weight")
        with torch.device("meta"):
            model = Redux(width, hidden, shape_of(checkpoint.shapes, "redux_down.weight")[0])
    checkpoint.check(what, {name: tensor.shape for name, tensor in model.state_dict().items()})
    return load_weights(model, StoredState(checkpoint, dtype, device))


def load_siglip(checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device) -> SiglipEncoder:
    """Load the vision tower of a SigLIP, with its config.json if there is one. Raises: ValueError."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    what = "the vision tower of a SigLIP"
    names = {name: name.removeprefix(_PREFIX) for name in checkpoint.tensors}
    checkpoint = checkpoint.rename({old: new for old, new in names.items() if not new.startswith(_NOT_OF_TOWER)})
    with naming_errors(checkpoint, what):
        settings = _siglip_settings(checkpoint.shapes, read_config(checkpoint.folder, "image_encoder"))
        model = build(SiglipVisionConfig, SiglipVisionModel, settings)
    own_names = {name.removeprefix(_PREFIX): name for name in model.state_dict()}
    checkpoint.check(what, {name: model.state_dict()[own].shape for name, own in own_names.items()})
    load_weights(model, StoredState(checkpoint.rename(own_names), dtype, device))
    positions = torch.arange(shape_of(checkpoint.shapes, "embeddings.position_embedding.weight")[0], device=device)
    for name, _ in list(model.named_buffers()):
        model.get_submodule(name.rpartition(".")[0]).register_buffer("position_ids", positions[None], persistent=False)
    return SiglipEncoder(model)


def _siglip_settings(shapes: Shapes, config: Config) -> Config:
    """Return the settings of a SigLIP tower: sizes from its shapes, the rest from its config.json, else as so400m's."""
    config = config.get("vision_config", config)
    hidden, channels, patch, _ = shape_of(shapes, "embeddings.patch_embedding.weight", 4)
    positions = shape_of(shapes, "embeddings.position_embedding.weight")[0]
    side = _SIDE if positions == _NUM_POSITIONS else round(positions**0.5) * patch
    return {
        "num_attention_heads": max(1, hidden // _HEAD_DIM),
        "image_size": side,
        **{name: config[name] for name in _SETTINGS if name in config},
        "hidden_size": hidden,
        "num_channels": channels,
        "patch_size": patch,
        "intermediate_size": shape_of(shapes, "encoder.layers.0.mlp.fc1.weight")[0],
        "num_hidden_layers": count_of(shapes, "encoder.layers."),
        "vision_use_head": False,
    }
