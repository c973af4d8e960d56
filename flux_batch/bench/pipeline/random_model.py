"""Models of known sizes with random weights, for measurements without a download."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod, sqrt
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTokenizer, T5Tokenizer

from flux_batch.demo.paths import demo_model_folder
from flux_batch.model.autoencoder import AutoEncoder
from flux_batch.model.checkpoint.lazy_state import StoredState
from flux_batch.model.checkpoint.loading import for_device, load_weights
from flux_batch.model.params import (
    AUTOENCODER,
    DEV,
    DEV_SCHEDULE,
    SCHNELL,
    SCHNELL_SCHEDULE,
    AutoencoderParams,
    FluxParams,
    ScheduleParams,
)
from flux_batch.model.text.clip import ClipEncoder, ClipModel, ClipParams
from flux_batch.model.text.t5 import T5Encoder, T5Model, T5Params
from flux_batch.model.text.tokenizers import load_tokenizer
from flux_batch.model.transformer import Flux
from flux_batch.pipeline.loras import LoadedLoras
from flux_batch.pipeline.model_manager import PREPARE_T5, PREPARE_TRANSFORMER, ModelManager
from flux_batch.sampling_params import Quantization

_SEED = 6
# The scale of modulation: at 1.0, rounding errors would grow from step to step.
_MODULATION_GAIN = 0.2


@dataclass(frozen=True, kw_only=True, slots=True)
class _Size:
    """The sizes of all parts; the width of the text encoders follows from the transformer."""

    transformer: FluxParams
    autoencoder: AutoencoderParams
    schedule: ScheduleParams
    clip: Mapping[str, Any]
    t5: Mapping[str, Any]


# Sources: openai/clip-vit-large-patch14 and google/t5-v1_1-xxl, their config.json.
_CLIP_L = {"vocab_size": 49408, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_T5_XXL = {"vocab_size": 32128, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": 24}
_SMALL_CLIP = {"vocab_size": 1024, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
_SMALL_T5 = {"vocab_size": 512, "d_ff": 512, "d_kv": 32, "num_heads": 4, "num_layers": 2}
_SMALL = replace(
    DEV,
    vec_in_dim=256,
    context_in_dim=256,
    hidden_size=768,
    mlp_hidden_dim=3072,
    num_heads=6,
    depth=4,
    depth_single_blocks=8,
)
_TINY = replace(
    _SMALL, hidden_size=64, mlp_hidden_dim=256, num_heads=2, depth=2, depth_single_blocks=2, axes_dim=(8, 12, 12)
)
SIZES: Mapping[str, _Size] = {
    "dev": _Size(transformer=DEV, autoencoder=AUTOENCODER, schedule=DEV_SCHEDULE, clip=_CLIP_L, t5=_T5_XXL),
    "schnell": _Size(transformer=SCHNELL, autoencoder=AUTOENCODER, schedule=SCHNELL_SCHEDULE, clip=_CLIP_L, t5=_T5_XXL),
    "small": _Size(
        transformer=_SMALL,
        autoencoder=replace(AUTOENCODER, channels=(32, 32, 64, 64), num_res_blocks=1, num_groups=8),
        schedule=DEV_SCHEDULE,
        clip=_SMALL_CLIP,
        t5=_SMALL_T5,
    ),
    "tiny": _Size(
        transformer=_TINY,
        autoencoder=replace(AUTOENCODER, channels=(8, 8, 16, 16), num_res_blocks=1, num_groups=4),
        schedule=DEV_SCHEDULE,
        clip=_SMALL_CLIP,
        t5=_SMALL_T5,
    ),
}


class _RandomState(StoredState):
    """A state dict that draws each tensor on access."""

    def __init__(
        self, shapes: Mapping[str, torch.Size], dtype: torch.dtype, device: torch.device, wide: frozenset[str]
    ) -> None:
        self.device = device
        self._shapes = shapes
        self._dtype = dtype
        self._wide = wide
        self._generator = torch.Generator(device).manual_seed(_SEED)

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """Return a tensor: norm scales of 1, small biases, matrices that keep the scale of their input."""
        shape = self._shapes[name]
        tensor = torch.empty(shape, dtype=dtype, device=self.device)
        if len(shape) == 1 and not name.endswith("bias"):
            return tensor.fill_(1.0)
        gain = _MODULATION_GAIN if ".lin." in name or "adaLN" in name else 1.0
        spread = 0.02 if len(shape) == 1 else gain / sqrt(prod(shape[1:]))
        return tensor.normal_(0.0, spread, generator=self._generator)

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of the tensor `name`."""
        return torch.float32 if name in self._wide else self._dtype

    def fp8(self, name: str) -> None:
        """Return None: no tensor is stored in fp8."""

    def __contains__(self, name: object) -> bool:
        return name in self._shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def random_manager(
    name: str, dtype: torch.dtype | str, device: torch.device, quantization: Quantization = "none"
) -> ModelManager:
    """Return a manager with all parts of a model of a size; the tokenizers are those of the demo model.

    Raises: InvalidSetting, like ModelManager.
    """
    size, manager = SIZES[name], ModelManager(dtype, device, quantization=quantization)
    with torch.device("meta"):
        transformer = Flux(size.transformer)
    dtype = manager.torch_dtype
    manager.transformer = _filled(transformer, dtype, device, PREPARE_TRANSFORMER[quantization])
    manager.autoencoder = random_autoencoder(name, dtype, device)
    manager.schedule = size.schedule
    manager.clip = random_clip(size, dtype, device)
    manager.t5 = random_t5(size, dtype, device, quantization)
    manager.loras = LoadedLoras(
        {"transformer": manager.transformer, "clip": manager.clip.model, "t5": manager.t5.model}
    )
    return manager


