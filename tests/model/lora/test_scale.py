"""alpha / rank from PEFT's settings, compared with PEFT, and settings that cannot be followed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftConfig, get_peft_model

from flux_batch.model.lora.file import open_lora
from flux_batch.model.lora.fusion import LoraFusion
from flux_batch.model.transformer import Flux
from helpers.layout_files import PARAMS
from helpers.lora_files import Factors, random_factors, write_lora
from helpers.yardstick import work

Names = Sequence[str]
LAYERS = ("img_attn.qkv", "txt_mlp.2", "img_mod.lin", "linear1", "linear2")


def make_model() -> Flux:
    """Return a transformer with the same random weights each time."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Flux(PARAMS).requires_grad_(False)


@pytest.fixture
def fusion() -> LoraFusion:
    fusion = LoraFusion()
    fusion.add_part("transformer", make_model())
    return fusion


@pytest.mark.parametrize(
    "make",
    [
        # By names, and by expressions.
        lambda names: LoraConfig(
            r=5,
            lora_alpha=3,
            target_modules=names,
            rank_pattern={"linear1": 7, "img_attn.qkv": 2},
            alpha_pattern={"linear1": 9, "img_attn.qkv": 1},
            init_lora_weights=False,
        ),
        lambda names: LoraConfig(
            r=4,
            lora_alpha=3,
            target_modules=names,
            use_rslora=True,
            rank_pattern={r"^single_blocks\.[01]\.linear.*": 6},
            alpha_pattern={r"^single_blocks\.0\.linear.": 9, r"double_blocks\.\d+\.(?:img_attn|txt_mlp)\..*": 5},
            init_lora_weights=False,
        ),
        lambda names: LoHaConfig(r=4, alpha=3, target_modules=names, alpha_pattern={"linear1": 9}, init_weights=False),
        lambda names: LoKrConfig(r=2, alpha=3, target_modules=names, decompose_both=True, init_weights=False),
        # A rank so high that both factors are full matrices, so that no tensor reveals it.
        lambda names: LoKrConfig(
            r=64,
            alpha=3,
            target_modules=names,
            rank_pattern={"linear1": 128},
            alpha_pattern={"linear2": 9},
            init_weights=False,
        ),
    ],
)
def test_equal_to_peft(tmp_path: Path, fusion: LoraFusion, make: Callable[[Names], PeftConfig]) -> None:
    wrapped = get_peft_model(make_model(), make(LAYERS))  # type: ignore[arg-type]
    torch.manual_seed(1)
    for value in wrapped.parameters():
        if value.requires_grad:
            torch.nn.init.normal_(value, std=0.3)
    wrapped.save_pretrained(tmp_path)

    fusion.fuse([(open_lora(tmp_path / "adapter_model.safetensors", "x", fusion.shapes()), 1.0)])

    expected = wrapped.merge_and_unload().state_dict()  # type: ignore[operator]
    for name, value in fusion.parts["transformer"].state_dict().items():
        assert torch.allclose(value, expected[name], rtol=1e-6, atol=2e-6), name


def with_settings(folder: Path, settings: Any) -> Path:
    """Write a LoRA as PEFT does, with settings beside it."""
    factors = Factors(torch.ones(2, 64), torch.ones(PARAMS.hidden_size, 2))
    path = write_lora(folder / "adapter_model.safetensors", {"img_in": factors}, prefix="base_model.model.")
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return path


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "corda", "loftq"])
def test_a_difference_to_another_model_is_refused(tmp_path: Path, fusion: LoraFusion, start: str) -> None:
    path = with_settings(tmp_path, {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "init_lora_weights": start})

    with pytest.raises(ValueError, match=f"is a LoRA that is not supported: its training began with {start}"):
        open_lora(path, "x", fusion.shapes())


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal", None])
def test_other_inits_are_accepted(tmp_path: Path, fusion: LoraFusion, start: Any) -> None:
    path = with_settings(tmp_path, {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "init_lora_weights": start})

    (change,) = open_lora(path, "x", fusion.shapes()).changes

    assert change.alpha_over_rank == 4.0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"alpha_pattern": {"(a+)+b": 2}}, "the pattern '(a+)+b' in its settings is too complex"),
        ({"alpha_pattern": {".*a.*b.*c.*d": 2}}, "is too complex"),
        ({"alpha_pattern": {r"(img_in)\1": 2}}, "is too complex"),
        ({"alpha_pattern": {"img_[in": 2}}, "the pattern 'img_[in' in its settings is wrong: "),
        ({"alpha_pattern": ["img_in"]}, "alpha_pattern in its settings is not a mapping"),
        ({"alpha_pattern": {"img_in": "8"}}, "the alpha of img_in is '8' in its settings, should be a number"),
        ({"lora_alpha": True}, "the alpha of img_in is True in its settings, should be a number"),
        ({"lora_alpha": float("inf")}, "the alpha of base_model.model.img_in is inf, should be a number"),
    ],
)
def test_settings_that_cannot_be_followed_are_named(
    tmp_path: Path, fusion: LoraFusion, settings: dict[str, Any], words: str
) -> None:
    path = with_settings(tmp_path, {"peft_type": "LORA", "r": 2, "lora_alpha": 2, **settings})

    with pytest.raises(ValueError, match=re.escape(words)):
        open_lora(path, "x", fusion.shapes())


@pytest.mark.parametrize("rank", [0, -1, float("nan"), float("inf"), "2"])
def test_an_invalid_rank_is_named(tmp_path: Path, fusion: LoraFusion, rank: Any) -> None:
    path = tmp_path / "adapter_model.safetensors"
    factors = {"img_in.lokr_w1": torch.ones(1, 1), "img_in.lokr_w2": torch.ones(PARAMS.hidden_size, 64)}
    write_lora(path, {}, extra=factors)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LOKR", "r": rank, "alpha": 2}))

    with pytest.raises(ValueError, match=r"the rank of img_in is .* in its settings, should be"):
        open_lora(path, "x", fusion.shapes())


def test_a_slow_pattern_is_refused_at_once(tmp_path: Path, fusion: LoraFusion) -> None:
    path = tmp_path / "adapter_model.safetensors"
    shapes = {
        name.removesuffix(".weight"): (shape[0], shape[1])
        for name, shape in fusion.shapes()["transformer"].items()
        if len(shape) == 2
    }
    write_lora(path, random_factors(shapes))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "alpha_pattern": {".*.*.*!": 2}}))

    assert work(lambda: open_lora(path, "x", fusion.shapes())) < 20
