"""The arguments of the command line, with their help and examples; imports no heavy package."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any, NoReturn

from flux_batch.bench.command import add_bench
from flux_batch.dataset.annotate_command import add_annotate
from flux_batch.dataset.command import add_export, add_publish, add_select
from flux_batch.errors import did_you_mean

_EPILOG = """\
to begin:
  flux-batch init job.yaml --prompts prompts.csv
  flux-batch plan job.yaml
  flux-batch run job.yaml

`flux-batch COMMAND --help` has examples; the pages are README.md and jobs/README.md of the project.
"""

# The metavars of arguments that may be local paths: the shell completion offers files or folders for them.
_FILES = ("JOB.yaml", "FILE", "URI")
_FOLDERS = ("OUTPUT_URI", "OTHER_URI", "DEST", "DIR", "FOLDER")


def parser() -> argparse.ArgumentParser:
    """Build the parser of all commands; imports no heavy package, so that --help is quick."""
    top = _Parser(
        prog="flux-batch",
        description="Batch image generation with FLUX.1-dev on Ray.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--debug", action="store_true", help="show tracebacks and more log lines")
    top.add_argument("--version", action="store_true", help="show the versions of the program and what it builds on")
    commands = top.add_subparsers(dest="command", metavar="COMMAND")

    command = _command(
        commands,
        "run",
        "run a job, or resume it",
        "job.yaml",
        "job.yaml --set output.uri=out/try --set prompts.limit=8",
    )
    _add_job(command)
    _add_json(command)
    _add_log_format(command)
    command.add_argument(
        "--retry-failed", action="store_true", help="render failed images again, also those of finished shards"
    )
    command.add_argument("--extend", action="store_true", help="add prompt files that are new since the run began")
    _add_price(command)
    command.add_argument(
        "--max-cost",
        type=_positive,
        metavar="AMOUNT",
        help="stop cleanly, with exit code 75, once the run has cost this much",
    )

    command = _command(
        commands,
        "plan",
        "show what a job would do and cost, without running it",
        "job.yaml",
        "job.yaml --measure --price 2.5",
    )
    _add_job(command)
    _add_json(command)
    command.add_argument("--speed", type=_positive, metavar="NUMBER", help="images per second of one worker")
    command.add_argument(
        "--measure", action="store_true", help="measure the speed on this machine: renders two batches"
    )
    _add_price(command)

    command = _command(
        commands, "init", "write a job file for prompts, with comments", "job.yaml --prompts prompts.csv"
    )
    command.add_argument("job", metavar="JOB.yaml", nargs="?", default="job.yaml", help="a new file (default job.yaml)")
    command.add_argument(
        "--prompts", metavar="URI", default="demo", help="the prompts of the job (default: those in the package)"
    )

    _add_json(command)

    command = _command(commands, "validate", "check a job and every row of its prompts, without a model", "job.yaml")
    _add_job(command)
    _add_json(command)

    command = _command(
        commands,
        "preview",
        "make the images of a few rows of a job on this machine, and show them on one page",
        "job.yaml --rows 8",
    )
    _add_job(command)
    command.add_argument("--rows", type=int, default=8, metavar="N", help="the first N rows (default 8)")
    command.add_argument("--random", action="store_true", help="random rows of the prompts, different ones each time")
    _add_json(command)

    command = _command(
        commands,
        "status",
        "show the progress of a run, from its output alone",
        "out/cats",
        "s3://bucket/runs/cats --watch",
    )
    _add_output(command)
    _add_json(command)
    command.add_argument(
        "--watch", action="store_true", help="update the figures until the run is complete; Ctrl-C ends it"
    )
    _add_price(command)

    command = _command(
        commands,
        "gallery",
        "make a page to look through a run's images, and a contact sheet",
        "out/cats",
        "out/cats --beside out/cats-28-steps",
    )
    _add_output(command)
    command.add_argument(
        "--max-images",
        type=int,
        metavar="N",
        help="at most N images, evenly spread (default 100000, in a single file 200)",
    )
    command.add_argument(
        "--columns",
        metavar="NAME,NAME",
        help="columns shown below each image (in a single file, by default those that differ)",
    )
    command.add_argument(
        "--beside", metavar="OUTPUT_URI", help="another run, whose images of the same rows are shown beside these"
    )
    command.add_argument(
        "--single-file", action="store_true", help="one HTML file with its images inside, without search"
    )
    _add_json(command)

    command = _command(
        commands, "report", "make a page of a run's figures: speed, workers, failures, scores", "out/cats"
    )
    _add_output(command)
    _add_json(command)

    command = _command(
        commands,
        "reproduce",
        "make one image of a run again, from its metadata alone, and compare the two",
        "out/cats 000010003",
        "out/cats 000010003 --save again.png",
    )
    _add_output(command)
    command.add_argument("key", metavar="KEY", help="the key of an image, as in the metadata")
    command.add_argument("--model", metavar="URI", help="the run's model, if its address is different on this machine")
    command.add_argument("--save", metavar="FILE", help="write the new image to FILE, encoded like the run's images")
    _add_json(command)

    command = _command(
        commands,
        "compare",
        "show what differs between two runs: settings, images, scores",
        "out/cats out/cats-28-steps",
        "out/cats out/cats-28-steps --images 0 --json",
    )
    _add_output(command)
    command.add_argument("other", metavar="OTHER_URI", help="the output of another run")
    command.add_argument(
        "--images", type=int, default=10, metavar="N", help="decode N of the images that differ (default 10)"
    )
    _add_json(command)

    command = _command(
        commands, "verify", "read all committed data again, and report errors", "out/cats", "out/cats --repair"
    )
    _add_output(command)
    command.add_argument(
        "--quick", action="store_true", help="compare listed sizes with the log of commits, without reading images"
    )
    command.add_argument("--repair", action="store_true", help="revert broken commits, so that `run` makes them again")
    _add_json(command)

    command = _command(
        commands,
        "select",
        "choose images by their metadata, and store the choice under a name",
        'out/cats best --where "clip > 0.27" --top 1000 --by clip',
    )
    add_select(command)
    _add_storage_options(command)

    command = _command(
        commands, "export", "copy the images of a run, or of a selection, into a data set", "out/cats out/set"
    )
    add_export(command)
    _add_storage_options(command)

    command = _command(
        commands,
        "publish",
        "publish images as a data set of the Hugging Face Hub",
        "out/cats hf://datasets/me/cats --license cc-by-4.0",
    )
    add_publish(command)
    _add_storage_options(command)

    command = _command(
        commands,
        "gc",
        "remove files that no commit names: half-written, no longer needed, or unknown",
        "out/cats --dry-run",
    )
    _add_output(command)
    _add_json(command)
    command.add_argument("--dry-run", action="store_true", help="list the files, without removing any")

    command = _command(
        commands, "annotate", "add columns about a run's images, computed by models or code", "out/cats --with phash"
    )
    add_annotate(command)
    _add_storage_options(command)

    command = _command(commands, "download", "download a model to this machine", "FLUX.1-dev --to /models/FLUX.1-dev")
    _add_json(command)
    command.add_argument(
        "name",
        metavar="NAME",
        help="FLUX.1-dev, FLUX.1-schnell, owner/repository, or an address whose model is copied to the cache",
    )
    command.add_argument(
        "--from",
        dest="hub",
        choices=["huggingface", "modelscope"],
        default="huggingface",
        help="the hub of a named model (default huggingface)",
    )
    command.add_argument("--to", metavar="DIR", help="folder (default: models/FLUX/NAME or models/OWNER/REPOSITORY)")
    command.add_argument(
        "--token", help="for a gated or private repository; other users can see it in the process list, unlike HF_TOKEN"
    )
    command.add_argument("--refresh", action="store_true", help="for an address: copy it again if it has changed")
    _add_storage_options(command)

    command = _command(
        commands, "schema", "show the JSON Schema of the job file, for editors and agents", "> job.schema.json"
    )
    command.add_argument("--json", action="store_true", help="has no effect: the output is always JSON")

    command = _command(
        commands,
        "skill",
        "show a page for coding agents: what to run, what to read, exit codes",
        "> .claude/skills/flux-batch/SKILL.md",
    )
    _add_json(command)

    command = _command(
        commands,
        "completion",
        "show a shell script that completes commands and options",
        "bash > ~/.local/share/bash-completion/completions/flux-batch",
        "zsh > ~/.zfunc/_flux-batch",
        "fish > ~/.config/fish/completions/flux-batch.fish",
    )
    command.add_argument("shell", choices=["bash", "zsh", "fish"], help="the shell that reads the script")

    command = _command(
        commands,
        "demo",
        "render the packaged prompts with the packaged small model, and make their gallery",
        "out/demo",
    )
    command.add_argument(
        "output", metavar="FOLDER", nargs="?", default="out/demo", help="the output (default out/demo)"
    )
    command.add_argument("--rows", type=int, metavar="N", help="only the first N prompts (default: all 72)")
    _add_log_format(command)
    _add_json(command)

    command = _command(commands, "bench", "measure the speed on this machine, compared with alternatives", "pipeline")
    add_bench(command)
    for each in commands.choices.values():
        # --debug may also follow the command. SUPPRESS keeps this copy from resetting a --debug before it.
        each.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return top


def completion(shell: str) -> str:
    """Return the script that completes commands, options and file names in a shell."""
    import shtab

    top = parser()
    for each in _all_parsers(top):
        for action in each._actions:
            if action.metavar in _FILES:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
            elif action.metavar in _FOLDERS:
                action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
    return shtab.complete(top, shell)


def _all_parsers(top: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Yield a parser and the parsers of its commands."""
    yield top
    for action in top._actions:
        if isinstance(action, argparse._SubParsersAction):
            for each in action.choices.values():
                yield from _all_parsers(each)


