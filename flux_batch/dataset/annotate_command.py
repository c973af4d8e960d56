"""The command line of `annotate`: its arguments and its output."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flux_batch.dataset.annotate import AnnotateReport, AnnotateSettings
    from flux_batch.report.progress.snapshot import Snapshot


def add_annotate(command: argparse.ArgumentParser) -> None:
    """Add the arguments of `annotate` to its parser; imports nothing heavy."""
    command.add_argument("output", metavar="OUTPUT_URI", help="the output of a run: output.uri of its job file")
    command.add_argument(
        "--with",
        dest="annotators",
        action="append",
        default=[],
        required=True,
        metavar="[NAME=]ANNOTATOR",
        help="a built-in annotator or module:factory; several read each image once",
    )
    command.add_argument(
        "--set",
        dest="options",
        action="append",
        default=[],
        metavar="[NAME.]KEY=VALUE",
        help="an option of an annotator; repeatable",
    )
    command.add_argument("--workers", type=int, default=1, metavar="N", help="workers at a time (default 1)")
    command.add_argument("--num-gpus", type=float, default=0, metavar="N", help="GPUs of a worker (default 0)")
    command.add_argument("--num-cpus", type=float, default=1, metavar="N", help="CPUs of a worker (default 1)")
    command.add_argument("--batch-size", type=int, default=16, metavar="N", help="images in a call (default 16)")
    command.add_argument(
        "--failures",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a setting of `failures`, such as max_ratio=0.1 (default: those of the run)",
    )
    command.add_argument("--runtime-env", metavar="FILE", help="Ray's runtime_env of the workers, in YAML or JSON")
    command.add_argument("--retry-failed", action="store_true", help="annotate images without values again")
    command.add_argument("--anew", action="store_true", help="first remove the existing annotations of these names")
    command.add_argument("--json", action="store_true", help="print JSON on stdout")


def run_annotate(
    arguments: argparse.Namespace, storage_options: dict[str, Any], show: Callable[[Snapshot], None] | None
) -> AnnotateReport:
    """Annotate with these arguments. `show` is called every second with the figures."""
    from flux_batch.config.text import read_pairs
    from flux_batch.dataset.annotate import annotate
    from flux_batch.dataset.annotators.load import parse_specs
    from flux_batch.engine.stop import Stop, stopped_by_signals

    stop = Stop()
    specs = parse_specs(arguments.annotators, read_pairs(arguments.options, "--set"))
    with stopped_by_signals(stop):
        return annotate(
            arguments.output,
            specs,
            storage_options=storage_options,
            settings=_settings(arguments),
            stop=stop,
            retry_failed=arguments.retry_failed,
            anew=arguments.anew,
            show=show,
        )


def _settings(arguments: argparse.Namespace) -> AnnotateSettings:
    from flux_batch.dataset.annotate import AnnotateSettings

    return AnnotateSettings(
        max_workers=arguments.workers,
        num_gpus=arguments.num_gpus,
        num_cpus=arguments.num_cpus,
        batch_size=arguments.batch_size,
        failures=tuple(arguments.failures),
        runtime_env=_runtime_env(arguments.runtime_env) if arguments.runtime_env else None,
    )


def _runtime_env(path: str) -> dict[str, Any]:
    """Read a runtime_env. Raises: JobError."""
    from flux_batch.config.text import load_yaml
    from flux_batch.errors import JobError

    try:
        tree = load_yaml(Path(path).read_text(encoding="utf-8"), path)
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"--runtime-env {path}: cannot be read: {error}") from error
    if not isinstance(tree, dict):
        raise JobError(f"--runtime-env {path}: must be a mapping, as in `pip: [a-package]`")
    return tree
