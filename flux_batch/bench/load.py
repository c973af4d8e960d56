"""The benchmark of loading a model: seconds, memory and time to the first step, each in a fresh process."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from flux_batch.bench.figures import Figures
from flux_batch.bench.machine import PeakMemory
from flux_batch.bench.source import Source
from flux_batch.download.models import local_model


def bench_load(source: Source, repeats: int) -> dict[str, Any]:
    """Measure `repeats` loads of a model; its files are in the page cache, except possibly the first time.

    Raises: CheckpointError, InvalidSetting, StoreError.
    """
    if not source.random_weights:
        local_model(source.uri)  # fetch it first, so that no measured process fails or waits for the network
    loads = [_load_in_process(source) for _ in range(repeats)]
    return {
        "benchmark": "load",
        **source.describe(),
        "device": loads[0]["device"],
        "repeats": repeats,
        "seconds": Figures(tuple(load["seconds"] for load in loads)).to_json(),
        "seconds_from_process_start_to_first_step": Figures(tuple(load["first_step_s"] for load in loads)).to_json(),
        "import_seconds": Figures(tuple(load["import_seconds"] for load in loads)).to_json(),
        "peak_memory_bytes": max(load["peak_memory_bytes"] for load in loads),
        "peak_host_memory_bytes": max(load["peak_host_memory_bytes"] for load in loads),
        "weights_bytes": loads[0]["weights_bytes"],
    }


def _load_in_process(source: Source) -> dict[str, Any]:
    """Measure a load in a new process; its errors are raised here."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_load_here, source, time.time()).result()


def _load_here(source: Source, process_started: float) -> dict[str, Any]:
    """Measure a load in this process, and the time to a small image's first step."""
    started = time.perf_counter()
    import torch

    import flux_batch.pipeline.pipeline  # noqa: F401  imported here, so that it does not count as loading

    device = source.torch_device
    if device.type == "cuda" and torch.cuda.is_available():
        torch.zeros(1, device=device)  # creates the context now
    imported = time.perf_counter()
    host = PeakMemory(torch.device("cpu"))
    memory = PeakMemory(device) if device.type == "cuda" and torch.cuda.is_available() else host
    pipeline = source.open()
    seconds = time.perf_counter() - imported
    memory_bytes, host_bytes = memory.bytes(), host.bytes()
    reached: list[float] = []

    def note(steps: Iterable[int]) -> Iterator[int]:
        reached.append(time.time())
        yield from steps

    pipeline("a circle", width=64, height=64, num_inference_steps=1, seed=0, output_type="latent", progress_bar=note)
    parts = (pipeline.transformer, pipeline.autoencoder, pipeline.clip.model, pipeline.t5.model)
    tensors = [tensor for part in parts for tensor in (*part.parameters(), *part.buffers())]
    return {
        "device": str(pipeline.device),
        "seconds": seconds,
        "import_seconds": imported - started,
        "first_step_s": reached[0] - process_started,
        "peak_memory_bytes": memory_bytes,
        "peak_host_memory_bytes": host_bytes,
        "weights_bytes": sum(tensor.nbytes for tensor in tensors),
    }


def format_load(figures: dict[str, Any]) -> str:
    """Return the figures as text for people."""
    seconds, imports = figures["seconds"], figures["import_seconds"]
    first = figures["seconds_from_process_start_to_first_step"]
    return "\n".join(
        [
            f"{figures['model']}, {figures['dtype']}, {figures['device']}: {figures['weights_bytes'] / 1e9:.3g} GB",
            f"load     {seconds['median']:.4g} s ({seconds['least']:.4g} to {seconds['most']:.4g}); "
            f"importing before it {imports['median']:.4g} s; medians of {figures['repeats']}",
            f"start    {first['median']:.4g} s ({first['least']:.4g} to {first['most']:.4g}) from process start "
            "to the first denoising step of a small image",
            f"memory   {figures['peak_memory_bytes'] / 1e9:.3g} GB at most on {figures['device']}, "
            f"{figures['peak_host_memory_bytes'] / 1e9:.3g} GB resident on the host",
        ]
    )
