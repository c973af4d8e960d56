"""A tiny model to put LoRAs into."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import nn

from flux_batch.model.checkpoint.checkpoint import open_checkpoint
from flux_batch.model.checkpoint.detect import detect
from flux_batch.model.checkpoint.loading import load_transformer
from flux_batch.model.lora.fusion import LoraFusion
from flux_batch.model.text.clip import load_clip
from flux_batch.model.text.t5 import load_t5
from helpers.tiny_flux import TinyFlux, make_tiny_repository

F32 = {"dtype": torch.float32, "device": torch.device("cpu")}


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_repository(tmp_path_factory.mktemp("models") / "tiny", TinyFlux(seed=7))


@pytest.fixture(scope="session")
def loaded(repository: Path) -> dict[str, nn.Module]:
    """The parts of a tiny model, by name."""
    transformer = open_checkpoint(repository / "transformer")
    config = json.loads((repository / "transformer" / "config.json").read_text())
    clip = detect(open_checkpoint(repository / "text_encoder"))[1]
    t5 = detect(open_checkpoint(repository / "text_encoder_2"))[1]
    return {
        "transformer": load_transformer(transformer, detect(transformer)[0], config, **F32),
        "clip": load_clip(clip, **F32).model,
        "t5": load_t5(t5, **F32).model,
    }


@pytest.fixture
def fusion(loaded: dict[str, nn.Module]) -> LoraFusion:
    """The parts of a tiny model, fresh."""
    fusion = LoraFusion()
    for name, part in loaded.items():
        fusion.add_part(name, deepcopy(part))
    return fusion
