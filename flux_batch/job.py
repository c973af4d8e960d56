"""A whole run: config -> plan -> remaining shards -> engine -> report.

This is the only file that knows both the work (worker) and the place where it runs (engine). The output holds all
facts of a run, so this process can be killed at any point and started again.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flux_batch.config.conditions import IPAdapterConfig, ReduxConfig
from flux_batch.config.factory import imported
from flux_batch.config.known_settings import check_settings, declared_settings
from flux_batch.config.schema import JobConfig, ModelConfig
from flux_batch.config.text import fill_in_dates, overridden, parse_moment, read_tree
from flux_batch.dataset.annotators.score import check_score, load_scorer
from flux_batch.download.models import absolute_model_uri
from flux_batch.download.revision import model_revision
from flux_batch.engine.ray_local import has_gpu, joins_cluster, keep_environment
from flux_batch.engine.stop import Stop
from flux_batch.errors import FluxBatchError, Interrupted, JobError, NotFound, RowError, StoreError, count_of
from flux_batch.output.lease import Lease
from flux_batch.output.metadata import columns_of_job
from flux_batch.output.paths import PLAN
from flux_batch.pipeline.load import check_weights, load_pipeline
from flux_batch.plan.costs import remember_speed
from flux_batch.plan.estimate import pflop_of_rows, pflop_per_image
from flux_batch.plan.shards import Shards
from flux_batch.plan.work import largest_first
from flux_batch.prompts.input_images import check_job_image
from flux_batch.records import Shard
from flux_batch.redaction import without_redacted
from flux_batch.report.progress.progress import Progress
from flux_batch.report.progress.snapshot import Snapshot
from flux_batch.report.reproduction import Original, Reproduction, surroundings
from flux_batch.report.saved_run import SavedRun
from flux_batch.report.summary import RunReport
from flux_batch.resume import (
    ExistingRun,
    close_run,
    draft_run,
    existing_run,
    finished,
    job_of_run,
    open_random_run,
    open_run,
    read_state,
    revert_failed,
)
from flux_batch.storage.retry import RetryPolicy
from flux_batch.storage.store import Store
from flux_batch.telemetry import EngineState
from flux_batch.worker.auto_batch_size import measured_images_per_s
from flux_batch.worker.generate import BatchMaker, image_options
from flux_batch.worker.protocol import ImagePipeline
from flux_batch.worker.recorder import recorded_task, recorded_tiles
from flux_batch.worker.settled_precision import settled_job
from flux_batch.worker.worker import WorkerFactory

if TYPE_CHECKING:
    from flux_batch.engine.protocol import Engine

# The folder of Ray's copies of submitted working directories: ray/_private/runtime_env/working_dir.py.
_RAY_WORKING_DIR = "working_dir_files"
# The number of shards whose rows are read to estimate the work of an image.
_SAMPLED_SHARDS = 3
# Advice for a run that was stopped at a limit.
_HIGHER_LIMIT = "the same command with a higher limit continues"

log = logging.getLogger(__name__)


def run(
    config: JobConfig | Mapping[str, Any] | str | Path,
    *,
    engine: Engine | None = None,
    make_pipeline: Callable[[ModelConfig], ImagePipeline] | None = None,
    stop: Stop | None = None,
    retry_failed: bool = False,
    extend: bool = False,
    price: float | None = None,
    max_cost: float | None = None,
    show: Callable[[Snapshot], None] | None = None,
) -> RunReport:
    """Run a job to its end, or resume one that was interrupted.

    config: a job, or the path or address of a job file. engine: a pool of Ray actors by default. make_pipeline: FLUX
    by default. stop: requests an early end, from a signal handler or another thread. retry_failed: render failed images
    again, also those of committed shards. extend: add prompt files that are new since the run was planned. price: the
    price of a GPU-hour, for the figures. max_cost: the run stops cleanly once it has cost this much; needs `price`.
    show: called every second with the figures, which are then not logged.
    Safe to call again: committed shards stay as they are.
    Raises: RunHeld, LeaseLost if another driver has the run; Interrupted after a stop; JobError, SourceError,
    CheckpointError, StoreError before or during the work; JobError if the limit was already reached. See errors.py.
    """
    if isinstance(config, Mapping):
        config = JobConfig.from_dict(config)
    config = with_absolute_paths(config if isinstance(config, JobConfig) else load_job(config))
    stop = stop or Stop()
    drain_s = config.failures.drain_s
    policy = RetryPolicy().ended_by(stop.check, lambda waited_s: stop.check(drain_s))
    store = Store(config.output.uri, config.output.storage_options, policy)
    config = job_of_run(config, store, extend=extend)
    report = finished(config, store, extend=extend)
    if report and not (retry_failed and report.num_failed):
        return report
    draft = None if store.exists(PLAN) else draft_run(config, store)
    here = _on_this_machine(config, engine, make_pipeline)
    joins = engine is None and joins_cluster()
    is_local = engine is None and make_pipeline is None and not joins
    if joins:  # checked before anything is written: the cluster may be missing, or have another version
        from flux_batch.engine.ray_cluster import find_cluster

        find_cluster(here.workers.max, here.workers.num_gpus)
    # From here on there is work to lose: wait while the storage is unavailable.
    store = store.with_policy(policy.waiting(config.failures.outage_s))
    with Lease(store, ttl_s=config.failures.lease_ttl_s, on_lost=stop.request, sleep=stop.sleep) as lease:
        store = lease.store
        plan = open_run(config, store, draft, extend=extend)
        limit = partial(_limit_reached, here, price, max_cost)
        if retry_failed:  # before the failed images are removed
            _check_limit(limit, read_state(here, plan, store)[1])
        revert_failed(config, plan, store, retry_failed=retry_failed)
        todo, progress = read_state(here, plan, store)
        if todo:
            shards = count_of(len(plan.shards), "shard")
            log.info("%s: %d of %s to do, output: %s", config.name, len(todo), shards, store.uri)
            make_pipeline = make_pipeline or partial(load_pipeline, num_gpus=here.workers.num_gpus)
            columns = columns_of_job(plan.passthrough, config)
            factory = WorkerFactory(
                here, len(plan.shards), columns, make_pipeline, plan.rules, load_scorer, retry_failed=retry_failed
            )
            progress.price = price
            progress.stop_reason, progress.stop_advice = lambda: stop.reason, lambda: stop.advice
            todo = todo if engine else _ordered(todo, here)
            _check_limit(limit, progress)
            progress.check = partial(_stop_at_limit, limit, stop)
            with progress.shown(show) as state:
                _render(engine or ray_pool(here), factory, todo, stop, progress, state)
            if is_local and progress.num_made and progress.device_s:
                pflop = pflop_of_rows(here, _rows_of_some(store, todo)) or pflop_per_image(here)
                remember_speed(here, progress.num_made / progress.device_s, pflop)
        return close_run(here, store, plan, progress)


def _rows_of_some(store: Store, shards: Iterable[Shard]) -> Iterator[Mapping[str, Any]]:
    """Yield the metadata rows of the first shards, as far as they are written."""
    saved = SavedRun.open(store)
    for shard in islice(shards, _SAMPLED_SHARDS):
        with suppress(NotFound):
            yield from saved.metadata(shard.index)


def foresee(config: JobConfig) -> tuple[JobConfig, ExistingRun | None, list[str]]:
    """Check what a run of a job would find; writes nothing.

    Returns: the job as it can run here, the existing run in its output, and the reasons why a run would be refused.
    Raises: StoreError if the output cannot be read.
    """
    there, problems = None, []
    store = Store(config.output.uri, config.output.storage_options)
    try:
        there = existing_run(config, store)
    except StoreError:
        raise
    except FluxBatchError as error:
        problems.append(str(error))
    try:
        config = _on_this_machine(config, None, None)
    except FluxBatchError as error:
        if error.exit_code == StoreError.exit_code:  # may pass, and a plan needs no model
            log.warning("%s", error)
        else:
            problems.append(str(error))
    if there and not there.is_complete:
        reached = _limit_reached(config, None, None, there.device_hours(config.workers.num_gpus))
        problems += [f"{reached}; {_HIGHER_LIMIT}"] if reached else []
    return config, there, problems


def measure(config: JobConfig) -> float:
    """Return the images per second of one worker, measured here with the job's settings."""
    here = _on_this_machine(config, None, None)
    pipeline = load_pipeline(here.model, num_gpus=here.workers.num_gpus)
    size = here.workers.batch_size
    size = 1 if size == "auto" else size
    return measured_images_per_s(pipeline, here.sampling, size, image_options=image_options(here))


