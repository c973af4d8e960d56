"""The two text encoders: prompts in, embeddings out; knows no image.

The networks and tokenizers are those of transformers. No attention mask is passed for padding, as in BFL, diffusers
and DiffSynth-Studio: pad tokens are tokens like others, and the pad length changes the image.
Letters: b batch, l tokens, d width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from flux_batch.model.checkpoint.checkpoint import Checkpoint, read_config
from flux_batch.model.checkpoint.lazy_state import StoredState
from flux_batch.model.checkpoint.loading import Prepare, load_weights, naming_errors
from flux_batch.model.params import Config, Shapes, count_of, shape_of
from flux_batch.model.sampling import on_device

_CLIP_HEAD_DIM = 64
# Settings that shapes do not tell; sizes are read from the shapes of the weights, whatever a config.json says.
_CLIP_SETTINGS = ("num_attention_heads", "hidden_act", "layer_norm_eps", "bos_token_id", "eos_token_id")
_T5_SETTINGS = ("relative_attention_max_distance", "layer_norm_epsilon", "feed_forward_proj")
# The files of each class of tokenizer: any one of these sets is enough.
_TOKENIZER_FILES = {
    CLIPTokenizer: (("tokenizer.json",), ("vocab.json", "merges.txt")),
    T5Tokenizer: (("tokenizer.json",), ("spiece.model",)),
}


class ClipEncoder:
    """CLIP's text half: the state of the end-of-text token, after the final norm, not projected."""

    def __init__(self, tokenizer: Any, model: Any) -> None:
        self.tokenizer = tokenizer
        self.model = model

    @property
    def width(self) -> int:
        width: int = self.model.config.hidden_size
        return width

    @property
    def max_length(self) -> int:
        """The number of tokens it reads, begin and end of text included."""
        length: int = min(self.tokenizer.model_max_length, self.model.config.max_position_embeddings)
        return length

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """Return the pooled embedding of each prompt: (b, d)."""
        return self.pool(tokenize(self.tokenizer, prompts, self.max_length))

    def pool(self, ids: Tensor) -> Tensor:
        """Return the pooled embedding of token ids (b, l): (b, d)."""
        pooled: Tensor = self.model(on_device(ids, self.model.device)).pooler_output
        return pooled

    def truncated(self, prompts: Sequence[str]) -> list[bool]:
        """Return whether the end of each prompt is left out."""
        return [count > self.max_length for count in count_tokens(self.tokenizer, prompts)]


class T5Encoder:
    """T5's encoder: the states of all tokens."""

    def __init__(self, tokenizer: Any, model: Any) -> None:
        self.tokenizer = tokenizer
        self.model = model

    @property
    def width(self) -> int:
        width: int = self.model.config.d_model
        return width

    @property
    def max_length(self) -> int:
        """The number of tokens its tokenizer was made for; since positions are relative, more are possible."""
        length: int = self.tokenizer.model_max_length
        return length

    def __call__(self, prompts: Sequence[str], length: int) -> Tensor:
        """Return the states of each prompt, cut or padded to `length` tokens: (b, length, d)."""
        return self.states(tokenize(self.tokenizer, prompts, length))

    def states(self, ids: Tensor) -> Tensor:
        """Return the states of token ids (b, l): (b, l, d)."""
        states: Tensor = self.model(on_device(ids, self.model.device)).last_hidden_state
        return states

    def truncated(self, prompts: Sequence[str], length: int) -> list[bool]:
        """Return whether the end of each prompt is left out at this length."""
        return [count > length for count in count_tokens(self.tokenizer, prompts)]


def tokenize(tokenizer: Any, prompts: Sequence[str], length: int) -> Tensor:
    """Return token ids (b, length) int64, cut or padded."""
    batch = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True)
    return torch.tensor(batch.input_ids, dtype=torch.int64, device="cpu")


