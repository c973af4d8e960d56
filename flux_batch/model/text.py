"""The two text encoders: prompts in, embeddings out; knows no picture.

The networks and tokenizers are those of transformers. No attention mask is passed for padding, as in BFL, diffusers
and DiffSynth-Studio: pad tokens are tokens like others, and the pad length changes the picture.
Letters: b batch, l tokens, d width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from flux_batch.model.checkpoint import Checkpoint, StoredState, read_config
from flux_batch.model.params import Config, Shapes, count_of, shape_of

CLIP_HEAD_DIM = 64
# What a tokenizer can be read from, by class: any one of these sets of files.
TOKENIZER_FILES = {
    CLIPTokenizer: (("tokenizer.json",), ("vocab.json", "merges.txt")),
    T5Tokenizer: (("tokenizer.json",), ("spiece.model",)),
}


class ClipEncoder:
    """CLIP's text half: the state of the end-of-text token, final norm applied, not projected."""

    def __init__(self, tokenizer: Any, model: Any) -> None:
        self.tokenizer = tokenizer
        self.model = model

    @property
    def width(self) -> int:
        width: int = self.model.config.hidden_size
        return width

    @property
    def max_length(self) -> int:
        """Tokens it reads, begin and end of text included."""
        length: int = min(self.tokenizer.model_max_length, self.model.config.max_position_embeddings)
        return length

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """Return the pooled embedding of each prompt: (b, d)."""
        return self.pool(tokenize(self.tokenizer, prompts, self.max_length))

    def pool(self, ids: Tensor) -> Tensor:
        """Return the pooled embedding of token ids (b, l): (b, d)."""
        pooled: Tensor = self.model(ids.to(self.model.device)).pooler_output
        return pooled

    def truncated(self, prompts: Sequence[str]) -> list[bool]:
        """Return of each prompt whether its end is not read."""
        return [count > self.max_length for count in count_tokens(self.tokenizer, prompts)]


class T5Encoder:
    """T5's encoder: the state of every token."""

    def __init__(self, tokenizer: Any, model: Any) -> None:
        self.tokenizer = tokenizer
        self.model = model

    @property
    def width(self) -> int:
        width: int = self.model.config.d_model
        return width

    @property
    def max_length(self) -> int:
        """Tokens its tokenizer was made for; more can be asked for, its positions are relative."""
        length: int = self.tokenizer.model_max_length
        return length

    def __call__(self, prompts: Sequence[str], length: int) -> Tensor:
        """Return the states of each prompt, cut or padded to `length` tokens: (b, length, d)."""
        return self.states(tokenize(self.tokenizer, prompts, length))

    def states(self, ids: Tensor) -> Tensor:
        """Return the states of token ids (b, l): (b, l, d)."""
        states: Tensor = self.model(ids.to(self.model.device)).last_hidden_state
        return states

    def truncated(self, prompts: Sequence[str], length: int) -> list[bool]:
        """Return of each prompt whether its end is not read at this length."""
        return [count > length for count in count_tokens(self.tokenizer, prompts)]


def tokenize(tokenizer: Any, prompts: Sequence[str], length: int) -> Tensor:
    """Return token ids (b, length) int64, cut or padded."""
    batch = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    ids: Tensor = batch.input_ids
    return ids


def count_tokens(tokenizer: Any, prompts: Sequence[str]) -> list[int]:
    """Return the number of tokens of each whole prompt, special tokens included."""
    return [len(ids) for ids in tokenizer(list(prompts), verbose=False).input_ids]


def load_clip(checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device) -> ClipEncoder:
    """Build CLIP from a recognised checkpoint, its config.json and the folder `tokenizer` beside it.

    Raises: ValueError naming what is missing.
    """
    config = read_config(checkpoint.home, "text_encoder")
    with torch.device("meta"):
        model = CLIPTextModel(clip_config(checkpoint.shapes, config))
    # transformers 5 moved the modules one level up: its own state dict has no text_model. prefix any more.
    expected = {name.removeprefix("text_model."): name for name in model.state_dict()}
    checkpoint.check("a CLIP text encoder", {name: model.state_dict()[own].shape for name, own in expected.items()})
    stored = StoredState(checkpoint, dtype, device)
    model.load_state_dict({own: stored[name] for name, own in expected.items()}, strict=True, assign=True)
    positions = torch.arange(model.config.max_position_embeddings, device=device)[None]
    for name, _ in list(model.named_buffers()):
        model.get_submodule(name.rpartition(".")[0]).register_buffer("position_ids", positions, persistent=False)
    tokenizer = load_tokenizer(CLIPTokenizer, checkpoint.home, "tokenizer")
    return ClipEncoder(tokenizer, model.requires_grad_(False).eval())


