"""One tiny pipeline for the tests of this folder, and its model in both layouts."""

from __future__ import annotations

from pathlib import Path

import pytest

from flux_batch import FluxImagePipeline
from helpers.tiny_calls import CPU
from helpers.tiny_flux import TinyFlux, make_tiny_repository


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in diffusers' layout."""
    return make_tiny_repository(tmp_path_factory.mktemp("models") / "dev", TinyFlux())


@pytest.fixture(scope="session")
def original_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of `repository` in the original layout."""
    return make_tiny_repository(tmp_path_factory.mktemp("models") / "original", TinyFlux(), layout="original")


@pytest.fixture(scope="session")
def pipe(repository: Path) -> FluxImagePipeline:
    return FluxImagePipeline.from_pretrained(repository, **CPU)
