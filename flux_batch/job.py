"""A whole run on one screen: config -> plan -> remaining -> engine -> report.

The only file that sees both sides, what is done (worker) and where (engine). Every fact of a run lies in its output;
this process can be killed at any point and started again.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from flux_batch.config.schema import JobConfig, ModelConfig
from flux_batch.config.text import fill_in_dates, read_tree
from flux_batch.engine.stop import Stop
from flux_batch.errors import Interrupted, JobError, StoreError
from flux_batch.output.lease import Lease
from flux_batch.output.paths import PLAN
from flux_batch.pipeline.load import load_pipeline
from flux_batch.prompts.input_images import check_job_image
from flux_batch.records import Shard
from flux_batch.report.progress import Progress
from flux_batch.report.summary import RunReport
from flux_batch.resume import close_run, draft_run, finished, open_run, reopen, state_of
from flux_batch.storage.retry import RetryPolicy
from flux_batch.storage.store import Store
from flux_batch.worker.protocol import ImagePipeline
from flux_batch.worker.settled_precision import with_dtype_of_run
from flux_batch.worker.worker import WorkerFactory

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
    config = with_absolute_paths(config if isinstance(config, JobConfig) else load_job(config))
    stop = stop or Stop()
    store = Store(config.output.uri, config.output.storage_options)
    config = with_dtype_of_run(store, config)
    report = finished(config, store, extend=extend)
    if report and not (retry_failed and report.num_failed):
        return report
    draft = None if store.exists(PLAN) else draft_run(config, store)
    # From here on there is work to lose: an outage is waited for.
    store = store.with_policy(RetryPolicy(config.failures.outage_s, stop.check))
    with Lease(store, ttl_s=config.failures.lease_ttl_s, on_lost=stop.request, sleep=stop.sleep) as lease:
        store = lease.store
        plan = open_run(config, store, draft, extend=extend)
        reopen(config, plan, store, retry_failed=retry_failed)
        todo, progress = state_of(plan, store)
        if todo:
            check_images(config)
            log.info("%s: %d of %d shards to do, output %s", config.name, len(todo), len(plan.shards), store.uri)
            recipe = WorkerFactory(config, len(plan.shards), plan.passthrough, make_pipeline or load_pipeline)
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


def with_absolute_paths(config: JobConfig) -> JobConfig:
    """Fix relative paths to this process's folder, since workers have another; `demo` prompts are in the package."""
    from flux_batch.demo.prompts import demo_prompts_path
    from flux_batch.download.models import absolute_model_uri

    uris = tuple(str(demo_prompts_path()) if uri == "demo" else _absolute(uri) for uri in config.prompts.uri)
    root, image = config.prompts.input_image_root, config.sampling.input_image
    return config.model_copy(
        update={
            "prompts": config.prompts.model_copy(update={"uri": uris, "input_image_root": root and _absolute(root)}),
            "sampling": config.sampling.model_copy(update={"input_image": image and _absolute(image)}),
            "output": config.output.model_copy(update={"uri": _absolute(config.output.uri)}),
            "model": config.model.model_copy(
                update={
                    "uri": absolute_model_uri(config.model.uri),
                    "loras": tuple(
                        lora.model_copy(update={"uri": absolute_model_uri(lora.uri)}) for lora in config.model.loras
                    ),
                }
            ),
        }
    )


def check_images(config: JobConfig) -> None:
    """Raise SourceError if the image that all rows start from cannot be used."""
    if config.sampling.input_image:
        check_job_image(config.sampling.input_image, config.prompts.storage_options)


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
