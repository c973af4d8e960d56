"""Small model folders with random weights in both layouts, made with diffusers without downloads."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from flux_batch.model.checkpoint.diffusers_keys import autoencoder_from_diffusers, transformer_from_diffusers

# Such small layers gain nothing from threads, and the threads of several test processes would wait for each other.
torch.set_num_threads(1)

CLIP_WIDTH = 32
T5_WIDTH = 24
# The vision tower of Redux and of an IP-Adapter.
TINY_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "patch_size": 14,
}
# The tokens of the tiny T5 vocabulary: each letter and digit is one token.
T5_PIECES = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,!?'-"


@dataclass(frozen=True, kw_only=True)
class TinyFlux:
    """Sizes of a tiny model; the defaults are the smallest with every kind of part twice."""

    axes_dim: tuple[int, int, int] = (4, 6, 6)
    num_heads: int = 2
    depth: int = 2
    depth_single_blocks: int = 2
    guidance_embed: bool = True
    dynamic_shift: bool = True
    in_channels: int = 64
    # FLUX.1 has 512, which a tiny model would mostly spend on padding.
    t5_max_length: int = 64
    seed: int = 0


def make_tiny_repository(
    folder: Path, config: TinyFlux | None = None, *, layout: str = "diffusers", max_shard_size: str = "10GB"
) -> Path:
    """Write a model folder in the layout `diffusers` or `original`."""
    make_tiny_pipeline(config or TinyFlux()).save_pretrained(folder, max_shard_size=max_shard_size)
    if layout == "original":
        to_original_layout(folder)
    return folder


def make_tiny_pipeline(config: TinyFlux) -> FluxPipeline:
    """Return diffusers' pipeline of a tiny model."""
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        transformer = FluxTransformer2DModel(
            in_channels=config.in_channels,
            out_channels=64,
            num_layers=config.depth,
            num_single_layers=config.depth_single_blocks,
            attention_head_dim=sum(config.axes_dim),
            num_attention_heads=config.num_heads,
            joint_attention_dim=T5_WIDTH,
            pooled_projection_dim=CLIP_WIDTH,
            guidance_embeds=config.guidance_embed,
            axes_dims_rope=config.axes_dim,
        )
        autoencoder = AutoencoderKL(
            block_out_channels=(8, 8, 16, 16),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=16,
            norm_num_groups=4,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
        clip = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(clip_vocabulary()),
                hidden_size=CLIP_WIDTH,
                intermediate_size=64,
                num_attention_heads=4,
                num_hidden_layers=2,
                max_position_embeddings=77,
                bos_token_id=0,
                eos_token_id=2,
            )
        )
        t5 = T5EncoderModel(
            T5Config(
                vocab_size=len(t5_vocabulary()),
                d_model=T5_WIDTH,
                d_ff=48,
                d_kv=6,
                num_heads=4,
                num_layers=2,
                feed_forward_proj="gated-gelu",
                tie_word_embeddings=False,
            )
        )
        for model in (transformer, autoencoder, clip, t5):
            shake_vectors(model)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0 if config.dynamic_shift else 1.0, use_dynamic_shifting=config.dynamic_shift
        ),
        vae=autoencoder.eval(),
        text_encoder=clip.eval(),
        text_encoder_2=t5.eval(),
        tokenizer=CLIPTokenizer(vocab=clip_vocabulary(), merges=[], model_max_length=77),
        tokenizer_2=T5Tokenizer(vocab=t5_vocabulary(), extra_ids=0, model_max_length=config.t5_max_length),
        transformer=transformer.eval(),
    )


@torch.no_grad()
def shake_vectors(model: torch.nn.Module) -> None:
    """Change norm scales and biases from their initial values, so that a swapped or lost one is noticed."""
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.2 * torch.randn_like(parameter))


def to_original_layout(folder: Path) -> None:
    """Turn a diffusers folder into one with `flux1-tiny.safetensors` and `ae.safetensors` at its top.

    The config files stay, since the weights of a tiny model do not reveal its configuration.
    """
    for name, file_name, convert in (
        ("transformer", "flux1-tiny.safetensors", transformer_from_diffusers),
        ("vae", "ae.safetensors", autoencoder_from_diffusers),
    ):
        save_file(convert(read_folder(folder / name)), folder / file_name)
        for path in (folder / name).glob("*.safetensors*"):
            path.unlink()


def read_folder(folder: Path) -> dict[str, Any]:
    """Return all tensors of a component folder."""
    return {key: value for path in sorted(folder.glob("*.safetensors")) for key, value in load_file(path).items()}


def copy_repository(source: Path, target: Path) -> Path:
    """Return a copy that a test may damage."""
    return Path(shutil.copytree(source, target))


def clip_vocabulary() -> dict[str, int]:
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return {word: index for index, word in enumerate(words)}


def t5_vocabulary() -> list[tuple[str, float]]:
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return special + [("▁", -2.0)] + [(letter, -3.0) for letter in T5_PIECES]
