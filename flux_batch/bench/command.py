"""The command `flux-batch bench`: measure, print a table, write JSON. Heavy imports happen in the measurement."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from flux_batch.bench.source import SizeName, Source
from flux_batch.errors import JobError

if TYPE_CHECKING:
    from flux_batch.bench.pipeline.pipeline import Call

_Figures = dict[str, Any]
# The value of --json without a file.
_STDOUT = "-"


def add_bench(command: argparse.ArgumentParser) -> None:
    """Add the arguments of `bench` and of its benchmarks."""
    kinds = command.add_subparsers(dest="kind", required=True, metavar="WHAT")

    kind = kinds.add_parser("pipeline", help="one pipeline: seconds by stage, utilisation, memory; against diffusers")
    _add_model(kind)
    _add_call(kind, steps=28, side=1024)
    _add_repeats(kind)
    kind.add_argument("--batch-size", type=_positive, default=1, help="images in a call (1)")
    kind.add_argument("--warm-ups", type=_positive, default=1, help="calls before those that count (1)")
    kind.add_argument(
        "--against",
        action="append",
        default=[],
        choices=["diffusers", "diffusers-compiled"],
        help="also run this, in turn, with the same weights, prompts and seeds; may be given twice",
    )
    kind.add_argument(
        "--peak-tflops", type=_from(0.001), help="the peak of the device, dense, in --dtype (from a table)"
    )
    kind.set_defaults(measure=_pipeline)

    kind = kinds.add_parser("job", help="a whole job without its start-up, against its pipelines in bare loops")
    _add_model(kind)
    _add_call(kind, steps=4, side=128)
    kind.add_argument("--images", type=_positive, default=64, help="number of images (64)")
    kind.add_argument("--workers", type=_positive, help="processes (the number of GPUs, or 2)")
    kind.add_argument("--batch-size", type=_positive, default=4, help="images a call (4)")
    kind.add_argument("--shard-size", type=_positive, help="prompts a shard (a tenth of a worker's share)")
    kind.add_argument("--num-gpus", type=_from(0), help="GPUs of a worker (1 if there are any, else 0)")
    kind.add_argument("--num-cpus", type=_positive, default=1, help="threads of a worker (1)")
    kind.add_argument("--engine", choices=["ray", "local"], default="ray", help="local: this process alone (ray)")
    kind.add_argument("--against", action="append", default=[], choices=["ray-data"], help="also run Ray Data")
    _add_repeats(kind, 1)
    kind.set_defaults(measure=_job)

    kind = kinds.add_parser("load", help="seconds and memory to load a model, and the seconds to its first step")
    _add_model(kind)
    _add_repeats(kind, 3)
    kind.set_defaults(measure=_load)

    kind = kinds.add_parser("lossy", help="fp8 and step caches: the time they save and the quality they cost")
    _add_model(kind)
    _add_call(kind, steps=28, side=128)
    kind.add_argument("--images", type=_positive, default=48, help="number of images in each mode (48)")
    kind.add_argument("--batch-size", type=_positive, default=4, help="images a call (4)")
    _add_json(kind)
    kind.set_defaults(measure=_lossy)

    kind = kinds.add_parser("kernels", help="attention, fp8 products, the decoder: each with its alternatives")
    kind.add_argument("--random-weights", choices=get_args(SizeName), default="dev", help="the sizes of a model (dev)")
    kind.add_argument("--device", help="cuda or cpu (cuda if there is one)")
    kind.add_argument(
        "--dtype", choices=["auto", "bfloat16", "float32"], default="auto", help="the number format of the model (auto)"
    )
    kind.add_argument("--side", type=_positive, default=1024, help="pixels (1024)")
    kind.add_argument("--eager", action="store_true", help="do not measure them compiled")
    _add_repeats(kind, 10)
    kind.set_defaults(measure=_kernels)

    kind = kinds.add_parser("lowering", help="the kernels that blocks compile to for an H100, counted without one")
    _add_json(kind)
    kind.set_defaults(measure=_lowering)

    kind = kinds.add_parser("encode", help="PNG, JPEG and WebP: milliseconds, bytes, MB/s")
    kind.add_argument("--side", type=_positive, default=1024, help="pixels (1024)")
    _add_repeats(kind)
    kind.set_defaults(measure=_encode)

    kind = kinds.add_parser("plan", help="planning a data set of many rows")
    kind.add_argument("--rows", type=_positive, default=1_000_000, help="prompts (1000000)")
    kind.add_argument("--files", type=_positive, default=8, help="Parquet files (8)")
    kind.add_argument("--shard-size", type=_positive, default=256, help="prompts a shard (256)")
    kind.add_argument("--rows-per-group", type=_positive, default=65_536, help="rows of a row group (65536)")
    _add_repeats(kind)
    kind.set_defaults(measure=_plan)

    kind = kinds.add_parser("resume", help="opening a run of many commits, on this disk")
    kind.add_argument("--commits", type=_positive, default=400_000, help="committed shards (400000)")
    _add_json(kind)
    kind.set_defaults(measure=_resume)

    kind = kinds.add_parser("driver", help="the driver's loop, on simulated workers; a row for each number of them")
    kind.add_argument("--workers", type=_positive, nargs="+", default=[10, 1000], help="workers (10 1000)")
    kind.add_argument("--shards", type=_positive, default=400_000, help="shards (400000)")
    kind.add_argument("--speedup", type=_from(1), default=100, help="how much faster than real workers they are (100)")
    kind.add_argument("--spread", type=_from(1), default=10, help="the longest shard over the shortest (10)")
    kind.add_argument("--slow-share", type=_from(0, 1), default=0.03, help="the share of slow workers (0.03)")
    kind.add_argument("--slow-factor", type=_from(1), default=3, help="how much slower these are (3)")
    kind.add_argument("--in-order", action="store_true", help="run shards in plan order, not the largest first")
    _add_json(kind)
    kind.set_defaults(measure=_driver)

    kind = kinds.add_parser("weights", help="requests for a model when many workers start at once, simulated")
    kind.add_argument("--workers", type=_positive, default=1000, help="workers (1000)")
    kind.add_argument("--nodes", type=_positive, default=125, help="nodes, of which one is refused (125)")
    kind.add_argument("--files", type=_positive, default=24, help="files of the model, a request each (24)")
    kind.add_argument("--request-s", type=_from(0), default=0.05, help="seconds that a request takes (0.05)")
    _add_json(kind)
    kind.set_defaults(measure=_weights)

    kind = kinds.add_parser(
        "store", help="requests of a shard, a further batch and the lease, on a store of the S3 kind"
    )
    kind.add_argument("--output", required=True, metavar="URI", help="a folder of a bucket, for runs that are deleted")
    kind.add_argument(
        "--storage-option", action="append", default=[], metavar="KEY=VALUE", help="e.g. endpoint_url=URL"
    )
    kind.add_argument("--shards", type=_positive, default=20, help="shards (20)")
    _add_json(kind)
    kind.set_defaults(measure=_store)
    for each in kinds.choices.values():
        each.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def bench(arguments: argparse.Namespace) -> str:
    """Run a benchmark and write --json. Returns: its table, or its figures if they go to stdout."""
    is_file = arguments.json not in (None, _STDOUT)
    if is_file and not Path(arguments.json).resolve().parent.is_dir():
        raise JobError(f"--json {arguments.json}: there is no such folder")  # fail before the measurement
    measure: Callable[[argparse.Namespace], tuple[_Figures, str]] = arguments.measure
    figures, text = measure(arguments)

    from flux_batch.bench.machine import describe_machine

    figures = {**describe_machine(arguments.argv), **figures}
    if is_file:
        Path(arguments.json).write_text(json.dumps(figures, indent=1) + "\n")
    return json.dumps(figures) if arguments.json == _STDOUT else text


def _positive(text: str) -> int:
    """Parse a whole number of at least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be 1 or more")
    return value


