"""The estimated cost in a plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flux_batch.config.schema import JobConfig
from flux_batch.plan.estimate import ASSUMED_FLOPS, estimate, estimate_rows
from flux_batch.plan.plan import make_plan
from helpers.job_files import make_job

SIZE = {"width": 1024, "height": 1024, "num_inference_steps": 28}


def job(folder: Path, **sampling: Any) -> JobConfig:
    rows = [{"prompt": str(number)} for number in range(10)]
    return make_job(folder, rows, model={"uri": str(folder / "nowhere")}, sampling=SIZE | sampling)


def figures_of(config: JobConfig) -> dict[str, Any]:
    return estimate(config, make_plan(config.prompts, config.output.shard_size))


def test_a_step_at_1024_costs_what_the_blocks_multiply(tmp_path: Path) -> None:
    figures = figures_of(job(tmp_path))
    assert figures["num_images"] == 10
    assert figures["pflop_per_image"] == pytest.approx(28 * 74.4e-3, rel=1e-3)
    assert figures["device_hours"] == pytest.approx(10 * 28 * 74.4e12 / ASSUMED_FLOPS / 3600, abs=0.005)


@pytest.mark.parametrize(
    ("sampling", "share", "words"),
    [
        ({"denoising_strength": 0.5}, 0.5, "14 of 28 steps"),
        ({"denoising_strength": 0.3}, 9 / 28, "9 of 28 steps"),  # 8.4 steps, rounded as diffusers does
        ({"denoising_strength": 0.5, "sigma_shift": 3.0}, 1.0, "28 steps"),  # DiffSynth-Studio runs them all
        ({"cfg_scale": 2.0}, 2.0, "28 steps"),
        ({"cfg_scale": 0.5, "denoising_strength": 0.5}, 1.0, "14 of 28 steps"),
        ({"num_inference_steps": 7}, 0.25, "7 steps"),
        ({"num_inference_steps": 1}, 1 / 28, "1 step"),
    ],
)
def test_passes_are_counted_as_they_are_run(tmp_path: Path, sampling: dict[str, Any], share: float, words: str) -> None:
    whole, config = figures_of(job(tmp_path / "a")), job(tmp_path / "b", **sampling)
    figures = figures_of(config)
    assert figures["pflop_per_image"] == pytest.approx(whole["pflop_per_image"] * share, abs=1e-3)
    assert f"of 1024 x 1024, {words}, unless" in dict(estimate_rows(config, figures))["images"]


def test_several_images_of_a_prompt_all_count(tmp_path: Path) -> None:
    one, three = figures_of(job(tmp_path / "a")), figures_of(job(tmp_path / "b", num_images_per_prompt=3))
    assert (three["num_prompts"], three["num_images"]) == (10, 30)
    assert three["output_bytes"] == 3 * one["output_bytes"]


def test_a_model_that_is_not_here_costs_the_memory_lines_alone(tmp_path: Path) -> None:
    config = job(tmp_path)
    assert dict(estimate_rows(config, figures_of(config)))["memory"].startswith("not known: ")