def count_tokens(tokenizer: Any, prompts: Sequence[str]) -> list[int]:
    """Return the number of tokens of each whole prompt, special tokens included."""
    return [len(ids) for ids in tokenizer(list(prompts), verbose=False).input_ids]


def left_out(tokenizer: Any, prompt: str, length: int) -> str:
    """Return the end of a prompt that does not fit into so many tokens; empty if all of it does."""
    batch = tokenizer(prompt, max_length=length, truncation=True, return_offsets_mapping=True, verbose=False)
    if len(batch.input_ids) < length or count_tokens(tokenizer, [prompt])[0] <= length:
        return ""
    return prompt[max(end for _, end in batch.offset_mapping) :]


def load_clip(checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device) -> ClipEncoder:
    """Load CLIP from a recognised checkpoint, its config.json and the folder `tokenizer` beside it.

    Raises: ValueError naming what is missing.
    """
    what = "a CLIP text encoder"
    tokenizer = load_tokenizer(CLIPTokenizer, checkpoint.folder, "tokenizer")
    with naming_errors(checkpoint, what):
        settings = clip_settings(checkpoint.shapes, read_config(checkpoint.folder, "text_encoder"))
        model = build(CLIPTextConfig, CLIPTextModel, settings)
    # transformers 5 moved the modules one level up: its own state dict has no text_model. prefix any more.
    own_names = {name.removeprefix("text_model."): name for name in model.state_dict()}
    checkpoint.check(what, {name: model.state_dict()[own].shape for name, own in own_names.items()})
    load_weights(model, StoredState(checkpoint.rename(own_names), dtype, device))
    positions = torch.arange(model.config.max_position_embeddings, device=device)[None]
    for name, _ in list(model.named_buffers()):
        model.get_submodule(name.rpartition(".")[0]).register_buffer("position_ids", positions, persistent=False)
    return ClipEncoder(tokenizer, model)


def load_t5(
    checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device, prepare: Prepare | None = None
) -> T5Encoder:
    """Load T5's encoder from a recognised checkpoint, its config.json and the folder `tokenizer_2` beside it.

    Raises: ValueError naming what is missing.
    """
    what = "a T5 encoder"
    tokenizer = load_tokenizer(T5Tokenizer, checkpoint.folder, "tokenizer_2")
    checkpoint = _with_one_table(checkpoint)
    with naming_errors(checkpoint, what):
        settings = t5_settings(checkpoint.shapes, read_config(checkpoint.folder, "text_encoder_2"))
        model = build(T5Config, T5EncoderModel, settings)
    model.encoder.set_input_embeddings(model.shared)
    expected = {name: value.shape for name, value in model.state_dict().items() if "embed_tokens" not in name}
    checkpoint.check(what, expected)
    # float16 overflows in wo; transformers keeps it in fp32, too.
    wide = [name for name in expected if name.endswith(".wo.weight")] if dtype == torch.float16 else []
    load_weights(model, StoredState(checkpoint, dtype, device, dtypes=dict.fromkeys(wide, torch.float32)), prepare)
    return T5Encoder(tokenizer, model)


def _with_one_table(checkpoint: Checkpoint) -> Checkpoint:
    """Return a T5 with its token table as `shared.weight` only: files hold it under one of two names, or both."""
    shared, again = "shared.weight", "encoder.embed_tokens.weight"
    names = {name: name for name in checkpoint.tensors if name != again or shared not in checkpoint.tensors}
    return checkpoint.rename({name: shared if name == again else name for name in names})


