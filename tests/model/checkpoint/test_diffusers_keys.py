"""Checkpoint layouts: exact key lists, conversion, and one clear message for each kind of wrong file."""

from __future__ import annotations

import hashlib
import json
import pickle
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from flux_batch.errors import CheckpointError
from flux_batch.model.autoencoder import AutoEncoder
from flux_batch.model.checkpoint.checkpoint import open_checkpoint
from flux_batch.model.checkpoint.detect import CheckpointKind, detect
from flux_batch.model.checkpoint.diffusers_keys import (
    autoencoder_from_diffusers,
    autoencoder_to_diffusers,
    controlnet_to_diffusers,
    transformer_from_diffusers,
    transformer_to_diffusers,
)
from flux_batch.model.conditions.controlnet import ControlNet, ControlNetParams
from flux_batch.model.conditions.redux import Redux
from flux_batch.model.params import AUTOENCODER, DEV, SCHNELL
from flux_batch.model.transformer import Flux
from flux_batch.pipeline.model_manager import ModelManager
from flux_batch.pipeline.pipeline import FluxImagePipeline
from helpers.tiny_flux import TinyFlux, copy_repository, make_tiny_pipeline, make_tiny_repository, read_folder

State = dict[str, Tensor]
CPU = torch.device("cpu")
FILE = "flux1-tiny.safetensors"


def on_meta(make: Callable[[], nn.Module]) -> State:
    with torch.device("meta"):
        return make().state_dict()


def key_hash(state: Mapping[str, Tensor], prefix: str = "") -> str:
    """Return the md5s by which DiffSynth-Studio identifies files: of all names, with and without shapes."""
    names = [prefix + name for name in state]
    shaped = [f"{prefix}{name}:{'_'.join(map(str, value.shape))}" for name, value in state.items()]
    return hashlib.md5(",".join(sorted(names + shaped)).encode()).hexdigest()


def clip_state() -> State:
    config = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    state = on_meta(lambda: CLIPTextModel(config))
    return {f"text_model.{name.removeprefix('text_model.')}": value for name, value in state.items()}


def t5_state() -> State:
    config = T5Config(d_model=4096, d_ff=10240, d_kv=64, num_heads=64, num_layers=24, feed_forward_proj="gated-gelu")
    state = on_meta(lambda: T5EncoderModel(config))
    return {name: value for name, value in state.items() if "embed_tokens" not in name}


def net_state(depth: int, depth_single_blocks: int, num_modes: int = 0, channels: int = 64) -> State:
    """Return the keys of a published ControlNet, in the layout of diffusers."""
    flux = replace(DEV, depth=depth, depth_single_blocks=depth_single_blocks)
    params = ControlNetParams(flux=flux, condition_channels=channels, num_modes=num_modes)
    return controlnet_to_diffusers(on_meta(lambda: ControlNet(params)))


