from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from flux_batch.demo import parts
from flux_batch.demo.model import demo_model_folder
from flux_batch.pipeline import FluxImagePipeline

BUILD = "from flux_batch.demo.model import demo_model_folder; print(demo_model_folder())"
BUILD_AND_DIE = f"""
import os, signal
from flux_batch.demo import parts
parts.write_autoencoder = lambda folder: os.kill(os.getpid(), signal.SIGKILL)
{BUILD}
"""
PROMPT = "a small red star left of a large blue circle on a plain white background"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLUX_BATCH_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def folder(cache: Path) -> Path:
    return demo_model_folder()


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> FluxImagePipeline:
    return FluxImagePipeline.from_pretrained("demo", torch_dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def peer(folder: Path) -> Any:
    diffusers = pytest.importorskip("diffusers")
    pipe = diffusers.FluxPipeline.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_two_processes_at_once_build_one_folder_with_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    processes = [start(BUILD, tmp_path) for _ in range(2)]
    outputs = [process.communicate(timeout=100) for process in processes]

    assert [process.returncode for process in processes] == [0, 0], outputs
    (place,) = {Path(output.strip()) for output, _ in outputs}
    assert place == tmp_path / folder.name
    assert visible(tmp_path) == [folder.name]
    assert bytes_of(place) == bytes_of(folder)


def test_a_killed_build_leaves_nothing_half(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = start(BUILD_AND_DIE, tmp_path)
    process.communicate(timeout=100)
    assert process.returncode == -signal.SIGKILL
    assert visible(tmp_path) == []

    monkeypatch.setenv("FLUX_BATCH_CACHE", str(tmp_path))

    assert bytes_of(demo_model_folder()) == bytes_of(folder)
    assert not list(tmp_path.glob(".*.partial"))


def test_a_second_call_builds_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "write_model", lambda folder: pytest.fail("built again"))

    assert demo_model_folder() == folder


def test_the_users_cache_is_the_default(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLUX_BATCH_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(parts, "write_model", lambda folder: None)

    assert demo_model_folder() == tmp_path / "flux-batch" / folder.name


def test_weights_follow_from_their_names_alone() -> None:
    # Pinned: every machine must make the same ones.
    assert parts.random_tensor("golden", (3, 4))[1].tolist() == [
        -0.18506285548210144,
        -0.7620352506637573,
        -0.43780583143234253,
        0.6969881057739258,
    ]


def test_the_folder_is_small_and_readable_by_all(folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    expected = 0o666 & ~current_umask()

    assert sum(path.stat().st_size for path in files) < 20_000_000
    assert {path.stat().st_mode & 0o777 for path in files} == {expected}


def test_weights_have_the_names_of_the_real_files(folder: Path) -> None:
    clip = tensor_names(folder / "text_encoder" / "model.safetensors")
    t5 = tensor_names(folder / "text_encoder_2" / "model.safetensors")

    assert all(name.startswith("text_model.") for name in clip)
    assert "shared.weight" in t5
    assert "encoder.embed_tokens.weight" not in t5


def test_vocabularies_fit_the_text_encoders(folder: Path) -> None:
    def setting(part: str, name: str) -> Any:
        return json.loads((folder / part / "config.json").read_text())[name]

    vocabulary = json.loads((folder / "tokenizer" / "vocab.json").read_text(encoding="utf-8"))
    assert setting("text_encoder", "vocab_size") == len(vocabulary)
    tokenizer = json.loads((folder / "tokenizer_2" / "tokenizer.json").read_text(encoding="utf-8"))
    assert setting("text_encoder_2", "vocab_size") == len(tokenizer["model"]["vocab"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pictures_are_neither_flat_nor_broken(folder: Path, dtype: torch.dtype) -> None:
    pipe = FluxImagePipeline.from_pretrained("demo", torch_dtype=dtype, device="cpu")

    pixels = pipe(prompt=PROMPT, height=128, width=128, num_inference_steps=20, seed=0, output_type="pt")

    assert pixels.isfinite().all()
    assert pixels.std(dim=(2, 3)).min() > 0.1


def test_pictures_depend_on_prompt_and_seed(pipeline: FluxImagePipeline) -> None:
    def picture(prompt: str, seed: int) -> Any:
        size: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 4, "output_type": "np"}
        return pipeline(prompt=prompt, seed=seed, **size).astype(float)

    first = picture(PROMPT, 0)

    assert np.abs(first - picture(PROMPT, 0)).max() == 0
    assert np.abs(first - picture("a huge black heart at the top on a pink background", 0)).mean() > 5
    assert np.abs(first - picture(PROMPT, 1)).mean() > 5


def test_diffusers_makes_a_picture_of_it(peer: Any) -> None:
    (image,) = peer(PROMPT, height=64, width=64, num_inference_steps=2, max_sequence_length=64).images

    assert image.size == (64, 64)
    assert np.asarray(image).std() > 10


@pytest.mark.parametrize(("width", "height"), [(64, 64), (96, 64)])
@pytest.mark.parametrize("cfg_scale", [1.0, 2.5])
def test_diffusers_makes_the_same_picture(
    pipeline: FluxImagePipeline, peer: Any, width: int, height: int, cfg_scale: float
) -> None:
    same: dict[str, Any] = {
        "prompt": PROMPT,
        "negative_prompt": "a big yellow ring",
        "width": width,
        "height": height,
        "num_inference_steps": 4,
        "guidance_scale": 2.0,
        "true_cfg_scale": cfg_scale,
        "max_sequence_length": 64,
    }

    ours = pipeline(**same, seed=5)
    (theirs,) = peer(**same, generator=torch.Generator().manual_seed(5)).images

    assert np.abs(np.asarray(ours, dtype=int) - np.asarray(theirs, dtype=int)).max() <= 1


def start(code: str, cache: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "FLUX_BATCH_CACHE": str(cache)}
    return subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def visible(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if not path.name.startswith(".")]


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def tensor_names(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as file:
        return list(file.keys())


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
