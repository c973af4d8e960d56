"""A whole run on one screen: config -> plan -> remaining -> engine -> report.

The only file that sees both sides, what is done (worker) and where (engine). Every fact of a run lies in its output;
this process can be killed at any point and started again.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from flux_batch.config import JobConfig, ModelConfig
from flux_batch.errors import AlreadyExists, JobError, NotFound, PlanMismatch
from flux_batch.plan import Plan, check_same_job, make_plan, remaining
from flux_batch.report.card import card
from flux_batch.report.progress import Progress
from flux_batch.report.summary import RunReport, Totals
from flux_batch.storage.commits import Commits
from flux_batch.storage.input_images import check_of_job
from flux_batch.storage.prompts import PromptSource
from flux_batch.storage.run_files import CARD, JOB, PLAN, REPORT, SUCCESS
from flux_batch.storage.store import Store
from flux_batch.worker import ImagePipeline, WorkerRecipe

if TYPE_CHECKING:
    from flux_batch.engine.protocol import Engine

log = logging.getLogger(__name__)


def run(
    config: JobConfig | str | Path,
    *,
    engine: Engine | None = None,
    make_pipeline: Callable[[ModelConfig], ImagePipeline] | None = None,
) -> RunReport:
    """Run a job to its end, or go on with one that was interrupted.

    `config` may be the path of a job file. The engine is a pool of Ray actors unless another is given; the pipeline
    is FLUX unless another is given. Safe to call again: committed shards are left as they are.
    Raises: JobError, SourceError, CheckpointError, StoreError before or while work is done; see errors.py.
    """
    config = located(config if isinstance(config, JobConfig) else load_job(config))
    store = Store(config.output.uri, config.output.storage_options)
    plan = open_run(config, store)
    commits = Commits(store, len(plan.shards))
    done = commits.done()
    todo = remaining(plan, done)
    progress = Progress(store, len(plan.shards), Totals.of(commits.read_all(sorted(done))))
    if todo:
        check_pictures(config)
        log.info("%s: %d of %d shards to do, output %s", config.name, len(todo), len(plan.shards), store.uri)
        recipe = WorkerRecipe(config, len(plan.shards), plan.passthrough, make_pipeline or load_pipeline)
        for result in (engine or ray_pool(config)).run(recipe, todo):
            progress.add(result)
    else:
        log.info("%s: nothing to do, all %d shards are committed in %s", config.name, len(plan.shards), store.uri)
    return close_run(config, store, progress)


def load_job(path: str | Path, overrides: Iterable[str] = ()) -> JobConfig:
    """Read a job file. Raises: JobError if it is missing or wrong."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"{path}: the job file cannot be read: {error}") from error
    return JobConfig.from_yaml(text, origin=str(path), overrides=overrides)


def located(config: JobConfig) -> JobConfig:
    """Fix relative paths to this process's folder, since workers have another; `demo` prompts are in the package."""
    from flux_batch.demo.prompts import demo_prompts_path
    from flux_batch.model_source import located as located_model

    uris = tuple(str(demo_prompts_path()) if uri == "demo" else _absolute(uri) for uri in config.prompts.uri)
    root, picture = config.prompts.input_image_root, config.sampling.input_image
    return config.model_copy(
        update={
            "prompts": config.prompts.model_copy(update={"uri": uris, "input_image_root": root and _absolute(root)}),
            "sampling": config.sampling.model_copy(update={"input_image": picture and _absolute(picture)}),
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


def check_pictures(config: JobConfig) -> None:
    """Raise SourceError if the picture that all rows start from cannot be used."""
    if config.sampling.input_image:
        check_of_job(config.sampling.input_image, config.prompts.storage_options)


def open_run(config: JobConfig, store: Store) -> Plan:
    """Load the plan of the run that is in the output, or make and save one.

    A run that has written nothing yet, since its model was not found say, may still be changed.
    Raises: PlanMismatch, JobError.
    """
    try:
        saved = store.read(PLAN)
    except NotFound:
        return start_run(config, store)
    try:
        check_same_job(JobConfig.from_yaml(store.read(JOB).decode(), origin=store.url(JOB)), config)
        return Plan.from_parquet(saved, PromptSource(config.prompts).files())
    except PlanMismatch:
        if written(store):
            raise
    store.delete(PLAN)
    return start_run(config, store)


def start_run(config: JobConfig, store: Store) -> Plan:
    """Plan a new run and write down what it is; the plan comes last and makes the run exist."""
    if foreign := written(store):
        raise JobError(f"{store.uri}: holds {foreign[0]}, but no run; take an empty folder as output.uri")
    plan = make_plan(config.prompts, config.output.shard_size)
    store.check_writable()
    store.write(JOB, config.to_yaml().encode())
    store.write(CARD, card(config, plan.num_prompts).encode())
    try:
        store.put_if_absent(PLAN, plan.to_parquet())
    except AlreadyExists:
        return open_run(config, store)  # another driver started in the same moment, or our answer was lost
    return plan


def written(store: Store) -> list[str]:
    """List the data set's files in the output, of whatever origin."""
    return store.list("train") or store.list("metadata")


def close_run(config: JobConfig, store: Store, progress: Progress) -> RunReport:
    """Write the report and, when every shard is committed, _SUCCESS as the last object of the run."""
    report = RunReport(
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
        errors=tuple(progress.errors),
    )
    if not store.exists(SUCCESS):
        store.write(REPORT, report.to_json())
        if report.is_complete:
            store.write(SUCCESS, b"")
    return report


def load_pipeline(model: ModelConfig) -> ImagePipeline:
    """Load FLUX, in the process that will run it."""
    from flux_batch.pipeline import FluxImagePipeline

    return FluxImagePipeline.from_pretrained(
        model.uri,
        torch_dtype=model.dtype,
        quantization=model.quantization,
        step_cache=model.step_cache,
        storage_options=model.storage_options,
        refresh=model.refresh,
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
    )


def _absolute(uri: str) -> str:
    return uri if "://" in uri else os.path.abspath(os.path.expanduser(uri))
