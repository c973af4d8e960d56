"""LoRAs in whole jobs: the LoRAs of each row, the number of exchanges, and the output."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from flux_batch import FluxImagePipeline
from flux_batch.config.schema import JobConfig, ModelConfig
from flux_batch.engine.local import LocalEngine
from flux_batch.errors import CheckpointError, Interrupted, PlanMismatch
from flux_batch.images import read_provenance
from flux_batch.job import run, with_absolute_paths
from flux_batch.report.progress.status import read_status
from flux_batch.report.summary import RunReport
from flux_batch.storage.store import Store
from helpers.fakes import FakePipeline, fake_image
from helpers.job_files import data_files, make_job, metadata
from helpers.lora_files import random_factors, write_lora
from helpers.tiny_flux import TinyFlux, make_tiny_repository

STYLE = {"uri": "/loras/style.safetensors", "scale": 0.8, "name": "style"}
DETAIL = {"uri": "s3://bucket/detail.safetensors"}
STYLE_PAIR, DETAIL_PAIR = ("/loras/style.safetensors", 0.8), ("s3://bucket/detail.safetensors", 1.0)


def render(
    config: JobConfig, pipeline: FakePipeline | None = None, engine: LocalEngine | None = None
) -> tuple[RunReport, FakePipeline]:
    made = pipeline or FakePipeline()
    return run(config, engine=engine or LocalEngine(), make_pipeline=lambda model: made), made


def test_rows_without_a_lora_have_all_of_the_job(tmp_path: Path) -> None:
    _, pipeline = render(make_job(tmp_path, model={"loras": [STYLE, DETAIL]}))

    assert pipeline.lora_calls == [[STYLE_PAIR, DETAIL_PAIR]]


def test_rows_are_batched_by_lora_and_exchanged_once_each(tmp_path: Path) -> None:
    choices = [None, "style", "", "/else/x.safetensors", None, "style", "", "/else/x.safetensors"]
    rows = [{"prompt": f"p{at}", "lora": lora} for at, lora in enumerate(choices)]
    config = make_job(tmp_path, rows, model={"loras": [STYLE, DETAIL]}, output={"shard_size": 8})

    report, pipeline = render(config)

    assert report.num_failed == 0
    assert pipeline.lora_calls == [[STYLE_PAIR, DETAIL_PAIR], [STYLE_PAIR], [], [("/else/x.safetensors", 1.0)]]
    assert sorted(pipeline.calls) == [["p0", "p4"], ["p1", "p5"], ["p2", "p6"], ["p3", "p7"]]
    assert [(row["lora"], row["lora_scale"]) for row in metadata(config)][:4] == [
        ("style (0.8), s3://bucket/detail.safetensors (1)", None),
        ("style", 0.8),
        ("", None),
        ("/else/x.safetensors", 1.0),
    ]


def test_loras_are_exchanged_no_more_often_for_other_sizes(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{at}", "width": 16 + 16 * (at % 2), "lora": ["style", ""][at // 2 % 2]} for at in range(8)]
    config = make_job(tmp_path, rows, model={"loras": [STYLE]}, output={"shard_size": 8})

    assert len(render(config)[1].lora_calls) == 2


@pytest.mark.parametrize("batch_size", [1, 3])
def test_images_do_not_depend_on_order_and_batches(tmp_path: Path, batch_size: int) -> None:
    choices = [{"lora": "style", "lora_scale": scale / 4} for scale in range(4)] + [
        {"lora": lora, "lora_scale": None} for lora in ("", None)
    ]
    rows = [{"id": str(at), "prompt": f"p{at}", "seed": at, **choices[at % 6]} for at in range(18)]
    shuffled = random.Random(1).sample(rows, len(rows))
    found = []

    for name, given in (("a", rows), ("b", shuffled)):
        config = make_job(tmp_path / name, given, model={"loras": [STYLE, DETAIL]}, workers={"batch_size": batch_size})
        render(config)
        made = {row["id"]: (row["lora"], row["lora_scale"]) for row in metadata(config)}
        found.append((made, {row["id"]: pixels(config, row) for row in metadata(config)}))

    assert found[0] == found[1]


def pixels(config: JobConfig, row: dict[str, Any]) -> bytes:
    """Read an image of a run in the layout `webdataset`."""
    import io
    import tarfile

    with tarfile.open(Path(config.output.uri) / row["file_name"]) as tar:
        member = tar.extractfile(f"{row['key']}.png")
        assert member is not None
        with Image.open(io.BytesIO(member.read())) as image:
            return np.asarray(image).tobytes()


def test_a_job_without_loras_does_not_know_the_word(tmp_path: Path) -> None:
    config = make_job(tmp_path)

    _, pipeline = render(config)

    assert pipeline.lora_calls == []
    row = metadata(config)[0]
    assert (row["lora"], row["lora_scale"]) == (None, None)
    image = fake_image("image 0", seed=row["seed"], width=16, height=16, num_inference_steps=2)
    assert pixels(config, row) == image.tobytes()


def test_a_lora_that_cannot_be_read_fails_its_rows_alone(tmp_path: Path) -> None:
    choices = ["style", "/missing.safetensors", "stile", "style", "/missing.safetensors", "style"]
    scales = [None, None, None, None, None, "a lot"]
    rows = [
        {"prompt": f"p{at}", "lora": lora, "lora_scale": scale}
        for at, (lora, scale) in enumerate(zip(choices, scales, strict=True))
    ]
    config = make_job(tmp_path, rows, model={"loras": [STYLE]}, output={"shard_size": 8})

    report, _ = render(config)

    assert (report.num_images, report.num_failed) == (6, 4)
    found = metadata(config)
    assert [row["status"] == "success" for row in found] == [True, False, False, True, False, False]
    assert found[1]["error_type"] == "RowError"
    assert found[1]["error_message"] == "lora /missing.safetensors: /missing.safetensors is not there"
    assert found[1]["lora"] == "/missing.safetensors"
    assert "lora stile: neither a LoRA of the job (which has style)" in found[2]["error_message"]
    assert "lora_scale = 'a lot': must be a number" in found[5]["error_message"]


def test_a_lora_of_the_job_that_cannot_be_read_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="missing"):
        render(make_job(tmp_path, model={"loras": [{"uri": "/missing.safetensors"}]}))


def test_a_storage_that_is_away_costs_no_rows(tmp_path: Path) -> None:
    config = make_job(tmp_path, [{"prompt": "x", "lora": "s3://away/x.safetensors"}])

    with pytest.raises(Interrupted, match="the store is away"):
        render(config, engine=LocalEngine(outage_s=0.02, backoff_s=0.01))

    assert read_status(Store(config.output.uri))["num_images"] == 0


def test_loras_are_of_the_identity_of_a_run(tmp_path: Path) -> None:
    rows = [{"prompt": "x"}]
    render(make_job(tmp_path, rows, model={"loras": [STYLE]}))

    render(make_job(tmp_path, rows, model={"loras": [STYLE]}))
    for changed in ([{**STYLE, "scale": 0.7}], [STYLE, DETAIL], [], [{**STYLE, "name": "other"}]):
        with pytest.raises(PlanMismatch, match=r"model\.loras"):
            render(make_job(tmp_path, rows, model={"loras": changed}))


def test_relative_paths_of_loras_mean_the_folder_of_the_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = with_absolute_paths(make_job(tmp_path, model={"loras": [{"uri": "loras/a.safetensors"}, DETAIL]}))

    assert [(lora.name, lora.uri) for lora in config.model.loras] == [
        ("loras/a.safetensors", str(tmp_path / "loras/a.safetensors")),
        (DETAIL["uri"], DETAIL["uri"]),
    ]


def test_images_say_their_lora(tmp_path: Path) -> None:
    config = make_job(tmp_path, [{"prompt": "x"}], model={"loras": [STYLE]}, output={"format": "files"})
    render(config)

    (row,) = metadata(config)
    inside = read_provenance((tmp_path / "out" / row["file_name"]).read_bytes())
    assert (inside["lora"], inside["lora_scale"]) == ("style", 0.8)


# With a real model


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_repository(tmp_path_factory.mktemp("models") / "tiny", TinyFlux(seed=2))


def tiny_pipeline(model: ModelConfig) -> FluxImagePipeline:
    return FluxImagePipeline.from_pretrained(model.uri, torch_dtype=torch.float32, device="cpu")


def test_end_to_end_on_a_tiny_model(tmp_path: Path, repository: Path) -> None:
    shapes = {"transformer_blocks.0.attn.to_q": (32, 32), "single_transformer_blocks.1.proj_mlp": (128, 32)}
    for seed, name in enumerate("ab"):
        write_lora(tmp_path / f"{name}.safetensors", random_factors(shapes, seed), prefix="transformer.")
    (tmp_path / "bad.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    loras = [
        {"uri": str(tmp_path / "a.safetensors"), "name": "a"},
        {"uri": str(tmp_path / "b.safetensors"), "scale": 0.5},
    ]
    choices = [
        {},
        {"lora": "a"},
        {"lora": ""},
        {"lora": "b.safetensors", "lora_scale": 2.0},
        {"lora": "bad.safetensors"},
    ]
    rows = [{"prompt": "a cat", "seed": 3, "lora": None, "lora_scale": None, **choices[at % 5]} for at in range(10)]
    sections: dict[str, Any] = {
        "model": {"uri": str(repository), "loras": loras},
        "sampling": {"width": 32, "height": 32},
    }
    config = make_job(tmp_path, rows, **sections)

    report = run(config, engine=LocalEngine(), make_pipeline=tiny_pipeline)

    assert (report.num_images, report.num_failed) == (10, 2)
    found = metadata(config)
    made = [pixels(config, row) if row["status"] == "success" else row["error_message"] for row in found]
    assert made[:4] == made[5:9]
    assert len(set(made[:4])) == 4
    assert "bad.safetensors is not a LoRA: its keys are none" in made[4]
    pipe = tiny_pipeline(config.model)
    call: dict[str, Any] = {"seed": 3, "height": 32, "width": 32, "num_inference_steps": 2, "output_type": "np"}
    for at, pairs in enumerate(([("a", 1.0), ("b", 0.5)], [("a", 1.0)], [], [("b", 2.0)])):
        pipe.set_loras([(tmp_path / f"{name}.safetensors", scale) for name, scale in pairs])
        assert np.array_equal(pipe("a cat", **call), np.frombuffer(made[at], np.uint8).reshape(32, 32, 3)), at

    # The same job, resumed after a kill, ends in the same bytes.
    whole = data_files(tmp_path / "out")
    (tmp_path / "out/_run/commits/00001.json").unlink()
    for path in [*(tmp_path / "out").rglob("00001.*"), tmp_path / "out/_SUCCESS"]:
        path.unlink()
    run(config, engine=LocalEngine(), make_pipeline=tiny_pipeline)
    assert data_files(tmp_path / "out") == whole
    assert json.loads((tmp_path / "out/_run/report.json").read_text())["num_images"] == 10
