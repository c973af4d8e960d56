"""What a plan will cost, before a GPU is rented: images, bytes, device hours. Rough, and says what it assumes."""

from __future__ import annotations

from typing import Any

from flux_batch.config.schema import JobConfig
from flux_batch.model.params import steps_run
from flux_batch.plan.memory import format_memory, memory
from flux_batch.plan.plan import Plan

# FLUX.1 transformer: 57 blocks of hidden size 3072; forward FLOPs of a block over S tokens are 24 h^2 S + 4 S^2 h,
# a multiply-add counting 2. At 1024 x 1024 with 512 text tokens this gives 74.4 TFLOP a step.
NUM_BLOCKS = 57
HIDDEN = 3072
DEV_TEXT_TOKENS = 512
# A round figure between what eager and compiled bf16 pipelines are published to reach on an H100; not measured here.
ASSUMED_FLOPS = 450e12
# Bytes a pixel, from photographs: PNG is lossless, JPEG and WebP at quality 95.
BYTES_PER_PIXEL = {"png": 1.5, "jpeg": 0.5, "webp": 0.35}


def estimate(config: JobConfig, plan: Plan) -> dict[str, Any]:
    """Estimate a run from its defaults; rows that override size, steps, strength or count are not looked at."""
    sampling = config.sampling
    num_images = plan.num_prompts * sampling.num_images_per_prompt
    pixels = sampling.width * sampling.height
    steps = steps_run(sampling.num_inference_steps, sampling.denoising_strength, sampling.sigma_shift)
    passes = steps * (2 if sampling.params().uses_cfg else 1)
    tokens = pixels // 256 + (sampling.t5_sequence_length or DEV_TEXT_TOKENS)
    flops = passes * NUM_BLOCKS * (24 * HIDDEN**2 * tokens + 4 * tokens**2 * HIDDEN)
    return {
        "num_files": len({shard.name for shard in plan.shards}),
        "num_prompts": plan.num_prompts,
        "num_images": num_images,
        "num_shards": len(plan.shards),
        "output_bytes": round(num_images * pixels * BYTES_PER_PIXEL[config.output.image.type]),
        "steps_per_image": steps,
        "pflop_per_image": round(flops / 1e15, 3),
        "device_hours": round(num_images * flops / ASSUMED_FLOPS / 3600, 2),
        "memory": memory(config),
    }


def format_estimate(config: JobConfig, figures: dict[str, Any]) -> str:
    """Lay an estimate out for people."""
    sampling = config.sampling
    return "\n".join(
        [
            f"prompts  {figures['num_prompts']} in {figures['num_files']} file(s)",
            f"images   {figures['num_images']} of {sampling.width} x {sampling.height}, "
            f"{_steps(sampling.num_inference_steps, figures['steps_per_image'])}, unless rows say otherwise",
            f"shards   {figures['num_shards']} of up to {config.output.shard_size} prompts",
            f"output   about {_size(figures['output_bytes'])} as {config.output.image.type}, {config.output.format}",
            f"compute  {figures['pflop_per_image']:g} PFLOP an image for FLUX.1-dev: about "
            f"{figures['device_hours']:g} GPU-hours at an assumed {ASSUMED_FLOPS / 1e12:g} TFLOP/s",
            *format_memory(figures["memory"]),
        ]
    )


def _steps(asked: int, run: int) -> str:
    return f"{run} steps" if run == asked else f"{run} of {asked} steps"


def _size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"
