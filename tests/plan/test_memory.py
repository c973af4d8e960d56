"""The memory of a model of FLUX.1-dev's real size: files with its headers, and holes for its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from flux_batch.config.running import QualityConfig
from flux_batch.config.schema import JobConfig
from flux_batch.model.autoencoder import AutoEncoder
from flux_batch.model.checkpoint.diffusers_keys import controlnet_to_diffusers, transformer_to_diffusers
from flux_batch.model.conditions.controlnet import ControlNet, ControlNetParams
from flux_batch.model.optimize import dtypes
from flux_batch.model.params import AUTOENCODER, DEV
from flux_batch.model.transformer import Flux
from flux_batch.plan.memory import CHOICES, memory, memory_rows
from helpers.job_files import make_job
from helpers.sparse_files import sparse_safetensors

T5_XXL = {"vocab_size": 32128, "d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": 24}
CLIP_L = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
}
GB = 10**9


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items() if "position_ids" not in name}


def write(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    sparse_safetensors(path, {name: (dtype, shape) for name, shape in shapes.items()})


@pytest.fixture(scope="module")
def parts() -> dict[str, nn.Module]:
    with torch.device("meta"):
        return {
            "transformer": Flux(DEV),
            "autoencoder": AutoEncoder(AUTOENCODER),
            "t5": T5EncoderModel(T5Config(feed_forward_proj="gated-gelu", **T5_XXL)),
            "clip": CLIPTextModel(CLIPTextConfig(**CLIP_L)),
        }


@pytest.fixture(scope="module")
def dev(parts: dict[str, nn.Module], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FLUX.1-dev in single files."""
    folder = tmp_path_factory.mktemp("models") / "dev"
    write(folder / "flux1-dev.safetensors", shapes_of(parts["transformer"]), "BF16")
    write(folder / "ae.safetensors", shapes_of(parts["autoencoder"]), "F32")
    write(folder / "t5xxl.safetensors", shapes_of(parts["t5"]), "F16")
    write(folder / "clip_l.safetensors", shapes_of(parts["clip"]), "F16")
    return folder


@pytest.fixture(scope="module")
def diffusers(parts: dict[str, nn.Module], dev: Path) -> Path:
    """The same in diffusers' folders, with the transformer in fp8."""
    folder = dev.parent / "diffusers"
    state = transformer_to_diffusers(parts["transformer"].state_dict())
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    write(folder / "transformer" / "diffusion_pytorch_model.safetensors", shapes, "F8_E4M3")
    for name, file in (("vae", "ae"), ("text_encoder_2", "t5xxl"), ("text_encoder", "clip_l")):
        (folder / name).mkdir()
        (folder / name / "model.safetensors").symlink_to(dev / f"{file}.safetensors")
    return folder


def job(model: Path, folder: Path, *, batch_size: int = 1, **sampling: Any) -> JobConfig:
    return make_job(
        folder,
        model={"uri": str(model)},
        sampling={"width": 1024, "height": 1024} | sampling,
        workers={"batch_size": batch_size},
    )


def cards(figures: dict[str, Any], dtype: str, quantization: str) -> list[int]:
    """Return the sizes of GPUs in GB that a dtype and quantization fit."""
    (choice,) = (x for x in figures["choices"] if (x["dtype"], x["quantization"]) == (dtype, quantization))
    fits: list[int] = choice["fits_gb"]
    return fits


def test_weights_are_those_that_are_published(dev: Path, tmp_path: Path) -> None:
    sizes = memory(job(dev, tmp_path))["bytes"]
    assert sizes["transformer"] == 2 * 11_901_408_320
    assert sizes["t5"] == 2 * 4_762_310_656
    assert sizes["clip"] == 2 * 123_060_480
    assert sizes["autoencoder"] == 2 * 83_819_683


def test_fp8_fits_a_card_of_24_gb_and_bfloat16_does_not(dev: Path, tmp_path: Path) -> None:
    figures = memory(job(dev, tmp_path))
    for quantization in ("fp8", "fp8_matmul"):
        assert cards(figures, "bfloat16", quantization) == [24, 40, 48, 80, 141]
    assert cards(figures, "bfloat16", "none") == [40, 48, 80, 141]
    assert cards(figures, "float16", "fp8") == [24, 40, 48, 80, 141]
    assert cards(figures, "float32", "none") == [80, 141]


@pytest.mark.parametrize(
    ("batch_size", "side", "tiled", "fits_24"),
    [(4, 1024, False, True), (8, 1024, False, False), (8, 1024, True, True), (1, 2048, False, True)],
)
def test_batches_and_sizes_count(
    dev: Path, tmp_path: Path, batch_size: int, side: int, tiled: bool, fits_24: bool
) -> None:
    config = job(dev, tmp_path, batch_size=batch_size, width=side, height=side, tiled=tiled, tile_size=64)
    assert (24 in cards(memory(config), "bfloat16", "fp8")) == fits_24


@pytest.mark.parametrize(("batch_size", "fits"), [(3, [True, True]), (9, [False, True]), (10, [False, False])])
def test_offloaded_text_encoders_leave_their_room_to_activations(
    dev: Path, tmp_path: Path, batch_size: int, fits: list[bool]
) -> None:
    config = job(dev, tmp_path, batch_size=batch_size)
    offloaded = config.model_copy(update={"model": config.model.model_copy(update={"offload_text_encoders": True})})
    figures = [memory(each) for each in (config, offloaded)]
    assert [40 in cards(each, "bfloat16", "none") for each in figures] == fits
    assert figures[1]["bytes"]["t5"] == 0
    # The text encoders return to the GPU for texts, so the peak includes their size.
    assert figures[1]["bytes"]["activations"] >= figures[0]["bytes"]["t5"] + figures[0]["bytes"]["clip"]


