"""The hours and the cost of a plan, from a measured, given or remembered speed; warnings about waste."""

from __future__ import annotations

import glob
import json
import os
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from flux_batch.config.schema import JobConfig
from flux_batch.download.local_copy import cache_folder
from flux_batch.errors import number_text, work_text
from flux_batch.model.optimize.host_memory import total_memory
from flux_batch.redaction import public_uri

# The file with the speeds of earlier runs on this machine, by model and device.
_SPEEDS = "speeds.json"
_LONG_SHARD_S = 3600.0


@dataclass(frozen=True)
class Speed:
    """The images per second of one worker; `when` is the Unix time of a remembered speed."""

    images_per_s: float
    origin: Literal["given", "measured", "remembered"]
    when: float | None = None


def remember_speed(config: JobConfig, images_per_s: float, pflop_per_image: float) -> None:
    """Store the speed of a run for later plans; ignore a cache that cannot be written."""
    path = cache_folder() / _SPEEDS
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        known = _read_speeds(path)
        known[_key(config)] = {"pflop_per_s": images_per_s * pflop_per_image, "unix_time": round(time.time())}
        half = path.with_suffix(f".{os.getpid()}")
        half.write_text(json.dumps(known, indent=1))
        half.replace(path)


def remembered_speed(config: JobConfig, pflop_per_image: float) -> Speed | None:
    """Return the speed of an earlier run here, scaled to images of this work."""
    try:
        found = _read_speeds(cache_folder() / _SPEEDS)[_key(config)]
        return Speed(found["pflop_per_s"] / pflop_per_image, "remembered", found["unix_time"])
    except (KeyError, TypeError, ZeroDivisionError):
        return None


def costs(
    config: JobConfig,
    figures: Mapping[str, Any],
    num_left: int,
    speed: Speed | None,
    price: float | None,
    *,
    is_here: bool = False,
    num_committed: int | None = None,
    past_hours: float = 0.0,
) -> dict[str, Any]:
    """Return hours, cost and warnings.

    price: the price of a GPU-hour, or of a worker-hour without GPUs. is_here: True if workers run on this machine.
    num_committed: the number of committed shards of the run; None before it was begun, when the shard size may still
    change. past_hours: the device hours of the run so far.
    """
    workers = config.workers
    warnings = _without_a_card(config, figures["memory"])
    if num_committed is None:
        warnings += _wrong_shard_size(config, figures, speed)
    if is_here and not workers.num_gpus:
        warnings = _too_large(figures["memory"]) + warnings
    found: dict[str, Any] = {"num_images_left": num_left, "speed": None, "warnings": warnings}
    if speed is None:
        return found
    worker_hours = num_left / speed.images_per_s / 3600
    device_hours = worker_hours * (workers.num_gpus or 1)
    at_once = max(1, min(workers.max, figures["num_shards"] - (num_committed or 0)))
    found |= {
        "speed": {"images_per_s": speed.images_per_s, "origin": speed.origin, "unix_time": speed.when},
        "device_hours": device_hours,
        "device": "GPU" if workers.num_gpus else "worker",
        "hours": worker_hours / at_once,
        "num_workers": at_once,
        "cost": None if price is None else device_hours * price,
        "price": price,
    }
    limit = workers.max_gpu_hours
    if limit is not None and past_hours < limit < past_hours + device_hours:
        found["warnings"].append(f"workers.max_gpu_hours = {limit:g} stops the run before it is complete")
    return found


def cost_rows(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return hours, cost and warnings as rows of a table."""
    rows: list[tuple[str, str]] = []
    if speed := found["speed"]:
        when = f" on {time.strftime('%Y-%m-%d', time.gmtime(speed['unix_time']))}" if speed["unix_time"] else ""
        hours = (
            f"{work_text(found['device_hours'], found['device'])} at {number_text(speed['images_per_s'])} images/s a "
            f"worker ({speed['origin']}{when}); {_time_text(found['hours'])} with {found['num_workers']} at work"
        )
        rows.append(("hours", hours))
        if found["cost"] is not None:
            rows.append(("cost", f"{found['cost']:.2f} at {found['price']:g} an hour"))
    else:
        rows.append(("hours", "not known: --measure renders a few images, --speed takes images/s of a worker"))
    return rows + [("" if number else "mind", text) for number, text in enumerate(found["warnings"])]


def _time_text(hours: float) -> str:
    """Return hours as text in a suitable unit."""
    for unit, number in (("h", hours), ("min", 60 * hours)):
        if number >= 1:
            return f"{number_text(number)} {unit}"
    return f"{3600 * hours:.3g} s"


def _too_large(memory: Mapping[str, Any]) -> list[str]:
    """Return a warning if a worker needs more memory than this machine has."""
    needed = memory.get("least_bytes")
    if needed is None:
        return []
    here = total_memory()
    if here is None or needed <= here:
        return []
    return [f"a worker needs {needed / 1e9:.1f} GB, this machine has {here / 1e9:.1f} GB"]


def _without_a_card(config: JobConfig, memory: Mapping[str, Any]) -> list[str]:
    """Return a warning if a batch fits into the memory of no GPU."""
    if "fits_gb" in memory and not memory["fits_gb"] and config.workers.num_gpus:
        return [f"a batch of {memory['batch_size']} fits on no card: set workers.batch_size lower"]
    return []


def _wrong_shard_size(config: JobConfig, figures: Mapping[str, Any], speed: Speed | None) -> list[str]:
    """Return warnings about shards that take more than an hour, and about idle workers."""
    found, workers = [], config.workers
    images_per_shard = config.output.shard_size * config.sampling.num_images_per_prompt
    if speed is not None and images_per_shard / speed.images_per_s > _LONG_SHARD_S:
        hours = images_per_shard / speed.images_per_s / 3600
        fitting = max(1, int(_LONG_SHARD_S * speed.images_per_s / config.sampling.num_images_per_prompt))
        found.append(f"a shard takes {hours:.1f} h: output.shard_size = {fitting} makes it an hour")
    if figures["num_shards"] < workers.max and figures["num_prompts"] > figures["num_shards"]:
        fitting = max(1, figures["num_prompts"] // workers.max)
        reached = "all" if figures["num_prompts"] >= workers.max else str(figures["num_prompts"])
        found.append(
            f"{figures['num_shards']} of {workers.max} workers have work: output.shard_size = {fitting} gives it to "
            f"{reached}"
        )
    return found


def _key(config: JobConfig) -> str:
    model = config.model
    name = model.pipeline or public_uri(model.uri)
    return " ".join([name, model.dtype, model.quantization, _device(config.workers.num_gpus)])


def _device(num_gpus: float) -> str:
    """Return the name of this machine's GPU; without GPUs, the number of its CPUs."""
    if not num_gpus:
        return f"CPU x{os.cpu_count()}"
    for path in sorted(glob.glob("/proc/driver/nvidia/gpus/*/information")):
        if found := re.search(r"Model:\s*(.+)", Path(path).read_text()):
            return found[1].strip()
    return "GPU"


def _read_speeds(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return {}
