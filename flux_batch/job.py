"""A whole run on one screen: config -> plan -> remaining -> engine -> report.

The only file that sees both sides, what is done (worker) and where (engine). Every fact of a run lies in its output;
this process can be killed at any point and started again.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flux_batch.config.schema import JobConfig, ModelConfig
from flux_batch.config.text import fill_in_dates, read_tree
from flux_batch.download.revision import model_revision
from flux_batch.engine.stop import Stop
from flux_batch.errors import AlreadyExists, Interrupted, JobError, NotFound, PlanMismatch, StoreError
from flux_batch.output.card import card
from flux_batch.output.commits import Commits
from flux_batch.output.layouts import layout_for
from flux_batch.output.lease import HeldStore, Lease
from flux_batch.output.paths import CARD, JOB, PLAN, PRECISION, REPORT, STAGING, SUCCESS
from flux_batch.output.revert import TakeBack
from flux_batch.output.staging import Staging
from flux_batch.pipeline.load import load_pipeline
from flux_batch.plan.plan import Plan, check_same_job, extended, make_plan, remaining
from flux_batch.prompts.input_images import check_of_job
from flux_batch.prompts.source import PromptSource
from flux_batch.records import Shard
from flux_batch.report.progress import Progress
from flux_batch.report.summary import RunReport, Totals
from flux_batch.report.versions import versions
from flux_batch.storage.store import SCRATCH, Store
from flux_batch.worker.protocol import ImagePipeline
from flux_batch.worker.settled_precision import settled_job, with_dtype_of_run
from flux_batch.worker.worker import WorkerRecipe

if TYPE_CHECKING:
    from flux_batch.engine.protocol import Engine, Runner

log = logging.getLogger(__name__)


def run(
    config: JobConfig | str | Path,
    *,
    engine: Engine | None = None,
    make_pipeline: Callable[[ModelConfig], ImagePipeline] | None = None,
    stop: Stop | None = None,
    retry_failed: bool = False,
    extend: bool = False,
) -> RunReport:
    """Run a job to its end, or go on with one that was interrupted.

    `config` may be the path or the address of a job file. The engine is a pool of Ray actors unless another is given;
    the pipeline is FLUX unless another is given. `stop` can ask for an early end, from a signal handler or another
    thread. Safe to call again: committed shards are left as they are, but for what failed in them with `retry_failed`.
    With `extend`, prompt files that came since the run was planned become shards of it.
    Raises: RunHeld, LeaseLost if another driver has the run; Interrupted after a stop; JobError, SourceError,
    CheckpointError, StoreError before or while work is done; see errors.py.
    """
    config = located(config if isinstance(config, JobConfig) else load_job(config))
    stop = stop or Stop()
    store = Store(config.output.uri, config.output.storage_options)
    config = with_dtype_of_run(store, config)
    report = finished(config, store, extend=extend)
    if report and not (retry_failed and report.num_failed):
        return report
    draft = None if store.exists(PLAN) else draft_run(config, store)
    # From here on there is work to lose: an outage is waited for.
    patience: dict[str, Any] = {"patience_s": config.failures.outage_s, "on_wait": stop.check}
    store = Store(config.output.uri, config.output.storage_options, **patience)
    with Lease(store, ttl_s=config.failures.lease_ttl_s, on_lost=stop.request, sleep=stop.sleep) as lease:
        store = HeldStore(config.output.uri, config.output.storage_options, check=lease.check, **patience)
        plan = open_run(config, store, draft, extend=extend)
        reopen(config, plan, store, retry_failed=retry_failed)
        todo, progress = state_of(plan, store)
        if todo:
            check_images(config)
            log.info("%s: %d of %d shards to do, output %s", config.name, len(todo), len(plan.shards), store.uri)
            recipe = WorkerRecipe(config, len(plan.shards), plan.passthrough, make_pipeline or load_pipeline)
            render(engine or ray_pool(config), recipe, todo, stop, progress)
        return close_run(config, store, plan, progress)


def load_job(path: str | Path, overrides: Iterable[str] = (), logical_date: datetime | None = None) -> JobConfig:
    """Read a job file, by its path or address; what it says of `{date}` and `{datetime}` is taken from `logical_date`.

    overrides: `section.key=value` strings. Raises: JobError if it is missing or wrong; StoreError if its storage is
    away.
    """
    try:
        text = _read_job(str(path)).decode()
    except StoreError:
        raise
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"{path}: the job file cannot be read: {error}") from error
    tree = fill_in_dates(read_tree(text, str(path), overrides), logical_date, str(path))
    return JobConfig.from_dict(tree, origin=str(path))


def located(config: JobConfig) -> JobConfig:
    """Fix relative paths to this process's folder, since workers have another; `demo` prompts are in the package."""
    from flux_batch.demo.prompts import demo_prompts_path
    from flux_batch.download.models import located as located_model

    uris = tuple(str(demo_prompts_path()) if uri == "demo" else _absolute(uri) for uri in config.prompts.uri)
    root, image = config.prompts.input_image_root, config.sampling.input_image
    return config.model_copy(
        update={
            "prompts": config.prompts.model_copy(update={"uri": uris, "input_image_root": root and _absolute(root)}),
            "sampling": config.sampling.model_copy(update={"input_image": image and _absolute(image)}),
            "output": config.output.model_copy(update={"uri": _absolute(config.output.uri)}),
            "model": config.model.model_copy(
                update={
                    "uri": located_model(config.model.uri),
                    "loras": tuple(
                        lora.model_copy(update={"uri": located_model(lora.uri)}) for lora in config.model.loras
                    ),
                }
            ),
        }
    )


