"""fp8 weights with scales, in three formats: each scale is paired with its weight, or is an error.

ComfyUI's first format is `X.scale_weight` and a marker `scaled_fp8`; its second `X.weight_scale` (NVIDIA's, too) with
`X.comfy_quant`, JSON bytes; its third the same with the header's `_quantization_metadata` instead (comfy/utils.py,
convert_old_quants). A weight without its scale would be noise, without an error.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod
from typing import Any

from flux_batch.model.checkpoint.checkpoint import FP8_DTYPES, Checkpoint, StoredTensor, first_names, open_safetensors

SCALED_FP8_MARKER = "scaled_fp8"
_SCALE_SUFFIXES = (".scale_weight", ".weight_scale")
# Scales of activations, for fp8 matmuls, which are not needed; and of formats that are not supported.
_INPUT_SCALE_SUFFIXES = (".scale_input", ".input_scale")
_SECOND_SCALE_SUFFIX = ".weight_scale_2"
_FORMAT_SUFFIX = ".comfy_quant"
_MAX_FORMAT_BYTES = 64 * 1024
_METADATA_KEY = "_quantization_metadata"
_FP8_FORMATS = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}
_SCALE_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})
# Embeddings, which are looked up and not multiplied: fp8 files hold them without a scale.
_LOOKUP_TABLES = ("shared.weight", "embed_tokens.weight", "relative_attention_bias.weight", "_embedding.weight")


def declared_formats(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the declared format of each layer, by the layer's full name.

    Raises: ValueError for a format that is not fp8, or not readable.
    """
    formats: dict[str, str] = {}
    for layer, settings in _layer_settings(checkpoint):
        kind = settings.get("format") if isinstance(settings, dict) else settings
        is_rotated = isinstance(settings, dict) and settings.get("convrot")
        if not isinstance(kind, str) or kind not in _FP8_FORMATS or is_rotated:
            raise ValueError(f"{checkpoint.source} is not supported: {layer} is quantised as {kind}, not as plain fp8")
        formats[layer] = kind
    return formats


def _layer_settings(checkpoint: Checkpoint) -> Iterator[tuple[str, Any]]:
    """Yield each layer that a file describes, with the description."""
    for header in checkpoint.headers:  # of each file of a sharded model
        if _METADATA_KEY not in header:
            continue
        settings = _from_json(checkpoint, _METADATA_KEY, header[_METADATA_KEY])
        layers = settings.get("layers") if isinstance(settings, dict) else None
        if not isinstance(layers, dict):
            raise ValueError(f"{checkpoint.source}: {_METADATA_KEY} in its header lists no layers: download it again")
        yield from layers.items()
    files: dict[Any, Any] = {}
    for name, tensor in checkpoint.tensors.items():
        if not name.endswith(_FORMAT_SUFFIX):
            continue
        if tensor.dtype not in ("U8", "I8") or tensor.offset is not None or prod(tensor.shape) > _MAX_FORMAT_BYTES:
            raise ValueError(f"{checkpoint.source}: {name} does not describe a layer: download it again")
        if tensor.path not in files:
            files[tensor.path] = open_safetensors(tensor.path)
        text = bytes(files[tensor.path].get_tensor(tensor.key).flatten().tolist())
        yield name.removesuffix(_FORMAT_SUFFIX), _from_json(checkpoint, name, text)


def _from_json(checkpoint: Checkpoint, name: str, text: str | bytes) -> Any:
    """Return the value of a JSON text. Raises: ValueError that names the file."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{checkpoint.source}: {name} is not valid JSON ({error}): download it again") from error


def pair_scales(checkpoint: Checkpoint, formats: Mapping[str, str]) -> Checkpoint:
    """Return the checkpoint with each scale paired with its weight; `formats` by layer, in the names of its keys.

    Raises: ValueError for a scale without weight, a weight without scale, or one of another format than declared.
    """
    scales, tensors = _take_scales(checkpoint)
    for layer, kind in formats.items():
        weight = tensors.get(f"{layer}.weight")
        if weight is not None and weight.dtype != _FP8_FORMATS[kind]:
            raise ValueError(f"{checkpoint.source}: {layer}.weight is declared as {kind}, and stored as {weight.dtype}")
    for name, scale in scales.items():
        if name not in tensors:
            raise ValueError(f"{checkpoint.source}: {scale.key} is there, and {name}, which it scales, is missing")
        _check_scale(checkpoint, tensors[name], scale)
        tensors[name] = replace(tensors[name], scale=scale)
    if scales or SCALED_FP8_MARKER in checkpoint.tensors or any(f"{layer}.weight" in tensors for layer in formats):
        lost = [name for name, tensor in tensors.items() if _needs_scale(name, tensor)]
        if lost:
            raise ValueError(
                f"{checkpoint.source} holds scaled fp8, and the scale of {first_names(lost)} is missing: "
                "download it again"
            )
    return replace(checkpoint, tensors=tensors)


def _take_scales(checkpoint: Checkpoint) -> tuple[dict[str, StoredTensor], dict[str, StoredTensor]]:
    """Return the scales by the name of their weight, and the other tensors.

    Markers and descriptions are left out.
    """
    scales: dict[str, StoredTensor] = {}
    tensors: dict[str, StoredTensor] = {}
    for name, tensor in checkpoint.tensors.items():
        ending = next((ending for ending in _SCALE_SUFFIXES if name.endswith(ending)), None)
        if name.endswith(_SECOND_SCALE_SUFFIX):
            raise ValueError(f"{checkpoint.source} is not supported: {name} belongs to 4-bit weights (NVFP4)")
        if ending:
            weight = f"{name.removesuffix(ending)}.weight"
            if weight in scales:
                twice = f"{scales[weight].key} and {tensor.key}"
                raise ValueError(f"{checkpoint.source} holds two scales of {weight}, {twice}: download it again")
            scales[weight] = tensor
        elif name != SCALED_FP8_MARKER and not name.endswith((*_INPUT_SCALE_SUFFIXES, _FORMAT_SUFFIX)):
            tensors[name] = tensor
    return scales, tensors


def _check_scale(checkpoint: Checkpoint, weight: StoredTensor, scale: StoredTensor) -> None:
    """Raise ValueError unless a scale's shape and dtype fit its fp8 weight."""
    if weight.dtype not in FP8_DTYPES or len(weight.shape) != 2:
        raise ValueError(
            f"{checkpoint.source}: {scale.key} scales {weight.key}, which is not an fp8 matrix but {weight.dtype} "
            f"{list(weight.shape)}"
        )
    rows = weight.shape[0]
    if scale.shape not in ((), (1,), (1, 1), (rows,), (rows, 1)) or scale.dtype not in _SCALE_DTYPES:
        raise ValueError(
            f"{checkpoint.source}: {scale.key} is {scale.dtype} {list(scale.shape)}, should be F32 and one number, or "
            f"one for each of {rows} rows"
        )


def _needs_scale(name: str, tensor: StoredTensor) -> bool:
    """Return whether a tensor is an fp8 matrix without its scale."""
    is_matrix = len(tensor.shape) == 2 and name.endswith(".weight") and not name.endswith(_LOOKUP_TABLES)
    return is_matrix and tensor.dtype in FP8_DTYPES and tensor.scale is None
