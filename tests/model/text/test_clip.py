"""CLIP's text encoder compared with golden numbers, and bit for bit with transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

from flux_batch.model.checkpoint.checkpoint import open_checkpoint
from flux_batch.model.checkpoint.detect import detect
from flux_batch.model.text.clip import ClipEncoder, ClipModel, ClipParams, clip_params, load_clip
from helpers.golden import check, weight

CPU = torch.device("cpu")
CLIP = CLIPTextConfig(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=64,
    num_attention_heads=4,
    num_hidden_layers=2,
    max_position_embeddings=16,
    hidden_act="quick_gelu",
    bos_token_id=0,
    eos_token_id=2,
    pad_token_id=1,
)


def make_clip_file(folder: Path, config: CLIPTextConfig) -> Path:
    """Write golden weights under the key names of the published file, and their config.json."""
    names = CLIPTextModel(config).state_dict()
    state = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in names.items()}
    folder.mkdir()
    config.save_pretrained(folder)
    save_file({name: weight(name, value.shape) for name, value in state.items()}, folder / "model.safetensors")
    return folder


def load_clip_from(folder: Path) -> ClipEncoder:
    return load_clip(detect(open_checkpoint(folder))[1], dtype=torch.float32, device=CPU)


def test_clip_is_golden(tokenizers: Path) -> None:
    clip = load_clip_from(make_clip_file(tokenizers / "clip", CLIP))
    pooled = clip.pool(torch.tensor([[126, 5, 17, 99, 3, 127, *[127] * 10]]))
    first = [-0.096738, 1.349663, -1.884292, 1.647430, -0.233179]
    check(pooled, 0.588754, 24.943624, first, [-0.073559, -1.041335, -0.175327])
    assert clip.width == 32
    assert clip.max_length == 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("settings", "length"),
    [
        ({}, 16),
        ({"hidden_act": "gelu", "eos_token_id": 127}, 9),
        ({"eos_token_id": 5, "layer_norm_eps": 0.1}, 9),
        ({"num_attention_heads": 2}, 1),
    ],
)
def test_it_computes_what_transformers_does(dtype: torch.dtype, settings: dict[str, Any], length: int) -> None:
    config = CLIPTextConfig(**CLIP.to_dict() | settings)
    theirs = CLIPTextModel(config).eval().to(dtype)
    shapes = {name: value.shape for name, value in theirs.state_dict().items()}
    ours = ClipModel(clip_params(shapes, config.to_dict())).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    # The end of text is in the middle, occurs twice, or is missing; then the largest or the first id is the end.
    ids = torch.tensor([[3, 5, 9, 127, 7, 7, 7, 7, 7], [3, 127, 8, 5, 127, 5, 9, 9, 9], [6, 4, 8, 4, 2, 9, 1, 1, 1]])
    ids = torch.cat((ids, ids), dim=1)[:, :length]
    with torch.inference_mode():
        assert torch.equal(ours(ids), theirs(ids).pooler_output)


def test_sizes_are_read_from_shapes() -> None:
    with torch.device("meta"):
        clip = CLIPTextModel(CLIPTextConfig())
    params = clip_params({name: value.shape for name, value in clip.state_dict().items()}, {})
    assert params == ClipParams(
        vocab_size=49408, hidden_size=512, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=8
    )


def test_a_setting_that_is_null_is_as_if_left_out() -> None:
    shapes = {key: tensor.shape for key, tensor in CLIPTextModel(CLIP).state_dict().items()}
    told = {"model_type": "clip_text_model", "num_attention_heads": 4}
    assert clip_params(shapes, told | {"eos_token_id": None}) == clip_params(shapes, told)


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("num_attention_heads", 5, "must divide 32"),
        ("num_attention_heads", "four", "must divide 32"),
        ("hidden_act", "swish", "must be quick_gelu or gelu"),
        ("hidden_act", ["gelu"], "must be quick_gelu or gelu"),
        ("layer_norm_eps", 0, "must be greater than 0"),
        ("eos_token_id", "end", "must be a token id"),
    ],
)
def test_a_setting_that_does_not_fit_is_named(name: str, value: object, rule: str) -> None:
    shapes = {key: tensor.shape for key, tensor in CLIPTextModel(CLIP).state_dict().items()}
    config = CLIP.to_dict() | {name: value}
    with pytest.raises(ValueError, match=r"its config\.json does not fit its weights: ") as caught:
        clip_params(shapes, config)
    assert str(caught.value).endswith(f"{name} = {value!r} {rule}")
