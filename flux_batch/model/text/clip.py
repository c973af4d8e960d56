"""CLIP's text encoder: one embedding for each prompt.

Attribute names are the keys of the published files, after their prefix `text_model.`.
Letters: b batch, l tokens, h heads, d width. Source: transformers 5.23, models/clip/modeling_clip.py; the order of
operations is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from transformers import CLIPTokenizer

from flux_batch.model.checkpoint.checkpoint import Checkpoint, read_config
from flux_batch.model.checkpoint.lazy_state import StoredState
from flux_batch.model.checkpoint.loading import load_weights, naming_errors
from flux_batch.model.params import Config, Shapes, check_setting, count_of, settings_of, shape_of
from flux_batch.model.sampling import on_device
from flux_batch.model.text.embedding import blank_table
from flux_batch.model.text.tokenizers import count_tokens, load_tokenizer, tokenize

_HEAD_DIM = 64
# Settings that shapes do not determine. Sizes are read from the shapes of the weights, never from config.json.
_SETTINGS = ("num_attention_heads", "hidden_act", "layer_norm_eps", "eos_token_id")
# The eos_token_id of older files, which means that a text ends at its largest id; CLIP-L's end token 49407 is that.
_LARGEST_ID = 2


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {"quick_gelu": _quick_gelu, "gelu": F.gelu}


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipParams:
    """The text encoder, with the names of config.json. The defaults are those of CLIP-L."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = _LARGEST_ID

    def __post_init__(self) -> None:
        heads, eps = self.num_attention_heads, self.layer_norm_eps
        is_divisor = isinstance(heads, int) and heads > 0 and self.hidden_size % heads == 0
        check_setting("num_attention_heads", heads, is_divisor, f"must divide {self.hidden_size}")
        is_known = isinstance(self.hidden_act, str) and self.hidden_act in _ACTIVATIONS
        check_setting("hidden_act", self.hidden_act, is_known, f"must be {' or '.join(_ACTIVATIONS)}")
        check_setting("layer_norm_eps", eps, isinstance(eps, (int, float)) and eps > 0, "must be greater than 0")
        check_setting("eos_token_id", self.eos_token_id, isinstance(self.eos_token_id, int), "must be a token id")


def clip_params(shapes: Shapes, config: Config) -> ClipParams:
    """Return a CLIP's parameters: sizes from its shapes, the rest from config.json or as in CLIP-L.

    Raises: ValueError if config.json does not fit.
    """
    vocab_size, hidden_size = shape_of(shapes, "embeddings.token_embedding.weight")
    settings = {
        "num_attention_heads": max(1, hidden_size // _HEAD_DIM),
        **settings_of(config, "clip_text_model", _SETTINGS),
    }
    return ClipParams(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=shape_of(shapes, "encoder.layers.0.mlp.fc1.weight")[0],
        num_hidden_layers=count_of(shapes, "encoder.layers."),
        max_position_embeddings=shape_of(shapes, "embeddings.position_embedding.weight")[0],
        **settings,
    )


class _Embeddings(nn.Module):
    def __init__(self, p: ClipParams) -> None:
        super().__init__()
        self.token_embedding = blank_table(p.vocab_size, p.hidden_size)
        self.position_embedding = blank_table(p.max_position_embeddings, p.hidden_size)

    def forward(self, ids: Tensor) -> Tensor:
        states: Tensor = self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]
        return states


