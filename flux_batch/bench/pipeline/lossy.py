"""The benchmark of lossy modes: seconds, difference from the exact images, facts of captions that still hold."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from flux_batch.bench.figures import number, table
from flux_batch.bench.pipeline.pipeline import GUIDANCE, Call
from flux_batch.bench.source import Source
from flux_batch.demo.world.captions import SCORED_SEED, Caption, captions
from flux_batch.demo.world.scorer import score_all
from flux_batch.errors import InvalidSetting
from flux_batch.sampling_params import Quantization

if TYPE_CHECKING:
    from flux_batch.pipeline.pipeline import FluxImagePipeline


class Mode(NamedTuple):
    """A lossy mode, or the exact one."""

    quantization: Quantization
    step_cache: float

    def __str__(self) -> str:
        parts: list[str] = [self.quantization] if self.quantization != "none" else []
        parts += [f"step cache {self.step_cache:g}"] if self.step_cache else []
        return ", ".join(parts) or "exact"


EXACT = Mode("none", 0.0)
_MODES: tuple[Mode, ...] = (
    EXACT,
    *(Mode("none", threshold) for threshold in (0.05, 0.1, 0.2)),
    Mode("fp8", 0.0),
    Mode("fp8_matmul", 0.0),
    Mode("fp8_matmul", 0.1),
)


@dataclass(frozen=True, slots=True)
class _ModeImages:
    """The images of a mode, and the seconds for each image."""

    images: list[Any]  # PIL
    seconds: float


def bench_lossy(source: Source, call: Call, num_images: int, modes: Sequence[Mode] = _MODES) -> dict[str, Any]:
    """Make the same images in every mode, and compare the other modes with the first.

    The prompts are captions of the demo's world, so that images can be read back, unless the weights are random. A mode
    that the model or the device does not support is left out, with the reason. Raises: CheckpointError.
    """
    source = replace(source, dtype=source.dtype_name)  # the same dtype for all modes
    held_out = list(captions(num_images, SCORED_SEED, held_out=True))
    results: dict[Mode, _ModeImages] = {}
    missing: dict[Mode, str] = {}
    for quantization in dict.fromkeys(mode.quantization for mode in modes):
        same_model = [mode for mode in modes if mode.quantization == quantization]
        try:
            results |= _images_of(replace(source, quantization=quantization), same_model, held_out, call)
        except InvalidSetting as error:
            missing |= dict.fromkeys(same_model, str(error))
        gc.collect()  # a pipeline has reference cycles, and a device may have no room for two models
    exact = results[modes[0]]
    reads = None if source.random_weights else held_out
    return {
        "benchmark": "lossy",
        **source.describe(),
        "call": {key: getattr(call, key) for key in Call.__slots__},
        "num_images": num_images,
        "modes": [{"mode": str(mode), **_describe_mode(images, exact, reads)} for mode, images in results.items()],
        "missing": {str(mode): reason for mode, reason in missing.items()},
    }


def _images_of(
    source: Source, modes: Sequence[Mode], held_out: Sequence[Caption], call: Call
) -> dict[Mode, _ModeImages]:
    """Load a model and make the images of its modes. Raises: InvalidSetting if the model or the device lacks it."""
    pipeline = source.open()
    return {mode: _make_images(pipeline, held_out, call, mode.step_cache) for mode in modes}


def _make_images(
    pipeline: FluxImagePipeline, held_out: Sequence[Caption], call: Call, step_cache: float
) -> _ModeImages:
    """Make an image of each caption, in batches, after a warm-up with the first batch."""
    batches = list(_batch_arguments(held_out, call, step_cache))
    pipeline(**batches[0])
    started = time.perf_counter()
    images = [one for arguments in batches for one in pipeline(**arguments)]
    return _ModeImages(images, (time.perf_counter() - started) / len(images))


def _batch_arguments(held_out: Sequence[Caption], call: Call, step_cache: float) -> Iterator[dict[str, Any]]:
    """Yield the arguments of the call for each batch; the seed of an image is its number."""
    for start in range(0, len(held_out), call.batch_size):
        part = held_out[start : start + call.batch_size]
        yield {
            "prompt": [caption.text for caption in part],
            "seed": list(range(start, start + len(part))),
            "width": call.width,
            "height": call.height,
            "num_inference_steps": call.steps,
            "embedded_guidance": GUIDANCE,
            "t5_sequence_length": call.t5_sequence_length,
            "step_cache": step_cache,
        }


def _describe_mode(images: _ModeImages, exact: _ModeImages, held_out: Sequence[Caption] | None) -> dict[str, Any]:
    """Return the figures of one mode; `psnr` is in dB, None if every image equals the exact one."""
    distances = [psnr(np.asarray(a), np.asarray(b)) for a, b in zip(images.images, exact.images, strict=True)]
    known = [distance for distance in distances if math.isfinite(distance)]
    return {
        "seconds_per_image": images.seconds,
        "times_as_fast": exact.seconds / images.seconds,
        "psnr_median": float(np.median(distances)) if known and math.isfinite(np.median(distances)) else None,
        "psnr_least": min(known, default=None),
        "facts_that_hold": None if held_out is None else score_all(held_out, images.images).share(),
    }


def psnr(ours: Any, theirs: Any) -> float:
    """Return 10 log10(255^2 / mean squared difference) of two uint8 images, in dB; infinite for equal ones."""
    error = float(np.mean((ours.astype(np.float64) - theirs.astype(np.float64)) ** 2))
    return 10 * math.log10(255**2 / error) if error else math.inf


def format_lossy(figures: dict[str, Any]) -> str:
    """Return the figures as text for people."""
    call = figures["call"]
    rows = [["mode", "s an image", "times as fast", "PSNR dB", "least", "facts that hold"]]
    for one in figures["modes"]:
        distances = [one["psnr_median"], one["psnr_least"]]
        rows.append(
            [
                one["mode"],
                number(one["seconds_per_image"]),
                f"{one['times_as_fast']:.2f}",
                *("the same" if distance is None else f"{distance:.1f}" for distance in distances),
                "not read" if one["facts_that_hold"] is None else f"{100 * one['facts_that_hold']:.1f} %",
            ]
        )
    left_out = "".join(f"\nnot measured: {mode}: {reason}" for mode, reason in figures["missing"].items())
    return (
        f"{figures['model']}, {figures['dtype']}: {call['width']} x {call['height']}, {call['steps']} steps, "
        f"batch {call['batch_size']}, {figures['num_images']} images\n{table(rows)}{left_out}"
    )
