"""`flux-batch bench`: parse, measure, print a table, write JSON. Imports nothing heavy before it measures."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flux_batch.errors import JobError

if TYPE_CHECKING:
    from flux_batch.bench.pipeline.pipeline import Call
    from flux_batch.bench.source import Source

Figures = dict[str, Any]
SIZE_NAMES = ("dev", "schnell", "small", "tiny")


def add_bench(command: argparse.ArgumentParser) -> None:
    """Describe `bench` and what it can measure."""
    kinds = command.add_subparsers(required=True, metavar="WHAT")

    kind = kinds.add_parser("pipeline", help="one pipeline: seconds by stage, utilisation, memory; against diffusers")
    _add_model(kind)
    _add_call(kind, steps=28, side=1024)
    _add_repeats(kind)
    kind.add_argument("--batch-size", type=positive, default=1, help="images a call (1)")
    kind.add_argument("--warm-ups", type=positive, default=1, help="calls before those that count (1)")
    kind.add_argument(
        "--against",
        action="append",
        default=[],
        choices=["diffusers", "diffusers-compiled"],
        help="run it too, in turn, with the same weights, prompts and seeds; may be given twice",
    )
    kind.add_argument("--peak-tflops", type=float, help="of the device, dense, in --dtype; else of a table")
    kind.set_defaults(measure=_pipeline)

    kind = kinds.add_parser("job", help="a whole job, start-up aside, against its pipelines in bare loops")
    _add_model(kind)
    _add_call(kind, steps=4, side=128)
    kind.add_argument("--images", type=positive, default=64, help="how many (64)")
    kind.add_argument("--workers", type=positive, help="processes; as many as there are GPUs, or else 2")
    kind.add_argument("--batch-size", type=positive, default=4, help="images a call (4)")
    kind.add_argument("--shard-size", type=positive, help="prompts a shard (a tenth of a worker's share)")
    kind.add_argument("--num-gpus", type=float, help="of a worker (1 if there are any, else 0)")
    kind.add_argument("--num-cpus", type=positive, default=1, help="of a worker, its threads (1)")
    kind.add_argument("--engine", choices=["ray", "local"], default="ray", help="local: this process alone")
    kind.add_argument("--against", action="append", default=[], choices=["ray-data"], help="the same with Ray Data")
    _add_repeats(kind, 1)
    kind.set_defaults(measure=_job)

    kind = kinds.add_parser("load", help="seconds and memory to load a model, and the seconds to its first step")
    _add_model(kind)
    _add_repeats(kind, 3)
    kind.set_defaults(measure=_load)

    kind = kinds.add_parser("lossy", help="fp8 and step caches: what they save, and what they cost the images")
    _add_model(kind)
    _add_call(kind, steps=28, side=128)
    kind.add_argument("--images", type=positive, default=48, help="how many, in each mode (48)")
    kind.add_argument("--batch-size", type=positive, default=4, help="images a call (4)")
    _add_json(kind)
    kind.set_defaults(measure=_lossy)

    kind = kinds.add_parser("encode", help="PNG, JPEG and WebP: milliseconds, bytes, MB/s")
    kind.add_argument("--side", type=positive, default=1024, help="pixels (1024)")
    _add_repeats(kind)
    kind.set_defaults(measure=_encode)

    kind = kinds.add_parser("plan", help="planning a data set of many rows")
    kind.add_argument("--rows", type=positive, default=1_000_000, help="prompts (1000000)")
    kind.add_argument("--files", type=positive, default=8, help="Parquet files (8)")
    kind.add_argument("--shard-size", type=positive, default=256, help="prompts a shard (256)")
    _add_repeats(kind)
    kind.set_defaults(measure=_plan)
    for each in kinds.choices.values():
        each.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def bench(arguments: argparse.Namespace) -> str:
    """Measure what the arguments name, and write --json. Returns: the table."""
    if arguments.json and not Path(arguments.json).resolve().parent.is_dir():
        raise JobError(f"--json {arguments.json}: there is no such folder")  # said before the minutes are spent
    measure: Callable[[argparse.Namespace], tuple[Figures, str]] = arguments.measure
    figures, text = measure(arguments)

    from flux_batch.bench.machine import describe_machine

    figures = {**describe_machine(arguments.argv), **figures}
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(figures, indent=1) + "\n")
    return text


def positive(text: str) -> int:
    """Read a whole number above 0, as argparse wants it."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be 1 or more")
    return value