def _chosen(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> argparse.ArgumentParser:
    """Return the parser of the command, or of the subcommand, in `arguments`; `parser` itself if there is none."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction) and (name := getattr(arguments, action.dest, None)):
            return _chosen(action.choices[name], arguments)
    return parser


class _Parser(argparse.ArgumentParser):
    """A parser that suggests the nearest command or option for an unknown one."""

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse arguments, and refuse those that the command does not know."""
        arguments, unknown = self.parse_known_args(args, namespace)
        if unknown:
            command = _chosen(self, arguments)
            near = self._near(unknown[0].partition("=")[0], command)
            command.error(f"unrecognized arguments: {' '.join(unknown)}{near}")
        return arguments

    def _near(self, option: str, command: argparse.ArgumentParser) -> str:
        """Return a hint for an unknown option: the nearest one of the same command."""
        if not option.startswith("--"):
            return ""
        if option in _options_of(_all_parsers(self)):
            return "; another command has it"
        return did_you_mean(option, _options_of([command]))

    def error(self, message: str) -> NoReturn:
        """Print one sentence and exit with 2."""
        unknown = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)$", message)
        near = did_you_mean(unknown[1], re.findall(r"[\w-]+", unknown[2])) if unknown else ""
        self.exit(2, f"{self.prog}: {message}{near}\n`{self.prog} --help` shows how to use it\n")


