"""Tokenizers for the text encoders."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.tiny_flux import TinyFlux, make_tiny_pipeline


@pytest.fixture(scope="package")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tokenizers of the tiny model."""
    folder = tmp_path_factory.mktemp("tokenizers")
    pipeline = make_tiny_pipeline(TinyFlux())
    pipeline.tokenizer.save_pretrained(folder / "tokenizer")
    pipeline.tokenizer_2.save_pretrained(folder / "tokenizer_2")
    return folder
