"""A rough estimate of a plan's images, bytes and device hours, with its assumptions stated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from flux_batch.config.schema import JobConfig
from flux_batch.download.models import find_local_model
from flux_batch.errors import FluxBatchError, bytes_text, count_of, number_text
from flux_batch.model.checkpoint.detect import find_parts, read_shapes
from flux_batch.model.footprint import DEV_SIZE, TransformerSize, controlnet_flops, step_flops, transformer_size
from flux_batch.model.params import counts_at, steps_run
from flux_batch.plan.memory import (
    TEXT_TOKENS,
    controlnet_shapes,
    memory,
    memory_rows,
    prompt_tokens,
    reference_tokens,
)
from flux_batch.plan.plan import Plan
from flux_batch.sampling_params import num_image_tokens

# A round number between published figures of eager and compiled bf16 pipelines on an H100; not measured here.
ASSUMED_FLOPS = 450e12
# Fewer hours than this are not shown: the assumed speed is too rough for them.
_LEAST_HOURS = 0.05
# The metadata columns that determine the work of an image.
_OF_WORK = ("width", "height", "num_inference_steps", "denoising_strength", "cfg_scale")
# Bytes per pixel, from photographs; JPEG and WebP at quality 95.
_BYTES_PER_PIXEL = {"png": 1.5, "jpeg": 0.5, "webp": 0.35}


def estimate(config: JobConfig, plan: Plan, bytes_per_image: float | None = None) -> dict[str, Any]:
    """Return an estimate of a run from the job's defaults; rows are not read.

    bytes_per_image: the mean of the run's existing images; None estimates it from their size in pixels.
    """
    sampling = config.sampling
    num_images = plan.num_prompts * sampling.num_images_per_prompt
    pixels = sampling.width * sampling.height
    size = _size_of_model(config)
    each = bytes_per_image or (1 + config.output.sources) * pixels * _BYTES_PER_PIXEL[config.output.image.type]
    tries = config.quality.expected_tries if config.quality else 1.0
    flops = _image_flops(config, size)
    return {
        "num_files": len(plan.shards.files),
        "num_prompts": plan.num_prompts,
        "num_images": num_images,
        "num_shards": len(plan.shards),
        "output_bytes": round(num_images * each),
        "is_of_samples": bytes_per_image is not None,
        "steps_per_image": _steps_of(config),
        "pflop_per_image": float(f"{flops / 1e15:.4g}"),
        "is_counted_for_dev": size is None,
        **({"tries_per_image": round(tries, 3)} if config.quality else {}),
        "device_hours": round(num_images * tries * flops / ASSUMED_FLOPS / 3600, 2),
        "memory": memory(config),
        "notes": list(plan.notes),
    }


def pflop_per_image(config: JobConfig) -> float:
    """Return the work of an image with the job's defaults, in 10^15 floating point operations."""
    return _image_flops(config, _size_of_model(config)) / 1e15


def pflop_of_rows(config: JobConfig, rows: Iterable[Mapping[str, Any]]) -> float:
    """Return the mean work of the images in metadata rows, in 10^15 floating point operations; 0 without any."""
    size = _size_of_model(config)
    made = Counter(tuple(row[name] for name in _OF_WORK) for row in rows if row["status"] == "success")
    flops = 0.0
    for values, number in made.items():
        sampling = config.sampling.model_copy(update=dict(zip(_OF_WORK, values, strict=True)))
        flops += number * _image_flops(config.model_copy(update={"sampling": sampling}), size)
    return flops / max(1, made.total()) / 1e15


def _image_flops(config: JobConfig, size: TransformerSize | None) -> float:
    sampling = config.sampling
    passes = _steps_of(config) * (2 if sampling.params().uses_cfg else 1)
    num_tokens = num_image_tokens(sampling.width, sampling.height) + reference_tokens(config)
    num_texts = (sampling.t5_sequence_length or TEXT_TOKENS) + prompt_tokens(config)
    flops = passes * step_flops(size or DEV_SIZE, num_tokens, num_texts)
    return flops + _controlnets_flops(config, size or DEV_SIZE, _steps_of(config))


def _steps_of(config: JobConfig) -> int:
    sampling = config.sampling
    return steps_run(sampling.num_inference_steps, sampling.denoising_strength, sampling.sigma_shift)