def preview(
    config: JobConfig,
    num_rows: int,
    *,
    is_random: bool = False,
    make_pipeline: Callable[[ModelConfig], ImagePipeline] | None = None,
) -> RunReport:
    """Make the images of a job's first rows in this process, in a temporary folder.

    is_random: take random rows of all prompts instead, different ones at each call.
    Returns: the report, whose `output` is the folder. The job's own output is neither read nor written.
    Raises: as `run`.
    """
    from flux_batch.engine.local import LocalEngine

    folder = tempfile.mkdtemp(prefix="flux-batch-preview-")
    output = config.output.model_copy(update={"uri": folder, "format": "files", "storage_options": {}})
    config = config.model_copy(update={"output": output})
    try:
        config = _on_cpu_without_gpu(with_absolute_paths(config), make_pipeline)
        if is_random:
            open_random_run(config, Store(folder), num_rows)
        else:
            limit = min(num_rows, config.prompts.limit or num_rows)
            config = config.model_copy(update={"prompts": config.prompts.model_copy(update={"limit": limit})})
        return run(config, engine=LocalEngine(max_attempts=1), make_pipeline=make_pipeline)
    except BaseException:  # after an interrupt too: the caller does not know the folder yet
        shutil.rmtree(folder, ignore_errors=True)
        raise


