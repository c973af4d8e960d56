"""The benchmark of one pipeline in this process: by stage, by step, against the device's peak and peers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers.utils import logging as transformers_logging

from flux_batch.bench.figures import Figures, Run, alternated, number, ratio, table
from flux_batch.bench.machine import PeakMemory, gpu_name
from flux_batch.bench.pipeline.flops import peak_tflops, utilisation
from flux_batch.bench.pipeline.stages import STAGES, timed_stages
from flux_batch.bench.source import Source
from flux_batch.config.schema import ImageConfig
from flux_batch.errors import JobError
from flux_batch.images import encode
from flux_batch.model.footprint import step_flops, transformer_size
from flux_batch.pipeline.pipeline import FluxImagePipeline
from flux_batch.sampling_params import num_image_tokens

if TYPE_CHECKING:
    from flux_batch.bench.pipeline.peer import Peer

_PROMPT = "a large red circle left of a small blue square, on a yellow ground"
GUIDANCE = 3.5
# Timed stages wait for the device, so whole calls are measured separately; few calls are enough for the shares.
_STAGE_REPEATS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """The measured call: pixels, steps, images in a call, text tokens (None: the model's own number)."""

    width: int = 1024
    height: int = 1024
    steps: int = 28
    batch_size: int = 1
    t5_sequence_length: int | None = None

    def prompts(self, repeat: int) -> list[str]:
        """Return the prompts of a repeat, different in each, so that none is cached."""
        return [f"{_PROMPT}, {repeat}.{image}" for image in range(self.batch_size)]

    def seeds(self, repeat: int) -> list[int]:
        """Return the seeds of a repeat."""
        return [1000 * (repeat + 1) + image for image in range(self.batch_size)]

    def arguments(self, repeat: int) -> dict[str, Any]:
        """Return the arguments of a repeat for our pipeline."""
        return {
            "prompt": self.prompts(max(repeat, -1)),
            "seed": self.seeds(max(repeat, -1)),
            "width": self.width,
            "height": self.height,
            "num_inference_steps": self.steps,
            "embedded_guidance": GUIDANCE,
            "t5_sequence_length": self.t5_sequence_length,
            "output_type": "np",
        }


def bench_pipeline(
    source: Source,
    call: Call,
    *,
    repeats: int = 5,
    warm_ups: int = 1,
    against: Sequence[str] = (),
    peak: float | None = None,
) -> dict[str, Any]:
    """Measure calls one after the other. peak: of the device in TFLOP/s; None looks it up.

    Raises: JobError if a peer is not installed; InvalidSetting, CheckpointError.
    """
    peers = find_peers(against)
    manager = source.load()
    for peer in peers:
        peer.keep(manager)  # before the pipeline changes the layout of weights
    pipeline = source.assemble(manager)
    length = call.t5_sequence_length or pipeline.default_t5_sequence_length

    def ours(repeat: int) -> Any:
        return pipeline(**call.arguments(repeat))

    memory = PeakMemory(pipeline.device)
    for warm_up in range(warm_ups):
        ours(warm_up - warm_ups)
    stages = _measure_stages(pipeline, call, repeats)
    peak_bytes = memory.bytes()  # before a peer adds its own
    against_us, call_s = _measure_peers(ours, peers, pipeline, call, repeats, warm_ups)
    image_s = call_s.scaled(1 / call.batch_size)
    step_s = stages["denoise"].scaled(1 / call.steps)
    # Weights in fp8 are buffers.
    size = transformer_size({name: weight.shape for name, weight in pipeline.transformer.state_dict().items()})
    flops = step_flops(size, num_image_tokens(call.width, call.height), length)
    peak = peak or peak_tflops(gpu_name(pipeline.device), source.dtype_name)
    return {
        "benchmark": "pipeline",
        **source.describe(),
        "device": str(pipeline.device),
        "call": {**{key: getattr(call, key) for key in Call.__slots__}, "t5_sequence_length": length},
        "repeats": repeats,
        "warm_ups": warm_ups,
        "seconds_per_image": image_s.to_json(),
        "images_per_second": 1 / image_s.median,
        "seconds_per_step_and_image": step_s.to_json(),
        "seconds_per_image_by_stage": {stage: seconds.to_json() for stage, seconds in stages.items()},
        "transformer_tflop_per_step_and_image": flops / 1e12,
        "transformer_tflops": flops / step_s.median / 1e12,
        "peak_tflops": peak,
        "utilisation_of_denoising": utilisation(flops, step_s.median, peak),
        "utilisation_of_image": utilisation(flops * call.steps, image_s.median, peak),
        "peak_memory_bytes": peak_bytes,
        "peak_memory_is": memory.kind,
        "against": against_us,
    }


def find_peers(names: Sequence[str]) -> list[Peer]:
    """Return the peers by name. Raises: JobError if diffusers is not installed."""
    if not names:
        return []
    transformers_logging.set_verbosity_error()  # diffusers' imports warn of a missing torchvision
    try:
        from flux_batch.bench.pipeline.peer import Peer
    except ImportError as error:
        raise JobError(
            f"--against {names[0]}: diffusers cannot be imported ({error}); install it, or leave out --against"
        ) from error
    return [Peer(name, compiled=name == "diffusers-compiled") for name in dict.fromkeys(names)]


def _measure_stages(pipeline: FluxImagePipeline, call: Call, repeats: int) -> dict[str, Figures]:
    """Return the seconds for each image by stage. Encoding the PNG file is a stage outside the call."""
    taken: dict[str, list[float]] = {stage: [] for stage in STAGES}
    images: Sequence[Any] = []
    for repeat in range(min(repeats, _STAGE_REPEATS)):
        with timed_stages(pipeline) as (clock, run):
            images = run(**call.arguments(repeats + repeat))  # prompts that the whole calls have not had
        for stage, seconds in clock.seconds.items():
            taken[stage].append(seconds / call.batch_size)
    figures = {stage: Figures(tuple(values)) for stage, values in taken.items()}
    png = alternated({"PNG": lambda _: encode(images[0], ImageConfig(), {"prompt": _PROMPT})}, repeats)
    return figures | png


def _measure_peers(
    ours: Run, peers: Sequence[Peer], pipeline: FluxImagePipeline, call: Call, repeats: int, warm_ups: int
) -> tuple[dict[str, Any], Figures]:
    """Run ours and the peers in turn with the same weights, prompts and seeds; compare times and images.

    Returns: the figures of each peer, and the seconds of our calls.
    """
    images: dict[str, dict[int, Any]] = {"ours": {}}
    runs: dict[str, Run] = {"ours": lambda repeat: images["ours"].update({repeat: ours(repeat)})}
    for peer in peers:
        peer.open(pipeline)
        kept = images[peer.name] = {}

        def run(repeat: int, peer: Peer = peer, kept: dict[int, Any] = kept) -> None:
            kept[repeat] = peer(call.arguments(repeat))

        runs[peer.name] = run
    seconds = alternated(runs, repeats, warm_ups=warm_ups)
    figures: dict[str, Any] = {}
    for peer in peers:
        differences = [
            level_differences(images["ours"][repeat], images[peer.name][repeat]) for repeat in range(repeats)
        ]
        figures[peer.name] = {
            "seconds_per_image": seconds[peer.name].scaled(1 / call.batch_size).to_json(),
            "times_as_fast": ratio(seconds["ours"], seconds[peer.name]),
            "largest_difference_in_levels": max(int(one.max()) for one in differences),
            "mean_difference_in_levels": float(np.mean([one.mean() for one in differences])),
        }
    return figures, seconds["ours"]


def level_differences(ours: Sequence[Any], theirs: Sequence[Any]) -> Any:
    """Return the absolute differences of images, in levels of uint8."""
    return np.abs(np.stack(list(ours)).astype(np.int16) - np.stack(list(theirs)).astype(np.int16))


def format_pipeline(figures: dict[str, Any]) -> str:
    """Return the figures as text for people."""
    call, total = figures["call"], figures["seconds_per_image"]["median"]
    rows = [["stage", "s an image", "least", "most", "share"]]
    for stage, seconds in figures["seconds_per_image_by_stage"].items():
        share = "" if stage == "PNG" else f"{100 * seconds['median'] / total:.1f} %"
        rows.append([stage, number(seconds["median"]), number(seconds["least"]), number(seconds["most"]), share])
    whole = figures["seconds_per_image"]
    rows.append(["whole call", number(total), number(whole["least"]), number(whole["most"]), ""])
    step = figures["seconds_per_step_and_image"]["median"]
    lines = [
        f"{figures['model']}, {figures['dtype']}, {figures['device']}: {call['width']} x {call['height']}, "
        f"{call['steps']} steps, batch {call['batch_size']}, {call['t5_sequence_length']} text tokens; "
        f"medians of {figures['repeats']}",
        table(rows),
        f"a step    {number(step)} s an image, {figures['transformer_tflop_per_step_and_image']:.4g} TFLOP: "
        f"{figures['transformer_tflops']:.4g} TFLOP/s, {_share_of_peak(figures)}",
        f"images    {figures['images_per_second']:.4g} a second",
        f"memory    {figures['peak_memory_bytes'] / 1e9:.3g} GB at most ({figures['peak_memory_is']})",
    ]
    for name, peer in figures["against"].items():
        fast, most = peer["times_as_fast"], peer["largest_difference_in_levels"]
        lines.append(
            f"against   {name}: {number(peer['seconds_per_image']['median'])} s an image, ours is "
            f"{fast['median']:.3f} times as fast ({fast['least']:.3f} to {fast['most']:.3f}); images differ by at "
            f"most {most} of 255 levels, {peer['mean_difference_in_levels']:.3g} on average"
        )
    return "\n".join(lines)


def _share_of_peak(figures: dict[str, Any]) -> str:
    """Return a phrase on the used share of the peak."""
    if figures["peak_tflops"] is None:
        return "utilisation not known: name the device's peak by --peak-tflops"
    return (
        f"{100 * figures['utilisation_of_denoising']:.1f} % of {figures['peak_tflops']:g}; "
        f"{100 * figures['utilisation_of_image']:.1f} % over the whole call"
    )
