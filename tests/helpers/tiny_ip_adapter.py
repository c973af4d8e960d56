"""A tiny IP-Adapter of XLabs with CLIP's vision tower."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from helpers.tiny_flux import T5_WIDTH, TINY_TOWER, TinyFlux

SIDE, WIDTH, TOKENS = 28, 24, 4


def adapter_state(config: TinyFlux, seed: int = 3) -> dict[str, Tensor]:
    """Return random weights under the keys of XLabs, for a tiny model."""
    hidden = config.num_heads * sum(config.axes_dim)
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {
        "ip_adapter_proj_model.proj.weight": (TOKENS * T5_WIDTH, WIDTH),
        "ip_adapter_proj_model.proj.bias": (TOKENS * T5_WIDTH,),
        "ip_adapter_proj_model.norm.weight": (T5_WIDTH,),
        "ip_adapter_proj_model.norm.bias": (T5_WIDTH,),
    }
    for block in range(config.depth):
        for name in ("k", "v"):
            key = f"double_blocks.{block}.processor.ip_adapter_double_stream_{name}_proj"
            shapes |= {f"{key}.weight": (hidden, T5_WIDTH), f"{key}.bias": (hidden,)}
    return {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}


def make_tiny_ip_adapter(folder: Path, config: TinyFlux | None = None) -> Path:
    """Write `ip_adapter.safetensors` and the folder `image_encoder`."""
    with torch.random.fork_rng():
        torch.manual_seed(6)
        tower = CLIPVisionConfig(
            **TINY_TOWER,
            image_size=SIDE,
            projection_dim=WIDTH,
        )
        CLIPVisionModelWithProjection(tower).save_pretrained(folder / "image_encoder")
    save_file(adapter_state(config or TinyFlux()), folder / "ip_adapter.safetensors")
    return folder


def load_into(reference: Any, folder: Path, weight_name: str | list[str] = "ip_adapter.safetensors") -> Any:
    """Load one or several adapter files into a pipeline of diffusers."""
    from transformers import CLIPImageProcessorPil

    reference.register_modules(
        image_encoder=CLIPVisionModelWithProjection.from_pretrained(folder / "image_encoder"),
        feature_extractor=CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SIDE),
    )
    reference.load_ip_adapter(folder, weight_name=weight_name, low_cpu_mem_usage=False)
    return reference