@pytest.mark.parametrize(
    ("make", "prefix", "md5"),
    [
        (lambda: on_meta(lambda: Flux(DEV)), "", "a29710fea6dddb0314663ee823598e50"),
        (lambda: on_meta(lambda: Flux(SCHNELL)), "", "57b02550baab820169365b3ee3afa2c9"),
        (lambda: on_meta(lambda: Flux(DEV)), "model.diffusion_model.", "3394f306c4cbf04334b712bf5aaed95f"),
        (lambda: transformer_to_diffusers(on_meta(lambda: Flux(DEV))), "", "605c56eab23e9e2af863ad8f0813a25d"),
        (lambda: transformer_to_diffusers(on_meta(lambda: Flux(SCHNELL))), "", "bd123e4edb902c17ec01195b6f332d91"),
        (lambda: on_meta(lambda: AutoEncoder(AUTOENCODER)), "", "21ea55f476dfc4fd135587abb59dfe5d"),
        (
            lambda: autoencoder_to_diffusers(on_meta(lambda: AutoEncoder(AUTOENCODER))),
            "",
            "1aafa3cc91716fb6b300cc1cd51b85a3",
        ),
        (clip_state, "", "94eefa3dac9cec93cb1ebaf1747d7b78"),
        (t5_state, "", "22540b49eaedbc2f2784b2091a234c7c"),
        (lambda: on_meta(lambda: Flux(replace(DEV, in_channels=384))), "", "f876d2a6fb247fb7da0f84fc7fb8a823"),
        (lambda: on_meta(lambda: Flux(replace(DEV, in_channels=128))), "", "80b22e2aff86d8ca58a6d1d96e5a9c67"),
        (lambda: on_meta(lambda: Redux(1152, 12288, 4096)), "", "d8ea4618391460bc831fddaae5fb5288"),
        (lambda: net_state(5, 10, num_modes=10), "", "78d18b9101345ff695f312e7e62538c0"),
        (lambda: net_state(6, 0), "", "43ad5aaa27dd4ee01b832ed16773fa52"),
        (lambda: net_state(5, 0), "", "b001c89139b5f053c715fe772362dd2a"),
        (lambda: net_state(6, 0, channels=68), "", "52357cb26250681367488a8954c271e8"),
        (lambda: net_state(4, 1), "", "0cfd1740758423a2a854d67c136d1e8c"),
    ],
    ids=[
        *("dev", "schnell", "dev prefixed", "dev diffusers", "schnell diffusers", "ae", "vae diffusers", "clip", "t5"),
        *("Fill", "Canny and Depth", "Redux", "Union", "Union-Pro-2.0", "Upscaler", "alimama", "Shakker Depth"),
    ],
)
def test_keys_and_shapes_are_those_of_the_published_file(make: Callable[[], State], prefix: str, md5: str) -> None:
    assert key_hash(make(), prefix) == md5


def random_state(names: Mapping[str, Tensor]) -> State:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(value.shape, generator=generator) for name, value in names.items()}


