"""LoRAs are merged and unloaded bit for bit, in every dtype of weights."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from threading import Event, Thread
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flux_batch.model.checkpoint.checkpoint import open_checkpoint
from flux_batch.model.checkpoint.detect import detect
from flux_batch.model.checkpoint.loading import load_transformer
from flux_batch.model.lora import fusion as lora_fusion
from flux_batch.model.lora.file import Lora, open_lora
from flux_batch.model.lora.fusion import LoraFusion
from flux_batch.model.optimize.quantize import Fp8Linear, apply_fp8, to_fp8
from helpers.lora_files import Factors, added, matrices, random_factors, write_lora
from helpers.tiny_flux import TinyFlux, make_tiny_repository

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
LAYOUTS = ("diffusers", "original")
KINDS = ("float32", "bfloat16", "float16", "fp8")


@pytest.fixture(scope="session")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: make_tiny_repository(folder / name, TinyFlux(seed=5), layout=name) for name in LAYOUTS}


def load(repository: Path, kind: str = "float32") -> LoraFusion:
    """Load the transformer with weights in a dtype, or in fp8 with all others in bfloat16."""
    source = repository / "flux1-tiny.safetensors"
    checkpoint = open_checkpoint(source if source.exists() else repository / "transformer")
    config = json.loads((repository / "transformer" / "config.json").read_text())
    dtype = torch.bfloat16 if kind == "fp8" else getattr(torch, kind)
    layout, checkpoint = detect(checkpoint)
    fusion = LoraFusion()
    prepare = apply_fp8 if kind == "fp8" else None
    fusion.add_part(
        "transformer", load_transformer(checkpoint, layout, config, dtype=dtype, device=CPU, prepare=prepare)
    )
    return fusion


def bits(fusion: LoraFusion) -> dict[str, bytes]:
    """Return every tensor of the transformer as bytes."""
    return {
        name: value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        for name, value in fusion.parts["transformer"].state_dict().items()
    }


def make_lora(fusion: LoraFusion, path: Path, seed: int, share: int = 1) -> Lora:
    """Write a LoRA for every `share`-th layer. Returns: the opened LoRA."""
    shapes = {
        name.removesuffix(".weight"): (shape[0], shape[1])
        for name, shape in fusion.shapes()["transformer"].items()
        if name.endswith(".weight") and len(shape) == 2
    }
    modules = random_factors(dict(list(shapes.items())[seed % share :: share]), seed=seed, alphas=(None, 3.0))
    return open_lora(write_lora(path, modules, prefix="diffusion_model."), path.name, fusion.shapes())


# Each layout with one of the kinds, since kinds do not depend on the layout.
@pytest.fixture(params=list(zip(2 * LAYOUTS, KINDS, strict=True)), ids=lambda each: "-".join(each))
def fusion(request: pytest.FixtureRequest, repositories: dict[str, Path]) -> LoraFusion:
    layout, kind = request.param
    return load(repositories[layout], kind)


def test_unfusing_restores_every_bit(tmp_path: Path, fusion: LoraFusion) -> None:
    before = bits(fusion)
    first = make_lora(fusion, tmp_path / "a.safetensors", seed=1)
    second = make_lora(fusion, tmp_path / "b.safetensors", seed=2, share=2)

    for loras in ([(first, 1.0)], [(second, -3.0)], [(first, 0.2), (second, 7.0)], [(second, 1.0)]):
        fusion.fuse(loras)
        assert bits(fusion) != before
        assert fusion.fused == tuple(loras)
    fusion.fuse([])

    assert bits(fusion) == before
    assert fusion.fused == ()


def test_the_same_loras_give_the_same_bits_whatever_was_before(tmp_path: Path, fusion: LoraFusion) -> None:
    first = make_lora(fusion, tmp_path / "a.safetensors", seed=1)
    second = make_lora(fusion, tmp_path / "b.safetensors", seed=2, share=3)
    fusion.fuse([(first, 0.5)])
    alone = bits(fusion)

    fusion.fuse([(second, 2.0)])
    fusion.fuse([(first, 1.0), (second, 1.0)])
    fusion.fuse([(first, 0.5)])

    assert bits(fusion) == alone


def test_order_does_not_matter(tmp_path: Path, fusion: LoraFusion) -> None:
    loras = [(make_lora(fusion, tmp_path / f"{seed}.safetensors", seed), 0.1 * seed) for seed in (1, 2, 3)]
    found = set()

    for order in permutations(loras):
        fusion.fuse(order)
        found.add(tuple(bits(fusion).items()))

    assert len(found) == 1


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16"])
def test_several_loras_are_summed_and_rounded_once(tmp_path: Path, repositories: dict[str, Path], kind: str) -> None:
    fusion = load(repositories["diffusers"], kind)
    before = {name: value.clone() for name, value in fusion.parts["transformer"].state_dict().items()}
    files = [(random_factors(matrices(before), seed), 0.3 * seed) for seed in (1, 2, 3)]

    fusion.fuse(
        [
            (open_lora(write_lora(tmp_path / f"{at}.safetensors", modules), f"{at}", fusion.shapes()), scale)
            for at, (modules, scale) in enumerate(files)
        ]
    )

    expected = before
    for modules, scale in files:
        expected = added(expected, modules, scale)
    for name, value in fusion.parts["transformer"].state_dict().items():
        assert value.dtype == before[name].dtype
        if kind == "float32":
            assert torch.allclose(value.double(), expected[name].double(), rtol=1e-6, atol=1e-6), name
        else:
            # The exact sum rounded once, except for rare sums that are half-way within the precision of fp32.
            rounded = expected[name].to(value.dtype)
            assert (value == rounded).double().mean() > 0.999, name


def test_fp8_weights_are_quantized_once(tmp_path: Path, repositories: dict[str, Path]) -> None:
    fusion = load(repositories["diffusers"], "fp8")
    layer = fusion.parts["transformer"].get_submodule("double_blocks.0.img_attn.qkv")
    assert isinstance(layer, Fp8Linear)
    dense, dtype, bias = layer.dense(torch.float32), layer.weight.dtype, layer.bias
    factors = Factors(torch.randn(2, 32), torch.randn(96, 2), 5.0)
    path = write_lora(tmp_path / "x.safetensors", {"double_blocks.0.img_attn.qkv": factors})

    fusion.fuse([(open_lora(path, "x", fusion.shapes()), 0.5)])

    weight, scale = to_fp8(dense + 0.5 * 5.0 / 2 * (factors.up @ factors.down))
    assert layer.weight.dtype == dtype
    assert torch.allclose(layer.weight_scale, scale, rtol=1e-6)
    same = layer.weight.float() == weight.float()
    assert same.double().mean() > 0.99
    assert layer.bias is bias


def test_layers_that_no_lora_changes_are_not_touched(tmp_path: Path, fusion: LoraFusion) -> None:
    model = fusion.parts["transformer"]
    places = {name: value.data_ptr() for name, value in model.state_dict().items()}
    path = write_lora(tmp_path / "x.safetensors", {"img_in": Factors(torch.ones(1, 64), torch.ones(32, 1))})

    fusion.fuse([(open_lora(path, "x", fusion.shapes()), 1.0)])

    moved = [name for name, value in model.state_dict().items() if value.data_ptr() != places[name]]
    assert moved == ["img_in.weight"]


@pytest.mark.parametrize("factors", [(0.0, None), (1.0, 0.0)])
def test_a_lora_times_zero_changes_nothing(
    tmp_path: Path, fusion: LoraFusion, factors: tuple[float, float | None]
) -> None:
    scale, alpha = factors
    before = bits(fusion)
    path = write_lora(tmp_path / "x.safetensors", {"img_in": Factors(torch.ones(2, 64), torch.ones(32, 2), alpha)})

    fusion.fuse([(open_lora(path, "x", fusion.shapes()), scale)])

    assert bits(fusion) == before


# The original weights


def change_by_hand(model: nn.Module) -> None:
    with torch.no_grad():
        model.get_parameter("img_in.weight").add_(1.0)


def replace_by_hand(model: nn.Module) -> None:
    model.get_submodule("img_in").weight = nn.Parameter(torch.randn(32, 64), requires_grad=False)


def quantize_by_hand(model: nn.Module) -> None:
    apply_fp8(model)


@pytest.mark.parametrize("change", [change_by_hand, replace_by_hand, quantize_by_hand])
def test_weights_changed_since_loading_are_restored(
    tmp_path: Path, repositories: dict[str, Path], change: Callable[[nn.Module], None]
) -> None:
    fusion = load(repositories["diffusers"])
    change(fusion.parts["transformer"])
    before = bits(fusion)
    lora = make_lora(fusion, tmp_path / "a.safetensors", seed=1)

    fusion.fuse([(lora, 1.0)])
    fusion.fuse([(lora, 2.0)])
    fusion.fuse([])

    assert bits(fusion) == before


def test_a_model_without_a_file_is_restored(tmp_path: Path, repositories: dict[str, Path]) -> None:
    loaded = load(repositories["diffusers"]).parts["transformer"]
    bare = type(loaded)(loaded.params)
    fusion = LoraFusion()
    fusion.add_part("transformer", bare)
    before = bits(fusion)

    fusion.fuse([(make_lora(fusion, tmp_path / "a.safetensors", seed=1), 1.0)])
    assert bits(fusion) != before
    fusion.fuse([])

    assert bits(fusion) == before


def test_weights_that_the_file_has_are_not_kept(tmp_path: Path, fusion: LoraFusion) -> None:
    fusion.fuse([(make_lora(fusion, tmp_path / "a.safetensors", seed=1), 1.0)])

    assert set(fusion._originals.values()) == {None}


def test_a_file_that_was_replaced_meanwhile_is_not_read(tmp_path: Path, repositories: dict[str, Path]) -> None:
    folder = make_tiny_repository(tmp_path / "own", TinyFlux(seed=5))
    fusion = load(folder)
    before = bits(fusion)
    fusion.fuse([(make_lora(fusion, tmp_path / "a.safetensors", seed=1), 1.0)])

    weights = next((folder / "transformer").glob("*.safetensors"))
    other = tmp_path / "other"
    other.write_bytes(bytes(weights.stat().st_size))
    other.rename(weights)
    fusion.fuse([])

    assert bits(fusion) == before


def test_a_copy_of_the_model_can_be_made(repositories: dict[str, Path]) -> None:
    model = load(repositories["diffusers"]).parts["transformer"]

    assert copy.deepcopy(model).get_parameter("img_in.weight").data_ptr() != 0


# Errors in the middle of a change, and parts that are loaded later


def test_a_failure_half_way_leaves_none_fused(
    tmp_path: Path, fusion: LoraFusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = bits(fusion)
    first = make_lora(fusion, tmp_path / "a.safetensors", seed=1)
    fusion.fuse([(first, 1.0)])
    calls: list[nn.Module] = []
    real = lora_fusion.fused_tensors

    def fails_at_the_fourth(layer: nn.Module, changes: list[tuple[object, float]]) -> dict[str, Tensor]:
        calls.append(layer)
        if len(calls) == 4:
            raise MemoryError
        return dict(real(layer, changes))

    monkeypatch.setattr(lora_fusion, "fused_tensors", fails_at_the_fourth)
    with pytest.raises(MemoryError):
        fusion.fuse([(first, 2.0)])

    assert bits(fusion) == before
    assert fusion.fused == ()


def test_a_replaced_part_gets_the_fused_loras(tmp_path: Path, repositories: dict[str, Path]) -> None:
    fusion = load(repositories["diffusers"])
    fusion.fuse([(make_lora(fusion, tmp_path / "a.safetensors", seed=1), 1.0)])
    expected = bits(fusion)
    other = load(repositories["original"])

    fusion.add_part("transformer", other.parts["transformer"])

    assert bits(fusion) == expected
    fusion.fuse([])
    assert bits(fusion) == bits(load(repositories["original"]))


@pytest.mark.parametrize("scale", [1e6, -1e300])
def test_a_scale_that_overflows_is_an_error(tmp_path: Path, repositories: dict[str, Path], scale: float) -> None:
    fusion = load(repositories["diffusers"], "float16")
    before = bits(fusion)
    lora = make_lora(fusion, tmp_path / "a.safetensors", seed=1)
    fusion.fuse([(lora, 1.0)])

    with pytest.raises(ValueError, match=r"overflows in float16 with these LoRAs|a scale of -1e\+300 is too large"):
        fusion.fuse([(lora, scale)])

    assert bits(fusion) == before
    assert fusion.fused == ()


def test_a_scale_that_overflows_over_fp8_is_an_error(tmp_path: Path, repositories: dict[str, Path]) -> None:
    fusion = load(repositories["diffusers"], "fp8")
    before = bits(fusion)
    shapes = {"double_blocks.0.img_attn.qkv": (96, 32)}
    modules = {name: replace(f, up=f.up * 1e6) for name, f in random_factors(shapes).items()}
    lora = open_lora(write_lora(tmp_path / "x.safetensors", modules), "x", fusion.shapes())

    with pytest.raises(ValueError, match=r"img_attn\.qkv\.weight_scale overflows in float32 with these LoRAs"):
        fusion.fuse([(lora, 1e38)])

    assert bits(fusion) == before


@pytest.mark.parametrize("now", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_a_model_whose_dtype_was_changed_meanwhile(
    tmp_path: Path, repositories: dict[str, Path], kind: str, now: torch.dtype
) -> None:
    fusion, other = load(repositories["diffusers"], kind), load(repositories["diffusers"], kind)
    lora = make_lora(fusion, tmp_path / "a.safetensors", seed=1)
    other.parts["transformer"].to(now)

    fusion.fuse([(lora, 1.0)])
    fusion.parts["transformer"].to(now)
    fusion.fuse([])

    assert bits(fusion) == bits(other)


def test_loras_fused_in_inference_mode_are_unfused_outside(tmp_path: Path, fusion: LoraFusion) -> None:
    before = bits(fusion)
    lora = make_lora(fusion, tmp_path / "a.safetensors", seed=1)

    with torch.inference_mode():
        fusion.fuse([(lora, 1.0)])
    fusion.fuse([(lora, 0.5)])
    fusion.fuse([])

    assert bits(fusion) == before


def test_a_program_may_use_torchs_newer_way_to_allow_less_precision(tmp_path: Path, fusion: LoraFusion) -> None:
    lora = make_lora(fusion, tmp_path / "a.safetensors", seed=1)
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        fusion.fuse([(lora, 1.0)])
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before


def test_fusing_is_exact_whatever_precision_the_program_allows(tmp_path: Path, fusion: LoraFusion) -> None:
    lora = make_lora(fusion, tmp_path / "a.safetensors", seed=1)
    fusion.fuse([(lora, 1.0)])
    expected = bits(fusion)

    torch.set_float32_matmul_precision("medium")
    try:
        fusion.fuse([(lora, 1.0)])
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")

    assert bits(fusion) == expected


def test_threads_that_fuse_at_once_leave_the_precision_of_the_program() -> None:
    """torch has one for all threads: each would put back what it found, which may be that of the other."""
    second_began, first_ended = Event(), Event()

    def fuse(at_work: Callable[[], object]) -> None:
        model = nn.Sequential(nn.Linear(2, 2))
        target = SimpleNamespace(part="transformer", layer="0")
        change: Any = SimpleNamespace(target=target, parameter="weight", replaces=False, num_columns=None)
        change.add_to = lambda total, original, scale: at_work()
        fusion = LoraFusion()
        fusion.add_part("transformer", model)
        fusion.fuse([(Lora("style", (change,), ()), 1.0)])

    def first() -> None:
        fuse(lambda: second_began.wait(0.3))
        first_ended.set()

    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        threads = [Thread(target=first), Thread(target=fuse, args=(lambda: (second_began.set(), first_ended.wait(5)),))]
        for thread in threads:
            thread.start()
            time.sleep(0.05)
        for thread in threads:
            thread.join()
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before