def check_images(config: JobConfig) -> None:
    """Raise SourceError if the image that all rows start from cannot be used."""
    if config.sampling.input_image:
        check_of_job(config.sampling.input_image, config.prompts.storage_options)


def finished(config: JobConfig, store: Store, *, extend: bool = False) -> RunReport | None:
    """Report on a run that has nothing left to do, without a lease or a write. Returns: None if there is work."""
    plan = saved_plan(config, store, extend=extend) if store.exists(SUCCESS) else None
    if plan is None or (extend and extended(plan, config.prompts, config.output.shard_size) is not plan):
        return None
    todo, progress = state_of(plan, store)
    if todo or store.list(SCRATCH):  # the last writer was killed in the middle of a write
        return None
    if extend:
        log.info("%s: no prompt file is new", config.name)
    log.info("%s: nothing to do, all %d shards are committed in %s", config.name, len(plan.shards), store.uri)
    return report_of(settled_job(store, config), store, progress)


def draft_run(config: JobConfig, store: Store) -> Plan:
    """Plan a new run and write nothing, so that what is wrong with it leaves no trace."""
    if foreign := written(store):
        raise JobError(f"{store.uri}: holds {foreign[0]}, but no run; take an empty folder as output.uri")
    return make_plan(config.prompts, config.output.shard_size)


def open_run(config: JobConfig, store: Store, draft: Plan | None = None, *, extend: bool = False) -> Plan:
    """Load the plan of the run that is in the output, or write down a new run; needs the lease.

    The plan comes last and makes the run exist. Raises: PlanMismatch, JobError.
    """
    if plan := saved_plan(config, store, extend=extend):
        return extend_run(config, store, plan) if extend else plan
    plan = draft or draft_run(config, store)
    if store.exists(PLAN):
        for key in (PLAN, PRECISION):  # of another job, which has made nothing
            store.delete(key)
    store.write(JOB, config.to_yaml().encode())
    store.write(CARD, card(config, plan.num_prompts).encode())
    try:
        store.put_if_absent(PLAN, plan.to_parquet())
    except AlreadyExists:
        return open_run(config, store, extend=extend)  # the answer to our own write was lost
    return plan


def extend_run(config: JobConfig, store: Store, plan: Plan) -> Plan:
    """Take the files that came since into a run; needs the lease. The plan comes last: it is the old or the new one."""
    longer = extended(plan, config.prompts, config.output.shard_size)
    if longer is plan:
        return plan
    num_new = len(longer.shards) - len(plan.shards)
    log.info("%s: %d new prompts in %d shards", config.name, longer.num_prompts - plan.num_prompts, num_new)
    if store.exists(SUCCESS):
        store.delete(SUCCESS)  # said of the old plan, it must not stand beside the new one
    store.write(CARD, card(config, longer.num_prompts).encode())
    store.write(PLAN, longer.to_parquet())
    return longer


def saved_plan(config: JobConfig, store: Store, *, extend: bool = False) -> Plan | None:
    """Load the plan of the run that is in the output; None if there is no run.

    A run that has written nothing yet, since its model was not found say, may still be changed: it does not count.
    Raises: PlanMismatch.
    """
    try:
        saved = store.read(PLAN)
    except NotFound:
        return None
    try:
        saved_job = JobConfig.from_yaml(store.read(JOB).decode(), origin=store.url(JOB))
        check_same_job(settled_job(store, saved_job), settled_job(store, config))
        return Plan.from_parquet(saved, PromptSource(config.prompts).files(), new_files=extend)
    except PlanMismatch:
        if written(store):
            raise
    return None