def load_t5(checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device) -> T5Encoder:
    """Build T5's encoder from a recognised checkpoint, its config.json and the folder `tokenizer_2` beside it.

    Raises: ValueError naming what is missing.
    """
    # The token table has two names, and files hold it under either or both.
    names = {name: "shared.weight" if name == "encoder.embed_tokens.weight" else name for name in checkpoint.tensors}
    checkpoint = checkpoint.rename(names)
    config = read_config(checkpoint.home, "text_encoder_2")
    with torch.device("meta"):
        model = T5EncoderModel(t5_config(checkpoint.shapes, config))
    expected = {name: value.shape for name, value in model.state_dict().items() if "embed_tokens" not in name}
    checkpoint.check("a T5 encoder", expected)
    # float16 overflows in wo (as transformers, which keeps it in fp32 then).
    wide = StoredState(checkpoint, torch.float32 if dtype == torch.float16 else dtype, device)
    stored = StoredState(checkpoint, dtype, device)
    state = {name: (wide if name.endswith(".wo.weight") else stored)[name] for name in stored}
    model.load_state_dict({**state, "encoder.embed_tokens.weight": state["shared.weight"]}, strict=True, assign=True)
    model.encoder.set_input_embeddings(model.shared)
    tokenizer = load_tokenizer(T5Tokenizer, checkpoint.home, "tokenizer_2")
    return T5Encoder(tokenizer, model.requires_grad_(False).eval())


def load_tokenizer(kind: Any, home: Path, name: str) -> Any:
    """Load a tokenizer from the folder `name` in `home` or beside it. Raises: ValueError if neither has its files."""
    places = [home / name, home.parent / name]
    for place in places:
        if place.is_dir():
            # Without its files transformers would make an empty tokenizer, and every prompt the same.
            if not any(all((place / file).is_file() for file in files) for files in TOKENIZER_FILES[kind]):
                needed = " or ".join(" and ".join(files) for files in TOKENIZER_FILES[kind])
                raise ValueError(f"{place} is no tokenizer: it lacks {needed}")
            try:
                return kind.from_pretrained(str(place), local_files_only=True)
            except Exception as error:  # tokenizers raises Exception itself
                raise ValueError(f"{place} holds a tokenizer that cannot be read: {error}") from error
    raise ValueError(f"no tokenizer: neither {places[0]} nor {places[1]} is there; it comes with the text encoder")


def clip_config(shapes: Shapes, config: Config) -> Any:
    """Return the configuration given, or that of a CLIP-L with the sizes of these shapes."""
    if config.get("model_type") == "clip_text_model":
        return CLIPTextConfig.from_dict(dict(config))
    vocab_size, hidden_size = shape_of(shapes, "embeddings.token_embedding.weight")
    return CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=shape_of(shapes, "encoder.layers.0.mlp.fc1.weight")[0],
        num_hidden_layers=count_of(shapes, "encoder.layers."),
        num_attention_heads=max(1, hidden_size // CLIP_HEAD_DIM),
        max_position_embeddings=shape_of(shapes, "embeddings.position_embedding.weight")[0],
        hidden_act="quick_gelu",
        bos_token_id=0,
        # The legacy value: the end of text is then found as the largest id, which also holds for CLIP-L's 49407.
        eos_token_id=2,
    )


def t5_config(shapes: Shapes, config: Config) -> Any:
    """Return the configuration given, or that of a T5 v1.1 with the sizes of these shapes."""
    if config.get("model_type") == "t5":
        return T5Config.from_dict(dict(config))
    vocab_size, d_model = shape_of(shapes, "shared.weight")
    attention = "encoder.block.0.layer.0.SelfAttention"
    num_buckets, num_heads = shape_of(shapes, f"{attention}.relative_attention_bias.weight")
    return T5Config(
        vocab_size=vocab_size,
        d_model=d_model,
        d_kv=shape_of(shapes, f"{attention}.q.weight")[0] // num_heads,
        d_ff=shape_of(shapes, "encoder.block.0.layer.1.DenseReluDense.wi_0.weight")[0],
        num_layers=count_of(shapes, "encoder.block."),
        num_heads=num_heads,
        relative_attention_num_buckets=num_buckets,
        relative_attention_max_distance=128,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
