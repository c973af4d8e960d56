"""Every family of LoRA files, compared with fp64 references."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flux_batch.model.checkpoint.diffusers_keys import swap_halves, transformer_to_diffusers
from flux_batch.model.lora.file import open_lora
from flux_batch.model.lora.fusion import LoraFusion
from helpers.lora_files import (
    ALPHAS,
    DIFFUSERS_NAMES,
    KOHYA,
    ORIGINAL_NAMES,
    Factors,
    added,
    assert_close,
    matrices,
    put_in,
    random_factors,
    state_of,
    write_lora,
)


def in_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return transformer_to_diffusers({name: value.double() for name, value in state.items()})


@pytest.mark.parametrize("family", DIFFUSERS_NAMES)
@pytest.mark.parametrize("scale", [1.0, -0.7])
def test_layers_of_diffusers_are_rows_of_ours(tmp_path: Path, fusion: LoraFusion, family: str, scale: float) -> None:
    before = in_diffusers(state_of(fusion))
    modules = random_factors(matrices(before), seed=1, alphas=ALPHAS)
    path = write_lora(tmp_path / "lora.safetensors", modules, **DIFFUSERS_NAMES[family])

    put_in(fusion, path, scale)

    assert_close(in_diffusers(state_of(fusion)), added(before, modules, scale))


@pytest.mark.parametrize("family", ORIGINAL_NAMES)
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_original_layers_are_ours(tmp_path: Path, fusion: LoraFusion, family: str, scale: float) -> None:
    before = state_of(fusion)
    modules = random_factors(matrices(before), seed=2, alphas=ALPHAS)
    path = write_lora(tmp_path / "lora.safetensors", modules, **ORIGINAL_NAMES[family])

    put_in(fusion, path, scale)

    assert_close(state_of(fusion), added(before, modules, scale))


@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
def test_xlabs(tmp_path: Path, fusion: LoraFusion, prefix: str) -> None:
    before = state_of(fusion)
    names = {}
    for i in range(2):
        names |= {
            f"double_blocks.{i}.processor.qkv_lora1": f"double_blocks.{i}.img_attn.qkv",
            f"double_blocks.{i}.processor.qkv_lora2": f"double_blocks.{i}.txt_attn.qkv",
            f"double_blocks.{i}.processor.proj_lora1": f"double_blocks.{i}.img_attn.proj",
            f"double_blocks.{i}.processor.proj_lora2": f"double_blocks.{i}.txt_attn.proj",
            f"single_blocks.{i}.processor.proj_lora": f"single_blocks.{i}.linear2",
        }
    shapes = matrices(before)
    modules = random_factors({theirs: shapes[ours] for theirs, ours in names.items()}, seed=3)
    # Only query, key and value of linear1.
    qkv = random_factors({f"single_blocks.{i}.processor.qkv_lora": (96, 32) for i in range(2)}, seed=4)
    path = write_lora(tmp_path / "x.safetensors", {**modules, **qkv}, prefix=prefix, down="down.weight", up="up.weight")

    put_in(fusion, path, 0.8)

    expected = added(before, {names[name]: factors for name, factors in modules.items()}, 0.8)
    for i in range(2):
        expected[f"single_blocks.{i}.linear1.weight"][:96] += 0.8 * qkv[f"single_blocks.{i}.processor.qkv_lora"].delta
    assert_close(state_of(fusion), expected)


def test_diffsynth(tmp_path: Path, fusion: LoraFusion) -> None:
    before = state_of(fusion)
    names = {
        "blocks.1.attn.a_to_qkv": "double_blocks.1.img_attn.qkv",
        "blocks.1.attn.b_to_out": "double_blocks.1.txt_attn.proj",
        "blocks.0.norm1_a.linear": "double_blocks.0.img_mod.lin",
        "blocks.0.ff_b.2": "double_blocks.0.txt_mlp.2",
        "single_blocks.1.to_qkv_mlp": "single_blocks.1.linear1",
        "single_blocks.0.proj_out": "single_blocks.0.linear2",
        "single_blocks.0.norm.linear": "single_blocks.0.modulation.lin",
        "x_embedder": "img_in",
        "time_embedder.timestep_embedder.2": "time_in.out_layer",
        "guidance_embedder.timestep_embedder.0": "guidance_in.in_layer",
        "pooled_text_embedder.0": "vector_in.in_layer",
        "final_proj_out": "final_layer.linear",
        "final_norm_out.linear": "final_layer.adaLN_modulation.1",
    }
    shapes = matrices(before)
    modules = random_factors({theirs: shapes[ours] for theirs, ours in names.items()}, seed=5)
    path = write_lora(tmp_path / "x.safetensors", modules, down="lora_A.default.weight", up="lora_B.default.weight")

    put_in(fusion, path)

    last = modules["final_norm_out.linear"]
    swapped = Factors(last.down, swap_halves(last.up))
    ours = {names[name]: swapped if factors is last else factors for name, factors in modules.items()}
    assert_close(state_of(fusion), added(before, ours))


CLIP_NAMES = {
    "kohya": {"prefix": "lora_te1_text_model_", "underscores": True, **KOHYA},
    "kohya of SD": {"prefix": "lora_te_text_model_", "underscores": True, **KOHYA},
    "diffusers": {"prefix": "text_encoder.text_model."},
    "diffusers on transformers 5": {"prefix": "text_encoder."},
    "old diffusers": {
        "prefix": "text_encoder.text_model.",
        "down": "lora_linear_layer.down.weight",
        "up": "lora_linear_layer.up.weight",
    },
    "comfyui": {"prefix": "text_encoders.clip_l.transformer.text_model.", **KOHYA},
    "peft": {"prefix": "base_model.model.text_model."},
}
T5_NAMES = {
    "kohya": {"prefix": "lora_te3_", "underscores": True, **KOHYA},
    "onetrainer": {"prefix": "lora_te2_", "underscores": True, **KOHYA},
    "diffusers": {"prefix": "text_encoder_2."},
    "comfyui": {"prefix": "text_encoders.t5xxl.transformer.", **KOHYA},
    "peft": {"prefix": "base_model.model."},
}


@pytest.mark.parametrize(
    ("part", "spelling"),
    [*(("clip", spelling) for spelling in CLIP_NAMES.values()), *(("t5", spelling) for spelling in T5_NAMES.values())],
)
def test_text_encoders(tmp_path: Path, fusion: LoraFusion, part: str, spelling: dict[str, str | bool]) -> None:
    before = state_of(fusion, part)
    modules = random_factors(matrices(before), seed=6, alphas=ALPHAS)
    path = write_lora(tmp_path / "x.safetensors", modules, **spelling)

    put_in(fusion, path, 1.5)

    assert_close(state_of(fusion, part), added(before, modules, 1.5))


def test_all_parts_of_one_file_at_once(tmp_path: Path, fusion: LoraFusion) -> None:
    shapes = {
        "lora_unet_single_blocks_0_linear2": (32, 160),
        "lora_te1_text_model_encoder_layers_0_mlp_fc1": (64, 32),
        "lora_te3_encoder_block_1_layer_1_DenseReluDense_wo": (24, 48),
    }
    before = {part: state_of(fusion, part) for part in fusion.parts}
    path = write_lora(tmp_path / "x.safetensors", random_factors(shapes), **KOHYA)

    put_in(fusion, path)

    for part, name in (
        ("transformer", "single_blocks.0.linear2.weight"),
        ("clip", "encoder.layers.0.mlp.fc1.weight"),
        ("t5", "encoder.block.1.layer.1.DenseReluDense.wo.weight"),
    ):
        after = state_of(fusion, part)
        assert [key for key in after if not torch.equal(after[key], before[part][key])] == [name]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_the_dtype_of_the_file_does_not_matter(tmp_path: Path, fusion: LoraFusion, dtype: torch.dtype) -> None:
    before = state_of(fusion)
    drawn = random_factors({"double_blocks.0.img_attn.qkv": (96, 32)})
    stored = {name: Factors(f.down.to(dtype).float(), f.up.to(dtype).float()) for name, f in drawn.items()}
    path = write_lora(tmp_path / "x.safetensors", drawn, dtype=dtype)

    put_in(fusion, path)

    assert_close(state_of(fusion), added(before, stored))


# Kinds


@pytest.mark.parametrize(
    ("factors", "expected"),
    [
        (
            {"hada_w1_a": (96, 3), "hada_w1_b": (3, 32), "hada_w2_a": (96, 3), "hada_w2_b": (3, 32), "alpha": 6.0},
            lambda f: 2 * (f["hada_w1_a"] @ f["hada_w1_b"]) * (f["hada_w2_a"] @ f["hada_w2_b"]),
        ),
        (
            {"lokr_w1": (4, 8), "lokr_w2_a": (24, 2), "lokr_w2_b": (2, 4), "alpha": 1.0},
            lambda f: 0.5 * torch.kron(f["lokr_w1"], f["lokr_w2_a"] @ f["lokr_w2_b"]),
        ),
        (
            {"lokr_w1_a": (4, 5), "lokr_w1_b": (5, 8), "lokr_w2": (24, 4)},
            lambda f: torch.kron(f["lokr_w1_a"] @ f["lokr_w1_b"], f["lokr_w2"]),
        ),
        # Two full factors have no rank, so alpha has no effect.
        ({"lokr_w1": (8, 4), "lokr_w2": (12, 8), "alpha": 7.0}, lambda f: torch.kron(f["lokr_w1"], f["lokr_w2"])),
        ({"diff": (96, 32)}, lambda f: f["diff"]),
    ],
)
def test_kinds(
    tmp_path: Path,
    fusion: LoraFusion,
    factors: dict[str, tuple[int, ...] | float],
    expected: Callable[[dict[str, Tensor]], Tensor],
) -> None:
    before = state_of(fusion)
    stem = "lora_unet_double_blocks_1_txt_attn_qkv"
    tensors = {
        role: torch.tensor(shape) if isinstance(shape, float) else torch.randn(shape) for role, shape in factors.items()
    }
    path = tmp_path / "x.safetensors"
    save_file({f"{stem}.{role}": tensor for role, tensor in tensors.items()}, path)

    put_in(fusion, path, 0.25)

    name = "double_blocks.1.txt_attn.qkv.weight"
    wide = {role: tensor.double() for role, tensor in tensors.items()}
    assert_close(state_of(fusion), before | {name: before[name].double() + 0.25 * expected(wide)})


@pytest.mark.parametrize("shape", [(32,), (32, 1), (1, 32)])
def test_dora_of_a_piece_of_a_fused_layer(tmp_path: Path, fusion: LoraFusion, shape: tuple[int, ...]) -> None:
    before = state_of(fusion)
    name = "transformer_blocks.0.attn.to_k"
    factors = random_factors({name: (32, 32)}, alphas=(3.0,))[name]
    magnitude = torch.rand(shape) + 0.5
    key = f"transformer.{name}.dora_scale"
    path = write_lora(tmp_path / "x.safetensors", {name: factors}, prefix="transformer.", extra={key: magnitude})

    put_in(fusion, path, 0.5)

    own = before["double_blocks.0.img_attn.qkv.weight"][32:64].double()
    moved = own + factors.delta
    dim = 0 if shape == (1, 32) else 1
    target = magnitude.double().reshape((1, 32) if dim == 0 else (32, 1)) * moved / moved.norm(dim=dim, keepdim=True)
    expected = {key: value.double() for key, value in before.items()}
    expected["double_blocks.0.img_attn.qkv.weight"][32:64] = 0.5 * own + 0.5 * target
    assert_close(state_of(fusion), expected)


def test_differences_of_norms_and_biases(tmp_path: Path, fusion: LoraFusion) -> None:
    before = state_of(fusion)
    norm, bias = torch.randn(16), torch.randn(64)
    path = tmp_path / "x.safetensors"
    save_file(
        {
            "diffusion_model.double_blocks.0.img_attn.norm.key_norm.diff": norm,
            "diffusion_model.final_layer.adaLN_modulation.1.diff_b": bias,
            "transformer.norm_out.linear.diff": torch.ones(64, 32),
        },
        path,
    )

    put_in(fusion, path, 2.0)

    changed = {
        "double_blocks.0.img_attn.norm.key_norm.scale": 2 * norm,
        "final_layer.adaLN_modulation.1.bias": 2 * bias,
        "final_layer.adaLN_modulation.1.weight": torch.full((64, 32), 2.0),
    }
    assert_close(state_of(fusion), before | {name: before[name] + change for name, change in changed.items()})


# Scales


def test_a_fused_file_trained_in_pieces_has_the_scale_of_a_piece(tmp_path: Path, fusion: LoraFusion) -> None:
    before = state_of(fusion)
    metadata = {"ss_network_args": json.dumps({"split_qkv": "True"})}
    up = torch.block_diag(torch.randn(32, 2), torch.randn(32, 2), torch.randn(32, 2))
    modules = {
        "double_blocks.0.img_attn.qkv": Factors(torch.randn(6, 32), up, 1.0),
        # No longer block-diagonal, as after a resize of the LoRA.
        "double_blocks.1.img_attn.qkv": Factors(torch.randn(6, 32), torch.randn(96, 6), 1.0),
    }
    path = write_lora(tmp_path / "x.safetensors", modules, metadata=metadata, **ORIGINAL_NAMES["kohya"])

    put_in(fusion, path)

    split = Factors(modules["double_blocks.0.img_attn.qkv"].down, up, 3.0)
    assert_close(state_of(fusion), added(before, modules | {"double_blocks.0.img_attn.qkv": split}))


def test_a_block_diagonal_file_that_says_nothing_is_as_it_is(tmp_path: Path, fusion: LoraFusion) -> None:
    before = state_of(fusion)
    up = torch.block_diag(torch.randn(32, 2), torch.randn(32, 2), torch.randn(32, 2))
    modules = {"double_blocks.0.img_attn.qkv": Factors(torch.randn(6, 32), up, 1.0)}
    path = write_lora(tmp_path / "x.safetensors", modules, **ORIGINAL_NAMES["kohya"])

    put_in(fusion, path)

    assert_close(state_of(fusion), added(before, modules))


@pytest.mark.parametrize("alpha", [float("nan"), float("inf")])
def test_an_alpha_that_is_no_number_is_an_error(tmp_path: Path, fusion: LoraFusion, alpha: float) -> None:
    modules = {"img_in": Factors(torch.randn(2, 64), torch.randn(32, 2), alpha)}

    with pytest.raises(ValueError, match=r"alpha of transformer\.img_in is"):
        open_lora(write_lora(tmp_path / "x.safetensors", modules, prefix="transformer."), "x", fusion.shapes())


# Damaged and wrong files


def good_lora(path: Path) -> dict[str, Tensor]:
    """Write a LoRA of rank 3. Returns: its tensors."""
    blocks, embedder = Factors(torch.ones(3, 32), torch.ones(96, 3)), Factors(torch.ones(3, 64), torch.ones(32, 3))
    return load_file(write_lora(path, {"double_blocks.0.img_attn.qkv": blocks, "img_in": embedder}))


def test_an_alpha_alone_and_settings_that_are_none_change_nothing(tmp_path: Path, fusion: LoraFusion) -> None:
    path = tmp_path / "x.safetensors"
    tensors = good_lora(path)
    put_in(fusion, path)
    expected = state_of(fusion)

    save_file(tensors | {"final_layer.linear.alpha": torch.ones(())}, path, {"ss_network_args": "None"})
    put_in(fusion, path)

    assert_close(state_of(fusion), expected)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ({"img_in.lora_B.weight": None}, "img_in is not a whole module of a LoRA: it has only img_in.lora_A.weight"),
        ({"img_in.lora_A.weight": torch.zeros(9, 64)}, "do not match each other"),
        ({"img_in.lora_A.weight": torch.zeros(2, 64, 1)}, "img_in.lora_A.weight is [2, 64, 1], should be a matrix"),
        ({"img_in.lora_A.weight": torch.zeros(())}, "img_in.lora_A.weight is [], should be a matrix"),
        (
            {"img_in.lora_A.weight": torch.zeros(2, 384), "img_in.lora_B.weight": torch.zeros(32, 2)},
            "give shape [32, 384], but img_in.weight has [32, 64] here; it is for a variant of FLUX.1 with more input",
        ),
        ({"img_in.lora_A.weight": torch.full((3, 64), float("nan"))}, "img_in.lora_A.weight is not finite"),
        ({"img_in.lora_A.weight": torch.zeros(3, 64, dtype=torch.int8)}, "img_in.lora_A.weight (I8)"),
        ({"img_in.alpha": torch.zeros(3)}, "img_in.alpha is [3], should be one number"),
        ({"double_blocks.0.txt_attn.norm.key_norm.diff_b": torch.zeros(16)}, "which this model does not have"),
        ({"img_in.lokr_w1": torch.zeros(2, 2)}, "img_in is not a whole module of a LoRA"),
    ],
)
def test_damaged_modules_are_named(
    tmp_path: Path, fusion: LoraFusion, damage: dict[str, Tensor | None], words: str
) -> None:
    path = tmp_path / "x.safetensors"
    tensors = good_lora(path) | damage
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)

    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the words say which)
        open_lora(path, "x", fusion.shapes())
    assert words in str(caught.value)
    assert str(path) in str(caught.value)


def test_every_cut_of_a_file_is_one_clear_error(tmp_path: Path, fusion: LoraFusion) -> None:
    path = tmp_path / "x.safetensors"
    good_lora(path)
    whole = path.read_bytes()

    for tenth in range(10):
        path.write_bytes(whole[: len(whole) * tenth // 10])
        with pytest.raises(ValueError, match="cut short or damaged"):
            open_lora(path, "x", fusion.shapes())