def reproduce(
    store: Store,
    key: str,
    model: str | None = None,
    *,
    make_pipeline: Callable[[ModelConfig], ImagePipeline] | None = None,
) -> Reproduction:
    """Make one image of a run again, in this process, from its metadata alone; writes nothing.

    model: the model's address on this machine, if it differs from the run's.
    Returns: the comparison of both images, with differences in device and versions.
    Raises: JobError, CheckpointError, StoreError, and errors of the pipeline.
    """
    original = Original.find(store, key)
    config = _reproducible(store, original.run.config, model)
    task = recorded_task(original.row, config)
    pipeline = (make_pipeline or partial(load_pipeline, num_gpus=config.workers.num_gpus))(config.model)
    tiles = recorded_tiles(original.row, config.sampling)
    (outcome,) = BatchMaker(pipeline, (), tiles, image_options=image_options(config)).make([task])
    if isinstance(outcome.result, RowError):
        raise JobError(f"{key}: {outcome.result}") from outcome.result
    if isinstance(outcome.result, Exception):
        raise outcome.result
    revision = model_revision(config.model.uri, config.model.storage_options)
    tile_size = outcome.tiles.size if outcome.tiles else None
    return original.compared(outcome.result, surroundings(pipeline.kernels, revision, tile_size))


def _reproducible(store: Store, config: JobConfig, model: str | None) -> JobConfig:
    """Return the job of a run with its settled dtype and this machine's model.

    Redacted options are left out; the environment may supply them.
    """
    config = settled_job(store, config)
    prompts = {"storage_options": without_redacted(config.prompts.storage_options)}
    weights: dict[str, Any] = {"storage_options": without_redacted(config.model.storage_options)}
    if model is not None:
        weights["uri"] = absolute_model_uri(model)
    return config.model_copy(
        update={
            "prompts": config.prompts.model_copy(update=prompts),
            "model": config.model.model_copy(update=weights),
        }
    )


