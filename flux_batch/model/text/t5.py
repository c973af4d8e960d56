"""T5's encoder: the states of all tokens of a prompt.

Attribute names are the keys of the published files.
Letters: b batch, l tokens, h heads, d width. Source: transformers 5.23, models/t5/modeling_t5.py; the order of
operations is the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from transformers import T5Tokenizer

from flux_batch.model.checkpoint.checkpoint import Checkpoint, read_config
from flux_batch.model.checkpoint.lazy_state import StoredState
from flux_batch.model.checkpoint.loading import Prepare, load_weights, naming_errors
from flux_batch.model.params import Config, Shapes, check_setting, count_of, settings_of, shape_of
from flux_batch.model.sampling import on_device
from flux_batch.model.text.embedding import blank_table
from flux_batch.model.text.tokenizers import count_tokens, load_tokenizer, tokenize

# Settings that shapes do not determine. Sizes are read from the shapes of the weights, never from config.json.
_SETTINGS = ("relative_attention_max_distance", "layer_norm_epsilon", "feed_forward_proj")
# The gate of T5 v1.1's feed-forward: the tanh approximation of GELU.
_GATED_GELU = "gated-gelu"
_GATED_GELUS = (_GATED_GELU, "gated-gelu_new")
# States in float16 that overflow are clipped to its largest number minus this margin.
_FP16_MARGIN = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class T5Params:
    """The encoder, with the names of config.json. The defaults are those of T5 v1.1."""

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_heads: int
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = _GATED_GELU

    def __post_init__(self) -> None:
        if not (near := self.relative_attention_num_buckets // 4):
            raise ValueError(
                f"relative_attention_bias has {self.relative_attention_num_buckets} buckets, not 4 or more"
            )
        distance, eps = self.relative_attention_max_distance, self.layer_norm_epsilon
        is_far = isinstance(distance, int) and distance > near
        check_setting("relative_attention_max_distance", distance, is_far, f"must be greater than {near}")
        check_setting("layer_norm_epsilon", eps, isinstance(eps, (int, float)) and eps > 0, "must be greater than 0")
        is_gated = self.feed_forward_proj in _GATED_GELUS
        check_setting("feed_forward_proj", self.feed_forward_proj, is_gated, f"must be {_GATED_GELU}")


def t5_params(shapes: Shapes, config: Config) -> T5Params:
    """Return a T5's parameters: sizes from its shapes, the rest from config.json or as in T5 v1.1.

    Raises: ValueError if config.json does not fit.
    """
    vocab_size, d_model = shape_of(shapes, "shared.weight")
    attention = "encoder.block.0.layer.0.SelfAttention"
    num_buckets, num_heads = shape_of(shapes, f"{attention}.relative_attention_bias.weight")
    return T5Params(
        vocab_size=vocab_size,
        d_model=d_model,
        d_kv=shape_of(shapes, f"{attention}.q.weight")[0] // num_heads,
        d_ff=shape_of(shapes, "encoder.block.0.layer.1.DenseReluDense.wi_0.weight")[0],
        num_layers=count_of(shapes, "encoder.block."),
        num_heads=num_heads,
        relative_attention_num_buckets=num_buckets,
        **settings_of(config, "t5", _SETTINGS),
    )


class _RMSNorm(nn.Module):
    """Norm by the root mean square in fp32, rounded before the scale."""

    def __init__(self, p: T5Params) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(p.d_model))
        self.eps = p.layer_norm_epsilon

    def forward(self, x: Tensor) -> Tensor:
        normed = x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(self.weight.dtype)


class _SelfAttention(nn.Module):
    """Unscaled attention of all tokens to all. The first layer has the table of position biases for all layers."""

    def __init__(self, p: T5Params, *, has_table: bool) -> None:
        super().__init__()
        self.num_heads = p.num_heads
        self.max_distance = p.relative_attention_max_distance
        width = p.num_heads * p.d_kv
        self.q = nn.Linear(p.d_model, width, bias=False)
        self.k = nn.Linear(p.d_model, width, bias=False)
        self.v = nn.Linear(p.d_model, width, bias=False)
        self.o = nn.Linear(width, p.d_model, bias=False)
        if has_table:
            self.relative_attention_bias = blank_table(p.relative_attention_num_buckets, p.num_heads)

    def position_bias(self, length: int) -> Tensor:
        """Return the bias that is added to the attention scores of `length` tokens: (1, h, l, l)."""
        table = self.relative_attention_bias
        buckets = _relative_buckets(length, table.num_embeddings, self.max_distance, table.weight.device)
        return rearrange(table(buckets), "q k h -> 1 h q k").contiguous()

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        projections = (self.q(x), self.k(x), self.v(x))
        q, k, v = (rearrange(part, "b l (h d) -> b h l d", h=self.num_heads) for part in projections)
        attn = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        states: Tensor = self.o(rearrange(attn, "b h l d -> b l (h d)"))
        return states


def _relative_buckets(length: int, num_buckets: int, max_distance: int, device: torch.device) -> Tensor:
    """Return the bucket of each key's distance from each query: (l, l) int64, queries first.

    Half of the buckets are for keys after the query. In each half, the first half of the buckets stands for one
    distance each; the others stand for ranges that grow by a constant factor up to `max_distance`, and the last one for
    all distances beyond.
    """
    positions = torch.arange(length, device=device)
    distance = positions[None, :] - positions[:, None]
    half, near = num_buckets // 2, num_buckets // 4
    far = torch.log(distance.abs().float() / near) / math.log(max_distance / near) * (half - near)
    buckets = torch.where(distance.abs() < near, distance.abs(), (near + far.long()).clamp(max=half - 1))
    return buckets + half * (distance > 0)


class _FeedForward(nn.Module):
    def __init__(self, p: T5Params) -> None:
        super().__init__()
        self.wi_0 = nn.Linear(p.d_model, p.d_ff, bias=False)
        self.wi_1 = nn.Linear(p.d_model, p.d_ff, bias=False)
        self.wo = nn.Linear(p.d_ff, p.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gated = _gelu(self.wi_0(x)) * self.wi_1(x)
        # wo is float32 in a float16 model, see load_t5.
        states: Tensor = self.wo(gated.float() if gated.dtype == torch.float16 else gated)
        return states


def _gelu(x: Tensor) -> Tensor:
    """Return the tanh approximation of GELU as transformers computes it; torch's own differs in the last bits."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


