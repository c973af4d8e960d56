"""Scaled fp8: every weight needs its scale, every scale its weight, and all must match their description."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from flux_batch.model.checkpoint.checkpoint import open_checkpoint
from flux_batch.model.checkpoint.detect import detect
from flux_batch.model.checkpoint.scaled_fp8 import declared_formats
from helpers.layout_files import State, as_bytes, coarse_state, save, scaled_state

FP8 = torch.float8_e4m3fn
LAYER = "double_blocks.0.img_attn.qkv"
SPELLINGS = ("scale_weight", "weight_scale", "comfy_quant", "metadata")


def without(state: State, *names: str) -> State:
    return {key: value for key, value in state.items() if key not in names}


def read(state: State, folder: Path, metadata: dict[str, str] | None = None) -> None:
    detect(open_checkpoint(save(state, folder, metadata, name="flux.safetensors")))


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_lost_scale_is_named(tmp_path: Path, spelling: str) -> None:
    stored, metadata = scaled_state(coarse_state(), spelling, FP8)
    read(stored, tmp_path, metadata)
    lost = next(name for name in stored if name.startswith(f"{LAYER}.") and name.endswith(("scale_weight", "_scale")))
    with pytest.raises(
        ValueError, match=rf"flux\.safetensors holds scaled fp8, and the scale of {LAYER}\.weight is mis"
    ):
        read(without(stored, lost), tmp_path, metadata)


@pytest.mark.parametrize("spelling", ["scale_weight", "comfy_quant", "metadata"])
def test_the_metadata_tells_that_all_scales_are_lost(tmp_path: Path, spelling: str) -> None:
    stored, metadata = scaled_state(coarse_state(), spelling, FP8)
    bare = {name: value for name, value in stored.items() if not name.endswith(("scale_weight", "weight_scale"))}
    with pytest.raises(ValueError, match=r"scale of .* and \d+ more is missing"):
        read(bare, tmp_path, metadata)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_lost_weight_is_named(tmp_path: Path, spelling: str) -> None:
    stored, metadata = scaled_state(coarse_state(), spelling, FP8)
    with pytest.raises(ValueError, match=rf"{LAYER}\.\w+ is there, and {LAYER}\.weight, which it scales, is missing"):
        read(without(stored, f"{LAYER}.weight"), tmp_path, metadata)


def test_tables_and_vectors_need_no_scale(tmp_path: Path) -> None:
    state = {
        "shared.weight": torch.ones(4, 4).to(FP8),
        "encoder.block.0.layer.0.layer_norm.weight": torch.ones(4).to(FP8),
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": torch.ones(4, 4).to(FP8),
        "encoder.block.0.layer.0.SelfAttention.q.weight": torch.ones(4, 4).to(FP8),
        "encoder.block.0.layer.0.SelfAttention.q.scale_weight": torch.ones(()),
    }
    read(state, tmp_path)


FP8_LAYER = {f"{LAYER}.weight": torch.ones(4, 2).to(FP8)}
WRONG: dict[str, tuple[Callable[[State], State], str]] = {
    "weight that is no fp8": (lambda s: s | {f"{LAYER}.weight": torch.ones(4, 2)}, "not an fp8 matrix but F32"),
    "weight that is no matrix": (lambda s: s | {f"{LAYER}.weight": torch.ones(4).to(FP8)}, r"but F8_E4M3 \[4\]"),
    "scale for each column": (lambda s: s | {f"{LAYER}.weight_scale": torch.ones(2)}, r"weight_scale is F32 \[2\]"),
    "scale for each block": (lambda s: s | {f"{LAYER}.weight_scale": torch.ones(2, 2)}, "one for each of 4 rows"),
    "scale of bytes": (
        lambda s: s | {f"{LAYER}.weight_scale": torch.ones(4, 1, dtype=torch.uint8)},
        r"weight_scale is U8 \[4, 1\], should be F32",
    ),
    "two scales": (lambda s: s | {f"{LAYER}.scale_weight": torch.ones(())}, f"two scales of {LAYER}.weight"),
    "second scale": (lambda s: s | {f"{LAYER}.weight_scale_2": torch.ones(())}, "weight_scale_2 belongs to 4-bit"),
    "int8": (
        lambda s: s | {f"{LAYER}.weight": torch.ones(4, 2, dtype=torch.int8)},
        r"not an fp8 matrix but I8 \[4, 2\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_scale_that_does_not_fit_is_named(tmp_path: Path, name: str) -> None:
    change, message = WRONG[name]
    state = FP8_LAYER | {f"{LAYER}.weight_scale": torch.ones(())}
    read(state, tmp_path)
    with pytest.raises(ValueError, match=rf"flux\.safetensors.*{message}"):
        read(change(state), tmp_path)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (4,), (4, 1)])
def test_scales_are_one_or_one_a_row(tmp_path: Path, shape: tuple[int, ...]) -> None:
    read(FP8_LAYER | {f"{LAYER}.weight_scale": torch.ones(shape)}, tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"format": "nvfp4"}, "quantised as nvfp4, not as plain fp8"),
        ({"format": "int8_tensorwise", "convrot": True}, "quantised as int8_tensorwise"),
        ({"format": "float8_e4m3fn", "convrot": True}, "not as plain fp8"),
        ({"format": "float8_e5m2"}, r"qkv\.weight is declared as float8_e5m2, and stored as F8_E4M3"),
        ({}, "quantised as None"),
        (None, "quantised as None"),
        (["float8_e4m3fn"], r"quantised as \["),
    ],
)
def test_formats_that_are_not_fp8_are_named(tmp_path: Path, words: object, message: str) -> None:
    state = FP8_LAYER | {f"{LAYER}.weight_scale": torch.ones(())}
    with pytest.raises(ValueError, match=message):
        read(state | {f"{LAYER}.comfy_quant": as_bytes(json.dumps(words))}, tmp_path)
    metadata = {"_quantization_metadata": json.dumps({"layers": {f"model.diffusion_model.{LAYER}": words}})}
    with pytest.raises(ValueError, match=message):
        read(state, tmp_path, metadata)


@pytest.mark.parametrize("shard", [1, 2])
def test_the_header_of_every_shard_is_read(tmp_path: Path, shard: int) -> None:
    headers = {
        number: json.dumps({"layers": {f"{LAYER}.{number}": {"format": "nvfp4" if number == shard else "float8_e5m2"}}})
        for number in (1, 2)
    }
    for number, words in headers.items():
        state = {f"{LAYER}.{number}.bias": torch.ones(4)}
        save(state, tmp_path, {"_quantization_metadata": words}, name=f"flux-0000{number}-of-00002.safetensors")
    with pytest.raises(ValueError, match=rf"{LAYER}\.{shard} is quantised as nvfp4"):
        declared_formats(open_checkpoint(tmp_path))


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "[]", '{"layers": 1}', "\ud800"])
def test_empty_metadata_is_an_error(tmp_path: Path, text: str) -> None:
    metadata = {"_quantization_metadata": text.encode(errors="ignore").decode()}
    with pytest.raises(ValueError, match="_quantization_metadata"):
        read(FP8_LAYER, tmp_path, metadata)


@pytest.mark.parametrize(
    "value", [as_bytes("{"), torch.full((4,), 255, dtype=torch.uint8), torch.ones(4), torch.zeros(100_000).byte()]
)
def test_an_empty_layer_description_is_an_error(tmp_path: Path, value: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=rf"{LAYER}\.comfy_quant (does not describe a layer|is not valid JSON)"):
        read(FP8_LAYER | {f"{LAYER}.comfy_quant": value}, tmp_path)
