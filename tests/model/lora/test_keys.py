"""The weights that the keys of a LoRA name, and the errors for unknown keys."""

from __future__ import annotations

import pytest

from flux_batch.model.lora.keys import Target, find_modules

HIDDEN = 3072
TRANSFORMER = {
    "img_in.weight": (HIDDEN, 64),
    "double_blocks.0.img_attn.qkv.weight": (3 * HIDDEN, HIDDEN),
    "double_blocks.0.img_attn.norm.key_norm.scale": (128,),
    "double_blocks.0.txt_mlp.2.weight": (HIDDEN, 4 * HIDDEN),
    "single_blocks.0.linear1.weight": (7 * HIDDEN, HIDDEN),
    "single_blocks.0.linear2.weight": (HIDDEN, 5 * HIDDEN),
    "final_layer.adaLN_modulation.1.weight": (2 * HIDDEN, HIDDEN),
}
PARTS = {
    "transformer": TRANSFORMER,
    "clip": {"encoder.layers.0.mlp.fc1.weight": (3072, 768)},
    "t5": {"encoder.block.0.layer.0.SelfAttention.q.weight": (4096, 4096)},
}
QKV, LINEAR1 = "double_blocks.0.img_attn.qkv", "single_blocks.0.linear1"
THIRDS = (HIDDEN, HIDDEN, HIDDEN)


@pytest.mark.parametrize(
    ("stem", "target"),
    [
        ("lora_unet_double_blocks_0_img_attn_qkv", Target("transformer", QKV, pieces=THIRDS)),
        ("model.diffusion_model.double_blocks.0.img_attn.qkv", Target("transformer", QKV, pieces=THIRDS)),
        ("double_blocks.0.processor.qkv_lora1", Target("transformer", QKV)),
        ("transformer.transformer_blocks.0.attn.to_v", Target("transformer", QKV, (2 * HIDDEN, 3 * HIDDEN))),
        ("lora_transformer_transformer_blocks_0_attn_to_q", Target("transformer", QKV, (0, HIDDEN))),
        (
            "base_model.model.single_transformer_blocks.0.proj_mlp",
            Target("transformer", LINEAR1, (3 * HIDDEN, 7 * HIDDEN)),
        ),
        ("single_blocks.0.processor.qkv_lora", Target("transformer", LINEAR1, (0, 3 * HIDDEN))),
        ("lora_unet_single_blocks_0_linear1", Target("transformer", LINEAR1, pieces=(*THIRDS, 4 * HIDDEN))),
        ("single_blocks.0.proj_out", Target("transformer", "single_blocks.0.linear2")),
        ("transformer.single_transformer_blocks.0.proj_out", Target("transformer", "single_blocks.0.linear2")),
        ("transformer.norm_out.linear", Target("transformer", "final_layer.adaLN_modulation.1", swaps_halves=True)),
        ("lora_unet_final_layer_adaLN_modulation_1", Target("transformer", "final_layer.adaLN_modulation.1")),
        ("lora_unet_double_blocks_0_txt_mlp_2", Target("transformer", "double_blocks.0.txt_mlp.2")),
        # OMI's names.
        ("transformer.double_blocks.0.img_attn.qkv.1", Target("transformer", QKV, (HIDDEN, 2 * HIDDEN))),
        ("transformer.single_blocks.0.linear1.3", Target("transformer", LINEAR1, (3 * HIDDEN, 7 * HIDDEN))),
        ("transformer.img_in.proj", Target("transformer", "img_in")),
        ("clip_l.text_model.encoder.layers.0.mlp.fc1", Target("clip", "encoder.layers.0.mlp.fc1")),
        ("t5.encoder.block.0.layer.0.SelfAttention.q", Target("t5", "encoder.block.0.layer.0.SelfAttention.q")),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1", Target("clip", "encoder.layers.0.mlp.fc1")),
        ("lora_te3_encoder_block_0_layer_0_SelfAttention_q", Target("t5", "encoder.block.0.layer.0.SelfAttention.q")),
    ],
)
def test_a_stem_means_rows_of_a_layer(stem: str, target: Target) -> None:
    (module,) = find_modules("x", [f"{stem}.lora_up.weight", f"{stem}.lora_down.weight", f"{stem}.alpha"], PARTS)

    assert module.target == target
    assert set(module.keys) == {"up", "down", "alpha"}


