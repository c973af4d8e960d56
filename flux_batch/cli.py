"""The command line: parse, call, print; an exception becomes one sentence and an exit code.

0: done. 1: unexpected error. 2: bad job file or input, or damaged output; do not retry. 3: finished, but more rows
failed than allowed. 75: interrupted; run the same command again.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from flux_batch.arguments import completion, parser
from flux_batch.dataset.annotate_command import run_annotate
from flux_batch.dataset.command import export_command, publish_command, select_command
from flux_batch.errors import JobError, one_line
from flux_batch.logs import ENCODING, JsonLines, log_lines, open_streams, reader_may_be_gone
from flux_batch.redaction import plain_text
from flux_batch.report.command import check_outputs, gallery_command, gc_command, said_of_gallery, verify_command

if TYPE_CHECKING:
    from flux_batch.config.schema import JobConfig
    from flux_batch.report.progress.live import LiveDisplay
    from flux_batch.report.progress.table import Rows
    from flux_batch.report.summary import RunReport
    from flux_batch.storage.store import Store

_TOO_MANY_FAILED, _INTERRUPTED = 3, 75
_MAX_PREVIEW = 200
# The state that an interrupted command leaves, for its message.
_RESUMED = "committed work stays, the same command resumes the run"
_LEFT = {
    **dict.fromkeys(("run", "demo", "annotate"), _RESUMED),
    **dict.fromkeys(("export", "publish", "download"), "finished files stay, the same command continues with the rest"),
    **dict.fromkeys(("plan", "validate"), "nothing was written"),
    "preview": "the output of the job is as it was",
}

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns: its exit code."""
    commands = parser()
    arguments = commands.parse_args(argv)
    if not (arguments.command or arguments.version):
        commands.print_help(sys.stderr)
        return 2
    if getattr(arguments, "log_format", None):
        os.environ[ENCODING] = arguments.log_format.upper()  # the workers inherit it
    arguments.argv = argv
    before = signal.signal(signal.SIGTERM, _on_sigterm)
    with open_streams(), log_lines(logging.DEBUG if arguments.debug else logging.INFO) as arguments.lines:
        try:
            check_outputs(arguments)
            return _version() if arguments.version else _COMMANDS[arguments.command](arguments)
        except (Exception, KeyboardInterrupt) as error:
            sentence, exit_code = _explained(error, arguments.command)
            if isinstance(arguments.lines, JsonLines):
                log.error(sentence, exc_info=error if arguments.debug else None, extra={"exit_code": exit_code})
                return exit_code
            trace = traceback.format_exc() if arguments.debug else ""
            with suppress(OSError):  # a full disk behind stderr does not change the exit code
                sys.stderr.write(plain_text(f"{trace}flux-batch: {sentence}\n"))
            return exit_code
        finally:
            signal.signal(signal.SIGTERM, before)


def _load_job(arguments: argparse.Namespace) -> JobConfig:
    from flux_batch.job import load_job

    return load_job(arguments.job, arguments.overrides, arguments.logical_date)


def _run(arguments: argparse.Namespace) -> int:
    from flux_batch.report.summary import report_rows

    report = _finished_run(arguments)
    _show_table(arguments, json.loads(report.to_json()), [report_rows(report)])
    return report.exit_code


def _finished_run(arguments: argparse.Namespace) -> RunReport:
    """Run a job, and post its result to a webhook if there is one."""
    from flux_batch.engine.stop import Stop, stopped_by_signals
    from flux_batch.job import run
    from flux_batch.report.webhook import post_to_webhook, webhook_address

    if arguments.max_cost and not arguments.price:
        raise JobError("--max-cost: needs --price, the cost of an hour of a GPU")
    address = webhook_address()
    stop = Stop()
    try:
        with stopped_by_signals(stop), _display(arguments, f"{arguments.job}: reading the job and its prompts") as live:
            config = _load_job(arguments)
            if isinstance(arguments.lines, JsonLines):
                arguments.lines.run = config.name
            report = run(
                config,
                stop=stop,
                retry_failed=arguments.retry_failed,
                extend=arguments.extend,
                price=arguments.price,
                max_cost=arguments.max_cost,
                show=live.show if live else None,
            )
    except (Exception, KeyboardInterrupt) as error:
        sentence, exit_code = _explained(error, arguments.command)
        post_to_webhook(address, plain_text(f"{arguments.job}: {sentence}"), exit_code)
        raise
    post_to_webhook(address, plain_text(report.line), report.exit_code, output=report.output)
    return report