def estimate_rows(config: JobConfig, figures: dict[str, Any], *, has_speed: bool = False) -> list[tuple[str, str]]:
    """Return an estimate as rows of a table; has_speed leaves out the hours at an assumed speed."""
    sampling = config.sampling
    hours = f": about {number_text(figures['device_hours'])} GPU-hours at an assumed {ASSUMED_FLOPS / 1e12:g} TFLOP/s"
    if has_speed or not config.workers.num_gpus or figures["device_hours"] < _LEAST_HOURS:
        hours = ""
    for_dev = " for FLUX.1-dev" if figures["is_counted_for_dev"] else ""
    of_samples = ", estimated from the images that exist" if figures["is_of_samples"] else ""
    return [
        (
            "images",
            f"{figures['num_images']} of {sampling.width} x {sampling.height}, "
            f"{_steps(sampling.num_inference_steps, figures['steps_per_image'])}, unless rows set other values",
        ),
        *_quality_rows(config, figures),
        ("shards", f"{figures['num_shards']}, each of up to {count_of(config.output.shard_size, 'prompt')}"),
        (
            "bytes",
            f"about {bytes_text(figures['output_bytes'])} of {config.output.image.type} in {config.output.format}"
            f"{of_samples}",
        ),
        ("compute", f"{figures['pflop_per_image']:g} PFLOP an image{for_dev}{hours}"),
        *memory_rows(figures["memory"], has_cards=config.workers.num_gpus > 0),
    ]


def job_rows(config: JobConfig) -> list[tuple[str, str]]:
    """Return the name, model, output and workers of a job as rows of a table."""
    workers = config.workers
    return [
        ("job", config.name),
        ("model", f"{config.model.uri}, dtype {config.model.dtype}"),
        ("output", config.output.uri),
        (
            "workers",
            f"up to {workers.max}, each with {workers.num_gpus:g} GPU and {workers.num_cpus:g} CPU, in batches of "
            f"{workers.batch_size}",
        ),
    ]


def prompt_rows(config: JobConfig, plan: Plan) -> list[tuple[str, str]]:
    """Return the prompts and columns of a plan as rows of a table."""
    files = f" in {count_of(len(plan.shards.files), 'file')}" if config.prompts.uri else ""
    rows = [("prompts", f"{plan.num_prompts}{files}"), *(("", note) for note in plan.notes)]
    if columns := config.prompts.columns:
        rows.append(("columns", ", ".join(f"{field} is {column!r}" for field, column in columns.items())))
    return rows


def _quality_rows(config: JobConfig, figures: dict[str, Any]) -> list[tuple[str, str]]:
    quality = config.quality
    if quality is None:
        return []
    assumed = "" if quality.accept_rate else "; quality.accept_rate would say how many are accepted"
    return [
        (
            "quality",
            f"{quality.score} of at least {quality.at_least:g}: {figures['tries_per_image']:g} tries an image, "
            f"at most {quality.max_tries}{assumed}",
        )
    ]


def _size_of_model(config: JobConfig) -> TransformerSize | None:
    """Return the size of the job's transformer; None if the model is missing here or incomplete."""
    model = config.model
    if model.pipeline:
        return None
    try:
        source = find_local_model(model.uri, model.storage_options)
        return transformer_size(read_shapes(find_parts(source))["transformer"]) if source else None
    except (FluxBatchError, ValueError, KeyError, OSError):
        return None


def _controlnets_flops(config: JobConfig, base: TransformerSize, steps: int) -> int:
    """Return the operations of an image's ControlNets, at the steps that use them; 0 if one is not here."""
    sampling = config.sampling
    tokens = num_image_tokens(sampling.width, sampling.height), sampling.t5_sequence_length or TEXT_TOKENS
    try:
        shapes, total = controlnet_shapes(config), 0
        for net in config.model.controlnets:
            num_steps = sum(counts_at(step, steps, net.start, net.end) for step in range(steps)) if net.scale else 0
            total += num_steps * controlnet_flops(shapes[net.uri], base, *tokens)
        return total
    except (FluxBatchError, ValueError, KeyError, OSError):
        return 0


def _steps(requested: int, run: int) -> str:
    return count_of(run, "step") if run == requested else f"{run} of {count_of(requested, 'step')}"