class _AttentionLayer(nn.Module):
    def __init__(self, p: T5Params, *, has_table: bool) -> None:
        super().__init__()
        self.SelfAttention = _SelfAttention(p, has_table=has_table)
        self.layer_norm = _RMSNorm(p)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        states: Tensor = x + self.SelfAttention(self.layer_norm(x), bias)
        return states


class _FeedForwardLayer(nn.Module):
    def __init__(self, p: T5Params) -> None:
        super().__init__()
        self.DenseReluDense = _FeedForward(p)
        self.layer_norm = _RMSNorm(p)

    def forward(self, x: Tensor) -> Tensor:
        states: Tensor = x + self.DenseReluDense(self.layer_norm(x))
        return states


class _Block(nn.Module):
    def __init__(self, p: T5Params, *, has_table: bool) -> None:
        super().__init__()
        self.layer = nn.ModuleList([_AttentionLayer(p, has_table=has_table), _FeedForwardLayer(p)])

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        attention, feed_forward = self.layer
        return _finite(feed_forward(_finite(attention(x, bias))))


def _finite(x: Tensor) -> Tensor:
    """Return float16 states with infinities clipped; return other dtypes unchanged."""
    if x.dtype != torch.float16:
        return x
    largest = torch.finfo(x.dtype).max - _FP16_MARGIN
    return torch.where(x.isinf().any(), x.clamp(-largest, largest), x)


class _Stack(nn.Module):
    def __init__(self, p: T5Params) -> None:
        super().__init__()
        self.block = nn.ModuleList(_Block(p, has_table=index == 0) for index in range(p.num_layers))
        self.final_layer_norm = _RMSNorm(p)

    def forward(self, x: Tensor) -> Tensor:
        first: Any = self.block[0]
        bias = first.layer[0].SelfAttention.position_bias(x.shape[1])
        for block in self.block:
            x = block(x, bias)
        states: Tensor = self.final_layer_norm(x)
        return states


class T5Model(nn.Module):
    """The network: token ids to the state of each token."""

    def __init__(self, params: T5Params) -> None:
        super().__init__()
        self.params = params
        self.shared = blank_table(params.vocab_size, params.d_model)
        self.encoder = _Stack(params)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the states of token ids (b, l): (b, l, d)."""
        states: Tensor = self.encoder(self.shared(ids))
        return states


class T5Encoder:
    """T5's encoder with its tokenizer."""

    def __init__(self, tokenizer: Any, model: T5Model) -> None:
        self.tokenizer = tokenizer
        self.model = model

    @property
    def width(self) -> int:
        return self.model.params.d_model

    @property
    def max_length(self) -> int:
        """The tokenizer's maximum number of tokens. The network takes more, since its positions are relative."""
        length: int = self.tokenizer.model_max_length
        return length

    def __call__(self, prompts: Sequence[str], length: int) -> Tensor:
        """Return the states of each prompt, cut or padded to `length` tokens: (b, length, d)."""
        return self.states(torch.tensor(tokenize(self.tokenizer, prompts, length), device="cpu"))

    def states(self, ids: Tensor) -> Tensor:
        """Return the states of token ids (b, l): (b, l, d)."""
        states: Tensor = self.model(on_device(ids, self.model.shared.weight.device))
        return states

    def truncated(self, prompts: Sequence[str], length: int) -> list[bool]:
        """Return for each prompt whether it is longer than `length` tokens."""
        return [count > length for count in count_tokens(self.tokenizer, prompts)]


def load_t5(
    checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device, prepare: Prepare | None = None
) -> T5Encoder:
    """Load T5's encoder from a recognised checkpoint, its config.json and the folder `tokenizer_2` beside it.

    Raises: ValueError if weights or tokenizer files are missing or do not fit.
    """
    what = "a T5 encoder"
    tokenizer = load_tokenizer(T5Tokenizer, checkpoint.folder, "tokenizer_2")
    checkpoint = _with_one_table(checkpoint)
    with naming_errors(checkpoint, what), torch.device("meta"):
        model = T5Model(t5_params(checkpoint.shapes, read_config(checkpoint.folder, "text_encoder_2")))
    expected = {name: value.shape for name, value in model.state_dict().items()}
    checkpoint.check(what, expected)
    # wo overflows in float16; transformers keeps it in fp32, too.
    wide = [name for name in expected if name.endswith(".wo.weight")] if dtype == torch.float16 else []
    state = StoredState(checkpoint, dtype, device, dtypes=dict.fromkeys(wide, torch.float32))
    return T5Encoder(tokenizer, load_weights(model, state, prepare))


def _with_one_table(checkpoint: Checkpoint) -> Checkpoint:
    """Return a T5 with its token table as `shared.weight` only; files have it under either of two names, or both."""
    shared, again = "shared.weight", "encoder.embed_tokens.weight"
    names = {name: name for name in checkpoint.tensors if name != again or shared not in checkpoint.tensors}
    return checkpoint.rename({name: shared if name == again else name for name in names})