def _plan(arguments: argparse.Namespace) -> int:
    from flux_batch.engine.ray_local import joins_cluster
    from flux_batch.job import foresee, measure
    from flux_batch.plan.costs import Speed, cost_rows, costs, remembered_speed
    from flux_batch.plan.estimate import estimate, estimate_rows, job_rows, prompt_rows
    from flux_batch.plan.plan import make_plan
    from flux_batch.plan.survey import PLAN_ROWS, survey, survey_rows

    config = _load_job(arguments)
    plan = make_plan(config.prompts, config.output.shard_size)
    here, there, problems = foresee(config)
    rows = survey(here, plan, PLAN_ROWS)
    here = rows.sized(here)
    figures = estimate(here, plan, there.bytes_per_image if there else None)
    speed = remembered_speed(here, figures["pflop_per_image"])
    if arguments.measure and not problems:
        speed = Speed(measure(rows.sized(config)), "measured")
    elif arguments.speed:
        speed = Speed(arguments.speed, "given")
    num_left = max(0, figures["num_images"] - (there.num_images if there else 0))
    is_here = not problems and not joins_cluster()
    begun: dict[str, Any] = {}
    if there:
        begun = {"num_committed": there.num_committed, "past_hours": there.device_hours(here.workers.num_gpus)}
    costing = costs(here, figures, num_left, speed, arguments.price, is_here=is_here, **begun)
    nothing = [] if problems else [("there", "nothing yet: a run would begin")]
    there_rows = [("there", there.text)] if there else nothing
    data = figures | costing | {"rows": rows.to_json(), "there": there and asdict(there), "problems": problems}
    sections = [
        job_rows(here),
        prompt_rows(here, plan) + survey_rows(rows, plan.num_prompts),
        estimate_rows(here, figures, has_speed=speed is not None),
        there_rows + cost_rows(costing) + [("REFUSED", problem) for problem in problems],
    ]
    _show_table(arguments, data, sections)
    return JobError.exit_code if problems else 0


def _init(arguments: argparse.Namespace) -> int:
    from flux_batch.config.schema import JobConfig
    from flux_batch.job import with_absolute_paths
    from flux_batch.plan.draft import draft_job

    tree = {"prompts": {"uri": arguments.prompts}, "output": {"uri": "out"}, "model": {"uri": "demo"}}
    text = draft_job(arguments.prompts, with_absolute_paths(JobConfig.from_dict(tree, origin="--prompts")).prompts)
    try:
        with Path(arguments.job).open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        is_job = arguments.job.endswith((".yaml", ".yml"))
        hint = "" if is_job else f"; to make a job for these prompts: --prompts {arguments.job}"
        raise JobError(f"{arguments.job}: already exists, and is not overwritten{hint}") from error
    except OSError as error:
        raise JobError(f"{arguments.job}: cannot be written: {error.strerror}") from error
    data = {"job": arguments.job, "prompts": arguments.prompts}
    _show(arguments, data, f"{arguments.job}: written; next: flux-batch plan {shlex.quote(arguments.job)}")
    return 0


def _validate(arguments: argparse.Namespace) -> int:
    from flux_batch.plan.estimate import prompt_rows
    from flux_batch.plan.plan import make_plan
    from flux_batch.plan.survey import survey, survey_rows
    from flux_batch.storage.store import Store

    config = _load_job(arguments)
    if "://" in config.output.uri:  # on a disk the check would leave a folder behind
        Store(config.output.uri, config.output.storage_options).check_writable()
    plan = make_plan(config.prompts, config.output.shard_size)
    rows = survey(config, plan)
    data = {"num_prompts": plan.num_prompts, "notes": list(plan.notes), "rows": rows.to_json()}
    _show_table(arguments, data, [prompt_rows(config, plan) + survey_rows(rows, plan.num_prompts)])
    return _TOO_MANY_FAILED if rows.failed_ratio > config.failures.max_ratio else 0