def load_tokenizer(kind: Any, home: Path, name: str) -> Any:
    """Load a tokenizer from the folder `name` in `home` or beside it. Raises: ValueError if neither has its files."""
    folders = [home / name, home.parent / name]
    for folder in folders:
        if folder.is_dir():
            # Without its files transformers would make an empty tokenizer, for which all prompts are the same.
            if not any(all((folder / file).is_file() for file in files) for files in _TOKENIZER_FILES[kind]):
                needed = " or ".join(" and ".join(files) for files in _TOKENIZER_FILES[kind])
                raise ValueError(f"{folder} is not a tokenizer: it lacks {needed}")
            try:
                tokenizer = kind.from_pretrained(str(folder), local_files_only=True)
            except Exception as error:  # tokenizers raises Exception itself
                raise ValueError(f"{folder} holds a tokenizer that cannot be read: {error}") from error
            most = tokenizer.model_max_length
            if not isinstance(most, (int, float)) or not most >= 1:
                raise ValueError(f"{folder} holds a tokenizer that cannot be used: model_max_length = {most!r}")
            return tokenizer
    raise ValueError(
        f"no tokenizer: neither {folders[0]} nor {folders[1]} is there; put the folders tokenizer and tokenizer_2 of "
        "FLUX.1-dev or FLUX.1-schnell beside the weights"
    )


def load_tokenizers(home: Path) -> tuple[Any, Any]:
    """Load the tokenizers of CLIP and T5 from a model's folder, or beside its file. Raises: ValueError."""
    return load_tokenizer(CLIPTokenizer, home, "tokenizer"), load_tokenizer(T5Tokenizer, home, "tokenizer_2")


def build(config_class: Any, model_class: Any, settings: Config) -> Any:
    """Build a network of transformers on meta. Raises: ValueError if the settings do not fit the weights."""
    try:
        with torch.device("meta"):
            return model_class(config_class(**settings))
    except Exception as error:  # of any class: settings are read from a file, and transformers computes with them
        raise ValueError(f"its config.json does not fit its weights: {error!r}") from error


def clip_settings(shapes: Shapes, config: Config) -> Config:
    """Return the settings of a CLIP: sizes from its shapes, the rest from its config.json, else as in CLIP-L."""
    vocab_size, hidden_size = shape_of(shapes, "embeddings.token_embedding.weight")
    return {
        "num_attention_heads": max(1, hidden_size // _CLIP_HEAD_DIM),
        "hidden_act": "quick_gelu",
        "bos_token_id": 0,
        # The legacy value, with which the end of text is found as the largest id; CLIP-L's 49407 is the largest.
        "eos_token_id": 2,
        **_settings_of(config, "clip_text_model", _CLIP_SETTINGS),
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": shape_of(shapes, "encoder.layers.0.mlp.fc1.weight")[0],
        "num_hidden_layers": count_of(shapes, "encoder.layers."),
        "max_position_embeddings": shape_of(shapes, "embeddings.position_embedding.weight")[0],
    }


def t5_settings(shapes: Shapes, config: Config) -> Config:
    """Return the settings of a T5: sizes from its shapes, the rest from its config.json, else as in T5 v1.1."""
    vocab_size, d_model = shape_of(shapes, "shared.weight")
    attention = "encoder.block.0.layer.0.SelfAttention"
    num_buckets, num_heads = shape_of(shapes, f"{attention}.relative_attention_bias.weight")
    return {
        "relative_attention_max_distance": 128,
        "feed_forward_proj": "gated-gelu",
        **_settings_of(config, "t5", _T5_SETTINGS),
        "vocab_size": vocab_size,
        "d_model": d_model,
        "d_kv": shape_of(shapes, f"{attention}.q.weight")[0] // num_heads,
        "d_ff": shape_of(shapes, "encoder.block.0.layer.1.DenseReluDense.wi_0.weight")[0],
        "num_layers": count_of(shapes, "encoder.block."),
        "num_heads": num_heads,
        "relative_attention_num_buckets": num_buckets,
        "tie_word_embeddings": False,
    }


def _settings_of(config: Config, model_type: str, names: Sequence[str]) -> Config:
    """Return the settings of these names in a config.json, if of that model type; null is as if left out."""
    own = config if config.get("model_type") == model_type else {}
    return {name: own[name] for name in names if own.get(name) is not None}