def test_keys_that_match_nothing_are_listed_and_counted() -> None:
    stems = ["lora_unet_double_blocks_1_img_attn_qkv", "lora_unet_input_blocks_1_1_proj_in", QKV]
    keys = [f"{stem}.lora_{half}.weight" for stem in stems for half in ("up", "down")]

    with pytest.raises(ValueError, match="x: 4 of its 6 keys match nothing in this model's transformer or clip or t5"):
        find_modules("x", keys, PARTS)
    with pytest.raises(ValueError, match=r"lora_unet_double_blocks_1_img_attn_qkv\.lora_down\.weight, .* and 1 more$"):
        find_modules("x", keys, PARTS)


CLIP_FC1 = "text_model_encoder_layers_0_mlp_fc1"


@pytest.mark.parametrize(
    "stems",
    [
        ["lora_unet_input_blocks_1_1_proj_in"],
        # SDXL also has CLIP, and a second, larger one.
        ["lora_unet_input_blocks_1_1_proj_in", f"lora_te1_{CLIP_FC1}", f"lora_te2_{CLIP_FC1}"],
        ["unet.down_blocks.1.attentions.0.proj_in", "text_encoder.text_model.encoder.layers.0.mlp.fc1"],
        # FLUX.2 and Chroma have blocks of the same names.
        ["diffusion_model.double_stream_modulation_img.lin", "diffusion_model.double_blocks.0.img_attn.qkv"],
        ["diffusion_model.distilled_guidance_layer.in_proj", "diffusion_model.double_blocks.0.img_attn.qkv"],
    ],
)
def test_a_file_for_another_model_is_guessed_to_be_so(stems: list[str]) -> None:
    keys = [f"{stem}.lora_{half}.weight" for stem in stems for half in ("up", "down")]

    with pytest.raises(ValueError, match=rf"x: 2 of its {len(keys)} keys .* is it for another model\?$"):
        find_modules("x", keys, PARTS)


def test_a_file_for_this_model_is_not_taken_for_another() -> None:
    stems = [QKV, "double_blocks.19.img_attn.qkv"]
    keys = [f"{stem}.lora_{half}.weight" for stem in stems for half in ("up", "down")]

    with pytest.raises(ValueError, match=r"2 of its 4 keys .*lora_up\.weight$"):
        find_modules("x", keys, PARTS)


def test_a_part_that_is_not_loaded_is_not_matched() -> None:
    key = "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight"

    with pytest.raises(ValueError, match="1 of its 1 keys match nothing in this model's transformer: lora_te1"):
        find_modules("x", [key], {"transformer": TRANSFORMER})


def test_layers_that_flux_does_not_compute_are_skipped() -> None:
    keys = [f"lora_te1_text_projection.{ending}" for ending in ("lora_up.weight", "lora_down.weight", "alpha")]

    assert find_modules("x", [*keys, "text_encoders.clip_l.transformer.text_projection.lora_up.weight"], PARTS) == []


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("diffusion_model.img_in.reshape_weight", "control LoRA of FLUX.1"),
        ("lora_unet_double_blocks_0_img_attn_qkv.oft_blocks", "of the kind OFT"),
        ("lora_unet_double_blocks_0_img_attn_qkv.a1.weight", "of the kind GLoRA"),
        ("lora_unet_double_blocks_0_img_attn_qkv.lokr_t2", "made for convolutions"),
        ("bundle_emb.token.string_to_param.*", "textual inversion"),
    ],
)
def test_unsupported_kinds_are_named(key: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        find_modules("x", [f"{QKV}.lora_A.weight", f"{QKV}.lora_B.weight", key], PARTS)


def test_a_model_is_no_lora() -> None:
    with pytest.raises(ValueError, match="x is not a LoRA: its keys are double_blocks"):
        find_modules("x", TRANSFORMER, PARTS)
    with pytest.raises(ValueError, match="x is not a LoRA: its keys are none"):
        find_modules("x", [], PARTS)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (f"{QKV}.lora_A.weight", f"{QKV}.lora_A.default.weight"),
        # Adapters are merged one by one, each with its own scale.
        (f"{QKV}.lora_A.cat.weight", f"{QKV}.lora_A.dog.weight"),
        (f"{QKV}.lora_A.weight", "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"),
        ("transformer_blocks.0.attn.to_q.lora_B.weight", "transformer.transformer_blocks.0.attn.to_q.lora_B.weight"),
        ("transformer_blocks.0.attn.to_q.alpha", f"{QKV}.0.alpha"),
    ],
)
def test_a_module_twice_is_an_error(one: str, other: str) -> None:
    with pytest.raises(ValueError, match="x gives the same weight twice: ") as caught:
        find_modules("x", [one, other], PARTS)
    assert one in str(caught.value)
    assert other in str(caught.value)