def load_job(path: str | Path, overrides: Iterable[str] = (), logical_date: datetime | str | None = None) -> JobConfig:
    """Read a job file from a path or address.

    overrides: `section.key=value` strings. logical_date: the value of `{date}`, `{day}` and `{datetime}` in the file;
    text is ISO 8601. Relative paths in the file become absolute, relative to the current folder.
    Raises: JobError if the file is missing or wrong; StoreError if its storage is unavailable.
    """
    moment = parse_moment(logical_date) if isinstance(logical_date, str) else logical_date
    try:
        text = _read_job(str(path)).decode()
    except StoreError:
        raise
    except UnicodeDecodeError as error:
        raise JobError(f"{path}: the job file is not in UTF-8: save it as UTF-8") from error
    except FileNotFoundError as error:
        raise JobError(f"{path}: there is no such job file; `flux-batch init` writes one") from error
    except OSError as error:
        raise JobError(f"{path}: the job file cannot be read: {error.strerror or error}") from error
    overrides = tuple(overrides)
    tree = fill_in_dates(read_tree(text, str(path), overrides), moment, str(path))
    config = JobConfig.from_dict(tree, origin=str(path), set_keys=overridden(overrides))
    if config.quality:
        check_score(config.quality)
    return with_absolute_paths(config)


def with_absolute_paths(config: JobConfig) -> JobConfig:
    """Resolve relative paths, since workers run in other folders; `demo` prompts become a path.

    Raises: JobError for a relative output in Ray's copy of a working directory, which Ray deletes.
    """
    from flux_batch.demo.prompts import demo_prompts_path

    prompts, sampling, output, model = config.prompts, config.sampling, config.output, config.model
    uris = tuple(str(demo_prompts_path()) if uri == "demo" else _absolute(uri) for uri in prompts.uri)
    root, image = prompts.input_image_root, sampling.input_image
    loras = tuple(lora.model_copy(update={"uri": absolute_model_uri(lora.uri)}) for lora in model.loras)
    nets = tuple(net.model_copy(update={"uri": absolute_model_uri(net.uri)}) for net in model.controlnets)
    addresses: dict[str, Any] = {"uri": absolute_model_uri(model.uri), "loras": loras, "controlnets": nets}
    addresses |= {"redux": _with_absolute_uris(model.redux), "ip_adapter": _with_absolute_uris(model.ip_adapter)}
    return config.model_copy(
        update={
            "prompts": prompts.model_copy(
                update={
                    "uri": uris,
                    "input_image_root": root and _absolute(root),
                    "samplers": _with_absolute_files(prompts.samplers),
                    "wildcards": prompts.wildcards and _absolute_if_text(prompts.wildcards),
                }
            ),
            "sampling": sampling.model_copy(update={"input_image": image and _absolute(image)}),
            "output": output.model_copy(update={"uri": _output_folder(output.uri)}),
            "model": model.model_copy(update=addresses),
        }
    )


def _with_absolute_uris(
    config: ReduxConfig | IPAdapterConfig | None,
) -> ReduxConfig | IPAdapterConfig | None:
    if config is None:
        return None
    encoder = config.image_encoder and absolute_model_uri(config.image_encoder)
    uris = tuple(map(absolute_model_uri, config.uris))
    return config.model_copy(update={"uri": uris[0] if isinstance(config.uri, str) else uris, "image_encoder": encoder})


def _on_this_machine(
    config: JobConfig, engine: Engine | None, make_pipeline: Callable[[ModelConfig], ImagePipeline] | None
) -> JobConfig:
    """Check a job, and return it as it can run: on the CPU if this machine runs it and has no GPU.

    The weights are checked only if this machine runs the job: the nodes of another cluster may have other files.
    Raises: SourceError if the job's input image cannot be used; the errors of check_weights.
    """
    if config.sampling.input_image:
        check_job_image(config.sampling.input_image, config.prompts.storage_options)
    if make_pipeline is None and config.model.pipeline and not joins_cluster():
        factory = imported(config.model.pipeline, os.getcwd(), "a pipeline")
        check_settings(config, declared_settings(factory))
    if config.quality:
        check_score(config.quality, is_here=not joins_cluster())
    return config if engine is not None or joins_cluster() else _on_cpu_without_gpu(config, make_pipeline)


def _on_cpu_without_gpu(config: JobConfig, make_pipeline: Callable[[ModelConfig], ImagePipeline] | None) -> JobConfig:
    """Return the job for this machine: on the CPU if it has no GPU. Raises: as check_weights."""
    workers = config.workers
    no_gpu = "there is no GPU on this machine" if workers.num_gpus and not has_gpu() else ""
    if make_pipeline is None:
        check_weights(config.model, no_gpu)
    if not no_gpu:
        return config
    log.warning("%s: the workers run on its CPU", no_gpu)
    return config.model_copy(update={"workers": workers.model_copy(update={"num_gpus": 0})})


