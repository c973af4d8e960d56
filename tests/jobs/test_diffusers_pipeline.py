"""Tiny random models of two other families in jobs with `jobs/diffusers_pipeline.py`."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from flux_batch.config.schema import JobConfig
from flux_batch.demo.paths import demo_model_folder
from flux_batch.engine.local import LocalEngine
from flux_batch.engine.stop import Stop
from flux_batch.errors import Interrupted, JobError
from flux_batch.job import run
from flux_batch.report.verify import verify
from flux_batch.storage.store import Store
from helpers.job_files import data_files, make_job, metadata

diffusers = pytest.importorskip("diffusers")
ROOT = Path(__file__).parents[2]
PIPELINE = "jobs.diffusers_pipeline:DiffusersPipeline"
ROWS: list[dict[str, Any]] = [
    {"prompt": "a red cat", "seed": 7, "embedded_guidance": 3.0},
    {"prompt": "a blue dog", "seed": 8, "embedded_guidance": None},
    {"prompt": "a lake", "seed": 9, "embedded_guidance": 3.0},
    {"prompt": "a hill", "seed": None, "embedded_guidance": None},
]


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def autoencoder() -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        latent_channels=4,
    )


def stable_diffusion() -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(demo_model_folder() / "tokenizer")
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
    )
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    return diffusers.StableDiffusionPipeline(
        vae=autoencoder(),
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def pixart() -> Any:
    from transformers import AutoTokenizer, T5Config, T5EncoderModel

    tokenizer = AutoTokenizer.from_pretrained(demo_model_folder() / "tokenizer_2")
    text = T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=32,  # the pipeline needs a known size
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=16,
        caption_channels=16,
    )
    return diffusers.PixArtSigmaPipeline(
        tokenizer=tokenizer,
        text_encoder=T5EncoderModel(text),
        vae=autoencoder(),
        transformer=transformer,
        scheduler=diffusers.DDIMScheduler(clip_sample=False),
    )


def job(folder: Path, rows: list[dict[str, Any]] = ROWS, *, uri: Path, **sections: Any) -> JobConfig:
    return make_job(
        folder,
        rows,
        output={"shard_size": 2, "uri": str(folder / "out")},
        model={"uri": str(uri), "pipeline": PIPELINE},
        failures={"max_ratio": 1.0},
        **{"sampling": {"width": 32, "height": 32, "num_inference_steps": 2}, **sections},
    )


def image_of(config: JobConfig, key: str) -> np.ndarray[Any, Any]:
    with tarfile.open(Path(config.output.uri, f"train/{key[:5]}.tar")) as tar:
        data = tar.extractfile(f"{key}.png").read()  # type: ignore[union-attr]
    return np.asarray(Image.open(io.BytesIO(data)))


@pytest.mark.parametrize(("family", "guidance"), [(stable_diffusion, 7.5), (pixart, 4.5)])
def test_each_row_is_made_once_as_diffusers_makes_it(
    tmp_path: Path, family: Callable[[], Any], guidance: float
) -> None:
    torch.manual_seed(0)
    family().save_pretrained(tmp_path / "model", safe_serialization=True)
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "model")  # loading turns off dropout
    pipe.set_progress_bar_config(disable=True)
    config = job(tmp_path, [*ROWS, *ROWS], uri=tmp_path / "model")

    stop = Stop()
    with pytest.raises(Interrupted):
        run(config, engine=_Stopping(stop), stop=stop)
    report = run(config, engine=LocalEngine())

    rows = metadata(config)
    assert [row["error_message"] for row in rows] == [None] * 8
    assert (report.num_images, report.num_failed, report.is_complete) == (8, 0, True)
    assert 0 < report.num_new_images < 8
    assert report.model["pipeline"] == PIPELINE
    assert verify(Store(config.output.uri)).problems == []
    assert [row["embedded_guidance"] for row in rows[:2]] == [3.0, guidance]
    theirs = pipe(
        prompt="a lake",
        generator=[torch.Generator("cpu").manual_seed(9)],
        width=32,
        height=32,
        num_inference_steps=2,
        guidance_scale=3.0,
        output_type="np",
    ).images[0]
    ours = image_of(config, "000010000").astype(int)
    assert np.abs(ours - (theirs * 255).round()).max() <= 1
    assert np.ptp(ours) > 0

    whole = config.model_copy(update={"output": config.output.model_copy(update={"uri": str(tmp_path / "whole")})})
    run(whole, engine=LocalEngine())
    assert data_files(tmp_path / "whole") == data_files(tmp_path / "out")


def test_a_setting_that_the_pipeline_does_not_know_is_refused_by_name(tmp_path: Path) -> None:
    stable_diffusion().save_pretrained(tmp_path / "model", safe_serialization=True)
    strange = [{"prompt": "a", "sigma_shift": 3.0, "input_image": "x.png"}, {"prompt": "b"}]
    rows = [*strange, *[{"prompt": "c", "denoising_strength": None}]]
    refused = job(tmp_path / "rows", rows, uri=tmp_path / "model")
    run(refused, engine=LocalEngine())
    assert [row["status"] for row in metadata(refused)] == ["failed", "success", "success"]
    assert "sigma_shift: the pipeline of the job does not know it" in metadata(refused)[0]["error_message"]

    for section, values in {"sampling": {"tiled": True}, "model": {"step_cache": 0.1}}.items():
        (name,) = values
        wrong = refused.model_copy(update={section: getattr(refused, section).model_copy(update=values)})
        with pytest.raises(JobError, match=rf"{section}\.{name}: the pipeline .* does not know it.*num_inf"):
            run(wrong.model_copy(update={"output": _elsewhere(wrong, tmp_path / name)}), engine=LocalEngine())


def _elsewhere(config: JobConfig, folder: Path) -> Any:
    return config.output.model_copy(update={"uri": str(folder)})


class _Stopping(LocalEngine):
    """An engine that stops after its first shard."""

    def __init__(self, stop: Stop) -> None:
        super().__init__()
        self._stop_now = stop

    def run(self, factory: Any, shards: Any, stop: Stop, *rest: Any) -> Any:
        for result in super().run(factory, shards, stop, *rest):
            yield result
            self._stop_now.request("a test")