def reopen(config: JobConfig, plan: Plan, store: Store, *, retry_failed: bool) -> None:
    """Take back the commits with failed rows, if they are to be tried again; finish what was being taken back."""
    take_back = TakeBack(store, len(plan.shards), layout_for(config.output, plan.passthrough))
    take_back.finish()
    if retry_failed:
        commits = Commits(store, len(plan.shards))
        failed = [commit for commit in commits.read_all(sorted(commits.done())) if commit.num_failed]
        num_rows = sum(commit.num_failed for commit in failed)
        log.info("%s: %d failed images in %d shards are tried again", config.name, num_rows, len(failed))
        take_back([commit.shard for commit in failed])


def state_of(plan: Plan, store: Store) -> tuple[list[Shard], Progress]:
    """Read which shards are left to do, and what the others came to."""
    commits = Commits(store, len(plan.shards))
    done = commits.done()
    return remaining(plan, done), Progress(store, len(plan.shards), Totals.of(commits.read_all(sorted(done))))


def render(engine: Engine, runner: Runner, todo: Sequence[Shard], stop: Stop, progress: Progress) -> None:
    """Have every shard run. Raises: Interrupted after a stop that left some of them, and what engines raise."""
    num_settled = 0
    for result in engine.run(runner, todo, stop):
        progress.add(result)
        num_settled += 1
    if stop.is_requested and num_settled < len(todo):
        progress.report()
        raise Interrupted(
            f"{stop.reason}: {progress.totals.num_committed} of {progress.num_shards} shards are committed; "
            "run the same command again"
        )


def written(store: Store) -> list[str]:
    """List images and metadata in the output, of whatever origin; those of unfinished shards included."""
    return store.list("train") or store.list("metadata") or store.list(STAGING)


def close_run(config: JobConfig, store: Store, plan: Plan, progress: Progress) -> RunReport:
    """Write the report and, when every shard is committed, _SUCCESS as the last object of the run."""
    config = settled_job(store, config)
    report = report_of(config, store, progress)
    if report.is_complete:
        Staging(store, progress.num_shards).clear()
        clear_scratch(store)
    if not store.exists(SUCCESS):
        progress.finish()
        revision = model_revision(config.model.uri, config.model.storage_options)
        report = replace(report, model={**report.model, "revision": revision})
        store.write(REPORT, report.to_json())
        store.write(CARD, card(config, plan.num_prompts).encode())  # with the dtype that was settled on
        if report.is_complete:
            store.write(SUCCESS, b"")
    return report


def clear_scratch(store: Store) -> None:
    """Remove the half-written files of killed processes; whoever is alive and writes one, writes it again."""
    for key in store.list(SCRATCH):
        store.delete(key)


def report_of(config: JobConfig, store: Store, progress: Progress) -> RunReport:
    """Sum up a run and this invocation of it."""
    return RunReport(
        name=config.name,
        output=store.uri,
        num_shards=progress.num_shards,
        num_committed=progress.totals.num_committed,
        num_images=progress.totals.num_images,
        num_failed=progress.totals.num_failed,
        num_new_images=progress.num_new_images,
        num_workers=len(progress.workers),
        wall_s=round(progress.wall_s, 3),
        device_s=round(progress.device_s, 3),
        max_failed_ratio=config.failures.max_ratio,
        failures=dict(sorted(progress.totals.failures.items())),
        device_s_of_run=round(progress.totals.device_s, 3),
        num_gpus=config.workers.num_gpus,
        model={key.removeprefix("model."): value for key, value in config.identity().items() if key[:6] == "model."},
        versions=versions(),
        errors=tuple(progress.errors),
    )


def ray_pool(config: JobConfig) -> Engine:
    """Make the engine that the `workers` section asks for."""
    from flux_batch.engine.ray_pool import RayPool

    workers = config.workers
    return RayPool(
        max_workers=workers.max,
        min_workers=workers.min,
        num_gpus=workers.num_gpus,
        num_cpus=workers.num_cpus,
        max_attempts=config.failures.max_attempts,
        hang_s=config.failures.hang_s,
        drain_s=config.failures.drain_s,
        outage_s=config.failures.outage_s,
        name=config.name,
    )


def _read_job(path: str) -> bytes:
    folder, _, name = path.rpartition("/")
    # Options of its storage would have to stand in it: they come from the environment.
    return Store(folder).read(name) if "://" in path else Path(path).read_bytes()


def _absolute(uri: str) -> str:
    return uri if "://" in uri else os.path.abspath(os.path.expanduser(uri))