def _from(least: float, most: float = sys.float_info.max) -> Callable[[str], float]:
    """Return a parser of finite numbers within limits, for argparse."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            limit = f"from {least:g} to {most:g}" if most < sys.float_info.max else f"{least:g} or more"
            raise argparse.ArgumentTypeError(f"{text}: must be {limit}")
        return value

    return read


def _add_model(kind: argparse.ArgumentParser) -> None:
    kind.add_argument("--model", default="demo", metavar="URI", help="a model, as in a job file (demo)")
    kind.add_argument(
        "--random-weights", choices=get_args(SizeName), help="in place of --model, random weights of this size"
    )
    kind.add_argument("--device", help="cuda or cpu (cuda if there is one)")
    kind.add_argument(
        "--dtype",
        choices=["auto", "bfloat16", "float16", "float32"],
        default="auto",
        help="the number format of the model (auto)",
    )
    kind.add_argument(
        "--quantization",
        choices=["none", "bfloat16", "fp8", "fp8_matmul"],
        default="none",
        help="how matrices are kept (none)",
    )
    kind.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a pipeline option, e.g. step_cache=0.1",
    )


def _add_call(kind: argparse.ArgumentParser, *, steps: int, side: int) -> None:
    kind.add_argument("--width", type=_positive, default=side, help=f"pixels ({side})")
    kind.add_argument("--height", type=_positive, default=side, help=f"pixels ({side})")
    kind.add_argument("--steps", type=_positive, default=steps, help=f"denoising steps ({steps})")
    kind.add_argument("--t5-sequence-length", type=_positive, help="text tokens (the model's own number)")


def _add_repeats(kind: argparse.ArgumentParser, default: int = 5) -> None:
    kind.add_argument("--repeats", type=_positive, default=default, help=f"number of measurements ({default})")
    _add_json(kind)


def _add_json(kind: argparse.ArgumentParser) -> None:
    kind.add_argument(
        "--json",
        nargs="?",
        const=_STDOUT,
        metavar="FILE",
        help="write all figures, with hardware, versions, commit and command; without FILE to stdout, not the table",
    )


def _source(arguments: argparse.Namespace) -> Source:
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


def _pipeline(arguments: argparse.Namespace) -> tuple[_Figures, str]:
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


def _lossy(arguments: argparse.Namespace) -> tuple[_Figures, str]:
    from flux_batch.bench.pipeline.lossy import bench_lossy, format_lossy

    figures = bench_lossy(_source(arguments), _call(arguments), arguments.images)
    return figures, format_lossy(figures)


def _job(arguments: argparse.Namespace) -> tuple[_Figures, str]:
    from flux_batch.bench.job import bench_job, format_job
    from flux_batch.bench.job_task import JobSize

    size = JobSize(**{name: getattr(arguments, name) for name in JobSize.__slots__})
    source, repeats = _source(arguments), arguments.repeats
    figures = bench_job(source, size, engine=arguments.engine, against=arguments.against, repeats=repeats)
    return figures, format_job(figures)


def _load(arguments: argparse.Namespace) -> tuple[_Figures, str]:
    from flux_batch.bench.load import bench_load, format_load

    figures = bench_load(_source(arguments), arguments.repeats)
    return figures, format_load(figures)


def _kernels(arguments: argparse.Namespace) -> tuple[_Figures, str]:
    from flux_batch.bench.pipeline.kernels import bench_kernels, format_kernels
    from flux_batch.pipeline.precision import to_dtype

    device = Source(device=arguments.device).torch_device
    figures = bench_kernels(
        arguments.random_weights,
        device,
        to_dtype(arguments.dtype, device),
        side=arguments.side,
        repeats=arguments.repeats,
        compiled=not arguments.eager,
    )
    return figures, format_kernels(figures)


def _lowering(arguments: argparse.Namespace) -> tuple[_Figures, str]:
    from flux_batch.bench.pipeline.lowering import bench_lowering, format_lowering

    figures = bench_lowering()
    return figures, format_lowering(figures)


def _encode(arguments: argparse.Namespace) -> tuple[_Figures, str]:
    from flux_batch.bench.encode import bench_encode, format_encode

    figures = bench_encode(arguments.side, arguments.repeats)
    return figures, format_encode(figures)


def _plan(arguments: argparse.Namespace) -> tuple[_Figures, str]:
    from flux_batch.bench.scale.planning import bench_plan, format_plan

    sizes = (arguments.rows, arguments.files, arguments.shard_size, arguments.repeats, arguments.rows_per_group)
    figures = bench_plan(*sizes)
    return figures, format_plan(figures)


def _resume(arguments: argparse.Namespace) -> tuple[_Figures, str]:
    from flux_batch.bench.scale.resuming import bench_resume, format_resume

    figures = bench_resume(arguments.commits)
    return figures, format_resume(figures)


def _driver(arguments: argparse.Namespace) -> tuple[_Figures, str]:
    from flux_batch.bench.scale.driver import bench_driver, format_driver

    figures = bench_driver(
        arguments.workers,
        arguments.shards,
        speedup=arguments.speedup,
        spread=arguments.spread,
        slow_share=arguments.slow_share,
        slow_factor=arguments.slow_factor,
        in_order=arguments.in_order,
    )
    return figures, format_driver(figures)


def _weights(arguments: argparse.Namespace) -> tuple[_Figures, str]:
    from flux_batch.bench.scale.weights import bench_weights, format_weights

    figures = bench_weights(
        arguments.workers, arguments.nodes, num_files=arguments.files, request_s=arguments.request_s
    )
    return figures, format_weights(figures)


def _store(arguments: argparse.Namespace) -> tuple[_Figures, str]:
    from flux_batch.bench.scale.store import bench_store, format_store
    from flux_batch.config.text import read_pairs

    options = read_pairs(arguments.storage_option, "--storage-option")
    figures = bench_store(arguments.output, options, arguments.shards)
    return figures, format_store(figures)