def _ordered(todo: Shards, config: JobConfig) -> Shards:
    """Return shards, the largest first; in the order of the plan if the rows cannot be read."""
    try:
        return largest_first(todo, config)
    except FluxBatchError as error:  # the workers will meet it too, and report the rows
        log.warning("the shards are made in the order of the plan: %s", error)
        return todo


def _limit_reached(config: JobConfig, price: float | None, max_cost: float | None, device_hours: float) -> str:
    """Return the start of a sentence if a limit of hours or cost is reached; else ""."""
    limit = config.workers.max_gpu_hours
    if limit is not None and device_hours >= limit:
        return f"workers.max_gpu_hours = {limit:g} is reached"
    if price is not None and max_cost is not None and device_hours * price >= max_cost:
        return f"--max-cost {max_cost:g} is reached"
    return ""


def _check_limit(limit: Callable[[float], str], progress: Progress) -> None:
    """Raise JobError if a run has reached its limit before it starts."""
    if reached := limit(progress.snapshot().device_hours):
        raise JobError(f"{_so_far(reached, progress)}; {_HIGHER_LIMIT}")


def _stop_at_limit(limit: Callable[[float], str], stop: Stop, now: Snapshot) -> None:
    """Request a stop once a run has reached its limit of hours or cost."""
    if reached := limit(now.device_hours):
        stop.request(reached, _HIGHER_LIMIT)


def _render(
    engine: Engine, factory: WorkerFactory, todo: Sequence[Shard], stop: Stop, progress: Progress, state: EngineState
) -> None:
    """Run every shard. Raises: Interrupted if a stop left some of them, and errors of the engine."""
    num_settled = 0
    for result in engine.run(factory, todo, stop, state):
        progress.add(result)
        num_settled += 1
    if stop.is_requested and num_settled < len(todo):
        progress.report()
        raise Interrupted(f"{_so_far(stop.reason, progress)}; {stop.advice}")


def _so_far(reason: str, progress: Progress) -> str:
    return f"{reason}: {progress.totals.num_committed} of {progress.num_shards} shards are committed"


def ray_pool(config: JobConfig) -> Engine:
    """Return the engine that the `workers` section describes."""
    if not joins_cluster():
        keep_environment()
    from flux_batch.engine.ray_pool import RayPool

    workers = config.workers
    return RayPool(
        max_workers=workers.max,
        min_workers=workers.min,
        num_gpus=workers.num_gpus,
        num_cpus=workers.num_cpus,
        max_attempts=config.failures.max_attempts,
        hang_s=config.failures.hang_s,
        load_hang_s=config.failures.load_hang_s,
        drain_s=config.failures.drain_s,
        outage_s=config.failures.outage_s,
        name=config.name,
    )


def _read_job(path: str) -> bytes:
    folder, _, name = path.rpartition("/")
    # The storage options of a job file come from the environment: they cannot be in the file itself.
    return Store(folder).read(name) if "://" in path else Path(path).read_bytes()


def _with_absolute_files(samplers: dict[str, Any]) -> dict[str, Any]:
    """Return samplers with absolute paths of their files of values."""
    return {
        key: _absolute(value)
        if key == "file" and isinstance(value, str)
        else _with_absolute_files(value)
        if isinstance(value, dict)
        else value
        for key, value in samplers.items()
    }


def _output_folder(uri: str) -> str:
    """Return the absolute path of an output. Raises: JobError if it lies in Ray's copy of a submitted folder."""
    is_relative = "://" not in uri and not os.path.isabs(os.path.expanduser(uri))
    if is_relative and _RAY_WORKING_DIR in Path.cwd().parts:
        raise JobError(
            f"output.uri = {uri}: in a job of Ray a relative path lies in Ray's own copy of the submitted folder, "
            "which it removes; name a bucket, or the full path of a folder that all nodes share"
        )
    return _absolute(uri)


def _absolute_if_text(value: bool | str) -> bool | str:
    return _absolute(value) if isinstance(value, str) else value


def _absolute(uri: str) -> str:
    return uri if "://" in uri else os.path.abspath(os.path.expanduser(uri))