def _options_of(parsers: Iterable[argparse.ArgumentParser]) -> set[str]:
    return {name for each in parsers for name in each._option_string_actions}


def _command(
    commands: argparse._SubParsersAction[_Parser], name: str, text: str, *examples: str
) -> argparse.ArgumentParser:
    """Add a command with its help and examples."""
    lines = "".join(f"\n  flux-batch {name} {example}" for example in examples)
    command = commands.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        epilog=f"examples:{lines}" if examples else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return command


def _add_json(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="print JSON on stdout")


def _add_log_format(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--log-format", choices=["text", "json"], help="the format of log lines; json: one object per line"
    )


def _add_job(command: argparse.ArgumentParser) -> None:
    command.add_argument("job", metavar="JOB.yaml", help="path or address, e.g. s3://bucket/job.yaml")
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        dest="overrides",
        help="override a setting of the job file; repeatable",
    )
    command.add_argument(
        "--logical-date", metavar="DATE", help="value of {date}, {day}, {datetime} in the job file, e.g. 2026-11-23"
    )


def _add_price(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--price",
        type=_positive,
        metavar="AMOUNT",
        help="price of a GPU-hour, or of a worker-hour without GPUs",
    )


def _positive(text: str) -> float:
    with suppress(ValueError):
        if 0 < (number := float(text)) < float("inf"):
            return number
    raise argparse.ArgumentTypeError(f"{text}: must be a number greater than 0")


def _add_output(command: argparse.ArgumentParser) -> None:
    command.add_argument("output", metavar="OUTPUT_URI", help="the output of a run: output.uri of its job file")
    _add_storage_options(command)


def _add_storage_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--storage-option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="fsspec option of the storage, e.g. endpoint_url=...; repeatable",
    )
