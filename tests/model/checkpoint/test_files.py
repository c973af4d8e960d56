"""The choice of a repository's files by their names."""

from __future__ import annotations

import pytest

from flux_batch.model.checkpoint.files import COMPONENT_FOLDERS, missing_components, needed_files, part_of

SETTINGS = [
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder_2/config.json",
    "tokenizer/merges.txt",
    "tokenizer/vocab.json",
    "tokenizer_2/spiece.model",
    "transformer/config.json",
    "vae/config.json",
]
ENCODERS = [
    "text_encoder/model.safetensors",
    "text_encoder_2/model-00001-of-00002.safetensors",
    "text_encoder_2/model-00002-of-00002.safetensors",
    "text_encoder_2/model.safetensors.index.json",
]
FOLDER_WEIGHTS = [
    "transformer/diffusion_pytorch_model-00001-of-00002.safetensors",
    "transformer/diffusion_pytorch_model-00002-of-00002.safetensors",
    "transformer/diffusion_pytorch_model.safetensors.index.json",
    "vae/diffusion_pytorch_model.safetensors",
]
SINGLE_FILES = ["ae.safetensors", "flux1-dev.safetensors"]
CLUTTER = [
    ".gitattributes",
    "LICENSE.md",
    "README.md",
    "dev_grid.jpg",
    "flux1-dev.ckpt",
    "text_encoder/flax_model.msgpack",
    "text_encoder/pytorch_model.bin",
    "text_encoder_2/tf_model.h5",
    "transformer/old/diffusion_pytorch_model.safetensors",
    "safety_checker/model.safetensors",
    "onnx/model.onnx",
]
# The repository of FLUX.1-dev, which has all weights twice.
EVERYTHING = [*SETTINGS, *ENCODERS, *FOLDER_WEIGHTS, *SINGLE_FILES, *CLUTTER]


def test_of_both_layouts_one_is_fetched() -> None:
    assert needed_files(EVERYTHING) == sorted([*SETTINGS, *ENCODERS, *FOLDER_WEIGHTS])
    assert needed_files(EVERYTHING, single_files=True) == sorted([*SETTINGS, *ENCODERS, *SINGLE_FILES])


@pytest.mark.parametrize("single_files", [False, True])
def test_weights_in_one_layout_are_fetched(single_files: bool) -> None:
    names = [*SETTINGS, *ENCODERS, *FOLDER_WEIGHTS]
    assert needed_files(names, single_files=single_files) == sorted(names)
    mixed = [*SETTINGS, *ENCODERS, *SINGLE_FILES]
    assert needed_files(mixed, single_files=single_files) == sorted(mixed)
    assert needed_files(["all.safetensors", "tokenizer/vocab.json"]) == ["all.safetensors", "tokenizer/vocab.json"]
    assert needed_files(["flux1-dev-Q8_0.gguf", *ENCODERS, "ae.safetensors"])[-1].startswith("text_encoder_2")


def test_a_part_comes_with_all_settings_and_no_other_weights() -> None:
    assert needed_files(EVERYTHING, part="ae.safetensors") == sorted(["ae.safetensors", *SETTINGS])
    assert needed_files(EVERYTHING, part="text_encoder_2") == sorted([*SETTINGS, *ENCODERS[1:]])
    assert needed_files(EVERYTHING, part="vae/diffusion_pytorch_model.safetensors") == sorted(
        ["vae/diffusion_pytorch_model.safetensors", *SETTINGS]
    )


def test_other_precisions_and_whole_files_beside_shards_are_left() -> None:
    names = [
        "transformer/diffusion_pytorch_model.fp16.safetensors",
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors",
        "text_encoder_2/model.fp16-00001-of-00002.safetensors",
        "text_encoder_2/model.fp16-00002-of-00002.safetensors",
        "text_encoder_2/model.safetensors",
        *ENCODERS[1:],
    ]
    assert needed_files(names) == sorted([names[1], names[2], *ENCODERS[1:]])


@pytest.mark.parametrize(
    "name",
    [
        "/etc/model.json",
        "/model.safetensors",
        "../model.safetensors",
        "vae/../../model.safetensors",
        "vae\\..\\model.safetensors",
        "..\\model.json",
        "./vae/config.json",
        "",
    ],
)
def test_no_name_leads_out_of_the_folder(name: str) -> None:
    assert needed_files([name]) == []


def test_missing_components_are_named_by_folder() -> None:
    assert missing_components([*SETTINGS, *ENCODERS, *FOLDER_WEIGHTS]) == []
    assert missing_components([*SETTINGS, *ENCODERS, *SINGLE_FILES]) == []
    assert missing_components([*SETTINGS, *ENCODERS[:2], *FOLDER_WEIGHTS]) == ["text_encoder_2"]  # one shard of two
    assert missing_components([*SETTINGS, *ENCODERS[1:], *FOLDER_WEIGHTS]) == ["text_encoder"]
    assert missing_components(["all.safetensors"]) == ["tokenizer", "tokenizer_2"]
    assert missing_components([]) == [folder for folder in COMPONENT_FOLDERS if folder != "scheduler"]


@pytest.mark.parametrize(
    ("uri", "parts"),
    {
        "s3://bucket/flux": ("s3://bucket/flux", ""),
        "s3://bucket/flux/": ("s3://bucket/flux", ""),
        "s3://bucket": ("s3://bucket", ""),
        "s3://bucket/flux/vae/": ("s3://bucket/flux", "vae"),
        "s3://bucket/flux/ae.safetensors": ("s3://bucket/flux", "ae.safetensors"),
        "s3://bucket/flux/text_encoder/x.safetensors": ("s3://bucket/flux", "text_encoder/x.safetensors"),
        "s3://bucket/x.gguf": ("s3://bucket", "x.gguf"),
        "https://host/flux/x.gguf": ("https://host/flux", "x.gguf"),
        "memory://vae": ("memory://vae", ""),
    }.items(),
)
def test_the_address_of_a_part_is_split(uri: str, parts: tuple[str, str]) -> None:
    assert part_of(uri) == parts