def _preview(arguments: argparse.Namespace) -> int:
    from flux_batch.job import preview
    from flux_batch.plan.tokenizers import Tokenizers
    from flux_batch.report.gallery.write import write_single_file
    from flux_batch.report.progress.table import write_table
    from flux_batch.report.summary import report_rows
    from flux_batch.storage.store import Store

    if not 1 <= arguments.rows <= _MAX_PREVIEW:
        raise JobError(f"--rows {arguments.rows}: must be from 1 to {_MAX_PREVIEW}")
    config = _load_job(arguments)
    report = preview(config, arguments.rows, is_random=arguments.random)
    store = Store(report.output)
    gallery = write_single_file(store, _MAX_PREVIEW, further=Tokenizers(config).left_out)
    data, text = said_of_gallery(store, gallery, len(gallery.images))
    rows = [image.row for image in gallery.images]
    num_cut = sum(bool(row.get("clip_truncated") or row.get("t5_truncated")) for row in rows)
    if num_cut:
        are = "prompt is" if num_cut == 1 else "prompts are"
        text += f"\n{num_cut} {are} longer than CLIP or T5 reads; the page shows the text left out"
    data |= {"output": report.output, "num_truncated": num_cut, "report": json.loads(report.to_json())}
    _show(arguments, data, text)
    if report.exit_code and not arguments.json:
        write_table([report_rows(report)])
    return report.exit_code


def _status(arguments: argparse.Namespace) -> int:
    from flux_batch.report.progress.status import read_status, status_rows

    store = _store(arguments)
    if arguments.watch:
        with suppress(KeyboardInterrupt), reader_may_be_gone():
            _watch(arguments, store)
        return 0
    status = read_status(store)
    _show_table(arguments, status, [status_rows(status, price=arguments.price)])
    return 0


def _watch(arguments: argparse.Namespace, store: Store) -> None:
    """Show the status of a run until the run is complete."""
    from flux_batch.report.progress.status import statuses, watch_status

    if arguments.json:
        for status in statuses(store):
            _print_line(json.dumps(status))
        return
    with _display(arguments, f"reading {store.uri}") as live:
        watch_status(store, arguments.price, _print_line, live.show if live else None)


def _gallery(arguments: argparse.Namespace) -> int:
    _show(arguments, *gallery_command(arguments, _options(arguments.storage_option), _show_progress))
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from flux_batch.report.charts.page import write_report_page

    page = write_report_page(_store(arguments))
    _show(arguments, {"page": page}, page)
    return 0


def _reproduce(arguments: argparse.Namespace) -> int:
    from flux_batch.job import reproduce

    if arguments.save and not Path(arguments.save).absolute().parent.is_dir():
        raise JobError(f"--save {arguments.save}: there is no such folder")
    result = reproduce(_store(arguments), arguments.key, arguments.model)
    if arguments.save:
        try:
            Path(arguments.save).write_bytes(result.data)
        except OSError as error:
            raise JobError(f"--save {arguments.save}: cannot be written: {error.strerror}") from error
    _show(arguments, result.to_json(), result.text)
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from flux_batch.report.compare import compare_runs

    if arguments.images < 0:
        raise JobError(f"--images {arguments.images}: must be 0 or more")
    found = compare_runs(_store(arguments), _store(arguments, arguments.other), arguments.images)
    _show(arguments, found.to_json(), found.text)
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    said, exit_code = verify_command(arguments, _options(arguments.storage_option), _show_progress)
    _show(arguments, *said)
    return exit_code


def _select(arguments: argparse.Namespace) -> int:
    _print(select_command(arguments, _options(arguments.storage_option)))
    return 0


def _export(arguments: argparse.Namespace) -> int:
    _print(export_command(arguments, _options(arguments.storage_option), _show_progress))
    return 0


def _publish(arguments: argparse.Namespace) -> int:
    _print(publish_command(arguments, _options(arguments.storage_option), _show_progress))
    return 0


def _gc(arguments: argparse.Namespace) -> int:
    _show(arguments, *gc_command(arguments, _options(arguments.storage_option)))
    return 0


def _annotate(arguments: argparse.Namespace) -> int:
    options = _options(arguments.storage_option)
    with _display(arguments, f"{arguments.output}: reading the run") as live:
        report = run_annotate(arguments, options, live.show if live else None)
    _print(report.to_json() if arguments.json else str(report))
    return report.exit_code


def _download(arguments: argparse.Namespace) -> int:
    from flux_batch.download.models import download_models, local_model

    if "://" in arguments.name:
        options = _options(arguments.storage_option)
        folder = local_model(arguments.name, options, refresh=arguments.refresh)
    else:
        (folder,) = download_models([arguments.name], [arguments.hub], to=arguments.to, token=arguments.token)
    _show(arguments, {"folder": str(folder)}, str(folder))
    return 0


def _schema(arguments: argparse.Namespace) -> int:
    from flux_batch.config.schema import JobConfig

    _print(json.dumps(JobConfig.model_json_schema(), indent=1))
    return 0


