"""fp8 weights: their exactness, the layers that get them, and a checkpoint's own fp8, which is kept."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux_batch.model.checkpoint.checkpoint import open_checkpoint
from flux_batch.model.checkpoint.detect import detect
from flux_batch.model.checkpoint.lazy_state import StoredState
from flux_batch.model.checkpoint.loading import Prepare, load_transformer, load_weights
from flux_batch.model.optimize import quantize
from flux_batch.model.optimize.quantize import (
    Fp8Linear,
    Fp8MatmulLinear,
    apply_fp8,
    apply_fp8_to_t5,
    fp8_matmul,
    fp8_matmul_obstacle,
    fp8_product_error,
    to_fp8,
    to_fp8_in_pieces,
)
from flux_batch.model.sampling import position_ids
from flux_batch.model.text.t5 import T5Model, T5Params
from flux_batch.model.transformer import Flux
from helpers.golden import FLUX, filled, tensor
from helpers.layout_files import LAYOUTS, coarse_state, save

CPU = torch.device("cpu")
E4M3 = torch.float8_e4m3fn
WITH_MATMUL = partial(apply_fp8, matmul=True)
INPUTS = (tensor("in.img", (2, 24, 64)), tensor("in.txt", (2, 7, 24)), tensor("in.vec", (2, 32)))


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def linear(inputs: int, outputs: int, *, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=bias, dtype=dtype).requires_grad_(False)
    layer.weight.copy_(random(outputs, inputs, dtype=dtype))
    return layer


def run(model: Flux, dtype: torch.dtype) -> Tensor:
    """Return the velocity of two images; guidance and time are exact in every dtype."""
    img, txt, vec = (value.to(dtype) for value in INPUTS)
    t, guidance = torch.full((2,), 0.5, dtype=dtype), torch.full((2,), 4.0, dtype=dtype)
    return model(img, txt, model.position_table(position_ids(7, 8, 12)), t, vec, guidance).float()


def error(result: Tensor, reference: Tensor) -> float:
    return float((result - reference).norm() / reference.norm())


class TestRows:
    def test_each_row_uses_the_whole_range_and_is_half_a_step_off_at_most(self) -> None:
        rows = random(50, 96) * torch.logspace(-20, 20, 50)[:, None]
        weight, scale = to_fp8(rows)
        assert weight.dtype == E4M3
        assert scale.shape == (50, 1)
        assert (weight.float().abs().amax(dim=1) == 448).all()
        # Three bits of mantissa; below 2^-6 the steps are 2^-9.
        allowed = torch.maximum(rows.abs() / 16, scale / 1024) * 1.0001
        assert ((weight.float() * scale - rows).abs() <= allowed).all()

    def test_numbers_that_fp8_holds_are_kept(self) -> None:
        rows = torch.arange(256, dtype=torch.uint8).view(E4M3).float().nan_to_num(448.0).reshape(1, -1)
        weight, scale = to_fp8(rows * 0.25)
        assert torch.equal(weight.float() * scale, rows * 0.25)

    def test_rows_of_zeros_and_of_the_smallest_numbers_stay_finite(self) -> None:
        rows = torch.tensor([[0.0, 0.0], [1e-45, -1e-40], [1e-38, 3e38]])
        weight, scale = to_fp8(rows)
        assert (weight.float() * scale).isfinite().all()
        assert (weight.float()[0] == 0).all()
        assert (scale > 0).all()

    @pytest.mark.parametrize(("size", "chunk"), [((7, 5), 10), ((7, 5), 1), ((6, 4), 8), ((3, 4), 12)])
    def test_pieces_do_not_show(self, size: tuple[int, int], chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(quantize, "CHUNK_NUMBERS", chunk)
        rows = random(*size, dtype=torch.bfloat16)
        for piecewise, whole in zip(to_fp8_in_pieces(rows), to_fp8(rows), strict=True):
            assert torch.equal(bits(piecewise), bits(whole))

    @pytest.mark.parametrize("number", [float("nan"), float("inf")])
    def test_what_is_no_number_does_not_become_one(self, number: float) -> None:
        weight, scale = to_fp8(torch.tensor([[1.0, number], [1.0, 2.0]]))
        dense = weight.float() * scale
        assert not dense[0].isfinite().all()
        assert dense[1].isfinite().all()


class TestFp8Linear:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("bias", [True, False])
    def test_it_multiplies_in_the_dtype_of_its_input(self, dtype: torch.dtype, bias: bool) -> None:
        plain = linear(32, 48, bias=bias, dtype=dtype)
        layer = Fp8Linear(plain)
        x = random(2, 5, 32, seed=1, dtype=dtype)
        dense = (layer.weight.double() * layer.weight_scale.double()).float().to(dtype)
        result = layer(x)
        assert result.dtype == dtype
        assert torch.equal(result, F.linear(x, dense, plain.bias))
        assert 0 < error(result.float(), plain(x).float()) < 0.04

    def test_it_has_no_parameters_and_one_byte_a_weight(self) -> None:
        layer = Fp8Linear(linear(32, 48, dtype=torch.bfloat16))
        assert list(layer.parameters()) == []
        assert {name: tuple(value.shape) for name, value in layer.state_dict().items()} == {
            "weight": (48, 32),
            "weight_scale": (48, 1),
            "bias": (48,),
        }
        assert layer.weight.nbytes == 48 * 32
        assert "in_features=32, out_features=48, bias=True" in repr(layer)


class TestFp8MatmulLinear:
    @pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 16, 16), (5, 48, 32), (17, 256, 80)])
    def test_the_stand_in_is_the_product_of_the_gpu(self, rows: int, inputs: int, outputs: int) -> None:
        # torch has the same operation for the CPU, which gives this emulation a reference.
        (a, a_scale), (b, b_scale) = to_fp8(random(rows, inputs)), to_fp8(random(outputs, inputs, seed=1))
        theirs = torch._scaled_mm(a, b.T, scale_a=a_scale, scale_b=b_scale.T, out_dtype=torch.bfloat16)
        ours = fp8_matmul(a, a_scale, b, b_scale)
        assert ours.dtype == torch.bfloat16
        # The order of the sums may change the rounding of a number.
        torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=1e-5)
        assert (ours == theirs).float().mean() > 0.99

    def test_input_and_weight_are_rounded_to_fp8(self) -> None:
        plain = linear(64, 32, dtype=torch.bfloat16)
        layer, x = Fp8MatmulLinear(plain), random(3, 7, 64, seed=2, dtype=torch.bfloat16)
        x_rows, x_scale = to_fp8(x.reshape(-1, 64))
        exact = (x_rows.double() * x_scale.double()) @ (layer.weight.double() * layer.weight_scale.double()).T
        expected = exact.bfloat16().view(3, 7, 32) + plain.bias
        torch.testing.assert_close(layer(x), expected, rtol=2**-7, atol=1e-3)
        assert error(layer(x).float(), plain(x).float()) > error(Fp8Linear(plain)(x).float(), plain(x).float())

    def test_a_token_does_not_depend_on_its_neighbours(self) -> None:
        layer, x = Fp8MatmulLinear(linear(64, 32, dtype=torch.bfloat16)), random(4, 6, 64, dtype=torch.bfloat16)
        loud = x.clone()
        loud[1] *= 1000
        assert torch.equal(layer(loud)[0], layer(x)[0])
        torch.testing.assert_close(layer(x[2:3, 4:5]), layer(x)[2:3, 4:5], rtol=2**-7, atol=1e-4)


class TestChoice:
    def test_the_matrices_of_the_blocks_and_no_others_are_quantised(self) -> None:
        model = Flux(FLUX)
        inside = {
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and name.startswith(("double_blocks.", "single_blocks."))
        }
        apply_fp8(model)
        assert {name for name, module in model.named_modules() if isinstance(module, Fp8Linear)} == inside
        assert len(inside) == FLUX.depth * 10 + FLUX.depth_single_blocks * 3

    def test_modulation_is_not_multiplied_in_fp8(self) -> None:
        model = Flux(FLUX)
        apply_fp8(model, matmul=True)
        kinds = {name: type(module) for name, module in model.named_modules() if isinstance(module, Fp8Linear)}
        assert {name.split(".")[-2] for name, kind in kinds.items() if kind is Fp8Linear} == {
            "img_mod",
            "txt_mod",
            "modulation",
        }
        assert sum(kind is Fp8MatmulLinear for kind in kinds.values()) == FLUX.depth * 8 + FLUX.depth_single_blocks * 2

    def test_sizes_that_products_do_not_take_are_multiplied_in_the_dtype(self) -> None:
        model = nn.ModuleDict({"single_blocks": nn.ModuleList([nn.ModuleDict({"linear1": linear(24, 32)})])})
        apply_fp8(model, matmul=True)
        assert type(model.get_submodule("single_blocks.0.linear1")) is Fp8Linear

    @pytest.mark.parametrize(("prepare", "most"), [(apply_fp8, 0.05), (WITH_MATMUL, 0.06)])
    def test_the_error_of_a_whole_model_is_small(self, prepare: Prepare, most: float) -> None:
        exact = run(filled(Flux(FLUX)), torch.float32)
        plain = error(run(filled(Flux(FLUX)).bfloat16(), torch.bfloat16), exact)
        model = filled(Flux(FLUX)).bfloat16()
        prepare(model)
        assert plain < error(run(model, torch.bfloat16), exact) < most


def load(path: Path, dtype: torch.dtype, prepare: Prepare | None) -> Flux:
    layout, checkpoint = detect(open_checkpoint(path))
    config = {"axes_dims_rope": [4, 6, 6]}
    return load_transformer(checkpoint, layout, config, dtype=dtype, device=CPU, prepare=prepare)


def bits(weight: Tensor) -> Tensor:
    return weight.view(torch.uint8)


class TestLoading:
    @pytest.mark.parametrize("layout", ["original bf16", "diffusers sharded", "gguf Q8_0"])
    @pytest.mark.parametrize("prepare", [apply_fp8, WITH_MATMUL])
    def test_quantised_while_read_is_quantised_when_read(self, tmp_path: Path, layout: str, prepare: Prepare) -> None:
        path = LAYOUTS[layout].write(coarse_state(), tmp_path / "model")
        loaded, changed = load(path, torch.bfloat16, prepare), load(path, torch.bfloat16, None)
        prepare(changed)
        assert loaded.state_dict().keys() == changed.state_dict().keys()
        for name, value in loaded.state_dict().items():
            expected = changed.state_dict()[name]
            assert value.dtype == expected.dtype
            assert torch.equal(bits(value), bits(expected))

    @pytest.mark.parametrize(
        "layout", ["fp8 e4m3fn", "fp8 e5m2", "scale_weight", "weight_scale by row", "weight_scale of diffusers"]
    )
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_fp8_of_a_file_stays_and_gives_the_images_of_the_dense_model(
        self, tmp_path: Path, layout: str, dtype: torch.dtype
    ) -> None:
        path = LAYOUTS[layout].write(coarse_state(), tmp_path / "model")
        kept, dense = load(path, dtype, apply_fp8), load(path, dtype, None)
        stored = open_checkpoint(path)
        kinds = {"F8_E4M3": E4M3, "F8_E5M2": torch.float8_e5m2}
        for name in ("double_blocks.0.img_mlp.2", "single_blocks.1.modulation.lin"):
            layer = kept.get_submodule(name)
            assert isinstance(layer, Fp8Linear)
            assert torch.equal(layer.dense(dtype), dense.get_submodule(name).weight)
            if f"{name}.weight" in stored.tensors:
                state = StoredState(stored, dtype, CPU)
                assert layer.weight.dtype == kinds[stored.tensors[f"{name}.weight"].dtype]
                assert torch.equal(bits(layer.weight), bits(state.fp8(f"{name}.weight")[0]))
            assert layer.weight_scale.shape == (layer.out_features, 1)
        img, txt, vec = (value.to(dtype) for value in INPUTS)
        pe = kept.position_table(position_ids(7, 8, 12))
        inputs = (img, txt, pe, torch.full((2,), 0.5, dtype=dtype), vec, torch.ones(2, dtype=dtype))
        assert torch.equal(kept(*inputs), dense(*inputs))

    def test_products_take_e4m3_only(self, tmp_path: Path) -> None:
        path = LAYOUTS["fp8 e5m2"].write(coarse_state(), tmp_path / "model")
        layer = load(path, torch.bfloat16, WITH_MATMUL).get_submodule("single_blocks.0.linear1")
        assert isinstance(layer, Fp8MatmulLinear)
        assert layer.weight.dtype == E4M3

    def test_a_scale_of_the_whole_tensor_is_one_for_each_row(self, tmp_path: Path) -> None:
        weight = random(48, 32).to(E4M3)
        state = {"layer.weight": weight, "layer.bias": torch.ones(48), "layer.weight_scale": torch.tensor(0.5)}
        path = save({f"double_blocks.0.{name}": value for name, value in state.items()}, tmp_path / "model")
        stored = StoredState(detect(open_checkpoint(path))[1], torch.bfloat16, CPU)
        with torch.device("meta"):
            layer = Fp8Linear(nn.Linear(32, 48))
        load_weights(nn.ModuleDict({"double_blocks": nn.ModuleList([nn.ModuleDict({"layer": layer})])}), stored)
        assert torch.equal(layer.weight_scale, torch.full((48, 1), 0.5))
        assert layer.weight_scale.is_contiguous()
        assert torch.equal(layer.bias, torch.ones(48, dtype=torch.bfloat16))

    @pytest.mark.slow
    def test_the_model_is_never_in_memory_twice(self, tmp_path: Path) -> None:
        # 24 matrices of 8 MB in bf16, which cannot use the pages of this fp16 file, or of 4 MB in fp8.
        state = {f"double_blocks.{i}.weight": torch.full((2048, 2048), 0.5).half() for i in range(24)}
        path = save(state, tmp_path / "model")
        code = f"""
