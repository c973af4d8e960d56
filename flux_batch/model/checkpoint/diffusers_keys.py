"""Keys and configurations of diffusers: one table of renames between its layout and the original, for both directions.

Sources: black-forest-labs/flux 802fb47, whose keys are the names of our modules; diffusers 58eb52c,
scripts/convert_flux_to_diffusers.py, which lists the same pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flux_batch.model.checkpoint.checkpoint import first_names
from flux_batch.model.params import AutoencoderParams, FluxParams, ScheduleParams, Shapes, count_of

State = Mapping[str, Tensor]
Rules = Callable[[Mapping[str, object]], Iterator["_Rule"]]


@dataclass(frozen=True, slots=True)
class _Rule:
    """An original key and the diffusers keys that hold its rows, in order."""

    original: str
    diffusers: tuple[str, ...]
    # diffusers stores (scale, shift) where the original has (shift, scale).
    swaps_halves: bool = False
    # diffusers stores a 1 x 1 convolution as a linear layer.
    is_conv_1x1: bool = False

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the original tensor, joined from diffusers' parts."""
        whole = parts[0] if len(parts) == 1 else torch.cat(list(parts))
        if self.swaps_halves:
            whole = swap_halves(whole)
        return whole[:, :, None, None] if self.is_conv_1x1 else whole

    def split(self, whole: Tensor, hidden_size: int) -> Sequence[Tensor]:
        """Return diffusers' parts: `hidden_size` rows each, and the remaining rows in the last."""
        if self.swaps_halves:
            whole = swap_halves(whole)
        if self.is_conv_1x1:
            whole = whole[:, :, 0, 0]
        *first, _ = self.diffusers
        rows = [hidden_size] * len(first)
        return [part.contiguous() for part in whole.split([*rows, whole.shape[0] - sum(rows)])]


def transformer_from_diffusers(state: State) -> dict[str, Tensor]:
    """Return the original layout of a diffusers transformer. Raises: ValueError for missing or unknown keys."""
    return _to_original(state, transformer_rules(state))


def transformer_to_diffusers(state: State) -> dict[str, Tensor]:
    """Return the diffusers layout of an original transformer. Raises: ValueError for unknown keys."""
    return _to_diffusers(state, transformer_rules(state), hidden_size=state["img_in.weight"].shape[0])


def controlnet_from_diffusers(state: State) -> dict[str, Tensor]:
    """Return the original layout of a diffusers ControlNet. Raises: ValueError for missing or unknown keys."""
    return _to_original(state, controlnet_rules(state))


def controlnet_to_diffusers(state: State) -> dict[str, Tensor]:
    """Return the diffusers layout of an original ControlNet. Raises: ValueError for unknown keys."""
    return _to_diffusers(state, controlnet_rules(state), hidden_size=state["img_in.weight"].shape[0])


def autoencoder_from_diffusers(state: State) -> dict[str, Tensor]:
    """Return the original layout of a diffusers autoencoder. Raises: ValueError for missing or unknown keys."""
    return _to_original(state, autoencoder_rules(state))


def autoencoder_to_diffusers(state: State) -> dict[str, Tensor]:
    """Return the diffusers layout of an original autoencoder. Raises: ValueError for unknown keys."""
    return _to_diffusers(state, autoencoder_rules(state), hidden_size=0)


def transformer_config(params: FluxParams) -> dict[str, Any]:
    """Return the config of a transformer in the format of diffusers' FluxTransformer2DModel."""
    return {
        "attention_head_dim": params.head_dim,
        "axes_dims_rope": list(params.axes_dim),
        "guidance_embeds": params.guidance_embed,
        "in_channels": params.in_channels,
        "joint_attention_dim": params.context_in_dim,
        "num_attention_heads": params.num_heads,
        "num_layers": params.depth,
        "num_single_layers": params.depth_single_blocks,
        "pooled_projection_dim": params.vec_in_dim,
    }


def autoencoder_config(params: AutoencoderParams) -> dict[str, Any]:
    """Return the config of an autoencoder in the format of diffusers' AutoencoderKL."""
    levels = len(params.channels)
    return {
        "block_out_channels": list(params.channels),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "in_channels": params.in_channels,
        "latent_channels": params.z_channels,
        "layers_per_block": params.num_res_blocks,
        "norm_num_groups": params.num_groups,
        "out_channels": params.out_ch,
        "scaling_factor": params.scale_factor,
        "shift_factor": params.shift_factor,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "use_post_quant_conv": False,
        "use_quant_conv": False,
    }


def scheduler_config(params: ScheduleParams) -> dict[str, Any]:
    """Return the config of a schedule in the format of diffusers' FlowMatchEulerDiscreteScheduler."""
    return {
        "base_image_seq_len": params.base_image_seq_len,
        "base_shift": params.base_shift,
        "max_image_seq_len": params.max_image_seq_len,
        "max_shift": params.max_shift,
        "shift": params.shift,
        "use_dynamic_shifting": params.use_dynamic_shifting,
    }


