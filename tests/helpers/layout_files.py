"""Writers of every checkpoint layout, and the tensors of each file once decoded; for tests."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from flux_batch.model.checkpoint.diffusers_keys import transformer_to_diffusers
from flux_batch.model.params import DEV, FluxParams
from flux_batch.model.transformer import Flux

State = dict[str, Tensor]
Encode = Callable[[State], State]

AXES_DIM = (4, 6, 6)
PARAMS = replace(
    DEV,
    vec_in_dim=32,
    context_in_dim=24,
    hidden_size=32,
    mlp_hidden_dim=128,
    num_heads=2,
    depth=1,
    depth_single_blocks=2,
    axes_dim=AXES_DIM,
)
COMFY_PREFIX = "model.diffusion_model."


def state_on_meta(make: Callable[[], nn.Module]) -> State:
    with torch.device("meta"):
        return make().state_dict()


def coarse_state(seed: int = 0, params: FluxParams = PARAMS) -> State:
    """Return random fp32 weights that are exact in every float format down to fp8.

    Each is 1 to 1.75 times a power of two.
    """
    generator = torch.Generator().manual_seed(seed)
    return {name: coarse(value.shape, generator) for name, value in state_on_meta(lambda: Flux(params)).items()}


def coarse(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    steps = torch.randint(4, 8, shape, generator=generator) / 4
    exponents = torch.randint(-5, 2, shape, generator=generator)
    signs = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    return torch.ldexp(steps * signs, exponents)


@dataclass(frozen=True)
class LayoutFile:
    """The writer of a transformer (fp32, original keys), and the values to be read from its file."""

    write: Callable[[State, Path], Path]
    encode: Encode


def plain(dtype: torch.dtype) -> Encode:
    return lambda state: {name: value.to(dtype).float() for name, value in state.items()}


def safetensors(dtype: torch.dtype, rename: Callable[[State], State] = dict) -> LayoutFile:
    """Return the layout of one file with renamed keys and all tensors in one dtype."""

    def write(state: State, folder: Path) -> Path:
        return save({name: value.to(dtype) for name, value in rename(state).items()}, folder)

    return LayoutFile(write, plain(dtype))


def save(state: State, folder: Path, metadata: dict[str, str] | None = None, name: str = "model.safetensors") -> Path:
    """Write one file and a config.json, since a tiny model's weights do not reveal its configuration."""
    write_config(folder)
    save_file({key: value.contiguous() for key, value in state.items()}, folder / name, metadata)
    return folder / name


def write_config(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"axes_dims_rope": AXES_DIM}))


def write_sharded(state: State, folder: Path) -> Path:
    """Write diffusers' folder with three shards and their index."""
    diffusers = transformer_to_diffusers(state)
    names = sorted(diffusers)
    weight_map = {}
    for i in range(3):
        file = f"diffusion_pytorch_model-{i + 1:05d}-of-00003.safetensors"
        save({name: diffusers[name] for name in names[i::3]}, folder, name=file)
        weight_map |= dict.fromkeys(names[i::3], file)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def prefixed(state: State) -> State:
    return {COMFY_PREFIX + name: value for name, value in state.items()}


def with_norm_weights(state: State) -> State:
    return {name.replace("_norm.scale", "_norm.weight"): value for name, value in state.items()}


def others() -> State:
    """Return a few tensors for the other parts of an all-in-one file, and some that belong to no part."""
    return {
        "vae.decoder.up.0.block.0.conv1.bias": torch.zeros(1),
        "text_encoders.clip_l.logit_scale": torch.zeros(()),
        "text_encoders.clip_l.transformer.text_projection.weight": torch.zeros(2, 2),
        "text_encoders.clip_l.transformer.text_model.embeddings.token_embedding.weight": torch.zeros(2, 2),
        "text_encoders.t5xxl.logit_scale": torch.zeros(()),
        "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.layer_norm.weight": torch.zeros(2),
    }


def write_all_in_one(state: State, folder: Path) -> Path:
    return save({name: x.to(torch.float8_e4m3fn) for name, x in prefixed(state).items()} | others(), folder)


# Scaled fp8


def is_matrix(value: Tensor) -> bool:
    return value.ndim == 2


def scale_of(value: Tensor) -> Tensor:
    """Return the power of two that scales the largest number close to the maximum of fp8, 448."""
    return torch.exp2(torch.ceil(torch.log2(value.abs().max() / 448)))


def row_scale_of(value: Tensor) -> Tensor:
    return torch.exp2(torch.ceil(torch.log2(value.abs().amax(1, keepdim=True) / 448)))


def scaled(state: State, kind: torch.dtype, scale: Callable[[Tensor], Tensor] = scale_of) -> dict[str, Any]:
    """Return each matrix as its fp8 values and scale, and other tensors unchanged."""
    return {
        name: ((value / scale(value)).to(kind), scale(value)) if is_matrix(value) else value
        for name, value in state.items()
    }