def _add_model(kind: argparse.ArgumentParser) -> None:
    kind.add_argument("--model", default="demo", metavar="URI", help="a model, as in a job file (demo)")
    kind.add_argument("--random-weights", choices=SIZE_NAMES, help="none, but one of that size with random weights")
    kind.add_argument("--device", help="cuda if there is one, else cpu")
    kind.add_argument("--dtype", choices=["auto", "bfloat16", "float16", "float32"], default="auto")
    kind.add_argument("--quantization", choices=["none", "bfloat16", "fp8", "fp8_matmul"], default="none")
    kind.add_argument(
        "--option", action="append", default=[], metavar="KEY=VALUE", help="of the pipeline, e.g. step_cache=0.1"
    )


def _add_call(kind: argparse.ArgumentParser, *, steps: int, side: int) -> None:
    kind.add_argument("--width", type=positive, default=side, help=f"pixels ({side})")
    kind.add_argument("--height", type=positive, default=side, help=f"pixels ({side})")
    kind.add_argument("--steps", type=positive, default=steps, help=f"denoising steps ({steps})")
    kind.add_argument("--t5-sequence-length", type=positive, help="text tokens; else the model's own number")


def _add_repeats(kind: argparse.ArgumentParser, default: int = 5) -> None:
    kind.add_argument(
        "--repeats", type=positive, default=default, help=f"measurements, of which the median ({default})"
    )
    _add_json(kind)


def _add_json(kind: argparse.ArgumentParser) -> None:
    kind.add_argument("--json", metavar="FILE", help="write all figures, with hardware, versions, commit and command")


def _source(arguments: argparse.Namespace) -> Source:
    from flux_batch.bench.source import Source
    from flux_batch.config.text import read_pairs

    return Source(
        uri=arguments.model,
        random_weights=arguments.random_weights,
        device=arguments.device,
        dtype=arguments.dtype,
        quantization=arguments.quantization,
        options=read_pairs(arguments.option, "--option"),
    )


def _call(arguments: argparse.Namespace) -> Call:
    from flux_batch.bench.pipeline.pipeline import Call

    return Call(**{name: getattr(arguments, name) for name in Call.__slots__})


def _pipeline(arguments: argparse.Namespace) -> tuple[Figures, str]:
    from flux_batch.bench.pipeline.pipeline import bench_pipeline, format_pipeline

    figures = bench_pipeline(
        _source(arguments),
        _call(arguments),
        repeats=arguments.repeats,
        warm_ups=arguments.warm_ups,
        against=arguments.against,
        peak=arguments.peak_tflops,
    )
    return figures, format_pipeline(figures)


def _lossy(arguments: argparse.Namespace) -> tuple[Figures, str]:
    from flux_batch.bench.pipeline.lossy import bench_lossy, format_lossy

    figures = bench_lossy(_source(arguments), _call(arguments), arguments.images)
    return figures, format_lossy(figures)


def _job(arguments: argparse.Namespace) -> tuple[Figures, str]:
    from flux_batch.bench.job import bench_job, format_job
    from flux_batch.bench.job_task import JobSize

    size = JobSize(**{name: getattr(arguments, name) for name in JobSize.__slots__})
    source, repeats = _source(arguments), arguments.repeats
    figures = bench_job(source, size, engine=arguments.engine, against=arguments.against, repeats=repeats)
    return figures, format_job(figures)


def _load(arguments: argparse.Namespace) -> tuple[Figures, str]:
    from flux_batch.bench.load import bench_load, format_load

    figures = bench_load(_source(arguments), arguments.repeats)
    return figures, format_load(figures)


def _encode(arguments: argparse.Namespace) -> tuple[Figures, str]:
    from flux_batch.bench.encode import bench_encode, format_encode

    figures = bench_encode(arguments.side, arguments.repeats)
    return figures, format_encode(figures)


def _plan(arguments: argparse.Namespace) -> tuple[Figures, str]:
    from flux_batch.bench.planning import bench_plan, format_plan

    figures = bench_plan(arguments.rows, arguments.files, arguments.shard_size, arguments.repeats)
    return figures, format_plan(figures)