def _skill(arguments: argparse.Namespace) -> int:
    text = Path(__file__).with_name("SKILL.md").read_text(encoding="utf-8").rstrip()
    _show(arguments, {"skill": text}, text)
    return 0


def _completion(arguments: argparse.Namespace) -> int:
    _print(completion(arguments.shell))
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from flux_batch.demo.paths import demo_job_path
    from flux_batch.report.summary import report_rows

    settings = [f"output.uri={json.dumps(arguments.output)}"]
    if arguments.rows is not None:
        settings.append(f"prompts.limit={arguments.rows}")
    report = _finished_run(
        argparse.Namespace(
            **vars(arguments),
            job=str(demo_job_path()),
            overrides=settings,
            logical_date=None,
            price=None,
            max_cost=None,
            retry_failed=False,
            extend=False,
        )
    )
    wanted = argparse.Namespace(output=report.output, columns=None, max_images=None, single_file=False, beside=None)
    page, where = gallery_command(wanted, {}, _show_progress)
    _show_table(arguments, {"report": json.loads(report.to_json()), "gallery": page}, [report_rows(report)])
    if not arguments.json:
        _print(where)
    return report.exit_code


def _version() -> int:
    from flux_batch.report.summary import installed_versions

    versions = installed_versions()
    _print(f"flux-batch {versions.pop('flux-batch')}")
    _print(", ".join(f"{name} {version or '(missing)'}" for name, version in versions.items()))
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    from flux_batch.bench.command import bench

    _print(bench(arguments))
    return 0


def _options(pairs: Sequence[str]) -> dict[str, Any]:
    """Read the pairs of --storage-option."""
    from flux_batch.config.text import read_pairs

    return read_pairs(pairs, "--storage-option")


def _display(arguments: argparse.Namespace, doing: str) -> AbstractContextManager[LiveDisplay | None]:
    """Return a live display; None if stderr is no terminal, or log lines are JSON."""
    from flux_batch.report.progress.live import live_display
    from flux_batch.report.progress.table import can_draw

    if isinstance(arguments.lines, JsonLines) or not can_draw(sys.stderr):
        return nullcontext()
    return live_display(doing, getattr(arguments, "price", None))


def _show_progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r{done} of {total} shards" + ("\n" if done == total else ""))


def _show(arguments: argparse.Namespace, data: dict[str, Any], text: str) -> None:
    """Print a result as JSON with --json, else as text."""
    _print(json.dumps(data) if arguments.json else text)


def _show_table(arguments: argparse.Namespace, data: dict[str, Any], sections: Sequence[Rows]) -> None:
    """Print a result as JSON with --json, else as a table."""
    from flux_batch.report.progress.table import write_table

    if arguments.json:
        _print(json.dumps(data))
        return
    with reader_may_be_gone():
        write_table(sections)


def _store(arguments: argparse.Namespace, uri: str | None = None) -> Store:
    """Return the store of the command's output, or of `uri`."""
    from flux_batch.storage.store import Store

    return Store(arguments.output if uri is None else uri, _options(arguments.storage_option))


def _print(text: str) -> None:
    """Print the result of a command; a closed stdout does not change its exit code."""
    with reader_may_be_gone():
        _print_line(text)


def _print_line(text: str) -> None:
    sys.stdout.write(plain_text(text) + "\n")
    sys.stdout.flush()  # the reader of a pipe gets the line now


def _explained(error: BaseException, command: str) -> tuple[str, int]:
    """Return the sentence and the exit code for an error that ended a command."""
    if isinstance(error, KeyboardInterrupt):
        return f"interrupted; {_LEFT.get(command, 'the same command begins again')}", _INTERRUPTED
    known = hasattr(error, "exit_code")
    sentence = str(error) if known else f"unexpected {type(error).__name__}: {one_line(error)} (--debug shows where)"
    return sentence, getattr(error, "exit_code", 1)


def _on_sigterm(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "run": _run,
    "plan": _plan,
    "init": _init,
    "validate": _validate,
    "preview": _preview,
    "status": _status,
    "gallery": _gallery,
    "report": _report,
    "reproduce": _reproduce,
    "compare": _compare,
    "verify": _verify,
    "select": _select,
    "export": _export,
    "publish": _publish,
    "gc": _gc,
    "annotate": _annotate,
    "download": _download,
    "schema": _schema,
    "skill": _skill,
    "completion": _completion,
    "demo": _demo,
    "bench": _bench,
}


if __name__ == "__main__":
    sys.exit(main())
