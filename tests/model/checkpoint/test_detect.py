"""Every layout: recognised by its keys, read with the right values, and told from files that are not FLUX.1."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from flux_batch.model.checkpoint.checkpoint import open_checkpoint, read_config
from flux_batch.model.checkpoint.detect import CheckpointKind, detect, from_llama_cpp, parts_of, refuse_unsupported
from flux_batch.model.checkpoint.loading import load_transformer
from helpers.layout_files import (
    COMFY_PREFIX,
    EXACT,
    LAYOUTS,
    State,
    coarse_state,
    others,
    prefixed,
    save,
    scaled_state,
)
from helpers.tiny_flux import make_tiny_repository

CPU = torch.device("cpu")


def load(path: Path) -> State:
    """Return the weights of the transformer in a file or folder by our names, in fp32."""
    for layout, checkpoint in parts_of(open_checkpoint(path)).items():
        if layout.part == "transformer":
            config = read_config(checkpoint.folder, "transformer")
            return load_transformer(checkpoint, layout, config, dtype=torch.float32, device=CPU).state_dict()
    raise AssertionError(f"no transformer in {path}")


def assert_equal(actual: State, expected: State) -> None:
    assert sorted(actual) == sorted(expected)
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


@pytest.fixture(scope="module")
def read_from(tmp_path_factory: pytest.TempPathFactory) -> dict[str, State]:
    """Return the tensors read from each layout, all written from the same weights."""
    state, read = coarse_state(), {}
    for name, layout in LAYOUTS.items():
        read[name] = load(layout.write(state, tmp_path_factory.mktemp("first") / "model"))
        assert_equal(read[name], state if name in EXACT else layout.encode(state))
    return read


@pytest.mark.slow
@pytest.mark.parametrize("second", LAYOUTS)
def test_going_from_any_layout_to_any_other_is_exact(read_from: dict[str, State], second: str, tmp_path: Path) -> None:
    # The fixture has asserted that all exact layouts give the same tensors.
    for first in ("original fp32", *(name for name in LAYOUTS if name not in EXACT)):
        there = load(LAYOUTS[second].write(read_from[first], tmp_path / first))
        assert_equal(there, LAYOUTS[second].encode(read_from[first]))
        if first in EXACT and second in EXACT:
            assert_equal(there, read_from[first])


@pytest.mark.parametrize("seed", range(1, 4))
def test_parts_of_an_all_in_one_file_are_separated(tmp_path: Path, seed: int) -> None:
    path = save(prefixed(coarse_state(seed)) | others(), tmp_path)
    parts = parts_of(open_checkpoint(path))
    assert {layout.part for layout in parts} == {"transformer", "autoencoder", "clip", "t5"}
    assert set(parts[CheckpointKind.CLIP].tensors) == {"embeddings.token_embedding.weight"}
    assert set(parts[CheckpointKind.T5].tensors) == {"encoder.block.0.layer.0.layer_norm.weight"}
    with pytest.raises(ValueError, match=r"holds several parts: .*transformer"):
        detect(open_checkpoint(path))


def test_parts_scaled_and_not_lie_in_one_file(tmp_path: Path) -> None:
    kind = torch.float8_e4m3fn
    plain = {name: value.to(kind) for name, value in prefixed(coarse_state()).items()}
    t5, _ = scaled_state({"encoder.block.0.layer.0.SelfAttention.q.weight": torch.ones(2, 2)}, "comfy_quant", kind)
    t5 = {f"text_encoders.t5xxl.transformer.{name}": value for name, value in t5.items()}
    parts = parts_of(open_checkpoint(save(plain | t5, tmp_path)))
    assert parts[CheckpointKind.TRANSFORMER].tensors["img_in.weight"].scale is None
    assert parts[CheckpointKind.T5].tensors["encoder.block.0.layer.0.SelfAttention.q.weight"].scale is not None


def test_markers_without_prefix_belong_to_their_part(tmp_path: Path) -> None:
    stored, _ = scaled_state(prefixed(coarse_state()), "scale_weight", torch.float8_e4m3fn)
    marker = stored.pop(f"{COMFY_PREFIX}scaled_fp8")
    assert_equal(load(save(stored | {"scaled_fp8": marker}, tmp_path)), coarse_state())
    clip = {"text_model.embeddings.token_embedding.weight": torch.ones(2, 2), "text_projection.weight": torch.ones(2)}
    layout, checkpoint = detect(open_checkpoint(save(clip, tmp_path, name="clip.safetensors")))
    assert (layout, set(checkpoint.tensors)) == (CheckpointKind.CLIP, {"embeddings.token_embedding.weight"})


def test_a_key_with_and_without_prefix_is_refused(tmp_path: Path) -> None:
    state = coarse_state()
    one = {"img_in.bias": torch.zeros(32)}
    path = save(prefixed(state) | one, tmp_path)
    message = r"holds img_in\.bias twice, as img_in\.bias and model\.diffusion_model\.img_in\.bias: keep one"
    with pytest.raises(ValueError, match=message):
        parts_of(open_checkpoint(path))
    path = save(state | prefixed(one), tmp_path)
    with pytest.raises(ValueError, match=message):
        parts_of(open_checkpoint(path))
    path = save(state | prefixed(coarse_state()), tmp_path)
    with pytest.raises(ValueError, match=r"holds .* twice"):
        parts_of(open_checkpoint(path))


def test_a_norm_in_both_spellings_is_refused(tmp_path: Path) -> None:
    name = "double_blocks.0.img_attn.norm.query_norm"
    path = save(coarse_state() | {f"{name}.weight": torch.ones(16)}, tmp_path)
    with pytest.raises(ValueError, match=rf"holds {name}\.scale twice, as {name}\.scale and {name}\.weight"):
        parts_of(open_checkpoint(path))


FLUX_KEY = "double_blocks.0.img_attn.qkv.weight"
# Unsupported files: a key of such a file, also with FLUX.1's keys if it has them, and the error message.
FOREIGN = {
    "NF4": (f"{FLUX_KEY}.quant_state.bitsandbytes__nf4", "bitsandbytes"),
    "FP4": (f"{COMFY_PREFIX}{FLUX_KEY}.quant_state.bitsandbytes__fp4", "bitsandbytes"),
    "LLM.int8": ("transformer_blocks.0.attn.to_q.SCB", "bitsandbytes"),
    "Nunchaku": ("transformer_blocks.0.mlp_fc1.wscales", "Nunchaku"),
    "GPTQ": ("transformer_blocks.0.attn.to_q.qweight", "quantised in an unknown way"),
    "quanto": ("transformer_blocks.0.attn.to_q.weight._data", "quantised in an unknown way"),
    "DFloat11": ("double_blocks.0.encoded_exponent", "quantised in an unknown way"),
    "LoRA of PEFT": ("transformer.transformer_blocks.0.attn.to_q.lora_A.weight", "a LoRA, not a model"),
    "LoRA of kohya": ("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", "a LoRA"),
    "LoRA of a text encoder": ("lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha", "a LoRA"),
    "LoRA of XLabs": ("double_blocks.0.processor.qkv_lora1.down.weight", "a LoRA"),
    "LoKr": ("lycoris_double_blocks_0_img_attn_qkv.lokr_w1", "a LoRA"),
    "control LoRA": ("double_blocks.0.img_attn.qkv.lora_B.bias", "a LoRA"),
    "MistoLine": ("controlnet_blocks.0.linear.weight", "MistoLine's kind of ControlNet"),
    "ControlNet of SDXL": ("controlnet_down_blocks.0.weight", "a ControlNet of Stable Diffusion"),
    "Redux": ("redux_up.weight", "FLUX.1-Redux"),
    "IP-Adapter": ("double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight", "an IP-Adapter"),
    "FLUX.2": ("double_stream_modulation_img.lin.weight", r"it is FLUX\.2"),
    "FLUX.2 of diffusers": ("single_stream_modulation.linear.weight", r"it is FLUX\.2"),
    "autoencoder of FLUX.2": ("bn.running_mean", r"it is FLUX\.2"),
    "Chroma": ("distilled_guidance_layer.in_proj.weight", "it is Chroma"),
    "SD3": (f"{COMFY_PREFIX}joint_blocks.0.x_block.attn.qkv.weight", "Stable Diffusion 3"),
    "SDXL": (f"{COMFY_PREFIX}input_blocks.0.0.weight", "SDXL"),
    "SD of diffusers": ("down_blocks.0.resnets.0.conv1.weight", "Stable Diffusion"),
}


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("beside", [True, False], ids=["beside FLUX.1's keys", "alone"])
def test_unsupported_kinds_are_named(tmp_path: Path, kind: str, beside: bool) -> None:
    key, message = FOREIGN[kind]
    state: dict[str, Tensor] = {FLUX_KEY: torch.ones(2, 2)} if beside else {}
    path = save(state | {key: torch.ones(2)}, tmp_path, name="flux1-dev.safetensors")
    with pytest.raises(ValueError, match=rf"flux1-dev\.safetensors is not supported: .*{message}"):
        parts_of(open_checkpoint(path))


def test_keys_of_flux_are_not_taken_for_others(tmp_path: Path) -> None:
    repository = make_tiny_repository(tmp_path / "diffusers")
    original = make_tiny_repository(tmp_path / "original", layout="original")
    folders = [repository / name for name in ("transformer", "vae", "text_encoder", "text_encoder_2")]
    for path in (*folders, original / "flux1-tiny.safetensors", original / "ae.safetensors"):
        refuse_unsupported(open_checkpoint(path))


def test_parts_under_the_prefix_of_another_are_refused(tmp_path: Path) -> None:
    path = save({f"vae.{FLUX_KEY}": torch.ones(2, 2)}, tmp_path)
    with pytest.raises(ValueError, match="keys of the transformer where those of the autoencoder should be"):
        parts_of(open_checkpoint(path))
    path = save({FLUX_KEY: torch.ones(2, 2), "decoder.up.0.x": torch.ones(2)}, tmp_path)
    with pytest.raises(ValueError, match="several models under the same prefix"):
        parts_of(open_checkpoint(path))


def test_keys_of_no_known_part_beside_one_are_refused(tmp_path: Path) -> None:
    path = save(prefixed(coarse_state()) | {"text_encoders.llama.x": torch.ones(1)}, tmp_path)
    with pytest.raises(ValueError, match=r"its keys are text_encoders\.llama\.x"):
        parts_of(open_checkpoint(path))


def test_names_of_llama_cpp_are_those_of_transformers() -> None:
    assert from_llama_cpp("enc.blk.11.attn_rel_b.weight") == (
        "encoder.block.11.layer.0.SelfAttention.relative_attention_bias.weight"
    )
    assert from_llama_cpp("enc.output_norm.weight") == "encoder.final_layer_norm.weight"
    assert from_llama_cpp("token_embd.weight") == "shared.weight"
    assert from_llama_cpp("dec.blk.0.attn_q.weight") is None
    assert from_llama_cpp("enc.blk.0.something.weight") == "enc.blk.0.something.weight"
