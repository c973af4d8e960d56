"""Pipelines of users: their declarations, their arguments, and checks of their results."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from flux_batch.config.schema import JobConfig, ModelConfig
from flux_batch.engine.local import LocalEngine
from flux_batch.errors import FluxBatchError, JobError
from flux_batch.job import run
from flux_batch.pipeline.checked import CheckedPipeline, open_pipeline
from flux_batch.worker.protocol import OwnPipeline
from helpers.job_files import make_job, metadata

NAME = "helpers.own_pipelines"


def pipeline_job(folder: Path, name: str, rows: list[dict[str, Any]] | None = None, **model: Any) -> JobConfig:
    model = {"uri": "any", "pipeline": f"{NAME}:{name}"} | model
    return make_job(folder, rows or [{"prompt": "a"}, {"prompt": "b"}], model=model, failures={"max_ratio": 1.0})


def test_a_pipeline_of_ones_own_makes_the_images_of_a_job(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "seed": 1}, {"prompt": "b", "seed": 2}, {"prompt": "[refuse]", "seed": 3}]
    config = pipeline_job(tmp_path, "Noise", rows, pipeline_options={"grain": 100})
    report = run(config, engine=LocalEngine())
    assert (report.num_images, report.num_failed) == (3, 1)
    assert metadata(config)[2]["error_message"] == "it will not"
    assert metadata(config)[0]["t5_sequence_length"] is None
    assert (report.model["pipeline"], report.model["pipeline_options"]) == (f"{NAME}:Noise", {"grain": 100})
    with pytest.raises(JobError, match="pipeline_options"):
        run(pipeline_job(tmp_path, "Noise", rows), engine=LocalEngine())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("Missing", {}, r"own_pipelines:Missing: cannot be imported"),
        ("NOTHING", {}, r"must be a class or a function that returns a pipeline"),
        ("Noise", {"grian": 1}, r"grian.*its options are grain \(model.pipeline_options\)"),
        ("Broken", {}, r"own_pipelines:Broken: cannot be opened: ValueError: no weights"),
        ("Silent", {}, r"declares no settings"),
        ("Misspelt", {}, r"'num_inference_step' is not a setting of a job.*num_inference_steps"),
    ],
)
def test_one_that_cannot_be_opened_ends_the_job_in_a_sentence(
    tmp_path: Path, name: str, options: dict[str, Any], message: str
) -> None:
    config = pipeline_job(tmp_path, name, pipeline_options=options)
    with pytest.raises(JobError, match=message):
        run(config, engine=LocalEngine())
    assert not (tmp_path / "out/train").exists()


def test_a_setting_that_is_not_known_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    config = pipeline_job(tmp_path, "Noise", step_cache=0.1)
    with pytest.raises(JobError, match=r"model\.step_cache: the pipeline .*Noise does not know it.*height, num_inf"):
        run(config, engine=LocalEngine())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (None, "returned a NoneType: must be a list of images"),
        ([], "returned 0 images for 1 prompts"),
        ([np.zeros((16, 16, 3))], r"returned float64 \[16, 16, 3\]: must be uint8 \[16, 32, 3\]"),
        ([np.zeros((16, 16, 3), np.uint8)], r"returned uint8 \[16, 16, 3\]"),
    ],
)
def test_a_wrong_result_is_said(made: Any, message: str) -> None:
    class Wrong:
        settings: frozenset[str] = frozenset()

        def __call__(self, prompt: Any, **given: Any) -> Any:
            assert given == {"seed": [1], "width": 32, "height": 16}
            return made

    own: OwnPipeline = Wrong()
    pipeline = CheckedPipeline(own, ModelConfig(uri="x", pipeline="a:b"), "cpu")
    with pytest.raises(FluxBatchError, match=message):
        pipeline(["p"], seed=[1], output_type="np", width=32, height=16, cfg_scale=[1.0], num_inference_steps=3)


def test_an_image_that_found_no_memory_costs_no_other(tmp_path: Path) -> None:
    """Somebody else may have had the memory for a while, and the pipeline makes no tiles."""
    config = pipeline_job(tmp_path, "Short", [{"prompt": each} for each in ("a", "[short]", "c", "d")])
    report = run(config, engine=LocalEngine())
    rows = metadata(config)
    assert report.num_failed == 1
    assert (rows[1]["error_type"], rows[1]["error_message"]) == ("OutOfMemory", "CUDA out of memory")


def test_the_first_precision_is_that_of_the_run(tmp_path: Path) -> None:
    opened = open_pipeline(ModelConfig(uri="x", pipeline=f"{NAME}:Noise"), "cpu")
    assert opened.precision == {"dtype": "float32", "quantization": "none"}
    assert opened.kernels.device.startswith("cpu")
    named = SimpleNamespace(settings={"loras"}, precision={"dtype": "float16"}, default_guidance=7)
    checked = CheckedPipeline(named, ModelConfig(uri="x", pipeline="a:b"), "cpu")
    assert (checked.precision["dtype"], checked.default_guidance) == ("float16", 7.0)
