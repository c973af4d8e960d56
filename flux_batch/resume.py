"""The run in an output: opening, extending, retrying and closing it.

This module knows the plan, the output and the report, but no worker and no engine. Functions that write need the lease.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

from flux_batch.config.schema import JobConfig
from flux_batch.download.revision import model_revision
from flux_batch.errors import (
    AlreadyExists,
    DamagedObject,
    FluxBatchError,
    JobError,
    NotFound,
    PlanMismatch,
    StoreError,
    count_of,
)
from flux_batch.output.card import card
from flux_batch.output.commit_log import CommitLog, check_all_committed
from flux_batch.output.commits import Commits
from flux_batch.output.formats import format_for
from flux_batch.output.gc import unfinished_uploads
from flux_batch.output.metadata import columns_of_job
from flux_batch.output.paths import (
    CARD,
    JOB,
    METADATA,
    PLAN,
    PROGRESS,
    REPORT,
    SETTLED,
    STAGING,
    SUCCESS,
    TRAIN,
    RunFolder,
)
from flux_batch.output.revert import finish_reverts, revert
from flux_batch.output.staging import Staging
from flux_batch.plan.plan import (
    Plan,
    check_same_job,
    check_same_lists,
    extended,
    make_plan,
    random_rows,
    rules_of_plan,
)
from flux_batch.plan.shards import Shards
from flux_batch.plan.shares import sampled_values
from flux_batch.prompts.source import PromptSource
from flux_batch.report.progress.progress import Progress
from flux_batch.report.saved_run import read_json
from flux_batch.report.summary import RunReport, Totals, first_failures, installed_versions
from flux_batch.storage.store import STORE_TMP, Store
from flux_batch.worker.settled_precision import kernels_of_run, settled_job, with_model_of_run

log = logging.getLogger(__name__)

# The number of commits that are read to estimate the size of an image.
_SAMPLED_COMMITS = 20


def finished(config: JobConfig, store: Store, *, extend: bool = False) -> RunReport | None:
    """Return the report of a finished run, None if there is work left. Needs no lease and writes nothing."""
    plan = _saved_plan(config, store, extend=extend) if store.exists(SUCCESS) else None
    if plan is None or (extend and extended(plan, config.prompts, config.output.shard_size) is not plan):
        return None
    todo, progress = read_state(config, plan, store)
    if todo or store.list(STORE_TMP) or unfinished_uploads(store):  # the last writer was killed during a write
        return None
    if extend:
        log.info("%s: no prompt file is new", config.name)
    log.info("%s: %s committed in %s, none is left", config.name, count_of(len(plan.shards), "shard"), store.uri)
    return _report_of(settled_job(store, config), store, progress)


@dataclass(frozen=True)
class ExistingRun:
    """The existing run in an output.

    bytes_per_image: the mean over the files of some commits, None without images. worker_s: the seconds for which
    workers held their devices.
    """

    num_shards: int
    num_committed: int
    num_images: int
    num_failed: int
    bytes_per_image: float | None
    worker_s: float = 0.0

    @property
    def is_complete(self) -> bool:
        """True if every shard is committed."""
        return self.num_committed == self.num_shards

    def device_hours(self, num_gpus: float) -> float:
        """Return the GPU-hours of the run; a worker without GPUs counts as one GPU."""
        return self.worker_s * (num_gpus or 1) / 3600

    @property
    def text(self) -> str:
        """The state of the run as one line."""
        shards = f"{self.num_committed} of {count_of(self.num_shards, 'shard')}"
        if self.is_complete:
            return f"{shards} committed: nothing to do"
        return f"{shards}, {self.num_images} images ({self.num_failed} failed): a run would continue with the rest"


def job_of_run(config: JobConfig, store: Store, *, extend: bool = False) -> JobConfig:
    """Return a job with its open settings taken from its existing run.

    These are dtype, `compile` and guidance. A job that replaces a run without images is returned unchanged.
    Raises: PlanMismatch, StoreError, JobError.
    """
    begun = with_model_of_run(store, config)
    return begun if begun == config or _saved_plan(begun, store, extend=extend) else config


def existing_run(config: JobConfig, store: Store) -> ExistingRun | None:
    """Return the run in the output that the job would resume; None if it would begin a new one.

    Raises: PlanMismatch, JobError if it can do neither.
    """
    plan = _saved_plan(job_of_run(config, store), store)
    if plan is None:
        _check_empty(store)
        return None
    commits = Commits(RunFolder(store, len(plan.shards)))
    counts = CommitLog.read(commits)
    totals = Totals.of(counts)
    samples = list(commits.read_all(counts.shards[:_SAMPLED_COMMITS]))
    num_made = sum(commit.num_images - commit.num_failed for commit in samples)
    num_bytes = sum(file.bytes for commit in samples for file in commit.files if file.path.startswith(f"{TRAIN}/"))
    return ExistingRun(
        len(plan.shards),
        totals.num_committed,
        totals.num_images,
        totals.num_failed,
        num_bytes / num_made if num_made else None,
        _past_worker_s(store),
    )


def _check_empty(store: Store) -> None:
    """Raise JobError if a new run would overwrite other files in the output."""
    if foreign := _any_output(store):
        raise JobError(f"{store.uri}: holds {foreign}, but no run; use an empty folder as output.uri")
    if store.exists(CARD) and not store.exists(JOB):
        raise JobError(
            f"{store.uri}: holds another {CARD}, which this run would overwrite; use an empty folder as output.uri"
        )


def draft_run(config: JobConfig, store: Store) -> Plan:
    """Plan a new run without writing, so that a wrong job leaves no trace. Raises: JobError, SourceError."""
    _check_empty(store)
    plan = make_plan(config.prompts, config.output.shard_size)
    for note in plan.notes:
        log.warning("prompts: %s", note)
    return plan


def open_run(config: JobConfig, store: Store, draft: Plan | None = None, *, extend: bool = False) -> Plan:
    """Load the plan of the output's run, or write a new run; needs the lease.

    The plan is written last, and makes the run exist. Raises: PlanMismatch, JobError.
    """
    if plan := _saved_plan(config, store, extend=extend):
        return _extend_run(config, store, plan) if extend else plan
    plan = draft or draft_run(config, store)
    if store.exists(PLAN):
        # The plan of another job, which has made no image. It is deleted last: without it nothing finds the others.
        for key in (*SETTLED, PROGRESS, PLAN):
            store.delete(key)
    store.write(JOB, config.to_yaml().encode())
    store.write(CARD, card(config, plan.num_prompts).encode())
    try:
        store.put_if_absent(PLAN, plan.to_parquet())
    except AlreadyExists:
        return open_run(config, store, extend=extend)  # our write succeeded, but its answer was lost
    return plan


def open_random_run(config: JobConfig, store: Store, num_rows: int) -> None:
    """Write a new run of random rows of all prompts into a new folder."""
    open_run(config, store, random_rows(draft_run(config, store), config.prompts, num_rows))


def _extend_run(config: JobConfig, store: Store, plan: Plan) -> Plan:
    """Add new prompt files to a run; needs the lease. The plan is written last, as a whole."""
    longer = extended(plan, config.prompts, config.output.shard_size)
    if longer is plan:
        return plan
    prompts = count_of(longer.num_prompts - plan.num_prompts, "new prompt")
    shards = count_of(len(longer.shards) - len(plan.shards), "shard")
    log.info("%s: %s in %s", config.name, prompts, shards)
    for key in (SUCCESS, REPORT):  # they belong to the old plan
        store.delete(key)
    store.write(CARD, card(config, longer.num_prompts).encode())
    store.write(PLAN, longer.to_parquet())
    return longer


def _saved_plan(config: JobConfig, store: Store, *, extend: bool = False) -> Plan | None:
    """Load the plan of the output's run, None if there is no run.

    A different run without images or metadata counts as none, for example one whose model was missing: the job may
    replace it. Raises: PlanMismatch, DamagedObject.
    """
    try:
        saved = store.read(PLAN)
    except NotFound:
        return None
    try:
        saved_job = JobConfig.from_yaml(store.read(JOB).decode(), origin=store.url(JOB))
        check_same_job(settled_job(store, saved_job), settled_job(store, config))
        source = PromptSource(config.prompts, rules_of_plan(saved))
        plan = Plan.from_parquet(saved, source.files(), new_files=extend)
        check_same_lists(plan, source.lists)
        return plan
    except PlanMismatch:
        if _any_output(store):
            raise
    except FluxBatchError:
        raise
    except ValueError as error:
        raise DamagedObject(f"{store.url(PLAN)} or {JOB} is damaged: {error}") from error
    return None


def revert_failed(config: JobConfig, plan: Plan, store: Store, *, retry_failed: bool) -> None:
    """Finish interrupted reverts; with `retry_failed`, also revert commits with failed rows. Needs the lease."""
    run, output_format = (
        RunFolder(store, len(plan.shards)),
        format_for(config.output, columns_of_job(plan.passthrough, config)),
    )
    finish_reverts(run, output_format)
    if retry_failed:
        counts = CommitLog.read(Commits(run))
        num_rows = sum(counts.num_failed)
        failed = sorted(shard for shard, number in zip(counts.shards, counts.num_failed, strict=True) if number)
        images, shards = count_of(num_rows, "failed image"), count_of(len(failed), "shard")
        log.info("%s: trying %s in %s again", config.name, images, shards)
        revert(run, output_format, failed)


def read_state(config: JobConfig, plan: Plan, store: Store) -> tuple[Shards, Progress]:
    """Read the shards that are left, and the totals of the committed ones."""
    counts = CommitLog.read(Commits(RunFolder(store, len(plan.shards))))
    todo, num_images = plan.shards.without(counts.is_done), config.sampling.num_images_per_prompt
    progress = Progress(
        store,
        len(plan.shards),
        Totals.of(counts),
        counts,
        num_left=todo.num_rows * num_images,
        expected=lambda shard: plan.shards[shard].num_rows * num_images,
        past_worker_s=_past_worker_s(store),
        num_gpus=config.workers.num_gpus,
    )
    if config.model.compile is True or (config.model.compile == "auto" and config.workers.num_gpus):
        progress.first_images = "the first images, for which the model is compiled"
    return todo, progress


def _past_worker_s(store: Store) -> float:
    """Return the seconds for which workers held their devices, over all past invocations."""
    return float((read_json(store, PROGRESS) or {}).get("worker_s", 0.0))


def _any_output(store: Store) -> str | None:
    """Return the key of one image or metadata file in the output; None without one.

    It may belong to another program or to an unfinished shard.
    """
    return store.any_key(TRAIN) or store.any_key(METADATA) or store.any_key(STAGING)


def close_run(config: JobConfig, store: Store, plan: Plan, progress: Progress) -> RunReport:
    """Write the report and, if every shard is committed, _SUCCESS as the last object. Needs the lease."""
    config = settled_job(store, config)
    is_open = not store.exists(SUCCESS)
    if is_open:
        progress.finish()
    report = _report_of(config, store, progress)
    if report.is_complete:
        run = RunFolder(store, progress.num_shards)
        check_all_committed(Commits(run))
        Staging(run).clear()
        _clear_scratch(store)
    if is_open:
        revision = model_revision(config.model.uri, config.model.storage_options)
        report = replace(report, model={**report.model, "revision": revision})
        store.write(REPORT, report.to_json())
        # Written again, now with the dtype that the first worker chose.
        store.write(CARD, card(config, plan.num_prompts, _sampled_values(config, plan)).encode())
        if report.is_complete:
            store.write(SUCCESS, b"")
    return report


def _sampled_values(config: JobConfig, plan: Plan) -> dict[str, str]:
    """Return the shares of sampled values; nothing if the prompts are missing by now, since the run is done."""
    try:
        return sampled_values(config, plan)
    except FluxBatchError as error:
        log.warning("the card has no shares of sampled values: %s", error)
        return {}


def _clear_scratch(store: Store) -> None:
    """Remove half-written files of killed processes; a live process writes a removed file again."""
    store.delete_many(store.list(STORE_TMP))
    for upload in unfinished_uploads(store):
        try:
            store.abort(upload)
        except StoreError as error:  # the bucket's policy may deny it, and the run is complete anyway
            log.warning("the parts of an upload remain, `flux-batch gc` tries again: %s", error)


def _report_of(config: JobConfig, store: Store, progress: Progress) -> RunReport:
    """Return the report of a run and of this invocation; its speed is the last one logged."""
    figures = progress.last or progress.snapshot()
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
        images_per_s=round(figures.images_per_s, 4),
        device_hours=round(figures.device_hours, 5),
        max_failed_ratio=config.failures.max_ratio,
        failures=dict(sorted(progress.totals.failures.items())),
        device_s_of_run=round(progress.totals.device_s, 3),
        num_gpus=config.workers.num_gpus,
        model={key.removeprefix("model."): value for key, value in config.identity().items() if key[:6] == "model."},
        kernels=kernels_of_run(store),
        versions=installed_versions(),
        examples=first_failures(progress.commit_log) if progress.commit_log else {},
        errors=tuple(progress.errors),
    )
