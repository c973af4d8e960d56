"""A tiny model to put LoRAs into."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from flux_batch.model.checkpoint.checkpoint import open_checkpoint
from flux_batch.model.checkpoint.detect import detect
from flux_batch.model.checkpoint.loading import load_transformer
from flux_batch.model.lora.fusion import LoraFusion
from flux_batch.model.text import load_clip, load_t5
from helpers.tiny_flux import TinyFlux, make_tiny_repository

F32 = {"dtype": torch.float32, "device": torch.device("cpu")}


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_repository(tmp_path_factory.mktemp("models") / "tiny", TinyFlux(seed=7))


@pytest.fixture
def fusion(repository: Path) -> LoraFusion:
    """The parts of a tiny model, fresh."""
    fusion = LoraFusion()
    transformer = open_checkpoint(repository / "transformer")
    config = json.loads((repository / "transformer" / "config.json").read_text())
    fusion.add_part("transformer", load_transformer(transformer, detect(transformer)[0], config, **F32))
    clip = detect(open_checkpoint(repository / "text_encoder"))[1]
    fusion.add_part("clip", load_clip(clip, **F32).model)
    fusion.add_part("t5", load_t5(detect(open_checkpoint(repository / "text_encoder_2"))[1], **F32).model)
    return fusion
