"""The version of a model at an address: of files, of a bucket, of a repository."""

from __future__ import annotations

from pathlib import Path

import pytest

from flux_batch.download.models import local_model
from flux_batch.download.revision import END_BYTES, model_revision
from flux_batch.storage import retry
from flux_batch.storage.store import Store
from helpers.hub_server import COMMIT, Hub
from helpers.s3 import Bucket
from helpers.tiny_flux import make_tiny_repository

NAME = "black-forest-labs/FLUX.1-dev"


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLUX_BATCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(retry, "ATTEMPTS", 2)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_tiny_repository(tmp_path / "model")


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_revision_of_local_files_changes_with_the_weights_alone(model: Path) -> None:
    first = model_revision(str(model))
    assert first is not None
    (model / "README.md").write_text("another one")
    (weights,) = (model / "transformer").glob("*.safetensors")
    data = bytearray(weights.read_bytes())
    weights.write_bytes(data)
    assert model_revision(str(model)) == model_revision(model.as_uri()) == first
    assert len(data) > 2 * END_BYTES
    for place in (len(data) - 1, END_BYTES - 1):
        data[place] ^= 1
        weights.write_bytes(data)
        assert model_revision(str(model)) != first
        data[place] ^= 1


def test_the_revision_of_a_bucket_is_the_name_of_its_copy(s3_store: Bucket, model: Path) -> None:
    store = Store(f"{s3_store.uri}/flux", s3_store.storage_options)
    for name, data in files(model).items():
        store.write(name, data)
    first = model_revision(store.uri, s3_store.storage_options)
    assert local_model(store.uri, s3_store.storage_options).name == first
    (weights,) = (model / "transformer").glob("*.safetensors")
    store.write(weights.relative_to(model).as_posix(), weights.read_bytes()[:-1] + b"x")
    assert model_revision(store.uri, s3_store.storage_options) not in (first, None)


def test_the_revision_of_a_repository_is_that_of_its_address_or_the_hub(hub: Hub, model: Path) -> None:
    hub.repositories = {NAME: files(model)}
    assert model_revision(f"hf://{NAME}@{COMMIT}") == COMMIT
    assert hub.requests == []
    assert model_revision(NAME) == local_model(NAME).name


@pytest.mark.parametrize("uri", ["/nowhere/flux", "hf://nobody", "s3://bucket/flux", NAME])
def test_an_unreachable_remote_has_no_revision(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert model_revision(uri) is None