def scaled_file(
    spelling: str,
    kind: torch.dtype = torch.float8_e4m3fn,
    rename: Callable[[State], State] = dict,
    scale: Callable[[Tensor], Tensor] = scale_of,
) -> LayoutFile:
    """Return a layout of scaled fp8: `scale_weight`, `weight_scale`, `comfy_quant` or `metadata`."""

    def write(state: State, folder: Path) -> Path:
        stored, metadata = scaled_state(rename(state), spelling, kind, scale)
        return save(stored, folder, metadata)

    def encode(state: State) -> State:
        pairs = scaled(state, kind, scale)
        return {name: x[0].float() * x[1] if isinstance(x, tuple) else x for name, x in pairs.items()}

    return LayoutFile(write, encode)


def scaled_state(
    state: State, spelling: str, kind: torch.dtype, scale: Callable[[Tensor], Tensor] = scale_of
) -> tuple[State, dict[str, str] | None]:
    """Return the tensors of a file of scaled fp8, and its metadata."""
    format_name = str(kind).removeprefix("torch.")
    stored: State = {}
    layers = {}
    for name, value in scaled(state, kind, scale).items():
        if not isinstance(value, tuple):
            stored[name] = value
            continue
        layer = name.removesuffix(".weight")
        stored[name], weight_scale = value
        stored[f"{layer}.{'scale_weight' if spelling == 'scale_weight' else 'weight_scale'}"] = weight_scale
        stored[f"{layer}.{'scale_input' if spelling == 'scale_weight' else 'input_scale'}"] = torch.ones(())
        layers[layer] = {"format": format_name}
    if spelling == "scale_weight":
        prefix = COMFY_PREFIX if all(name.startswith(COMFY_PREFIX) for name in state) else ""
        stored[f"{prefix}scaled_fp8"] = torch.zeros(0, dtype=kind)
    if spelling == "comfy_quant":
        stored |= {f"{layer}.comfy_quant": as_bytes(json.dumps(words)) for layer, words in layers.items()}
    if spelling == "metadata":
        return stored, {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    return stored, None


def as_bytes(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


# GGUF


def gguf_kind(value: Tensor, kind: str) -> gguf.GGMLQuantizationType:
    """Return the type in which a converter stores a tensor: F32 for vectors and rows without whole blocks."""
    wanted = gguf.GGMLQuantizationType[kind]
    block, _ = gguf.GGML_QUANT_SIZES[wanted]
    fits = value.ndim == 2 and value.shape[-1] % block == 0
    return wanted if fits else gguf.GGMLQuantizationType.F32


def write_gguf(
    state: Mapping[str, Tensor], path: Path, kind: str, architecture: str | None = "flux", **values: Any
) -> Path:
    writer = gguf.GGUFWriter(path, architecture or "")
    for key, value in values.items():
        writer.add_array(f"tokenizer.ggml.{key}", value)
    for name, value in state.items():
        stored_as = gguf_kind(value, kind)
        data = gguf.quantize(value.float().contiguous().numpy(), stored_as)
        writer.add_tensor(name, data, raw_dtype=stored_as)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_file(kind: str, rename: Callable[[State], State] = dict, architecture: str | None = "flux") -> LayoutFile:
    def write(state: State, folder: Path) -> Path:
        write_config(folder)
        return write_gguf(rename(state), folder / "model.gguf", kind, architecture)

    def encode(state: State) -> State:
        return {name: gguf_round(value, kind) for name, value in state.items()}

    return LayoutFile(write, encode)


def gguf_round(value: Tensor, kind: str) -> Tensor:
    """Return a tensor quantized and dequantized by the package `gguf`."""
    stored_as = gguf_kind(value, kind)
    data = gguf.quantize(value.float().contiguous().numpy(), stored_as)
    return torch.from_numpy(np.array(gguf.dequantize(data, stored_as))).reshape(value.shape)


FP8, FP8_WIDE = torch.float8_e4m3fn, torch.float8_e5m2
EXACT = {
    "original fp32": safetensors(torch.float32),
    "original fp16": safetensors(torch.float16),
    "original bf16": safetensors(torch.bfloat16),
    "prefix": safetensors(torch.bfloat16, prefixed),
    "norm weights": safetensors(torch.bfloat16, with_norm_weights),
    "prefix and norm weights": safetensors(torch.float32, lambda state: prefixed(with_norm_weights(state))),
    "diffusers": safetensors(torch.bfloat16, transformer_to_diffusers),
    "diffusers sharded": LayoutFile(write_sharded, dict),
    "all in one": LayoutFile(write_all_in_one, plain(FP8)),
    "fp8 e4m3fn": safetensors(FP8),
    "fp8 e5m2": safetensors(FP8_WIDE, prefixed),
    "scale_weight": scaled_file("scale_weight"),
    "scale_weight with prefix": scaled_file("scale_weight", rename=prefixed),
    "weight_scale of diffusers": scaled_file("weight_scale", rename=transformer_to_diffusers),
    "weight_scale by row": scaled_file("weight_scale", FP8_WIDE, scale=row_scale_of),
    "comfy_quant": scaled_file("comfy_quant", rename=prefixed),
    "metadata": scaled_file("metadata", FP8_WIDE),
    "gguf F32": gguf_file("F32"),
    "gguf F16": gguf_file("F16", prefixed),
    "gguf BF16 of diffusers": gguf_file("BF16", transformer_to_diffusers, architecture=None),
}
# Layouts that round the values.
ROUNDED = {kind: gguf_file(kind) for kind in ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")}
LAYOUTS = EXACT | {f"gguf {kind}": layout for kind, layout in ROUNDED.items()}