def assert_equal(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert sorted(actual) == sorted(expected)
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def test_conversion_there_and_back_is_exact(repository: Path) -> None:
    diffusers = random_state(read_folder(repository / "transformer"))
    assert_equal(transformer_to_diffusers(transformer_from_diffusers(diffusers)), diffusers)
    original = random_state(transformer_from_diffusers(diffusers))
    assert_equal(transformer_from_diffusers(transformer_to_diffusers(original)), original)
    vae = random_state(read_folder(repository / "vae"))
    assert_equal(autoencoder_to_diffusers(autoencoder_from_diffusers(vae)), vae)
    original = random_state(autoencoder_from_diffusers(vae))
    assert_equal(autoencoder_from_diffusers(autoencoder_to_diffusers(original)), original)


def test_the_last_modulation_is_swapped_and_no_other(repository: Path) -> None:
    diffusers = read_folder(repository / "transformer")
    original = transformer_from_diffusers(diffusers)
    for kind in ("weight", "bias"):
        scale, shift = diffusers[f"norm_out.linear.{kind}"].chunk(2)
        assert torch.equal(original[f"final_layer.adaLN_modulation.1.{kind}"], torch.cat((shift, scale)))
        same = original[f"double_blocks.0.img_mod.lin.{kind}"]
        assert torch.equal(same, diffusers[f"transformer_blocks.0.norm1.linear.{kind}"])


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_repository(tmp_path_factory.mktemp("tiny") / "diffusers")


@pytest.fixture(scope="module")
def original_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_repository(tmp_path_factory.mktemp("tiny") / "original", layout="original")


@pytest.fixture
def original(original_repository: Path, tmp_path: Path) -> Path:
    """A model folder in the original layout that a test may damage."""
    return copy_repository(original_repository, tmp_path / "model")


def load(path: Path | Sequence[Path]) -> Flux:
    transformer = ModelManager(torch.float32, "cpu", [path]).transformer
    assert transformer is not None
    return transformer


def rewrite(path: Path, change: Callable[[State], State]) -> None:
    save_file(change(load_file(path)), path)


def with_norms_called_weight(state: State) -> State:
    return {name.replace("_norm.scale", "_norm.weight"): value for name, value in state.items()}


def with_prefix(state: State) -> State:
    return {f"model.diffusion_model.{name}": value for name, value in state.items()}


@pytest.mark.parametrize(
    "change",
    [with_norms_called_weight, with_prefix, lambda state: with_prefix(with_norms_called_weight(state))],
    ids=["norm weights", "prefix", "both"],
)
def test_other_spellings_load_the_same_model(original: Path, change: Callable[[State], State]) -> None:
    expected = load(original / FILE).state_dict()
    rewrite(original / FILE, change)
    assert_equal(load(original / FILE).state_dict(), expected)


def test_both_layouts_load_the_same_model(repository: Path, original_repository: Path) -> None:
    ours = load(original_repository / FILE)
    assert_equal(load(repository / "transformer").state_dict(), ours.state_dict())
    assert not ours.training
    assert not any(parameter.requires_grad for parameter in ours.parameters())


def test_shards_load_with_an_index_without_one_and_as_a_list(repository: Path, tmp_path: Path) -> None:
    folder = make_tiny_repository(tmp_path / "sharded", max_shard_size="100KB") / "transformer"
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2
    expected = load(repository / "transformer").state_dict()
    assert_equal(load(folder).state_dict(), expected)
    assert_equal(load(shards).state_dict(), expected)
    (folder / "diffusion_pytorch_model.safetensors.index.json").unlink()
    assert_equal(load(folder).state_dict(), expected)
    shards[1].unlink()
    with pytest.raises(CheckpointError, match="holds several files and no index"):
        load(folder)


def test_weights_are_cast_to_the_dtype_asked_for(original: Path) -> None:
    rewrite(original / FILE, lambda state: {name: value.to(torch.float8_e4m3fn) for name, value in state.items()})
    expected = load_file(original / FILE)["img_in.weight"].to(torch.bfloat16)
    model = ModelManager(torch.bfloat16, "cpu", [original / FILE]).transformer
    assert model is not None
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.img_in.weight, expected)


# ControlNets are not part of a model repository; tests/pipeline/test_controlnets.py loads them.
@pytest.mark.parametrize("kind", [kind for kind in CheckpointKind if kind is not CheckpointKind.CONTROLNET])
def test_parts_are_detected_by_their_keys(repository: Path, original_repository: Path, kind: CheckpointKind) -> None:
    home = {
        CheckpointKind.TRANSFORMER: original_repository / FILE,
        CheckpointKind.TRANSFORMER_DIFFUSERS: repository / "transformer",
        CheckpointKind.AUTOENCODER: original_repository / "ae.safetensors",
        CheckpointKind.AUTOENCODER_DIFFUSERS: repository / "vae",
        CheckpointKind.CLIP: repository / "text_encoder",
        CheckpointKind.T5: repository / "text_encoder_2",
    }[kind]
    assert detect(open_checkpoint(home))[0] is kind


