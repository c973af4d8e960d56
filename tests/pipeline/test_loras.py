"""LoRAs from addresses, in the manager and the pipeline, and their effect on images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flux_batch import FluxImagePipeline, ModelManager
from flux_batch.errors import CheckpointError, InvalidSetting
from flux_batch.pipeline.loras import LoadedLoras
from helpers.lora_files import random_factors, write_lora
from helpers.s3 import S3Server
from helpers.tiny_flux import TinyFlux, make_tiny_repository

CALL: dict[str, Any] = {
    "prompt": ["a cat", "a dog"],
    "seed": [1, 2],
    "height": 32,
    "width": 48,
    "num_inference_steps": 2,
    "output_type": "np",
}
SHAPES = {"lora_unet_double_blocks_0_img_attn_qkv": (96, 32), "lora_unet_single_blocks_1_linear2": (32, 160)}
TEXT_SHAPES = {
    "lora_te1_text_model_encoder_layers_1_mlp_fc1": (64, 32),
    "lora_te3_encoder_block_0_layer_1_DenseReluDense_wi_0": (48, 24),
}
KOHYA = {"down": "lora_down.weight", "up": "lora_up.weight"}


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_repository(tmp_path_factory.mktemp("models") / "tiny", TinyFlux(seed=11))


@pytest.fixture
def pipe(repository: Path) -> FluxImagePipeline:
    return FluxImagePipeline.from_pretrained(repository, torch_dtype=torch.float32, device="cpu")


@pytest.fixture
def style(tmp_path: Path) -> Path:
    return write_lora(tmp_path / "style.safetensors", random_factors(SHAPES, seed=1), **KOHYA)


@pytest.fixture
def words(tmp_path: Path) -> Path:
    """A LoRA of both text encoders."""
    return write_lora(tmp_path / "words.safetensors", random_factors(TEXT_SHAPES, seed=2), **KOHYA)


def same(a: Any, b: Any) -> bool:
    return all(np.array_equal(one, other) for one, other in zip(a, b, strict=True))


def test_images_with_and_without(pipe: FluxImagePipeline, style: Path, words: Path) -> None:
    plain = pipe(**CALL)

    pipe.load_lora(style, 0.8)
    with_style = pipe(**CALL)
    pipe.load_lora(str(words))
    with_both = pipe(**CALL)
    assert pipe.loras.fused == [(str(style), 0.8), (str(words), 1.0)]
    pipe.set_loras([(style, 0.8)])
    assert same(pipe(**CALL), with_style)
    pipe.set_loras([(words, 1.0), (style, 0.8)])
    assert same(pipe(**CALL), with_both)
    pipe.unload_loras()

    assert same(pipe(**CALL), plain)
    assert not same(with_style, plain)
    assert not same(with_both, with_style)
    assert pipe.loras.fused == []


def test_the_manager_takes_what_scripts_for_diffsynth_say(repository: Path, style: Path, words: Path) -> None:
    manager = ModelManager(torch.float32, "cpu")
    folders = ["transformer", "text_encoder", "text_encoder_2", "vae"]
    manager.load_models([repository / folder for folder in folders])
    manager.load_lora([str(style), str(words)], lora_alpha=0.5)
    pipe = FluxImagePipeline.from_model_manager(manager)
    found = pipe(**CALL)

    other = FluxImagePipeline.from_pretrained(repository, torch_dtype=torch.float32, device="cpu")
    plain = other(**CALL)
    other.set_loras([(style, 0.5), (words, 0.5)])
    assert same(found, other(**CALL))
    pipe.unload_loras()
    assert same(pipe(**CALL), plain)


@pytest.mark.parametrize("quantization", ["fp8", "fp8_matmul"])
def test_over_fp8(repository: Path, style: Path, words: Path, quantization: str) -> None:
    pipe = FluxImagePipeline.from_pretrained(repository, device="cpu", quantization=quantization)  # type: ignore[arg-type]
    plain = pipe(**CALL)

    pipe.set_loras([(style, 1.0), (words, 1.0)])
    assert not same(pipe(**CALL), plain)
    pipe.unload_loras()

    assert same(pipe(**CALL), plain)


def test_under_autocast_they_are_fused_and_texts_encoded_as_without(
    pipe: FluxImagePipeline, style: Path, words: Path
) -> None:
    pipe.set_loras([(style, 1.0), (words, 0.5)])
    weights, embeds = pipe.transformer.state_dict(), pipe.encode_prompt("a cat")
    pipe.unload_loras()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pipe.set_loras([(style, 1.0), (words, 0.5)])
        again = pipe.encode_prompt(["a dog", "a cat"])
    assert all(torch.equal(weight, weights[name]) for name, weight in pipe.transformer.state_dict().items())
    pipe.set_loras([(style, 0.5), (words, 0.5)])  # the embeddings of other LoRAs are encoded anew
    assert torch.equal(again[0][1:], embeds[0])
    assert torch.equal(again[0], pipe.encode_prompt(["a dog", "a cat"])[0])


@pytest.mark.parametrize("quantization", ["none", "fp8"])
def test_a_model_loaded_in_inference_mode_takes_them_outside(repository: Path, style: Path, quantization: str) -> None:
    with torch.inference_mode():
        pipe = FluxImagePipeline.from_pretrained(repository, device="cpu", quantization=quantization)  # type: ignore[arg-type]
        plain = pipe(**CALL)

    pipe.set_loras([(style, 1.0)])
    assert not same(pipe(**CALL), plain)
    pipe.unload_loras()

    assert same(pipe(**CALL), plain)


def test_a_file_that_is_written_anew_is_read_anew(repository: Path, pipe: FluxImagePipeline, words: Path) -> None:
    """As by a training that keeps its last LoRA under one name."""
    pipe.set_loras([(words, 1.0)])
    before = pipe(**CALL)
    write_lora(words, random_factors(TEXT_SHAPES, seed=3), **KOHYA)
    pipe.set_loras([(words, 1.0)])
    after = pipe(**CALL)
    other = FluxImagePipeline.from_pretrained(repository, torch_dtype=torch.float32, device="cpu")
    other.load_lora(words)
    assert not same(after, before)
    assert same(after, other(**CALL))


def test_what_fails_leaves_what_was_merged(pipe: FluxImagePipeline, style: Path, tmp_path: Path) -> None:
    pipe.load_lora(style)
    before = pipe(**CALL)
    other = write_lora(tmp_path / "other.safetensors", random_factors({"lora_unet_input_blocks_1": (8, 8)}), **KOHYA)

    for bad in (tmp_path / "nothing.safetensors", other):
        with pytest.raises(CheckpointError, match=bad.name):
            pipe.load_lora(bad)
        with pytest.raises(CheckpointError):
            pipe.set_loras([(style, 0.1), (bad, 1.0)])

    assert same(pipe(**CALL), before)
    assert pipe.loras.fused == [(str(style), 1.0)]


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "1", None, True])
def test_a_scale_must_be_a_number(pipe: FluxImagePipeline, style: Path, scale: Any) -> None:
    with pytest.raises(InvalidSetting, match="scale = "):
        pipe.load_lora(style, scale)


def test_without_a_model_there_is_nothing_to_fuse_them_into(style: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no model yet to fuse a LoRA into; load its parts first"):
        ModelManager(torch.float32, "cpu").load_lora(style)


def test_loras_are_pairs(pipe: FluxImagePipeline, style: Path) -> None:
    with pytest.raises(InvalidSetting, match=r"must be pairs of an address and a scale: \[\(path, 1.0\)\]"):
        pipe.set_loras([str(style)])  # type: ignore[list-item]


def test_pickles_are_refused(pipe: FluxImagePipeline, tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(b"PK\3\4")

    with pytest.raises(CheckpointError, match="is a pickle, which can run any code"):
        pipe.load_lora(tmp_path / "x.pt")


@pytest.mark.s3
def test_a_lora_in_a_bucket_is_fetched_once(
    repository: Path, style: Path, moto: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    monkeypatch.setenv("FLUX_BATCH_CACHE", str(tmp_path / "cache"))
    uri = f"{moto.make_bucket()}/loras/style.safetensors"
    fs = s3fs.S3FileSystem(**moto.storage_options)
    fs.put(str(style), uri)
    pipe = FluxImagePipeline.from_pretrained(
        repository, torch_dtype=torch.float32, device="cpu", storage_options=moto.storage_options
    )

    pipe.load_lora(uri, 0.7)
    found = pipe(**CALL)
    fs.rm(uri)
    pipe.set_loras([(uri, 0.7)])

    assert same(pipe(**CALL), found)
    pipe.set_loras([(style, 0.7)])
    assert same(pipe(**CALL), found)


@pytest.mark.s3
def test_what_peft_says_beside_a_file_is_fetched_with_it(
    pipe: FluxImagePipeline, moto: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    monkeypatch.setenv("FLUX_BATCH_CACHE", str(tmp_path / "cache"))
    (tmp_path / "adapter").mkdir()
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    shapes = {"double_blocks.0.img_attn.qkv": (96, 32)}
    write_lora(path, random_factors(shapes), prefix="base_model.model.")
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 24}')
    uri = f"{moto.make_bucket()}/adapter"
    fs = s3fs.S3FileSystem(**moto.storage_options)
    fs.put(str(tmp_path / "adapter") + "/", uri + "/", recursive=True)
    pipe.load_lora(path)
    expected = pipe.transformer.state_dict()["double_blocks.0.img_attn.qkv.weight"].clone()

    for address in (f"{uri}/adapter_model.safetensors", uri):
        loras = LoadedLoras({"transformer": pipe.transformer}, moto.storage_options)
        pipe.unload_loras()
        loras.set([(address, 1.0)])
        found = pipe.transformer.state_dict()["double_blocks.0.img_attn.qkv.weight"].clone()
        loras.set([])
        assert torch.equal(found, expected)
