"""The check of a job's weights before they are loaded, on this machine and elsewhere."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest

from flux_batch.config.schema import ModelConfig
from flux_batch.errors import CheckpointError, JobError, NotFound, StoreError
from flux_batch.pipeline import load
from flux_batch.pipeline.load import MAX_BYTES_ON_CPU, check_weights
from helpers.hub_server import TOKEN, Hub
from helpers.s3 import free_port
from helpers.sparse_files import sparse_safetensors

FOLDERS = ("vae", "text_encoder", "text_encoder_2", "transformer")
NO_GPU = "there is no GPU here"


def write_model(folder: Path, num_bytes: int) -> Path:
    """Write a model with one tensor in each part; the transformer's has a given size."""
    for name in FOLDERS:
        (folder / name).mkdir(parents=True)
        sparse_safetensors(folder / name / "model.safetensors", {"w": ("F32", [4])})
    sparse_safetensors(folder / "transformer/model.safetensors", {"w": ("F8_E4M3", [num_bytes])})
    return folder


def test_a_large_model_is_refused_where_the_cpu_was_not_asked_for(tmp_path: Path) -> None:
    large = ModelConfig(uri=str(write_model(tmp_path / "large", MAX_BYTES_ON_CPU)))
    check_weights(large)
    with pytest.raises(JobError, match=rf"^workers\.num_gpus: {NO_GPU}, and the weights of .*large have 2 GB.* to 0 "):
        check_weights(large, NO_GPU)
    check_weights(ModelConfig(uri=str(write_model(tmp_path / "small", 100))), NO_GPU)
    check_weights(ModelConfig(uri="demo"), NO_GPU)


def test_a_model_that_is_not_whole_is_said(tmp_path: Path) -> None:
    model = write_model(tmp_path, 4)
    (model / "vae/model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no autoencoder: looked for"):
        check_weights(ModelConfig(uri=str(model)))


def test_a_name_with_a_slip_is_understood(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no model folder .*; did you mean 'demo'\?"):
        check_weights(ModelConfig(uri=str(tmp_path / "Demo")))


def test_a_remote_model_is_listed_and_not_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FLUX_BATCH_CACHE", str(tmp_path))
    memory = fsspec.filesystem("memory")
    for name in FOLDERS:
        memory.pipe(f"/check-weights/{name}/model.safetensors", b"12345678")
    model = ModelConfig(uri="memory://check-weights")
    check_weights(model, NO_GPU)
    monkeypatch.setattr(load, "MAX_BYTES_ON_CPU", 31)
    with pytest.raises(JobError, match=NO_GPU):
        check_weights(model, NO_GPU)
    with pytest.raises(NotFound):
        check_weights(ModelConfig(uri="memory://check-no-weights"))
    assert not list(tmp_path.iterdir())


def test_a_remote_that_is_away_for_now_is_left_to_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    def away(uri: str, *options: object) -> None:
        raise StoreError("away")

    monkeypatch.setattr(load, "model_listing", away)
    check_weights(ModelConfig(uri="s3://bucket/flux"), NO_GPU)


def test_a_hub_that_never_answers_is_said_before_anything_is_started(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    sentence = r"^model\.uri = owner/flux is not on this machine, and its hub does not answer: .* cannot be reached: "
    with pytest.raises(StoreError, match=sentence) as caught:
        check_weights(ModelConfig(uri="owner/flux"))
    assert caught.value.exit_code == 75


def test_a_hub_says_what_it_has_and_who_may_read_it(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ModelConfig(uri="owner/flux")
    with pytest.raises(CheckpointError, match="there is no such repository"):
        check_weights(model)
    hub.repositories["owner/flux"] = {f"{name}/model.safetensors": b"12345678" for name in FOLDERS}
    hub.gated = {"owner/flux"}
    with pytest.raises(CheckpointError, match="owner/flux is gated"):
        check_weights(model)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    check_weights(model)
    hub.statuses = [503] * 9
    check_weights(model)  # the hub has answered before, so the run may wait for it


def test_a_hub_is_not_asked_for_what_is_here(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", 4)
    monkeypatch.setattr(load, "find_local_model", lambda *arguments: folder)
    check_weights(ModelConfig(uri="owner/flux"))
    assert not hub.requests
