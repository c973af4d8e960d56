"""fp8 weights with scales, in the three spellings of the field: each scale is put with its weight, or is an error.

ComfyUI's first spelling is `X.scale_weight` and a marker `scaled_fp8`; its second `X.weight_scale` (NVIDIA's, too) with
`X.comfy_quant`, JSON bytes; its third the same with the header's `_quantization_metadata` instead (comfy/utils.py,
convert_old_quants). A weight read without its scale would be noise, and nothing would say so.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod
from typing import Any

from flux_batch.model.checkpoint.checkpoint import FP8, Checkpoint, StoredTensor, listing, open_safetensors

MARKER = "scaled_fp8"
SCALES = (".scale_weight", ".weight_scale")
# Of the activations, for products in fp8; and a second scale, of formats that are not supported.
INPUT_SCALES = (".scale_input", ".input_scale")
SECOND_SCALE = ".weight_scale_2"
FORMAT = ".comfy_quant"
MAX_FORMAT_SIZE = 64 * 1024
METADATA = "_quantization_metadata"
FORMATS = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}
SCALE_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})
# Tables, which are looked up and not multiplied with: fp8 files hold them without a scale.
TABLES = ("shared.weight", "embed_tokens.weight", "relative_attention_bias.weight", "_embedding.weight")


def declared_formats(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the format that a file names for each layer, by the layer's full name.

    Raises: ValueError if a format is not fp8, or not readable.
    """
    formats: dict[str, str] = {}
    for layer, words in layer_settings(checkpoint):
        kind = words.get("format") if isinstance(words, dict) else words
        is_rotated = isinstance(words, dict) and words.get("convrot")
        if not isinstance(kind, str) or kind not in FORMATS or is_rotated:
            raise ValueError(f"{checkpoint.source} is not supported: {layer} is quantised as {kind}, not as plain fp8")
        formats[layer] = kind
    return formats


def layer_settings(checkpoint: Checkpoint) -> Iterator[tuple[str, Any]]:
    """Yield each layer that a file describes, and the description."""
    for header in checkpoint.headers:  # of each file of a sharded model
        if METADATA not in header:
            continue
        words = from_json(checkpoint, METADATA, header[METADATA])
        layers = words.get("layers") if isinstance(words, dict) else None
        if not isinstance(layers, dict):
            raise ValueError(f"{checkpoint.source}: {METADATA} in its header lists no layers: download it again")
        yield from layers.items()
    files: dict[Any, Any] = {}
    for name, tensor in checkpoint.tensors.items():
        if not name.endswith(FORMAT):
            continue
        if tensor.dtype not in ("U8", "I8") or tensor.offset is not None or prod(tensor.shape) > MAX_FORMAT_SIZE:
            raise ValueError(f"{checkpoint.source}: {name} is no description of a layer: download it again")
        if tensor.path not in files:
            files[tensor.path] = open_safetensors(tensor.path)
        text = bytes(files[tensor.path].get_tensor(tensor.key).flatten().tolist())
        yield name.removesuffix(FORMAT), from_json(checkpoint, name, text)


def from_json(checkpoint: Checkpoint, name: str, text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{checkpoint.source}: {name} is not valid JSON ({error}): download it again") from error


def pair_scales(checkpoint: Checkpoint, formats: Mapping[str, str]) -> Checkpoint:
    """Return the checkpoint with each scale put with its weight; `formats` by layer, as the keys are named here.

    Raises: ValueError if a scale lacks its weight, a weight its scale, or one is not what it is said to be.
    """
    scales, tensors = take_scales(checkpoint)
    for layer, kind in formats.items():
        weight = tensors.get(f"{layer}.weight")
        if weight is not None and weight.dtype != FORMATS[kind]:
            raise ValueError(
                f"{checkpoint.source}: {layer}.weight is said to be {kind}, and is stored as {weight.dtype}"
            )
    for name, scale in scales.items():
        if name not in tensors:
            raise ValueError(f"{checkpoint.source}: {scale.key} is there, and {name}, which it scales, is missing")
        check_scale(checkpoint, tensors[name], scale)
        tensors[name] = replace(tensors[name], scale=scale)
    if scales or MARKER in checkpoint.tensors or any(f"{layer}.weight" in tensors for layer in formats):
        lost = [name for name, tensor in tensors.items() if needs_scale(name, tensor)]
        if lost:
            raise ValueError(
                f"{checkpoint.source} holds scaled fp8, and the scale of {listing(lost)} is missing: download it again"
            )
    return replace(checkpoint, tensors=tensors)


def take_scales(checkpoint: Checkpoint) -> tuple[dict[str, StoredTensor], dict[str, StoredTensor]]:
    """Return the scales by the name of their weight, and the tensors that are neither scales nor remarks."""
    scales: dict[str, StoredTensor] = {}
    tensors: dict[str, StoredTensor] = {}
    for name, tensor in checkpoint.tensors.items():
        ending = next((ending for ending in SCALES if name.endswith(ending)), None)
        if name.endswith(SECOND_SCALE):
            raise ValueError(f"{checkpoint.source} is not supported: {name} belongs to 4-bit weights (NVFP4)")
        if ending:
            weight = f"{name.removesuffix(ending)}.weight"
            if weight in scales:
                twice = f"{scales[weight].key} and {tensor.key}"
                raise ValueError(f"{checkpoint.source} holds two scales of {weight}, {twice}: download it again")
            scales[weight] = tensor
        elif name != MARKER and not name.endswith((*INPUT_SCALES, FORMAT)):
            tensors[name] = tensor
    return scales, tensors


def check_scale(checkpoint: Checkpoint, weight: StoredTensor, scale: StoredTensor) -> None:
    if weight.dtype not in FP8 or len(weight.shape) != 2:
        raise ValueError(
            f"{checkpoint.source}: {scale.key} scales {weight.key}, which is no fp8 matrix but {weight.dtype} "
            f"{list(weight.shape)}"
        )
    rows = weight.shape[0]
    if scale.shape not in ((), (1,), (1, 1), (rows,), (rows, 1)) or scale.dtype not in SCALE_DTYPES:
        raise ValueError(
            f"{checkpoint.source}: {scale.key} is {scale.dtype} {list(scale.shape)}, should be F32 and one number, or "
            f"one for each of {rows} rows"
        )


def needs_scale(name: str, tensor: StoredTensor) -> bool:
    is_matrix = len(tensor.shape) == 2 and name.endswith(".weight") and not name.endswith(TABLES)
    return is_matrix and tensor.dtype in FP8 and tensor.scale is None