# Changes of a file, each with the text of the message beside the file's name.
DAMAGES = {
    "missing key": (
        lambda s: without(s, "single_blocks.1.linear1.bias"),
        r"1 missing \(single_blocks\.1\.linear1\.bias",
    ),
    "missing first key": (lambda s: without(s, "img_in.weight"), r"img_in\.weight is missing"),
    "extra key": (
        lambda s: s | {"double_blocks.0.more": torch.zeros(1)},
        r"1 not part of it \(double_blocks\.0\.more\)",
    ),
    "wrong shape": (
        lambda s: s | {"single_blocks.0.linear2.bias": torch.zeros(33)},
        r"single_blocks\.0\.linear2\.bias is \[33\], should be \[32\]",
    ),
    "wrong number of dimensions": (lambda s: s | {"img_in.weight": torch.zeros(32)}, r"img_in\.weight is \[32\]"),
    "integers": (lambda s: s | {"img_in.bias": torch.zeros(32, dtype=torch.int8)}, r"quantised.*img_in\.bias \(I8\)"),
    "a scale beside no fp8": (
        lambda s: s | {"img_in.scale_weight": torch.ones(())},
        r"img_in\.scale_weight scales img_in\.weight, which is not an fp8 matrix but F32",
    ),
    "another variant": (lambda s: s | {"img_in.weight": torch.zeros(32, 196)}, "196 channels .* an unknown variant"),
    "two models": (lambda s: s | {"decoder.up.0.x": torch.zeros(1)}, "several models under the same prefix"),
    "nothing known": (lambda _: {"blocks.0.weight": torch.zeros(1)}, r"not a FLUX\.1 .* keys are blocks\.0\.weight"),
    "a LoRA": (lambda _: {"lora_up.weight": torch.zeros(1)}, "is not supported: it is a LoRA, not a model"),
    "a block skipped": (
        lambda s: {name.replace("single_blocks.1.", "single_blocks.999999999."): x for name, x in s.items()},
        r"single_blocks\.1 is missing",
    ),
    "heads too large": (
        lambda s: s | {"double_blocks.0.img_attn.norm.query_norm.scale": torch.ones(64)},
        "heads of size 64 do not fit into a hidden size of 32|must be three even numbers above 0",
    ),
    "nothing": (lambda _: {}, r"not a FLUX\.1"),
}


