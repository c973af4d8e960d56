"""Models on disk: subfolders, single files of any encoding, and one file with everything."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5EncoderModel

from flux_batch.errors import CheckpointError
from flux_batch.model.checkpoint.detect import LLAMA_CPP_BLOCK_NAMES, find_parts
from flux_batch.pipeline.model_manager import ModelManager
from flux_batch.pipeline.pipeline import FluxImagePipeline
from helpers.layout_files import COMFY_PREFIX, FP8, State, gguf_round, scaled_state, write_gguf
from helpers.tiny_flux import copy_repository, make_tiny_repository

FILE = "flux1-tiny.safetensors"
T5_FILE = "text_encoder_2/model.safetensors"
CLIP_FILE = "text_encoder/model.safetensors"
SETTINGS = {"height": 32, "width": 32, "num_inference_steps": 2, "seed": 1, "output_type": "np"}


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with original single files and the text encoders of diffusers."""
    return make_tiny_repository(tmp_path_factory.mktemp("tiny") / "original", layout="original")


@pytest.fixture(scope="module")
def image(repository: Path) -> np.ndarray:
    return draw(repository)


@pytest.fixture
def model(repository: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return copy_repository(repository, tmp_path / "model")


def draw(uri: Path) -> np.ndarray:
    pipe = FluxImagePipeline.from_pretrained(uri, torch.float32, "cpu")
    image: np.ndarray = pipe("a cat", **SETTINGS)
    return image


def with_prefix(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}


def all_in_one(model: Path) -> State:
    """Return the tensors that ComfyUI saves for a whole model."""
    clip = {f"text_model.{name.removeprefix('text_model.')}": x for name, x in load_file(model / CLIP_FILE).items()}
    return {
        **with_prefix(COMFY_PREFIX, load_file(model / FILE)),
        **with_prefix("vae.", load_file(model / "ae.safetensors")),
        **with_prefix("text_encoders.clip_l.transformer.", clip),
        "text_encoders.clip_l.transformer.text_projection.weight": torch.eye(32),
        "text_encoders.clip_l.logit_scale": torch.tensor(4.6),
        **with_prefix("text_encoders.t5xxl.transformer.", load_file(model / T5_FILE)),
        "text_encoders.t5xxl.logit_scale": torch.tensor(4.6),
    }


def move_configs(model: Path, home: Path) -> None:
    """Put the configs of a tiny model, which its weights do not reveal, and tokenizers beside an all-in-one file."""
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2", "scheduler", "tokenizer", "tokenizer_2"):
        copy_repository(model / name, home / name)
        for path in (home / name).glob("*.safetensors"):
            path.unlink()


@pytest.mark.slow
def test_one_file_with_everything_draws_the_same_image(model: Path, image: np.ndarray, tmp_path: Path) -> None:
    home = tmp_path / "comfy"
    move_configs(model, home)
    path = home / "flux1-dev-fp8.safetensors"
    save_file(all_in_one(model), path)
    assert find_parts(path) == [path]
    assert np.array_equal(draw(path), image)
    # The folder of the file is a model too, and the file is read once.
    assert find_parts(home) == [path]
    assert np.array_equal(draw(home), image)


def test_one_file_without_tokenizers_says_what_belongs_beside_it(model: Path, tmp_path: Path) -> None:
    home = tmp_path / "comfy" / "checkpoints"
    home.mkdir(parents=True)
    save_file(all_in_one(model), home / "flux1-dev-fp8.safetensors")
    with pytest.raises(CheckpointError, match=r"no tokenizer: neither .*checkpoints.tokenizer nor .* put the folders"):
        draw(home / "flux1-dev-fp8.safetensors")


def test_one_file_that_lacks_a_part_says_which(model: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tiny\.safetensors holds no autoencoder and no CLIP text encoder and"):
        draw(model / FILE)


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_a_gguf_transformer_lies_beside_the_rest(model: Path, image: np.ndarray, kind: str) -> None:
    state = load_file(model / FILE)
    (model / FILE).unlink()
    path = write_gguf(state, model / "flux1-dev.gguf", kind)
    assert path in find_parts(model)
    assert np.array_equal(draw(model), image) == (kind == "F32")
    (model / "transformer").joinpath(path.name).write_bytes(path.read_bytes())
    path.unlink()
    assert model / "transformer" in find_parts(model)
    assert np.array_equal(draw(model), image) == (kind == "F32")


def llama_cpp_names(state: State) -> State:
    """Return the tensors of a T5 with llama.cpp's names."""
    hf_names = {hf: llama for llama, hf in LLAMA_CPP_BLOCK_NAMES.items()}
    renamed: State = {}
    for name, value in state.items():
        if name.startswith("encoder.block."):
            _, _, block, rest = name.split(".", 3)
            renamed[f"enc.blk.{block}.{hf_names[rest.removesuffix('.weight')]}.weight"] = value
        elif name == "encoder.final_layer_norm.weight":
            renamed["enc.output_norm.weight"] = value
        elif name == "shared.weight":
            renamed["token_embd.weight"] = value
    return renamed


def with_decoder(state: State) -> State:
    return llama_cpp_names(state) | {"dec.blk.0.attn_q.weight": torch.ones(2, 2), "output.weight": torch.ones(2, 2)}


@pytest.mark.parametrize("rename", [dict, llama_cpp_names, with_decoder], ids=["transformers", "t5encoder", "t5"])
def test_a_gguf_t5_is_read_by_either_names(model: Path, image: np.ndarray, rename: Callable[[State], State]) -> None:
    state = load_file(model / T5_FILE)
    (model / T5_FILE).unlink()
    write_gguf(rename(state), model / "t5-xxl.gguf", "F32", "t5encoder", tokens=["a", "b"])
    assert np.array_equal(draw(model), image)


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_1", "F16"])
def test_a_gguf_t5_is_what_the_package_makes_of_it(model: Path, kind: str) -> None:
    config = T5Config(
        vocab_size=50, d_model=32, d_ff=64, d_kv=8, num_heads=4, num_layers=2, feed_forward_proj="gated-gelu"
    )
    state = {name: x for name, x in T5EncoderModel(config).state_dict().items() if "embed_tokens" not in name}
    path = write_gguf(llama_cpp_names(state), model / "t5.gguf", kind, "t5encoder")
    t5 = ModelManager(torch.float32, "cpu", [path]).t5
    assert t5 is not None
    for name, value in state.items():
        assert torch.equal(t5.model.get_parameter(name), gguf_round(value, kind)), name


TEXT_ENCODERS: dict[str, tuple[str, Callable[[State], State]]] = {
    "CLIP without its prefix": (CLIP_FILE, lambda s: {k.removeprefix("text_model."): x for k, x in s.items()}),
    "CLIP with position ids": (CLIP_FILE, lambda s: s | {"text_model.embeddings.position_ids": torch.arange(77)[None]}),
    "CLIP with its projection": (CLIP_FILE, lambda s: s | {"text_projection.weight": torch.eye(32)}),
    "T5 with its table twice": (T5_FILE, lambda s: s | {"encoder.embed_tokens.weight": s["shared.weight"].clone()}),
    "T5 with its table under the other name": (
        T5_FILE,
        lambda s: {k.replace("shared", "encoder.embed_tokens"): x for k, x in s.items()},
    ),
    "autoencoder with a prefix": ("ae.safetensors", lambda s: with_prefix("first_stage_model.", s)),
}


@pytest.mark.parametrize("name", TEXT_ENCODERS)
def test_other_parts_are_read_in_every_format(model: Path, image: np.ndarray, name: str) -> None:
    file, change = TEXT_ENCODERS[name]
    save_file(change(load_file(model / file)), model / file)
    assert np.array_equal(draw(model), image)


@pytest.mark.parametrize("spelling", ["scale_weight", "weight_scale", "comfy_quant", "metadata"])
def test_a_scaled_t5_is_read(model: Path, spelling: str) -> None:
    state = load_file(model / T5_FILE)
    tables = {name: value for name, value in state.items() if "Attention.relative" in name or name == "shared.weight"}
    stored, metadata = scaled_state({name: value for name, value in state.items() if name not in tables}, spelling, FP8)
    save_file(stored | tables, model / T5_FILE, metadata)
    manager = ModelManager(torch.float32, "cpu", [model / "text_encoder_2"])
    assert manager.t5 is not None
    name = "encoder.block.1.layer.1.DenseReluDense.wo"
    scale = stored[f"{name}.{'scale_weight' if spelling == 'scale_weight' else 'weight_scale'}"]
    assert torch.equal(manager.t5.model.get_parameter(f"{name}.weight"), stored[f"{name}.weight"].float() * scale)


def test_two_files_for_one_part_are_named(model: Path) -> None:
    save_file(load_file(model / FILE), model / "again.safetensors")
    with pytest.raises(CheckpointError, match=r"several files for the transformer: again\.safetensors, flux1-tiny"):
        draw(model)
    (model / "again.safetensors").unlink()
    save_file(all_in_one(model), model / "all.safetensors")
    with pytest.raises(CheckpointError, match=r"several files for the (transformer|CLIP text encoder): .*keep one"):
        draw(model)


def test_shards_beside_the_other_files_are_asked_into_a_folder_where_they_load(model: Path, image: np.ndarray) -> None:
    state = load_file(model / FILE)
    (model / FILE).unlink()
    names = [f"flux1-{number:05d}-of-00002.safetensors" for number in (1, 2)]
    for place, name in enumerate(names):
        save_file({key: state[key] for key in sorted(state)[place::2]}, model / name)
    with pytest.raises(CheckpointError, match=r"put the shards of a model into a folder transformer$"):
        draw(model)
    for name in names:
        (model / name).rename(model / "transformer" / name)
    assert np.array_equal(draw(model), image)


def test_single_files_beside_component_folders_are_ignored(model: Path, image: np.ndarray) -> None:
    """The official repositories have the transformer in both layouts."""
    (model / "transformer" / "model.safetensors").write_bytes((model / FILE).read_bytes())
    assert model / FILE not in find_parts(model)
    assert np.array_equal(draw(model), image)


def test_files_of_other_models_are_left_alone_and_named_if_a_part_is_missing(model: Path, image: np.ndarray) -> None:
    save_file({"lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": torch.ones(1)}, model / "style.safetensors")
    assert np.array_equal(draw(model), image)
    (model / "ae.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"no autoencoder: looked for .*style\.safetensors is not supported: it is"
    ):
        draw(model)


def test_a_sub_folder_of_pickles_is_refused_by_name(model: Path) -> None:
    (model / T5_FILE).rename(model / "text_encoder_2" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"no \.safetensors or .*text_encoder_2, only pytorch_model\.bin"):
        draw(model)


def test_gguf_weights_are_rounded_as_the_package_does(model: Path) -> None:
    state = load_file(model / FILE)
    path = write_gguf(state, model / "transformer" / "x.gguf", "Q4_0")
    transformer = ModelManager(torch.bfloat16, "cpu", [path]).transformer
    assert transformer is not None
    for name, value in transformer.state_dict().items():
        assert torch.equal(value, gguf_round(state[name], "Q4_0").bfloat16()), name