def test_controlnets_are_counted_once_each_and_their_residuals_for_each_image(dev: Path, tmp_path: Path) -> None:
    with torch.device("meta"):
        union = ControlNet(
            ControlNetParams(flux=replace(DEV, depth=5, depth_single_blocks=10), condition_channels=64, num_modes=10)
        )
    state = controlnet_to_diffusers(union.state_dict())
    path = tmp_path / "union.safetensors"
    write(path, {name: tuple(value.shape) for name, value in state.items()}, "BF16")
    plain = memory(job(dev, tmp_path))["bytes"]
    nets = [{"uri": str(path), "mode": mode} for mode in (0, 2)]
    config = job(dev, tmp_path)
    with_nets = config.model_copy(
        update={"model": config.model.model_validate(config.model.model_dump() | {"controlnets": nets})}
    )
    counted = memory(with_nets)["bytes"]
    assert counted["controlnets"] == 2 * 3_301_956_608
    assert plain["activations"] < counted["activations"] < plain["activations"] + 64 * 4096 * 3072 * 2
    gone = {"controlnets": [{"uri": str(tmp_path / "gone.safetensors")}]}
    config = config.model_copy(update={"model": config.model.model_validate(config.model.model_dump() | gone)})
    assert "gone.safetensors is not on this machine" in memory(config)["error"]


def test_a_scorer_on_the_device_of_the_pipeline_is_counted(dev: Path, tmp_path: Path) -> None:
    clip = tmp_path / "clip"
    clip.mkdir()
    sparse_safetensors(clip / "model.safetensors", {"weight": ("F32", (427_616_513,))})
    plain = job(dev, tmp_path)

    def bytes_with(score: str, **options: Any) -> dict[str, Any]:
        quality = QualityConfig(score=score, at_least=0.3, options=options)
        return memory(plain.model_copy(update={"quality": quality}))

    counted = bytes_with("clip", model=str(clip))
    assert counted["bytes"]["scorer"] == pytest.approx(4 * 427_616_513, rel=1e-6)
    assert counted["total_bytes"] == memory(plain)["total_bytes"] + counted["bytes"]["scorer"]
    for without in (bytes_with("clip", model=str(clip), device="cpu"), bytes_with("sharpness"), bytes_with("my:Judge")):
        assert without == memory(plain)
    missing = bytes_with("aesthetic", model=str(tmp_path / "gone"), head="head.pth")
    assert "gone, the model of quality.score, is not on this machine" in missing["error"]


def test_with_cuda_graphs_nobody_else_gets_what_denoising_takes(dev: Path, tmp_path: Path) -> None:
    config = job(dev, tmp_path, batch_size=4)
    graphs = config.model_copy(update={"model": config.model.model_copy(update={"cuda_graphs": True})})
    plain, kept = (memory(each)["bytes"] for each in (config, graphs))
    assert plain["activations"] < kept["activations"] < 2 * plain["activations"]
    assert {**plain, "activations": 0} == {**kept, "activations": 0}


def test_what_a_file_is_stored_as_does_not_count(dev: Path, diffusers: Path, tmp_path: Path) -> None:
    assert memory(job(diffusers, tmp_path)) == memory(job(dev, tmp_path))


def test_the_choice_of_the_job_comes_first(dev: Path, tmp_path: Path) -> None:
    config = make_job(tmp_path, model={"uri": str(dev), "quantization": "fp8"}, sampling={"width": 64, "height": 64})
    figures = memory(config)
    rows = memory_rows(figures)
    assert rows[0][1].startswith("about 17.")
    assert rows[0][1].endswith(" GB a worker, fits a card of 24 GB")
    assert "in batches of 2: transformer 12.0" in rows[1][1]
    assert len(rows) == 2 + len(CHOICES)
    assert rows[2] == ("or with", "bfloat16: 34.0 GB, fits a card of 40 GB")
    assert len(memory_rows(figures, has_cards=False)) == 2
    assert figures["bytes"]["transformer"] == pytest.approx(11.97 * GB, rel=0.01)


def test_what_no_card_has_is_said(dev: Path, tmp_path: Path) -> None:
    rows = memory_rows(memory(job(dev, tmp_path, batch_size=100, width=2048, height=2048)))
    assert rows[0][1].endswith("fits no card")
    assert rows[1][1].startswith("in batches of 100: ")


def test_a_model_that_is_not_whole_is_said(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    figures = memory(job(tmp_path / "model", tmp_path))
    assert "no transformer: looked for" in figures["error"]
    assert memory_rows(figures) == [("memory", f"not known: {figures['error']}")]


def test_where_memory_is_short_a_cpu_keeps_its_matrices_narrow(
    dev: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dtypes, "native_dtype", lambda device: torch.float32)
    figures = memory(make_job(tmp_path, model={"uri": str(dev)}, workers={"num_gpus": 0}))
    assert figures["total_bytes"] > 60 * GB
    assert 30 * GB < figures["least_bytes"] < 45 * GB
    config = make_job(tmp_path, model={"uri": str(dev), "dtype": "float32"}, workers={"num_gpus": 0})
    figures = memory(config)
    assert figures["least_bytes"] == figures["total_bytes"]
