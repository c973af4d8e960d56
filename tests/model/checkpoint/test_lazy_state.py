"""Stored tensors: decoded exactly, in pieces, to the requested device and dtype; fp8 stays fp8."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flux_batch.model.checkpoint import lazy_state as module
from flux_batch.model.checkpoint.checkpoint import Checkpoint, open_checkpoint
from flux_batch.model.checkpoint.detect import detect
from flux_batch.model.checkpoint.diffusers_keys import (
    transformer_from_diffusers,
    transformer_rules,
    transformer_to_diffusers,
)
from flux_batch.model.checkpoint.lazy_state import StoredState
from flux_batch.model.checkpoint.loading import diffusers_pieces
from helpers.layout_files import FP8, FP8_WIDE, LAYOUTS, State, coarse_state, gguf_round, save, scaled_state, write_gguf

CPU = torch.device("cpu")
LAYER = "double_blocks.0.img_attn.qkv"


def random_fp8(shape: tuple[int, ...], kind: torch.dtype = FP8) -> Tensor:
    """Return numbers of all magnitudes of fp8, including the smallest."""
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return (numbers * 2.0 ** torch.arange(-12, 4)[: shape[-1]]).to(kind)


def recognised(state: State, folder: Path) -> Checkpoint:
    return detect(open_checkpoint(save(state, folder)))[1]


@pytest.mark.parametrize("kind", [FP8, FP8_WIDE])
@pytest.mark.parametrize("rows", [False, True], ids=["one scale", "one a row"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scaled_weights_are_the_fp32_product_rounded_once(
    tmp_path: Path, kind: torch.dtype, rows: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_NUMBERS", 48)  # 3 of 10 rows at a time
    weight, scale = random_fp8((10, 16), kind), torch.rand(10 if rows else ()) / 3
    stored = recognised({f"{LAYER}.weight": weight, f"{LAYER}.scale_weight": scale}, tmp_path)
    actual = StoredState(stored, dtype, CPU)[f"{LAYER}.weight"]
    product = weight.double() * (scale[:, None] if rows else scale).double()  # exact: 4 bits by 24
    assert actual.dtype == dtype
    assert torch.equal(actual, product.float().to(dtype))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1"])
def test_gguf_weights_do_not_depend_on_the_pieces(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_NUMBERS", 100)
    state = {LAYER: torch.randn(7, 64), "short": torch.randn(3, 5)}
    stored = open_checkpoint(write_gguf(state, tmp_path / "model.gguf", kind))
    read = StoredState(stored, torch.float32, CPU)
    for name, value in state.items():
        assert torch.equal(read[name], gguf_round(value, kind))
        assert torch.equal(StoredState(stored, torch.bfloat16, CPU)[name], read[name].bfloat16())


@pytest.mark.parametrize("layout", ["original fp32", "gguf F32"])
def test_unconverted_tensors_are_pages_of_the_file(tmp_path: Path, layout: str) -> None:
    path = LAYOUTS[layout].write(coarse_state(), tmp_path / "model")
    state = StoredState(detect(open_checkpoint(path))[1], torch.float32, CPU)
    pages = Path("/proc/self/maps").read_text().splitlines()
    spans = [line.split()[0].split("-") for line in pages if line.endswith(str(path))]
    address = state["img_in.weight"].data_ptr()
    assert any(int(start, 16) <= address < int(end, 16) for start, end in spans)


def test_a_damaged_scale_or_block_is_named(tmp_path: Path) -> None:
    state = {f"{LAYER}.weight": random_fp8((4, 4)), f"{LAYER}.weight_scale": torch.tensor(float("nan"))}
    with pytest.raises(ValueError, match=rf"{LAYER}\.weight_scale in .*model\.safetensors is not finite"):
        StoredState(recognised(state, tmp_path), torch.float32, CPU)[f"{LAYER}.weight"]
    path = write_gguf({"x": torch.ones(2, 32)}, tmp_path / "model.gguf", "Q8_0")
    data = path.read_bytes()
    factor = torch.tensor(1 / 127).half().numpy().tobytes()
    assert data.count(factor) == 2
    path.write_bytes(data.replace(factor, b"\xff\xff"))
    with pytest.raises(ValueError, match=r"x in .*model\.gguf: it holds numbers that are not finite"):
        StoredState(open_checkpoint(path), torch.float32, CPU)["x"]


def test_a_dtype_of_its_own_is_followed(tmp_path: Path) -> None:
    stored = recognised(coarse_state(), tmp_path)
    state = StoredState(stored, torch.float16, CPU, dtypes={"img_in.weight": torch.float32})
    assert {name for name, value in state.items() if value.dtype == torch.float32} == {"img_in.weight"}
    assert state.dtype("img_in.weight") == torch.float32
    assert state.dtype("img_in.bias") == torch.float16


@pytest.mark.parametrize("kind", [FP8, FP8_WIDE])
def test_plain_fp8_is_handed_out_as_it_is(tmp_path: Path, kind: torch.dtype) -> None:
    weight = random_fp8((8, 4), kind)
    state = StoredState(recognised({f"{LAYER}.weight": weight}, tmp_path), torch.bfloat16, CPU)
    found = state.fp8(f"{LAYER}.weight")
    assert found is not None
    assert found[0].dtype == kind
    assert torch.equal(found[0].view(torch.uint8), weight.view(torch.uint8))
    assert torch.equal(found[1], torch.ones(()))


def test_other_weights_are_no_fp8(tmp_path: Path) -> None:
    state = StoredState(recognised(coarse_state(), tmp_path), torch.bfloat16, CPU)
    assert state.fp8("img_in.weight") is None
    mixed = {name: value.to(FP8) if "to_k" in name else value for name, value in diffusers().items()}
    assert joined(mixed, tmp_path).fp8(f"{LAYER}.weight") is None


def diffusers() -> State:
    return transformer_to_diffusers(coarse_state())


def joined(state: State, folder: Path) -> StoredState:
    """Return the tensors of a diffusers file by our names."""
    stored = recognised(state, folder)
    return StoredState(stored, torch.float32, CPU, parts=diffusers_pieces(transformer_rules, stored.tensors))


@pytest.mark.parametrize("spelling", ["scale_weight", "weight_scale"])
def test_fp8_in_parts_is_joined_with_a_scale_a_row(tmp_path: Path, spelling: str) -> None:
    stored, _ = scaled_state(diffusers(), spelling, FP8, scale=lambda value: value.abs().sum() / 7000)
    state = joined(stored, tmp_path)
    dense = transformer_from_diffusers({
        name: value.float() * stored[f"{name.removesuffix('weight')}{spelling}"] if value.dtype == FP8 else value
        for name, value in stored.items()
        if not name.endswith(("scale_weight", "weight_scale", "input_scale", "scale_input", "scaled_fp8"))
    })  # fmt: skip
    assert sorted(state) == sorted(dense)
    for name, value in dense.items():
        assert torch.equal(state[name], value)
        if value.ndim == 2:
            found = state.fp8(name)
            assert found is not None
            assert found[0].shape == value.shape
            assert found[1].shape in ((), (len(value), 1))
            assert torch.equal(found[0].float() * found[1], value)
    qkv, last = state.fp8(f"{LAYER}.weight"), state.fp8("final_layer.adaLN_modulation.1.weight")
    assert qkv is not None
    assert len(qkv[1].unique()) == 3
    assert last is not None
    assert last[1].ndim == 0


def test_asking_whether_a_tensor_is_there_does_not_read_it(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"img_in.weight": torch.zeros(2)}, path)
    state = StoredState(open_checkpoint(path), torch.float32, CPU)
    path.write_bytes(b"")
    assert "img_in.weight" in state
    assert "img_out.weight" not in state
    assert list(state) == ["img_in.weight"]
    assert len(state) == 1


def test_a_safetensors_file_is_read_as_its_own_library_does(tmp_path: Path) -> None:
    path = LAYOUTS["fp8 e5m2"].write(coarse_state(), tmp_path / "model")
    state = StoredState(open_checkpoint(path), torch.bfloat16, CPU)
    for name, value in load_file(path).items():
        assert torch.equal(state[name], value.to(torch.bfloat16))