def random_autoencoder(name: str, dtype: torch.dtype, device: torch.device) -> AutoEncoder:
    """Return the autoencoder of a model of a size with random weights."""
    with torch.device("meta"):
        autoencoder = AutoEncoder(SIZES[name].autoencoder)
    # float32 in place of float16, as in load_autoencoder: it overflows in float16.
    filled: AutoEncoder = _filled(autoencoder, torch.float32 if dtype == torch.float16 else dtype, device)
    return for_device(filled, device)


def random_clip(size: _Size, dtype: torch.dtype, device: torch.device) -> ClipEncoder:
    """Return CLIP's text encoder with random weights."""
    with torch.device("meta"):
        model = ClipModel(ClipParams(**size.clip, hidden_size=size.transformer.vec_in_dim))
    tokenizer = load_tokenizer(CLIPTokenizer, demo_model_folder(), "tokenizer")
    return ClipEncoder(tokenizer, _filled(model, dtype, device))


def random_t5(size: _Size, dtype: torch.dtype, device: torch.device, quantization: Quantization) -> T5Encoder:
    """Return T5's encoder with random weights."""
    with torch.device("meta"):
        model = T5Model(T5Params(**size.t5, d_model=size.transformer.context_in_dim))
    tokenizer = load_tokenizer(T5Tokenizer, demo_model_folder(), "tokenizer_2")
    return T5Encoder(tokenizer, _filled(model, dtype, device, PREPARE_T5[quantization]))


def _filled(model: Any, dtype: torch.dtype, device: torch.device, prepare: Any = None) -> Any:
    """Return a module on meta with random weights, drawn one tensor after another."""
    shapes = {name: tensor.shape for name, tensor in nn.Module.state_dict(model).items()}
    # These matrices stay float32, as in load_t5: they overflow in float16.
    wide = {name for name in shapes if name.endswith(".DenseReluDense.wo.weight")} if dtype == torch.float16 else set()
    return load_weights(model, _RandomState(shapes, dtype, device, frozenset(wide)), prepare)
