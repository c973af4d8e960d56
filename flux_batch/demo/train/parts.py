"""The parts of the demo model: their sizes, their configuration files, and the writer of its folder.

The folder is like a FLUX.1 repository in the layout of diffusers, weights in bfloat16.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from flux_batch.demo.train.tokenizers import CLIP_LENGTH, write_json
from flux_batch.model import params as model_params
from flux_batch.model.autoencoder import AutoEncoder
from flux_batch.model.checkpoint import diffusers_keys
from flux_batch.model.checkpoint.diffusers_keys import autoencoder_to_diffusers, transformer_to_diffusers
from flux_batch.model.params import DEV, AutoencoderParams, FluxParams, ScheduleParams
from flux_batch.model.text.clip import ClipEncoder
from flux_batch.model.text.t5 import T5Encoder
from flux_batch.model.transformer import Flux

# The release of diffusers that wrote the real folder; readers use it to choose the right behaviour.
_DIFFUSERS_VERSION = "0.30.0"
CLIP_WIDTH, _CLIP_HEADS, _CLIP_LAYERS = 128, 2, 2
T5_WIDTH, _T5_HEADS, _T5_LAYERS = 128, 4, 3
TRANSFORMER = replace(
    DEV,
    vec_in_dim=CLIP_WIDTH,
    context_in_dim=T5_WIDTH,
    hidden_size=256,
    mlp_hidden_dim=1024,
    num_heads=2,  # of size 128, as in FLUX.1, so that rotary axes and attention kernels are the real ones
    depth=1,
    depth_single_blocks=5,
)
AUTOENCODER = replace(model_params.AUTOENCODER, channels=(32, 32, 64, 64), num_res_blocks=1, num_groups=8)


def write_model(
    folder: Path, tokenizers: Path, transformer: Flux, autoencoder: AutoEncoder, clip: ClipEncoder, t5: T5Encoder
) -> None:
    """Write the whole model to a new folder; the tokenizers are copied from the folder `tokenizers`."""
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2", "scheduler"):
        (folder / part).mkdir(parents=True)
    for part in ("tokenizer", "tokenizer_2"):
        shutil.copytree(tokenizers / part, folder / part)
    weights = "diffusion_pytorch_model.safetensors"
    save_weights(folder / "transformer" / weights, transformer_to_diffusers(transformer.state_dict()))
    save_weights(folder / "vae" / weights, autoencoder_to_diffusers(autoencoder.state_dict()))
    clip_state = {f"text_model.{name}": tensor for name, tensor in clip.model.state_dict().items()}
    save_weights(folder / "text_encoder" / "model.safetensors", clip_state)
    save_weights(folder / "text_encoder_2" / "model.safetensors", t5.model.state_dict())
    write_json(folder / "transformer" / "config.json", _transformer_config(transformer.params))
    write_json(folder / "vae" / "config.json", _autoencoder_config(autoencoder.params))
    write_json(folder / "text_encoder" / "config.json", clip_config(clip.model.params.vocab_size))
    write_json(folder / "text_encoder_2" / "config.json", t5_config(t5.model.params.vocab_size))
    write_json(folder / "scheduler" / "scheduler_config.json", _scheduler_config())
    write_json(folder / "model_index.json", _model_index())


def save_weights(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write bfloat16 safetensors."""
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in state.items()}
    # Not save_file: other users of a shared cache could not read its files.
    path.write_bytes(save(tensors, metadata={"format": "pt"}))


def _model_index() -> dict[str, Any]:
    """Return the index of the classes of all parts."""
    return {
        "_class_name": "FluxPipeline",
        "_diffusers_version": _DIFFUSERS_VERSION,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def _scheduler_config() -> dict[str, Any]:
    """Return the schedule of FLUX.1-dev: shifted by the size of the image."""
    schedule = diffusers_keys.scheduler_config(ScheduleParams(use_dynamic_shifting=True, shift=3.0))
    return _of_class("FlowMatchEulerDiscreteScheduler", schedule | {"num_train_timesteps": 1000})


def _transformer_config(params: FluxParams) -> dict[str, Any]:
    """Return the configuration of the transformer as diffusers writes it."""
    return _of_class("FluxTransformer2DModel", diffusers_keys.transformer_config(params) | {"patch_size": 1})


def _autoencoder_config(params: AutoencoderParams) -> dict[str, Any]:
    """Return the configuration of the autoencoder as diffusers writes it."""
    defaults = {
        "act_fn": "silu",
        "force_upcast": True,
        "latents_mean": None,
        "latents_std": None,
        "mid_block_add_attention": True,
        "sample_size": 1024,
    }
    return _of_class("AutoencoderKL", diffusers_keys.autoencoder_config(params) | defaults)


def _of_class(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return sorted settings with the name of the class they belong to."""
    return {"_class_name": name, "_diffusers_version": _DIFFUSERS_VERSION, **dict(sorted(settings.items()))}


def clip_config(vocab_size: int) -> dict[str, Any]:
    """Return the CLIP text encoder's sizes."""
    return {
        "architectures": ["CLIPTextModel"],
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "dropout": 0.0,
        # The legacy value of the real file, which means that a text ends at its largest id.
        "eos_token_id": 2,
        "hidden_act": "quick_gelu",
        "hidden_size": CLIP_WIDTH,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": 2 * CLIP_WIDTH,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": CLIP_LENGTH,
        "model_type": "clip_text_model",
        "num_attention_heads": _CLIP_HEADS,
        "num_hidden_layers": _CLIP_LAYERS,
        "pad_token_id": 1,
        "projection_dim": CLIP_WIDTH,
        "torch_dtype": "bfloat16",
        "vocab_size": vocab_size,
    }


def t5_config(vocab_size: int) -> dict[str, Any]:
    """Return the T5 encoder's sizes."""
    return {
        "architectures": ["T5EncoderModel"],
        "classifier_dropout": 0.0,
        "d_ff": 2 * T5_WIDTH,
        "d_kv": T5_WIDTH // _T5_HEADS,
        "d_model": T5_WIDTH,
        "decoder_start_token_id": 0,
        "dense_act_fn": "gelu_new",
        "dropout_rate": 0.1,
        "eos_token_id": 1,
        "feed_forward_proj": "gated-gelu",
        "initializer_factor": 1.0,
        "is_encoder_decoder": True,
        "is_gated_act": True,
        "layer_norm_epsilon": 1e-06,
        "model_type": "t5",
        "num_decoder_layers": _T5_LAYERS,
        "num_heads": _T5_HEADS,
        "num_layers": _T5_LAYERS,
        "output_past": True,
        "pad_token_id": 0,
        "relative_attention_max_distance": 128,
        "relative_attention_num_buckets": 32,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": vocab_size,
    }