import threading, time
from pathlib import Path
import torch
from torch import nn
from flux_batch.model.checkpoint.checkpoint import open_checkpoint
from flux_batch.model.checkpoint.loading import load_weights
from flux_batch.model.optimize.quantize import apply_fp8
from flux_batch.model.checkpoint.lazy_state import StoredState
torch.set_num_threads(1)
def own():
    return int(Path("/proc/self/statm").read_text().split()[1]) - int(Path("/proc/self/statm").read_text().split()[2])
with torch.device("meta"):
    layers = [nn.Linear(2048, 2048, bias=False) for _ in range(24)]
    model = nn.ModuleDict({{"double_blocks": nn.ModuleList(layers)}})
apply_fp8(nn.ModuleDict({{"double_blocks": nn.Linear(16, 16)}}))
before, peak, done = own(), 0, threading.Event()
def watch():
    global peak
    while not done.is_set():
        peak = max(peak, own())
        time.sleep(0.0005)
thread = threading.Thread(target=watch)
thread.start()
state = StoredState(open_checkpoint(Path({str(path)!r})), torch.bfloat16, torch.device("cpu"))
load_weights(model, state, apply_fp8)
done.set()
thread.join()
print((peak - before) * 4096 / 2**20, (own() - before) * 4096 / 2**20)
"""
        # Freed memory goes back to the system at once, so that only memory in use is counted.
        env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
        peak, after = (float(word) for word in result.stdout.split())
        assert after == pytest.approx(24 * 4, abs=8)
        # One matrix in bf16 in transit; its fp32 form of 16 MB never exists as a whole.
        assert peak < 24 * 4 + 8 + 12


def make_t5(prepare: Callable[[nn.Module], None] | None, dtype: torch.dtype, size: float = 1.0) -> T5Model:
    params = T5Params(vocab_size=64, d_model=32, d_ff=64, d_kv=8, num_heads=4, num_layers=2)
    model = T5Model(params).requires_grad_(False)
    for name, value in model.named_parameters():
        value.copy_(tensor(name, value.shape, 1.0 if value.ndim == 1 else value.shape[-1] ** -0.5))
        if name.endswith(".wo.weight"):
            value.mul_(size)
    model = model.to(dtype)
    if prepare is not None:
        prepare(model)
    return model


class TestT5:
    IDS = torch.arange(40).reshape(2, 20)

    def test_its_matrices_are_quantised_and_its_tables_are_not(self) -> None:
        model = make_t5(apply_fp8_to_t5, torch.bfloat16)
        assert sum(isinstance(module, Fp8Linear) for module in model.modules()) == 2 * 7
        assert not any(type(module) is nn.Linear for module in model.modules())
        assert model.shared.weight.dtype == torch.bfloat16

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_it_computes_what_a_plain_one_does_with_the_same_weights(self, dtype: torch.dtype) -> None:
        quantised, dense = make_t5(apply_fp8_to_t5, dtype), make_t5(None, dtype)
        for name, module in dense.named_modules():
            if isinstance(module, nn.Linear):
                module.weight.copy_(quantised.get_submodule(name).dense(dtype))
        plain = make_t5(None, dtype)
        result, expected = quantised(self.IDS), dense(self.IDS)
        assert torch.equal(result, expected)
        assert 0 < error(result.float(), plain(self.IDS).float()) < 0.06

    def test_in_float16_wo_does_not_overflow(self) -> None:
        # The sums of wo exceed 65504, so transformers keeps wo in fp32.
        model = make_t5(apply_fp8_to_t5, torch.float16, size=2e5)
        result = model(self.IDS)
        exact = make_t5(apply_fp8_to_t5, torch.float32, size=2e5)(self.IDS)
        assert result.isfinite().all()
        assert error(result.float(), exact) < 0.02


@pytest.mark.parametrize(("capability", "has"), [((8, 0), False), ((8, 6), False), ((8, 9), True), ((9, 0), True)])
def test_a_gpu_without_products_is_named(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], has: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    monkeypatch.setattr(quantize, "fp8_product_error", lambda device: "")
    said = fp8_matmul_obstacle(torch.device("cuda"))
    if has:
        assert said == ""
    else:
        assert said.startswith(
            f"NVIDIA A100 cannot multiply in fp8 (compute capability {capability[0]}.{capability[1]};"
        )


def test_a_gpu_whose_libraries_refuse_a_product_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "RTX PRO 5000")
    monkeypatch.setattr(quantize, "fp8_product_error", lambda device: "CUBLAS_STATUS_NOT_SUPPORTED")
    said = fp8_matmul_obstacle(torch.device("cuda"))
    assert said == "RTX PRO 5000 cannot multiply in fp8 with this torch: CUBLAS_STATUS_NOT_SUPPORTED"


def test_a_small_product_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fp8_product_error(CPU) == ""
    exact = fp8_matmul
    monkeypatch.setattr(quantize, "fp8_matmul", lambda *given: 2 * exact(*given))
    assert fp8_product_error(CPU) == "its numbers are wrong"

    def fail(*given: Tensor) -> Tensor:
        raise RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED\nstack")

    monkeypatch.setattr(quantize, "fp8_matmul", fail)
    assert fp8_product_error(CPU) == "CUDA error: CUBLAS_STATUS_NOT_SUPPORTED"


def test_other_devices_have_no_products_and_the_cpu_stands_in() -> None:
    assert fp8_matmul_obstacle(CPU) == ""
    assert fp8_matmul_obstacle(torch.device("mps")) == "mps cannot multiply in fp8"