def without(state: State, name: str) -> State:
    return {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize("damage", DAMAGES)
def test_wrong_contents_are_named_with_file_and_key(original: Path, damage: str) -> None:
    change, message = DAMAGES[damage]
    rewrite(original / FILE, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(original / FILE)
    assert str(original / FILE) in str(caught.value)


def test_wrong_contents_in_the_other_layout_are_named_by_the_keys_of_the_file(repository: Path, tmp_path: Path) -> None:
    folder = copy_repository(repository / "transformer", tmp_path / "transformer")
    path = folder / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    for change, message in (
        (
            without(state, "transformer_blocks.1.attn.to_k.weight"),
            r"missing \(transformer_blocks\.1\.attn\.to_k\.weight",
        ),
        (state | {"proj_out.scale": torch.zeros(1)}, r"not part of it \(proj_out\.scale\)"),
        (state | {"proj_out.bias": torch.zeros(63)}, r"proj_out\.bias is \[63\], should be \[64\]"),
        (state | {"x_embedder.weight": torch.zeros(32, 196)}, "196 channels .* an unknown variant"),
    ):
        save_file(change, path)
        with pytest.raises(CheckpointError, match=message):
            load(folder)


@pytest.mark.parametrize(
    "name", ["ae.safetensors", "text_encoder/model.safetensors", "text_encoder_2/model.safetensors"]
)
def test_a_key_missing_from_any_part_is_named(original: Path, name: str) -> None:
    lost = sorted(load_file(original / name))[-1]
    rewrite(original / name, lambda state: without(state, lost))
    with pytest.raises(CheckpointError) as caught:
        FluxImagePipeline.from_pretrained(original, torch.float32, "cpu")
    assert lost.removeprefix("text_model.") in str(caught.value)
    assert str((original / name).parent if "/" in name else original / name) in str(caught.value)


@pytest.mark.parametrize("tenths", range(10))
def test_a_file_cut_short_is_said_to_be_so(original: Path, tenths: int) -> None:
    data = (original / FILE).read_bytes()
    (original / FILE).write_bytes(data[: len(data) * tenths // 10])
    with pytest.raises(CheckpointError, match=r"cut short or damaged .*download it again") as caught:
        load(original / FILE)
    assert str(original / FILE) in str(caught.value)


@pytest.mark.parametrize("cut", [1, 7, 8, 9, 100, -1])
def test_a_file_cut_inside_its_header_or_by_a_byte_is_said_to_be_so(original: Path, cut: int) -> None:
    data = (original / FILE).read_bytes()
    (original / FILE).write_bytes(data[:cut])
    with pytest.raises(CheckpointError, match="cut short or damaged"):
        load(original / FILE)


def test_a_cut_file_whose_length_looks_like_a_pickle_is_not_called_one(tmp_path: Path) -> None:
    path = tmp_path / "cut.safetensors"
    path.write_bytes(struct.pack("<Q", 0x280) + b'{"img_in.weight":')
    with pytest.raises(CheckpointError, match="cut short or damaged"):
        load(path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (pickle.dumps({"img_in.weight": 1}), "is a pickle, not safetensors"),
        (b"PK\x03\x04" + b"\0" * 60, r"is a pickle \(zip\), not safetensors"),
        (b"GGUF" + b"\0" * 60, "cut short or damaged .GGUF version 0"),
        (b"<!doctype html><html>please log in</html>", "is a web page, not safetensors"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS, not safetensors"),
        (struct.pack("<Q", 2**31) + b"{" + b" " * 100, "cut short or damaged"),
        (struct.pack("<Q", 2**63 + 5) + b"{" + b" " * 100, "cut short or damaged"),
        (struct.pack("<Q", 8) + b"not json", "cut short or damaged"),
    ],
    ids=["pickle", "zip", "gguf", "html", "lfs pointer", "2 GB header", "8 EB header", "no json"],
)
def test_a_file_of_another_format_is_named(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "flux1-dev.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("ending", ["ckpt", "bin", "pt", "pth", "pkl", "CKPT", "Bin"])
def test_a_pickle_is_not_opened(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"flux.{ending}"
    torch.save({"img_in.weight": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="is a pickle, which can run any code"):
        load(path)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"x": "not-there.safetensors"}}']
)
def test_a_broken_index_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json|not-there\.safetensors is not there"):
        load(tmp_path)


def test_broken_configs_are_named(original: Path) -> None:
    config = original / "transformer" / "config.json"
    good = config.read_text()
    for text, message in (
        ("{", "not valid JSON"),
        ("[1]", "not a JSON object"),
        (json.dumps({"axes_dims_rope": [4, 6, 8]}), "which add up to the head size 16"),
        ("{}", "put a config.json with axes_dims_rope beside them"),
    ):
        config.write_text(text)
        with pytest.raises(CheckpointError, match=message):
            load(original / FILE)
    config.write_text(good)
    load(original / FILE)


def test_missing_paths_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"not-there\.safetensors is not there"):
        load(tmp_path / "not-there.safetensors")
    with pytest.raises(CheckpointError, match=r"no \.safetensors or \.gguf file in"):
        load(tmp_path)
    with pytest.raises(CheckpointError, match="empty list"):
        load([])


def test_one_tensor_in_two_files_is_refused(original: Path) -> None:
    again = original / "again.safetensors"
    save_file({"img_in.weight": torch.zeros(32, 64)}, again)
    with pytest.raises(CheckpointError, match=r"img_in\.weight is both in .*tiny\.safetensors and in .*again"):
        load([original / FILE, again])


def test_a_model_of_other_sizes_in_each_layout_is_the_same(tmp_path: Path) -> None:
    config = TinyFlux(num_heads=3, depth=1, depth_single_blocks=5, guidance_embed=False)
    state = make_tiny_pipeline(config).transformer.state_dict()
    repository = make_tiny_repository(tmp_path / "odd", config, layout="original")
    model = load(repository / FILE)
    assert (model.params.num_heads, model.params.depth, model.params.depth_single_blocks) == (3, 1, 5)
    assert_equal(transformer_to_diffusers(model.state_dict()), state)