class _Attention(nn.Module):
    """Causal attention: each token attends to itself and to those before it."""

    def __init__(self, p: ClipParams) -> None:
        super().__init__()
        self.num_heads = p.num_attention_heads
        self.q_proj = nn.Linear(p.hidden_size, p.hidden_size)
        self.k_proj = nn.Linear(p.hidden_size, p.hidden_size)
        self.v_proj = nn.Linear(p.hidden_size, p.hidden_size)
        self.out_proj = nn.Linear(p.hidden_size, p.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        projections = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        q, k, v = (rearrange(part, "b l (h d) -> b h l d", h=self.num_heads) for part in projections)
        attn = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        states: Tensor = self.out_proj(rearrange(attn, "b h l d -> b l (h d)"))
        return states


class _MLP(nn.Module):
    def __init__(self, p: ClipParams) -> None:
        super().__init__()
        self.activation = _ACTIVATIONS[p.hidden_act]
        self.fc1 = nn.Linear(p.hidden_size, p.intermediate_size)
        self.fc2 = nn.Linear(p.intermediate_size, p.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        states: Tensor = self.fc2(self.activation(self.fc1(x)))
        return states


class _Layer(nn.Module):
    def __init__(self, p: ClipParams) -> None:
        super().__init__()
        self.self_attn = _Attention(p)
        self.layer_norm1 = nn.LayerNorm(p.hidden_size, eps=p.layer_norm_eps)
        self.mlp = _MLP(p)
        self.layer_norm2 = nn.LayerNorm(p.hidden_size, eps=p.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        states: Tensor = x + self.mlp(self.layer_norm2(x))
        return states


class _Layers(nn.Module):
    def __init__(self, p: ClipParams) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(p) for _ in range(p.num_hidden_layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class ClipModel(nn.Module):
    """The network: token ids to the state of each text's end token, after the final norm, not projected."""

    def __init__(self, params: ClipParams) -> None:
        super().__init__()
        self.params = params
        self.embeddings = _Embeddings(params)
        self.encoder = _Layers(params)
        self.final_layer_norm = nn.LayerNorm(params.hidden_size, eps=params.layer_norm_eps)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the pooled embedding of token ids (b, l), l at most `max_position_embeddings`: (b, d)."""
        states = self.final_layer_norm(self.encoder(self.embeddings(ids)))
        eos = self.params.eos_token_id
        ends = (ids if eos == _LARGEST_ID else (ids == eos).int()).argmax(dim=-1)
        pooled: Tensor = states[torch.arange(len(ids), device=ids.device), ends]
        return pooled


class ClipEncoder:
    """CLIP's text encoder with its tokenizer."""

    def __init__(self, tokenizer: Any, model: ClipModel) -> None:
        self.tokenizer = tokenizer
        self.model = model

    @property
    def width(self) -> int:
        return self.model.params.hidden_size

    @property
    def max_length(self) -> int:
        """The largest number of tokens that it reads, begin and end of text included."""
        length: int = min(self.tokenizer.model_max_length, self.model.params.max_position_embeddings)
        return length

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """Return the pooled embedding of each prompt: (b, d)."""
        return self.pool(torch.tensor(tokenize(self.tokenizer, prompts, self.max_length), device="cpu"))

    def pool(self, ids: Tensor) -> Tensor:
        """Return the pooled embedding of token ids (b, l): (b, d)."""
        pooled: Tensor = self.model(on_device(ids, self.model.final_layer_norm.weight.device))
        return pooled

    def truncated(self, prompts: Sequence[str]) -> list[bool]:
        """Return for each prompt whether it is longer than `max_length` tokens."""
        return [count > self.max_length for count in count_tokens(self.tokenizer, prompts)]


def load_clip(checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device) -> ClipEncoder:
    """Load CLIP from a recognised checkpoint, its config.json and the folder `tokenizer` beside it.

    Raises: ValueError if weights or tokenizer files are missing or do not fit.
    """
    what = "a CLIP text encoder"
    tokenizer = load_tokenizer(CLIPTokenizer, checkpoint.folder, "tokenizer")
    with naming_errors(checkpoint, what), torch.device("meta"):
        model = ClipModel(clip_params(checkpoint.shapes, read_config(checkpoint.folder, "text_encoder")))
    checkpoint.check(what, {name: value.shape for name, value in model.state_dict().items()})
    return ClipEncoder(tokenizer, load_weights(model, StoredState(checkpoint, dtype, device)))
