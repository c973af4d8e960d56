"""The vision towers that read image prompts, from transformers: SigLIP's for Redux, CLIP's for an IP-Adapter.

Letters: b batch, n patches, d width of the tower, e width of an image's embedding, s side in pixels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flux_batch.model.checkpoint.checkpoint import Checkpoint, read_config
from flux_batch.model.checkpoint.image_prompts import TOWER_PREFIX, tower_of
from flux_batch.model.checkpoint.lazy_state import StoredState
from flux_batch.model.checkpoint.loading import load_weights, naming_errors
from flux_batch.model.params import Config, Shapes, count_of, shape_of

# Settings that cannot be read from the shapes of the weights.
_SETTINGS = ("num_attention_heads", "hidden_act", "layer_norm_eps", "image_size")
# Widths of a head, and the side of siglip-so400m in pixels: 27 patches of 14 pixels, and 6 unused pixels.
_SIGLIP_HEAD_DIM, _CLIP_HEAD_DIM = 72, 64
_SIGLIP_SIDE, _SIGLIP_POSITIONS = 384, 729


class _VisionTower:
    """A vision tower of transformers, which reads square images."""

    def __init__(self, model: Any) -> None:
        self.model = model

    @property
    def side(self) -> int:
        """The side in pixels of the images that it reads."""
        side: int = self.model.config.image_size
        return side

    def _read(self, pixels: Tensor) -> Any:
        weight = next(iter(self.model.parameters()))
        return self.model(pixel_values=pixels.to(weight))


class SiglipEncoder(_VisionTower):
    """SigLIP's vision tower, which returns the states of all patches after the last norm."""

    @property
    def width(self) -> int:
        """The width of a patch's state."""
        width: int = self.model.config.hidden_size
        return width

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return the states of the patches of images: (b, 3, s, s) in [-1, 1] -> (b, n, d)."""
        states: Tensor = self._read(pixels).last_hidden_state
        return states


class ClipVisionEncoder(_VisionTower):
    """CLIP's vision tower with its projection, which returns an embedding of each image."""

    @property
    def width(self) -> int:
        """The width of an image's embedding."""
        width: int = self.model.config.projection_dim
        return width

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return the embedding of images: (b, 3, s, s), normalized as CLIP expects -> (b, e)."""
        embeds: Tensor = self._read(pixels).image_embeds
        return embeds


def load_siglip(checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device) -> SiglipEncoder:
    """Load the vision tower of a SigLIP, with its config.json if there is one. Raises: ValueError."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    checkpoint, what = tower_of(checkpoint), "the vision tower of a SigLIP"
    with naming_errors(checkpoint, what):
        config = _vision_config(checkpoint)
        model = build_tower(SiglipVisionConfig, SiglipVisionModel, _siglip_settings(checkpoint.shapes, config))
    return SiglipEncoder(_filled(model, checkpoint, what, dtype, device))


def load_clip_vision(checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device) -> ClipVisionEncoder:
    """Load the vision tower of a CLIP, with its config.json if there is one. Raises: ValueError."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    checkpoint, what = tower_of(checkpoint), "the vision tower of a CLIP with its projection"
    with naming_errors(checkpoint, what):
        config = _vision_config(checkpoint)
        model = build_tower(CLIPVisionConfig, CLIPVisionModelWithProjection, _clip_settings(checkpoint.shapes, config))
    return ClipVisionEncoder(_filled(model, checkpoint, what, dtype, device))


def build_tower(config_class: Any, model_class: Any, settings: Config) -> Any:
    """Build a tower of transformers on meta. Raises: ValueError if the settings do not fit the weights."""
    try:
        with torch.device("meta"):
            return model_class(config_class(**settings))
    except Exception as error:  # of any class: transformers computes with the settings of the file
        raise ValueError(f"its config.json does not fit its weights: {error!r}") from error


def _filled(model: Any, checkpoint: Checkpoint, what: str, dtype: torch.dtype, device: torch.device) -> Any:
    """Return a tower filled with the weights of a checkpoint. Raises: ValueError if keys or shapes do not match."""
    own_names = {name.removeprefix(TOWER_PREFIX): name for name in model.state_dict()}
    checkpoint.check(what, {name: model.state_dict()[own].shape for name, own in own_names.items()})
    load_weights(model, StoredState(checkpoint.rename(own_names), dtype, device))
    for name, positions in list(model.named_buffers()):
        filled = torch.arange(positions.shape[-1], device=device)[None]
        model.get_submodule(name.rpartition(".")[0]).register_buffer("position_ids", filled, persistent=False)
    return model


def _vision_config(checkpoint: Checkpoint) -> Config:
    config = read_config(checkpoint.folder, "image_encoder")
    found: Config = config.get("vision_config", config)
    return found


def _siglip_settings(shapes: Shapes, config: Config) -> Config:
    """Return a SigLIP tower's settings: sizes from shapes, the rest from config.json or the defaults of so400m."""
    hidden, channels, patch, _ = shape_of(shapes, "embeddings.patch_embedding.weight", 4)
    positions = shape_of(shapes, "embeddings.position_embedding.weight")[0]
    side = _SIGLIP_SIDE if positions == _SIGLIP_POSITIONS else round(positions**0.5) * patch
    return {
        "num_attention_heads": max(1, hidden // _SIGLIP_HEAD_DIM),
        "image_size": side,
        **_told(config),
        **_sizes(shapes, hidden, channels, patch),
        "vision_use_head": False,
    }


def _clip_settings(shapes: Shapes, config: Config) -> Config:
    """Return a CLIP tower's settings: sizes from shapes, the rest from config.json or the defaults of CLIP-L."""
    hidden, channels, patch, _ = shape_of(shapes, "embeddings.patch_embedding.weight", 4)
    positions = shape_of(shapes, "embeddings.position_embedding.weight")[0] - 1  # one is for the class token
    return {
        "num_attention_heads": max(1, hidden // _CLIP_HEAD_DIM),
        "image_size": round(positions**0.5) * patch,
        "hidden_act": "quick_gelu",
        **_told(config),
        **_sizes(shapes, hidden, channels, patch),
        "projection_dim": shape_of(shapes, "visual_projection.weight")[0],
    }


def _told(config: Config) -> Config:
    """Return the settings that a config.json holds, without those that are null."""
    return {name: config[name] for name in _SETTINGS if config.get(name) is not None}


def _sizes(shapes: Shapes, hidden: int, channels: int, patch: int) -> Config:
    return {
        "hidden_size": hidden,
        "num_channels": channels,
        "patch_size": patch,
        "intermediate_size": shape_of(shapes, "encoder.layers.0.mlp.fc1.weight")[0],
        "num_hidden_layers": count_of(shapes, "encoder.layers."),
    }
