"""Tiny ControlNets with random weights, and diffusers' pipeline with them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxControlNetModel, FluxControlNetPipeline
from diffusers.models.controlnets.controlnet_flux import FluxMultiControlNetModel

from helpers.parity import load_reference
from helpers.tiny_flux import CLIP_WIDTH, T5_WIDTH, TinyFlux, shake_vectors

BASE = TinyFlux(depth=3, depth_single_blocks=5)


def make_net(folder: Path, depth: int, depth_single: int, modes: int | None = None, *, xlabs: bool = False) -> Path:
    """Write a net with random weights as diffusers does, also for the weights that diffusers starts at zero."""
    with torch.random.fork_rng():
        torch.manual_seed(7 * depth + depth_single)
        net = FluxControlNetModel(
            in_channels=64,
            num_layers=depth,
            num_single_layers=depth_single,
            attention_head_dim=sum(BASE.axes_dim),
            num_attention_heads=BASE.num_heads,
            joint_attention_dim=T5_WIDTH,
            pooled_projection_dim=CLIP_WIDTH,
            guidance_embeds=True,
            axes_dims_rope=BASE.axes_dim,
            num_mode=modes,
            conditioning_embedding_channels=16 if xlabs else None,
            patch_size=2 if xlabs else 1,
        )
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                if name.startswith(("controlnet_", "input_hint_block.")) and parameter.ndim > 1:
                    parameter.normal_(std=0.2)
        shake_vectors(net)
    net.save_pretrained(folder)
    return folder


class Mapped(FluxMultiControlNetModel):
    """Several nets whose residuals are mapped to the blocks before they are added; diffusers maps the sums."""

    def forward(self, *, controlnet_cond: Any, controlnet_mode: Any, conditioning_scale: Any, **inputs: Any) -> Any:
        inputs.pop("return_dict")
        double, single = [0.0] * BASE.depth, [0.0] * BASE.depth_single_blocks
        for net, image, mode, scale in zip(
            self.nets, controlnet_cond, controlnet_mode, conditioning_scale, strict=True
        ):
            found = net(
                controlnet_cond=image,
                controlnet_mode=mode[:, None],
                conditioning_scale=scale,
                return_dict=False,
                **inputs,
            )
            for sums, residuals in zip((double, single), found, strict=True):
                for block in range(len(sums) if residuals else 0):
                    sums[block] = sums[block] + residuals[block // math.ceil(len(sums) / len(residuals))]
        return double, single


def reference_of(base: Path, *nets: Path) -> Any:
    """Return diffusers' pipeline, with zero variance for control images, so that a sample is the mean."""
    found = [FluxControlNetModel.from_pretrained(net).eval() for net in nets]
    reference = load_reference(base)
    reference = FluxControlNetPipeline(
        **reference.components, controlnet=found[0] if len(found) == 1 else Mapped(found)
    )
    reference.set_progress_bar_config(disable=True)
    conv = reference.vae.encoder.conv_out
    with torch.no_grad():
        conv.weight[16:], conv.bias[16:] = 0, -60.0
    return reference