def _to_original(state: State, rules: Iterator[_Rule]) -> dict[str, Tensor]:
    """Return a state in the original layout. Raises: ValueError for missing or unknown keys."""
    converted: dict[str, Tensor] = {}
    used: set[str] = set()
    for rule in rules:
        present = [name for name in rule.diffusers if name in state]
        if present and len(present) < len(rule.diffusers):
            raise ValueError(f"missing: {first_names([name for name in rule.diffusers if name not in state])}")
        if present:
            converted[rule.original] = rule.join([state[name] for name in present])
            used.update(present)
    _check_all_used(state, used)
    return converted


def _to_diffusers(state: State, rules: Iterator[_Rule], hidden_size: int) -> dict[str, Tensor]:
    """Return a state in the layout of diffusers. Raises: ValueError for unknown keys."""
    converted: dict[str, Tensor] = {}
    used: set[str] = set()
    for rule in rules:
        if rule.original in state:
            converted.update(zip(rule.diffusers, rule.split(state[rule.original], hidden_size), strict=True))
            used.add(rule.original)
    _check_all_used(state, used)
    return converted


def _check_all_used(state: State, used: set[str]) -> None:
    if unknown := [name for name in state if name not in used]:
        raise ValueError(f"not part of this layout: {first_names(unknown)}")


def original_names(shapes: Shapes, rules: Rules) -> Shapes:
    """Return shapes by original key; for a key that diffusers splits, the shape of the first part."""
    return {rule.original: shapes[rule.diffusers[0]] for rule in rules(shapes) if rule.diffusers[0] in shapes}


def swap_halves(rows: Tensor) -> Tensor:
    """Return the rows with their first and second half exchanged."""
    # Meta tensors hold no rows to swap, and torch.cat on meta would make torch import its compiler, which is slow.
    return rows if rows.is_meta else torch.cat(rows.chunk(2)[::-1])


def transformer_rules(names: Mapping[str, object]) -> Iterator[_Rule]:
    """Yield the rules of a transformer; its depth is read from `names`, keys of either layout."""
    shapes = dict.fromkeys(names, ())
    depth = max(count_of(shapes, "double_blocks."), count_of(shapes, "transformer_blocks."))
    depth_single = max(count_of(shapes, "single_blocks."), count_of(shapes, "single_transformer_blocks."))
    yield from _linear("img_in", "x_embedder")
    yield from _linear("txt_in", "context_embedder")
    for part, embedder in (("time_in", "timestep"), ("guidance_in", "guidance"), ("vector_in", "text")):
        yield from _linear(f"{part}.in_layer", f"time_text_embed.{embedder}_embedder.linear_1")
        yield from _linear(f"{part}.out_layer", f"time_text_embed.{embedder}_embedder.linear_2")
    for i in range(depth):
        yield from _double_block_rules(f"double_blocks.{i}", f"transformer_blocks.{i}")
    for i in range(depth_single):
        yield from _single_block_rules(f"single_blocks.{i}", f"single_transformer_blocks.{i}")
    yield from _linear("final_layer.linear", "proj_out")
    yield from _linear("final_layer.adaLN_modulation.1", "norm_out.linear", swaps_halves=True)


def controlnet_rules(names: Mapping[str, object]) -> Iterator[_Rule]:
    """Yield the rules of a ControlNet; its depth is read from `names`, keys of either layout.

    XLabs' nets have the original layout, nets of InstantX's kind that of diffusers. Sources: diffusers 0.42.1,
    models/controlnets/controlnet_flux.py; XLabs-AI/x-flux 4749542, src/flux/controlnet.py.
    """
    shapes = dict.fromkeys(names, ())
    yield from transformer_rules(names)
    for blocks in ("controlnet_blocks", "controlnet_single_blocks"):
        for i in range(count_of(shapes, f"{blocks}.")):
            yield from _linear(f"{blocks}.{i}", f"{blocks}.{i}")
    yield _Rule("controlnet_mode_embedder.weight", ("controlnet_mode_embedder.weight",))
    if not any(name.startswith("input_hint_block.") for name in names):
        yield from _linear("controlnet_x_embedder", "controlnet_x_embedder")
        return
    yield from _linear("pos_embed_input", "controlnet_x_embedder")
    for place, name in enumerate(("conv_in", *(f"blocks.{i}" for i in range(6)), "conv_out")):
        yield from _linear(f"input_hint_block.{2 * place}", f"input_hint_block.{name}")


