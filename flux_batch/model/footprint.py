"""The memory and the FLOPs of a model, computed from the shapes of its weights.

Shapes may be of either layout. Letters: h hidden size, m width of the MLP.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from flux_batch.model.params import MODULATION_ROWS, Shapes, count_of, used_residuals

_DTYPE_BYTES: Mapping[str, int] = {"bfloat16": 2, "float16": 2, "float32": 4}
_SCALE_BYTES = 4
# The key prefixes of matrices that may be narrow, in either layout: the blocks, 99 % of the weights. The embedders or
# the last layer in fp8 would cost more precision than all blocks together. On a random model of hidden 512 with 4 + 8
# blocks the relative error (L2) of the output was 0.9 % in bfloat16, 2.7 % with the blocks in fp8, 4.0 % with only the
# embedders and 3.2 % with only the last layer. aredden/flux-fp8-api (61a425a, README) finds the same in images.
_BLOCKS = {
    "transformer": ("double_blocks.", "single_blocks.", "transformer_blocks.", "single_transformer_blocks."),
    "t5": ("encoder.block.",),
}
# T5's token table, which some files hold twice.
_TABLE, _TABLE_AGAIN = "shared.weight", "encoder.embed_tokens.weight"
# A lookup table of T5's first block, which is not multiplied.
_NO_MATRIX = ".relative_attention_bias.weight"


def is_quantizable(part: str, name: str, num_dims: int) -> bool:
    """Return whether a weight of a part may be narrow; the name is of either layout."""
    is_matrix = num_dims == 2 and name.endswith(".weight") and not name.endswith(_NO_MATRIX)
    return is_matrix and name.startswith(_BLOCKS.get(part, ()))


def _weight_dtype(part: str, dtype: str) -> str:
    """Return the dtype of a part's weights in a model of `dtype`.

    The autoencoder overflows in float16: diffusers' own vae/config.json of FLUX.1 says force_upcast.
    """
    return "float32" if part == "autoencoder" and dtype == "float16" else dtype


def weight_bytes(part: str, shapes: Shapes, dtype: str, quantization: str = "none") -> int:
    """Return the bytes of a part's weights. An fp8 weight takes 1 byte a number and 4 bytes for each row's scale."""
    wide = _DTYPE_BYTES[_weight_dtype(part, dtype)]
    total = 0
    for name, shape in shapes.items():
        if name == _TABLE_AGAIN and _TABLE in shapes:
            continue
        numbers = math.prod(shape)
        if quantization != "none" and is_quantizable(part, name, len(shape)):
            total += 2 * numbers if quantization == "bfloat16" else numbers + _SCALE_BYTES * shape[0]
        elif part == "t5" and dtype == "float16" and name.endswith(".wo.weight"):
            total += 4 * numbers  # kept in float32, see load_t5
        else:
            total += wide * numbers
    return total


def denoise_bytes(shapes: Shapes, num_tokens: int, batch_size: int, dtype: str, quantization: str = "none") -> int:
    """Return the bytes of the transformer's activations at their peak, not compiled.

    num_tokens: text and image tokens of an image. The peak is in a single block, before linear2. Each token then takes:
    the stream and the results of the first and the last double block (3h), linear1's output (3h + m), q and k (2h),
    attention (h), the activated MLP (m), and these two concatenated (h + m). With narrow weights the peak may be in
    linear2, which widens its weight to fp32 and then to the dtype; with products in fp8, linear2 has its input in fp32
    and in fp8 as well. The modulation of all blocks for several steps is always in memory.
    """
    h = _first_shape(shapes, "img_in.weight", "x_embedder.weight")[0]
    m = _first_shape(shapes, "double_blocks.0.img_mlp.0.weight", "transformer_blocks.0.ff.net.0.proj.weight")[0]
    wide = _DTYPE_BYTES[dtype]
    numbers = batch_size * num_tokens * wide
    modulation = max(MODULATION_ROWS, batch_size) * _num_modulations(shapes) * h * wide
    before = numbers * (10 * h + 3 * m)
    if quantization == "none":
        return modulation + before
    products = quantization == "fp8_matmul"
    rows, narrow = (batch_size * num_tokens, 1) if products else (h, wide % 4)  # fp32 needs no second copy
    return modulation + max(before, numbers * (10 * h + 2 * m) + rows * (h + m) * (4 + narrow))


class TransformerSize(NamedTuple):
    """The widths and depths that determine the FLOPs of a transformer."""

    hidden_size: int
    mlp_hidden_dim: int
    depth: int
    depth_single_blocks: int
    in_channels: int
    out_channels: int
    context_in_dim: int
    embedded_widths: tuple[int, ...]  # inputs of the time, pooled text and guidance embedders, two layers each


# FLUX.1-dev.
DEV_SIZE = TransformerSize(3072, 12288, 19, 38, 64, 64, 4096, (256, 768, 256))


def transformer_size(shapes: Shapes) -> TransformerSize:
    """Return the size of a transformer from its shapes in either layout. Raises: ValueError if a shape is missing."""
    embedders = (
        ("time_in.in_layer.weight", "time_text_embed.timestep_embedder.linear_1.weight"),
        ("vector_in.in_layer.weight", "time_text_embed.text_embedder.linear_1.weight"),
        ("guidance_in.in_layer.weight", "time_text_embed.guidance_embedder.linear_1.weight"),
    )
    has_guidance = any(name in shapes for name in embedders[2])
    hidden_size, in_channels = _first_shape(shapes, "img_in.weight", "x_embedder.weight")
    double, single = _num_blocks(shapes)
    mlp = _first_shape(shapes, "double_blocks.0.img_mlp.0.weight", "transformer_blocks.0.ff.net.0.proj.weight")
    return TransformerSize(
        hidden_size,
        mlp[0],
        double,
        single,
        in_channels,
        _first_shape(shapes, "final_layer.linear.weight", "proj_out.weight")[0],
        _first_shape(shapes, "txt_in.weight", "context_embedder.weight")[1],
        tuple(_first_shape(shapes, *names)[1] for names in embedders[: 2 + has_guidance]),
    )


def step_flops(size: TransformerSize, num_image_tokens: int, num_text_tokens: int) -> int:
    """Return the FLOPs of one pass over one image: matrix products and attention, without elementwise operations.

    A multiply-add counts as 2. A block takes 8 h^2 S + 4 h m S + 4 S^2 h for S tokens of image and text, which is
    24 h^2 S + 4 S^2 h if m = 4 h. FLUX.1-dev at 1024 x 1024 with 512 text tokens: 74.4e12. The last block counts in
    full, although it computes no text tokens: that is a thousandth of the total.
    """
    h, m, n, l = size.hidden_size, size.mlp_hidden_dim, num_image_tokens, num_text_tokens  # noqa: E741
    tokens = n + l
    block = 8 * h * h * tokens + 4 * h * m * tokens + 4 * tokens * tokens * h
    modulation = size.depth * 24 * h * h + size.depth_single_blocks * 6 * h * h + 4 * h * h
    conditioning = sum(2 * (width * h + h * h) for width in size.embedded_widths)
    ends = 2 * h * (size.in_channels * n + size.context_in_dim * l + size.out_channels * n)
    return (size.depth + size.depth_single_blocks) * block + modulation + conditioning + ends


def controlnet_flops(shapes: Shapes, base: TransformerSize, num_image_tokens: int, num_text_tokens: int) -> int:
    """Return the FLOPs of one pass of a ControlNet over one image.

    A last block that feeds no block of the base is not run and does not count.
    """
    hidden_size = _first_shape(shapes, "img_in.weight", "x_embedder.weight")[0]
    size = transformer_size({**shapes, "final_layer.linear.weight": (0, hidden_size)})
    double, single = _num_residuals(shapes, base)
    size = size._replace(depth=size.depth if single else double)
    projections = 2 * hidden_size**2 * num_image_tokens * (double + single)
    return step_flops(size, num_image_tokens, num_text_tokens) + projections


def residual_bytes(shapes: Shapes, base: TransformerSize, num_image_tokens: int, batch_size: int, dtype: str) -> int:
    """Return the bytes of a ControlNet's residuals and of its condition.

    They stay in memory until the base model has run.
    """
    numbers = batch_size * num_image_tokens * base.hidden_size
    return (1 + sum(_num_residuals(shapes, base))) * numbers * _DTYPE_BYTES[dtype]


def _num_residuals(shapes: Shapes, base: TransformerSize) -> tuple[int, int]:
    """Return the numbers of residuals that feed double and single blocks of the base."""
    repeats = any(name.startswith("input_hint_block.") for name in shapes)
    double, single = _num_blocks(shapes)
    return used_residuals(double, base.depth, repeats), single


def _num_modulations(shapes: Shapes) -> int:
    """Return the modulation vectors in a row: 12 for each double block, 3 for each single one, 2 for the last layer."""
    double, single = _num_blocks(shapes)
    return 12 * double + 3 * single + 2


def _num_blocks(shapes: Shapes) -> tuple[int, int]:
    """Return the numbers of double and single blocks of a transformer in either layout."""
    double, single = (
        count_of(shapes, f"{original}_blocks.") or count_of(shapes, f"{diffusers}_blocks.")
        for original, diffusers in (("double", "transformer"), ("single", "single_transformer"))
    )
    return double, single


def decode_bytes(shapes: Shapes, width: int, height: int, batch_size: int, dtype: str) -> int:
    """Return the bytes of the decoder's activations at their peak. Width and height are in pixels.

    The peak is in the first block of the finest level, whose input still has the channels of the level below. It holds
    three tensors of that size: the input, after the norm, and after the activation.
    """
    last = max(0, count_of(shapes, "decoder.up_blocks.") - 1)
    names = ("decoder.up.0.block.0.conv1.weight", f"decoder.up_blocks.{last}.resnets.0.conv1.weight")
    channels = _first_shape(shapes, *names)[1]
    return 3 * batch_size * channels * width * height * _DTYPE_BYTES[_weight_dtype("autoencoder", dtype)]


def _first_shape(shapes: Shapes, *names: str) -> Sequence[int]:
    """Return the shape of the first of these names that exists. Raises: ValueError if none does."""
    for name in names:
        if name in shapes:
            return shapes[name]
    raise ValueError(f"{names[0]} is missing")
