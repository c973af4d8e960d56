"""LoRAs merged and taken out, bit for bit, in every precision that weights are kept in."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from flux_batch.model.checkpoint.checkpoint import open_checkpoint
from flux_batch.model.checkpoint.detect import detect
from flux_batch.model.checkpoint.loading import load_transformer
from flux_batch.model.lora import merge as lora_merge
from flux_batch.model.lora.file import Lora, open_lora
from flux_batch.model.lora.merge import LoraMerge
from flux_batch.model.optimize.quantize import Fp8Linear, apply_fp8, to_fp8
from helpers.lora_files import Factors, added, matrices, random_factors, write_lora
from helpers.tiny_flux import TinyFlux, make_tiny_repository

CPU = torch.device("cpu")
LAYOUTS = ("diffusers", "original")
KINDS = ("float32", "bfloat16", "float16", "fp8")


@pytest.fixture(scope="session")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: make_tiny_repository(folder / name, TinyFlux(seed=5), layout=name) for name in LAYOUTS}


def load(repository: Path, kind: str = "float32") -> LoraMerge:
    """Load the transformer, its weights kept in a dtype, or in fp8 with all others in bfloat16."""
    source = repository / "flux1-tiny.safetensors"
    checkpoint = open_checkpoint(source if source.exists() else repository / "transformer")
    config = json.loads((repository / "transformer" / "config.json").read_text())
    dtype = torch.bfloat16 if kind == "fp8" else getattr(torch, kind)
    layout, checkpoint = detect(checkpoint)
    merge = LoraMerge()
    prepare = apply_fp8 if kind == "fp8" else None
    merge.add_part(
        "transformer", load_transformer(checkpoint, layout, config, dtype=dtype, device=CPU, prepare=prepare)
    )
    return merge


def bits(merge: LoraMerge) -> dict[str, bytes]:
    """Return every tensor of the transformer as bytes."""
    return {
        name: value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        for name, value in merge.parts["transformer"].state_dict().items()
    }


def make_lora(merge: LoraMerge, path: Path, seed: int, share: int = 1) -> Lora:
    """Write a LoRA for every `share`-th layer, and open it."""
    shapes = {
        name.removesuffix(".weight"): (shape[0], shape[1])
        for name, shape in merge.shapes()["transformer"].items()
        if name.endswith(".weight") and len(shape) == 2
    }
    modules = random_factors(dict(list(shapes.items())[seed % share :: share]), seed=seed, alphas=(None, 3.0))
    return open_lora(write_lora(path, modules, prefix="diffusion_model."), path.name, merge.shapes())


@pytest.fixture(params=[(layout, kind) for layout in LAYOUTS for kind in KINDS], ids=lambda each: "-".join(each))
def merge(request: pytest.FixtureRequest, repositories: dict[str, Path]) -> LoraMerge:
    layout, kind = request.param
    return load(repositories[layout], kind)


def test_what_is_taken_out_leaves_no_bit_behind(tmp_path: Path, merge: LoraMerge) -> None:
    before = bits(merge)
    first = make_lora(merge, tmp_path / "a.safetensors", seed=1)
    second = make_lora(merge, tmp_path / "b.safetensors", seed=2, share=2)

    for loras in ([(first, 1.0)], [(second, -3.0)], [(first, 0.2), (second, 7.0)], [(second, 1.0)]):
        merge.set(loras)
        assert bits(merge) != before
        assert merge.merged == tuple(loras)
    merge.set([])

    assert bits(merge) == before
    assert merge.merged == ()


def test_the_same_loras_give_the_same_bits_whatever_was_before(tmp_path: Path, merge: LoraMerge) -> None:
    first = make_lora(merge, tmp_path / "a.safetensors", seed=1)
    second = make_lora(merge, tmp_path / "b.safetensors", seed=2, share=3)
    merge.set([(first, 0.5)])
    alone = bits(merge)

    merge.set([(second, 2.0)])
    merge.set([(first, 1.0), (second, 1.0)])
    merge.set([(first, 0.5)])

    assert bits(merge) == alone


def test_order_does_not_matter(tmp_path: Path, merge: LoraMerge) -> None:
    loras = [(make_lora(merge, tmp_path / f"{seed}.safetensors", seed), 0.1 * seed) for seed in (1, 2, 3)]
    found = set()

    for order in permutations(loras):
        merge.set(order)
        found.add(tuple(bits(merge).items()))

    assert len(found) == 1


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16"])
def test_several_are_one_sum_and_one_rounding(tmp_path: Path, repositories: dict[str, Path], kind: str) -> None:
    merge = load(repositories["diffusers"], kind)
    before = {name: value.clone() for name, value in merge.parts["transformer"].state_dict().items()}
    files = [(random_factors(matrices(before), seed), 0.3 * seed) for seed in (1, 2, 3)]

    merge.set(
        [
            (open_lora(write_lora(tmp_path / f"{at}.safetensors", modules), f"{at}", merge.shapes()), scale)
            for at, (modules, scale) in enumerate(files)
        ]
    )

    expected = before
    for modules, scale in files:
        expected = added(expected, modules, scale)
    for name, value in merge.parts["transformer"].state_dict().items():
        assert value.dtype == before[name].dtype
        if kind == "float32":
            assert torch.allclose(value.double(), expected[name].double(), rtol=1e-6, atol=1e-6), name
        else:
            # Rounded once: that of the exact sum, but for the rare one that lies half-way to within fp32.
            rounded = expected[name].to(value.dtype)
            assert (value == rounded).double().mean() > 0.999, name


def test_over_fp8_the_sum_is_quantised_once(tmp_path: Path, repositories: dict[str, Path]) -> None:
    merge = load(repositories["diffusers"], "fp8")
    layer = merge.parts["transformer"].get_submodule("double_blocks.0.img_attn.qkv")
    assert isinstance(layer, Fp8Linear)
    dense, dtype, bias = layer.dense(torch.float32), layer.weight.dtype, layer.bias
    factors = Factors(torch.randn(2, 32), torch.randn(96, 2), 5.0)
    path = write_lora(tmp_path / "x.safetensors", {"double_blocks.0.img_attn.qkv": factors})

    merge.set([(open_lora(path, "x", merge.shapes()), 0.5)])

    weight, scale = to_fp8(dense + 0.5 * 5.0 / 2 * (factors.up @ factors.down))
    assert layer.weight.dtype == dtype
    assert torch.allclose(layer.weight_scale, scale, rtol=1e-6)
    same = layer.weight.float() == weight.float()
    assert same.double().mean() > 0.99
    assert layer.bias is bias


def test_layers_that_no_lora_changes_are_not_touched(tmp_path: Path, merge: LoraMerge) -> None:
    model = merge.parts["transformer"]
    places = {name: value.data_ptr() for name, value in model.state_dict().items()}
    path = write_lora(tmp_path / "x.safetensors", {"img_in": Factors(torch.ones(1, 64), torch.ones(32, 1))})

    merge.set([(open_lora(path, "x", merge.shapes()), 1.0)])

    moved = [name for name, value in model.state_dict().items() if value.data_ptr() != places[name]]
    assert moved == ["img_in.weight"]


@pytest.mark.parametrize("factors", [(0.0, None), (1.0, 0.0)])
def test_nothing_times_a_lora_is_nothing(tmp_path: Path, merge: LoraMerge, factors: tuple[float, float | None]) -> None:
    scale, alpha = factors
    before = bits(merge)
    path = write_lora(tmp_path / "x.safetensors", {"img_in": Factors(torch.ones(2, 64), torch.ones(32, 2), alpha)})

    merge.set([(open_lora(path, "x", merge.shapes()), scale)])

    assert bits(merge) == before


# What a weight was


def change_by_hand(model: nn.Module) -> None:
    with torch.no_grad():
        model.get_parameter("img_in.weight").add_(1.0)


def replace_by_hand(model: nn.Module) -> None:
    model.get_submodule("img_in").weight = nn.Parameter(torch.randn(32, 64), requires_grad=False)


def quantize_by_hand(model: nn.Module) -> None:
    apply_fp8(model)


@pytest.mark.parametrize("change", [change_by_hand, replace_by_hand, quantize_by_hand])
def test_weights_that_are_not_those_of_the_file_come_back_too(
    tmp_path: Path, repositories: dict[str, Path], change: Callable[[nn.Module], None]
) -> None:
    merge = load(repositories["diffusers"])
    change(merge.parts["transformer"])
    before = bits(merge)
    lora = make_lora(merge, tmp_path / "a.safetensors", seed=1)

    merge.set([(lora, 1.0)])
    merge.set([(lora, 2.0)])
    merge.set([])

    assert bits(merge) == before


def test_a_model_that_came_from_no_file_comes_back_too(tmp_path: Path, repositories: dict[str, Path]) -> None:
    loaded = load(repositories["diffusers"]).parts["transformer"]
    bare = type(loaded)(loaded.params)
    merge = LoraMerge()
    merge.add_part("transformer", bare)
    before = bits(merge)

    merge.set([(make_lora(merge, tmp_path / "a.safetensors", seed=1), 1.0)])
    assert bits(merge) != before
    merge.set([])

    assert bits(merge) == before


def test_nothing_is_kept_of_what_the_file_has(tmp_path: Path, merge: LoraMerge) -> None:
    merge.set([(make_lora(merge, tmp_path / "a.safetensors", seed=1), 1.0)])

    assert set(merge._originals.values()) == {None}


def test_a_file_that_was_replaced_meanwhile_is_not_read(tmp_path: Path, repositories: dict[str, Path]) -> None:
    folder = make_tiny_repository(tmp_path / "own", TinyFlux(seed=5))
    merge = load(folder)
    before = bits(merge)
    merge.set([(make_lora(merge, tmp_path / "a.safetensors", seed=1), 1.0)])

    weights = next((folder / "transformer").glob("*.safetensors"))
    other = tmp_path / "other"
    other.write_bytes(bytes(weights.stat().st_size))
    other.rename(weights)
    merge.set([])

    assert bits(merge) == before


def test_a_copy_of_the_model_can_be_made(repositories: dict[str, Path]) -> None:
    model = load(repositories["diffusers"]).parts["transformer"]

    assert copy.deepcopy(model).get_parameter("img_in.weight").data_ptr() != 0


# What goes wrong half-way, and parts that come later


def test_a_failure_half_way_leaves_none_merged(
    tmp_path: Path, merge: LoraMerge, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = bits(merge)
    first = make_lora(merge, tmp_path / "a.safetensors", seed=1)
    merge.set([(first, 1.0)])
    calls: list[nn.Module] = []
    real = lora_merge.merged_tensors

    def fails_at_the_fourth(layer: nn.Module, changes: list[tuple[object, float]]) -> dict[str, Tensor]:
        calls.append(layer)
        if len(calls) == 4:
            raise MemoryError
        return dict(real(layer, changes))

    monkeypatch.setattr(lora_merge, "merged_tensors", fails_at_the_fourth)
    with pytest.raises(MemoryError):
        merge.set([(first, 2.0)])

    assert bits(merge) == before
    assert merge.merged == ()


def test_a_part_that_takes_the_place_of_another_gets_what_is_merged(
    tmp_path: Path, repositories: dict[str, Path]
) -> None:
    merge = load(repositories["diffusers"])
    merge.set([(make_lora(merge, tmp_path / "a.safetensors", seed=1), 1.0)])
    expected = bits(merge)
    other = load(repositories["original"])

    merge.add_part("transformer", other.parts["transformer"])

    assert bits(merge) == expected
    merge.set([])
    assert bits(merge) == bits(load(repositories["original"]))


@pytest.mark.parametrize("scale", [1e6, -1e300])
def test_a_scale_that_overflows_is_an_error(tmp_path: Path, repositories: dict[str, Path], scale: float) -> None:
    merge = load(repositories["diffusers"], "float16")
    before = bits(merge)
    lora = make_lora(merge, tmp_path / "a.safetensors", seed=1)
    merge.set([(lora, 1.0)])

    with pytest.raises(ValueError, match=r"overflows in float16: take smaller scales|a scale of -1e\+300 is too large"):
        merge.set([(lora, scale)])

    assert bits(merge) == before
    assert merge.merged == ()


def test_a_scale_that_overflows_over_fp8_is_an_error(tmp_path: Path, repositories: dict[str, Path]) -> None:
    merge = load(repositories["diffusers"], "fp8")
    before = bits(merge)
    shapes = {"double_blocks.0.img_attn.qkv": (96, 32)}
    modules = {name: replace(f, up=f.up * 1e6) for name, f in random_factors(shapes).items()}
    lora = open_lora(write_lora(tmp_path / "x.safetensors", modules), "x", merge.shapes())

    with pytest.raises(ValueError, match=r"img_attn\.qkv\.weight_scale overflows in float32: take smaller scales"):
        merge.set([(lora, 1e38)])

    assert bits(merge) == before


@pytest.mark.parametrize("now", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_a_model_whose_dtype_was_changed_meanwhile(
    tmp_path: Path, repositories: dict[str, Path], kind: str, now: torch.dtype
) -> None:
    merge, other = load(repositories["diffusers"], kind), load(repositories["diffusers"], kind)
    lora = make_lora(merge, tmp_path / "a.safetensors", seed=1)
    other.parts["transformer"].to(now)

    merge.set([(lora, 1.0)])
    merge.parts["transformer"].to(now)
    merge.set([])

    assert bits(merge) == bits(other)


def test_a_merge_inside_inference_mode_can_be_taken_out_outside(tmp_path: Path, merge: LoraMerge) -> None:
    before = bits(merge)
    lora = make_lora(merge, tmp_path / "a.safetensors", seed=1)

    with torch.inference_mode():
        merge.set([(lora, 1.0)])
    merge.set([(lora, 0.5)])
    merge.set([])

    assert bits(merge) == before


def test_a_program_may_use_torchs_newer_way_to_allow_less_precision(tmp_path: Path, merge: LoraMerge) -> None:
    lora = make_lora(merge, tmp_path / "a.safetensors", seed=1)
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        merge.set([(lora, 1.0)])
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before


def test_a_merge_is_exact_whatever_the_program_allows_elsewhere(tmp_path: Path, merge: LoraMerge) -> None:
    lora = make_lora(merge, tmp_path / "a.safetensors", seed=1)
    merge.set([(lora, 1.0)])
    expected = bits(merge)

    torch.set_float32_matmul_precision("medium")
    try:
        merge.set([(lora, 1.0)])
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")

    assert bits(merge) == expected
