"""Fused LoRAs compared with diffusers and PEFT, where these are correct."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from flux_batch.model.checkpoint.diffusers_keys import transformer_from_diffusers, transformer_to_diffusers
from flux_batch.model.lora.fusion import LoraFusion
from flux_batch.model.transformer import Flux
from helpers.lora_files import (
    DIFFUSERS_NAMES,
    ORIGINAL_NAMES,
    assert_close,
    matrices,
    put_in,
    random_factors,
    state_of,
    write_lora,
)


def in_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return transformer_to_diffusers({name: value.double() for name, value in state.items()})


@pytest.fixture
def reference(repository: Path) -> FluxPipeline:
    return FluxPipeline.from_pretrained(repository, dtype=torch.float32)


def fused_by_diffusers(reference: FluxPipeline, path: Path, scale: float) -> dict[str, Tensor]:
    """Return the transformer, in the original layout, after diffusers has merged a LoRA."""
    reference.load_lora_weights(str(path.parent), weight_name=path.name)
    reference.fuse_lora(lora_scale=scale)
    reference.unload_lora_weights()
    return transformer_from_diffusers(reference.transformer.state_dict())


def of_double_blocks(shapes: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    return {name: shape for name, shape in shapes.items() if name.startswith("double_blocks.")}


@pytest.mark.parametrize("family", ["diffusers", "onetrainer"])
def test_equal_to_diffusers(tmp_path: Path, fusion: LoraFusion, reference: FluxPipeline, family: str) -> None:
    names = matrices(in_diffusers(state_of(fusion)))
    blocks = {name: shape for name, shape in names.items() if ".attn." in name or name == "x_embedder"}
    # diffusers' OneTrainer conversion requires an alpha for every module.
    modules = random_factors(blocks, seed=8, alphas=(None,) if family == "diffusers" else (2.0, 8.0))
    path = write_lora(tmp_path / "lora.safetensors", modules, **DIFFUSERS_NAMES[family])

    put_in(fusion, path, 0.6)

    assert_close(state_of(fusion), fused_by_diffusers(reference, path, 0.6))


def test_equal_to_diffusers_on_kohyas_files(tmp_path: Path, fusion: LoraFusion, reference: FluxPipeline) -> None:
    shapes = of_double_blocks(matrices(state_of(fusion)))  # diffusers converts single blocks only at full size
    modules = random_factors(shapes, seed=9, alphas=(None, 1.0, 4.0, 16.0))
    path = write_lora(tmp_path / "lora.safetensors", modules, **ORIGINAL_NAMES["kohya"])

    put_in(fusion, path, 0.9)

    assert_close(state_of(fusion), fused_by_diffusers(reference, path, 0.9))


def test_equal_to_diffusers_on_xlabs_files(tmp_path: Path, fusion: LoraFusion, reference: FluxPipeline) -> None:
    shapes = {"double_blocks.0.processor.qkv_lora1": (96, 32), "double_blocks.1.processor.proj_lora2": (32, 32)}
    shapes |= {"single_blocks.1.processor.qkv_lora": (96, 32), "single_blocks.0.processor.proj_lora": (32, 160)}
    path = write_lora(tmp_path / "x.safetensors", random_factors(shapes), down="down.weight", up="up.weight")

    put_in(fusion, path)

    assert_close(state_of(fusion), fused_by_diffusers(reference, path, 1.0))


def test_equal_to_diffusers_on_text_encoders(tmp_path: Path, fusion: LoraFusion, reference: FluxPipeline) -> None:
    shapes = {f"text_model.encoder.layers.{i}.self_attn.{name}_proj": (32, 32) for i in range(2) for name in "qkv"}
    path = write_lora(tmp_path / "x.safetensors", random_factors(shapes, seed=10), prefix="text_encoder.")

    put_in(fusion, path, 0.5)
    reference.load_lora_weights(str(tmp_path), weight_name=path.name)
    reference.fuse_lora(components=["text_encoder"], lora_scale=0.5)
    reference.unload_lora_weights()

    assert_close(state_of(fusion, "clip"), reference.text_encoder.state_dict())


def test_metadata_of_diffusers_states_alphas(tmp_path: Path, fusion: LoraFusion, reference: FluxPipeline) -> None:
    config = LoraConfig(
        r=4,
        lora_alpha=10,
        target_modules=["to_q", "to_out.0", "proj_mlp"],
        alpha_pattern={"proj_mlp": 3},
        rank_pattern={"proj_mlp": 2},
        use_rslora=True,
        init_lora_weights=False,
    )
    reference.transformer.add_adapter(config)
    reference.save_lora_weights(
        tmp_path,
        transformer_lora_layers={
            name.replace(".default", ""): value
            for name, value in reference.transformer.state_dict().items()
            if "lora_" in name
        },
        transformer_lora_adapter_metadata=config.to_dict(),
    )
    reference.unload_lora_weights()
    path = tmp_path / "pytorch_lora_weights.safetensors"

    put_in(fusion, path, 0.7)

    assert_close(state_of(fusion), fused_by_diffusers(reference, path, 0.7))


@pytest.mark.filterwarnings("ignore:Adapter 'default'")  # PEFT's warning, which takes a bias for a damaged matrix
@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}, {"lora_alpha": 9}, {"use_rslora": True}])
def test_equal_to_peft(tmp_path: Path, fusion: LoraFusion, options: dict[str, object]) -> None:
    before = state_of(fusion)
    plain = Flux(fusion.parts["transformer"].params)
    plain.load_state_dict(before)
    targets = [f"double_blocks.{i}.{name}" for i in range(2) for name in ("img_attn.qkv", "txt_mlp.2")]
    settings = {"r": 3, "lora_alpha": 2, "target_modules": targets, "init_lora_weights": False, **options}
    torch.manual_seed(0)
    wrapped = get_peft_model(plain, LoraConfig(**settings))
    for name, value in wrapped.named_parameters():
        if "magnitude" in name or "lora_B" in name:
            nn.init.normal_(value, mean=1.0)
    wrapped.save_pretrained(tmp_path)

    put_in(fusion, tmp_path / "adapter_model.safetensors")

    assert_close(state_of(fusion), wrapped.merge_and_unload().state_dict())
