"""XLabs' IP-Adapter: in each double block, image tokens also attend to the tokens of an image prompt.

Sources: XLabs-AI/x-flux 4749542, src/flux/modules/layers.py; diffusers 0.42.1, models/transformers/transformer_flux.py,
FluxIPAdapterAttnProcessor. Attribute names are the keys of the files.
Letters: b batch, k images of a prompt, m their tokens, e width of an embedding, H heads, D head size.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from flux_batch.model.checkpoint.checkpoint import Checkpoint
from flux_batch.model.checkpoint.lazy_state import StoredState
from flux_batch.model.checkpoint.loading import load_weights, naming_errors
from flux_batch.model.params import Shapes, count_of, shape_of
from flux_batch.model.transformer import ImagePrompt

_PROJECTION = "ip_adapter_proj_model"
_KEY, _VALUE = "ip_adapter_double_stream_k_proj", "ip_adapter_double_stream_v_proj"
# Keys of diffusers (loaders/ip_adapter.py) -> keys of XLabs.
_OTHER_KEYS = (
    (r"^image_proj\.", f"{_PROJECTION}."),
    (r"^ip_adapter\.(\d+)\.to_k_ip\.", rf"double_blocks.\1.processor.{_KEY}."),
    (r"^ip_adapter\.(\d+)\.to_v_ip\.", rf"double_blocks.\1.processor.{_VALUE}."),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class IPAdapterParams:
    """An IP-Adapter: the width of an image's embedding, the number and the width of its tokens."""

    embed_dim: int
    num_tokens: int
    token_dim: int
    hidden_size: int
    depth: int


def ip_adapter_params(shapes: Shapes) -> IPAdapterParams:
    """Read an IP-Adapter's parameters from its shapes. Raises: ValueError if a key is missing."""
    (token_dim,) = shape_of(shapes, f"{_PROJECTION}.norm.weight", 1)
    rows, embed_dim = shape_of(shapes, f"{_PROJECTION}.proj.weight")
    if rows % token_dim:
        raise ValueError(f"its projection has {rows} rows: must be a multiple of {token_dim}, the width of a token")
    return IPAdapterParams(
        embed_dim=embed_dim,
        num_tokens=rows // token_dim,
        token_dim=token_dim,
        hidden_size=shape_of(shapes, f"double_blocks.0.processor.{_KEY}.weight")[0],
        depth=count_of(shapes, "double_blocks."),
    )


class IPAdapter(nn.Module):
    """The projections of an image prompt: embedding to tokens, and tokens to each double block's keys and values."""

    def __init__(self, params: IPAdapterParams) -> None:
        super().__init__()
        p = self.params = params
        layers = {"proj": nn.Linear(p.embed_dim, p.num_tokens * p.token_dim), "norm": nn.LayerNorm(p.token_dim)}
        self.ip_adapter_proj_model = nn.ModuleDict(layers)
        self.double_blocks = nn.ModuleList(
            nn.ModuleDict(
                {"processor": nn.ModuleDict({name: nn.Linear(p.token_dim, p.hidden_size) for name in (_KEY, _VALUE)})}
            )
            for _ in range(p.depth)
        )

    def tokens(self, embeds: Tensor) -> Tensor:
        """Return the tokens of image prompts, image after image: (b, k, e) -> (b, k m, token_dim)."""
        model = self.ip_adapter_proj_model
        tokens = rearrange(model["proj"](embeds), "b k (m d) -> b (k m) d", m=self.params.num_tokens)
        normed: Tensor = model["norm"](tokens)
        return normed

    def prompt(
        self, embeds: Tensor, num_heads: int, scale: float | Sequence[float] = 1.0, weights: Tensor | None = None
    ) -> ImagePrompt:
        """Return the keys and values of image prompts for each double block of the base.

        embeds: (b, k, e), from CLIP. scale: one for all blocks, or one for each; weights: (b, k), one for each image.
        Both multiply the values, which equals scaling the result of attention.
        """
        tokens = self.tokens(embeds)
        of_tokens = 1.0 if weights is None else weights.repeat_interleave(self.params.num_tokens, dim=1)[..., None]
        scales = list(scale) if isinstance(scale, Sequence) else [scale] * len(self.double_blocks)
        found, blocks = [], cast("Sequence[Any]", self.double_blocks)
        for block, strength in zip(blocks, scales, strict=True):
            key, value = (block["processor"][name](tokens) for name in (_KEY, _VALUE))
            value = of_tokens * strength * value
            key, value = (rearrange(each, "b m (H D) -> b m H D", H=num_heads) for each in (key, value))
            found.append([(key, value)])
        return ImagePrompt(found)


def load_ip_adapter(checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device) -> IPAdapter:
    """Load an IP-Adapter of XLabs' kind, under its own keys or those of diffusers.

    Raises: ValueError for missing keys, or for InstantX's kind.
    """
    what = "an IP-Adapter of XLabs"
    if any(name.startswith("ip_adapter.") for name in checkpoint.tensors) and "image_proj.proj.0.weight" in (
        checkpoint.tensors
    ):
        raise ValueError(f"{checkpoint.source} is InstantX's IP-Adapter, which is not supported: use one of XLabs")
    checkpoint = checkpoint.rename({name: _own_key(name) for name in checkpoint.tensors})
    with naming_errors(checkpoint, what):
        params = ip_adapter_params(checkpoint.shapes)
        with torch.device("meta"):
            model = IPAdapter(params)
    checkpoint.check(what, {name: tensor.shape for name, tensor in model.state_dict().items()})
    return load_weights(model, StoredState(checkpoint, dtype, device))


def _own_key(name: str) -> str:
    for pattern, own in _OTHER_KEYS:
        name = re.sub(pattern, own, name)
    return name