def _double_block_rules(ours: str, theirs: str) -> Iterator[_Rule]:
    attn = f"{theirs}.attn"
    yield from _linear(f"{ours}.img_mod.lin", f"{theirs}.norm1.linear")
    yield from _linear(f"{ours}.txt_mod.lin", f"{theirs}.norm1_context.linear")
    yield from _linear(f"{ours}.img_attn.qkv", f"{attn}.to_q", f"{attn}.to_k", f"{attn}.to_v")
    yield from _linear(f"{ours}.txt_attn.qkv", f"{attn}.add_q_proj", f"{attn}.add_k_proj", f"{attn}.add_v_proj")
    yield _Rule(f"{ours}.img_attn.norm.query_norm.scale", (f"{attn}.norm_q.weight",))
    yield _Rule(f"{ours}.img_attn.norm.key_norm.scale", (f"{attn}.norm_k.weight",))
    yield _Rule(f"{ours}.txt_attn.norm.query_norm.scale", (f"{attn}.norm_added_q.weight",))
    yield _Rule(f"{ours}.txt_attn.norm.key_norm.scale", (f"{attn}.norm_added_k.weight",))
    yield from _linear(f"{ours}.img_attn.proj", f"{attn}.to_out.0")
    yield from _linear(f"{ours}.txt_attn.proj", f"{attn}.to_add_out")
    yield from _linear(f"{ours}.img_mlp.0", f"{theirs}.ff.net.0.proj")
    yield from _linear(f"{ours}.img_mlp.2", f"{theirs}.ff.net.2")
    yield from _linear(f"{ours}.txt_mlp.0", f"{theirs}.ff_context.net.0.proj")
    yield from _linear(f"{ours}.txt_mlp.2", f"{theirs}.ff_context.net.2")


def _single_block_rules(ours: str, theirs: str) -> Iterator[_Rule]:
    attn = f"{theirs}.attn"
    yield from _linear(f"{ours}.modulation.lin", f"{theirs}.norm.linear")
    yield from _linear(f"{ours}.linear1", f"{attn}.to_q", f"{attn}.to_k", f"{attn}.to_v", f"{theirs}.proj_mlp")
    yield from _linear(f"{ours}.linear2", f"{theirs}.proj_out")
    yield _Rule(f"{ours}.norm.query_norm.scale", (f"{attn}.norm_q.weight",))
    yield _Rule(f"{ours}.norm.key_norm.scale", (f"{attn}.norm_k.weight",))


def autoencoder_rules(names: Mapping[str, object]) -> Iterator[_Rule]:
    """Yield the rules of an autoencoder; its levels are read from `names`, keys of either layout."""
    shapes = dict.fromkeys(names, ())
    levels = max(count_of(shapes, "encoder.down."), count_of(shapes, "encoder.down_blocks."))
    blocks = max(count_of(shapes, "decoder.up.0.block."), count_of(shapes, "decoder.up_blocks.0.resnets."))
    for half in ("encoder", "decoder"):
        yield from _linear(f"{half}.conv_in", f"{half}.conv_in")
        yield from _linear(f"{half}.conv_out", f"{half}.conv_out")
        yield from _linear(f"{half}.norm_out", f"{half}.conv_norm_out")
        yield from _mid_rules(f"{half}.mid", f"{half}.mid_block")
    for level in range(levels):
        down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{levels - 1 - level}"
        for block in range(blocks):
            yield from _resnet_rules(f"encoder.down.{level}.block.{block}", f"{down}.resnets.{block}")
            yield from _resnet_rules(f"decoder.up.{level}.block.{block}", f"{up}.resnets.{block}")
        yield from _linear(f"encoder.down.{level}.downsample.conv", f"{down}.downsamplers.0.conv")
        yield from _linear(f"decoder.up.{level}.upsample.conv", f"{up}.upsamplers.0.conv")


def _mid_rules(ours: str, theirs: str) -> Iterator[_Rule]:
    yield from _resnet_rules(f"{ours}.block_1", f"{theirs}.resnets.0")
    yield from _resnet_rules(f"{ours}.block_2", f"{theirs}.resnets.1")
    attn = f"{theirs}.attentions.0"
    yield from _linear(f"{ours}.attn_1.norm", f"{attn}.group_norm")
    for part, name in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")):
        yield _Rule(f"{ours}.attn_1.{part}.weight", (f"{attn}.{name}.weight",), is_conv_1x1=True)
        yield _Rule(f"{ours}.attn_1.{part}.bias", (f"{attn}.{name}.bias",))


def _resnet_rules(ours: str, theirs: str) -> Iterator[_Rule]:
    for part in ("norm1", "conv1", "norm2", "conv2"):
        yield from _linear(f"{ours}.{part}", f"{theirs}.{part}")
    yield from _linear(f"{ours}.nin_shortcut", f"{theirs}.conv_shortcut")


def _linear(ours: str, *theirs: str, swaps_halves: bool = False) -> Iterator[_Rule]:
    """Yield the rules for the weight and bias of a linear layer."""
    for kind in ("weight", "bias"):
        yield _Rule(f"{ours}.{kind}", tuple(f"{name}.{kind}" for name in theirs), swaps_halves=swaps_halves)
