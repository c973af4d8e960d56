"""A pass over the committed images of a run: every annotator on every shard, written to files beside the images.

It uses the engine, the lease and the commit protocol of a run. It can be called again: it resumes, and after the run
was extended it annotates the new images.
"""

from __future__ import annotations

import json
import logging
import math
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, overload

from flux_batch.config.running import FailuresConfig
from flux_batch.config.schema import JobConfig
from flux_batch.dataset.annotate_worker import AnnotateFactory, check_identity, read_identity
from flux_batch.dataset.annotators.load import AnnotatorSpec, changing_options
from flux_batch.engine.ray_local import has_gpu, joins_cluster, keep_environment
from flux_batch.engine.stop import Stop
from flux_batch.errors import Interrupted, JobError, NotFound, count_of
from flux_batch.output.annotations import AnnotationFolder
from flux_batch.output.formats import DECODE_ERRORS
from flux_batch.output.lease import Lease
from flux_batch.records import FileRange, Shard
from flux_batch.report.progress.progress import Progress
from flux_batch.report.progress.snapshot import Snapshot
from flux_batch.report.saved_run import SavedRun
from flux_batch.report.summary import Totals
from flux_batch.storage.retry import RetryPolicy
from flux_batch.storage.store import Store

if TYPE_CHECKING:
    from flux_batch.engine.protocol import Engine

log = logging.getLogger(__name__)

_TOO_MANY_FAILED = 3
# The number of reasons with an example, and the length of an example in characters.
_MAX_EXAMPLES, _MAX_EXAMPLE = 5, 300


@dataclass(frozen=True, kw_only=True)
class AnnotateSettings:
    """The workers of a pass, and its limits.

    batch_size: images in one call of an annotator. failures: settings that override the section `failures` of the run,
    such as `max_ratio=0.1`. runtime_env: Ray's runtime_env of the workers, e.g. with the packages of an annotator.
    """

    max_workers: int = 1
    num_gpus: float = 0
    num_cpus: float = 1
    batch_size: int = 16
    failures: tuple[str, ...] = ()
    runtime_env: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for name, least in (("max_workers", 1), ("batch_size", 1), ("num_gpus", 0), ("num_cpus", 0)):
            if not least <= getattr(self, name) < math.inf:
                raise JobError(f"{name} = {getattr(self, name)}: must be at least {least}, and finite")


@dataclass(frozen=True, kw_only=True)
class _Counts:
    """The state of one annotation: committed shards, their images, and images without values by reason.

    examples: the key and message of an image for each reason.
    """

    name: str
    annotator: str
    num_committed: int
    num_images: int
    num_failed: int
    failures: dict[str, int]
    seconds: float
    examples: dict[str, str] = field(default_factory=dict)

    @property
    def failed_ratio(self) -> float:
        """The share of images without values."""
        return self.num_failed / self.num_images if self.num_images else 0.0


@dataclass(frozen=True, kw_only=True)
class AnnotateReport:
    """The result of a pass: the state of each annotation, and the work of this call."""

    output: str
    num_shards: int
    num_new_shards: int
    max_failed_ratio: float
    wall_s: float
    annotations: tuple[_Counts, ...]
    errors: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        """The exit code: 0; 1 if shards were given up; 3 if too many images have no values."""
        if self.errors:
            return 1
        return _TOO_MANY_FAILED if any(one.failed_ratio > self.max_failed_ratio for one in self.annotations) else 0

    def to_json(self) -> str:
        """Return the report as JSON."""
        return json.dumps(asdict(self) | {"exit_code": self.exit_code})

    def __str__(self) -> str:
        width = max(len(one.name) for one in self.annotations)
        lines = [f"{self.output}: {count_of(self.num_new_shards, 'shard')} annotated in {self.wall_s:.1f} s"]
        for one in self.annotations:
            failed = ", ".join(f"{number} {name}" for name, number in one.failures.items())
            lines.append(
                f"{one.name:<{width}}  {one.num_committed} of {count_of(self.num_shards, 'shard')}, "
                f"{count_of(one.num_images, 'image')}, "
                f"{one.num_failed} without values{f' ({failed})' if failed else ''}"
            )
            lines += [f"{'':<{width}}  {name}, as {text}" for name, text in one.examples.items()]
        lines += self.errors
        return "\n".join(lines)


def annotate(
    output: str,
    specs: Sequence[AnnotatorSpec],
    *,
    storage_options: Mapping[str, Any] | None = None,
    settings: AnnotateSettings | None = None,
    engine: Engine | None = None,
    stop: Stop | None = None,
    retry_failed: bool = False,
    anew: bool = False,
    show: Callable[[Snapshot], None] | None = None,
) -> AnnotateReport:
    """Annotate the committed shards of a run, or resume. Images are read once for all annotators.

    engine: a pool of Ray actors by default. stop: may request an early end. retry_failed: annotate images without
    values again. anew: first remove the existing annotations of these names. show: called every second with the
    figures, which are then not logged.
    Raises: PlanMismatch if one of the names was begun by another annotator; RunHeld, LeaseLost if another driver has
    the run; Interrupted after a stop; JobError, StoreError.

    >>> from flux_batch.dataset.annotators.load import parse_specs
    >>> from flux_batch.engine.local import LocalEngine
    >>> report = annotate("out/done", parse_specs(["phash"], {}), engine=LocalEngine())
    >>> report.annotations[0].num_images, report.exit_code
    (10, 0)
    """
    stop, settings, options = stop or Stop(), settings or AnnotateSettings(), dict(storage_options or {})
    policy = RetryPolicy().ended_by(stop.check, lambda waited_s: stop.check(FailuresConfig().drain_s))
    store = Store(output, options, policy)
    run = SavedRun.open(store)
    failures = _failures(run.config, settings.failures)
    folders = [AnnotationFolder(run.folder, spec.name) for spec in specs]
    if not anew:
        _check_begun(folders, specs)
    if (anew or retry_failed) and engine is None and joins_cluster():  # the cluster may not answer
        from flux_batch.engine.ray_cluster import find_cluster

        find_cluster(settings.max_workers, settings.num_gpus)
    store = store.with_policy(policy.waiting(failures.outage_s))
    with Lease(store, ttl_s=failures.lease_ttl_s, on_lost=stop.request, sleep=stop.sleep) as lease:
        run = SavedRun.open(lease.store)
        folders = [AnnotationFolder(run.folder, spec.name) for spec in specs]
        for folder in folders:
            _prepare(folder, retry_failed=retry_failed, anew=anew)
        progress = _Pass(run, folders, settings.num_gpus)
        todo = progress.todo()
        if todo:
            log.info("%s: %d of %s to annotate", store.uri, len(todo), count_of(run.num_shards, "shard"))
            factory = AnnotateFactory(
                output=output,
                storage_options=options,
                specs=tuple(specs),
                batch_size=settings.batch_size,
                failures=failures,
            )
            progress.follow(engine or annotate_pool(run, settings, failures), factory, todo, stop, show)
        if not progress.errors:
            for folder in folders:
                # Staged rows of a shard that is not annotated are kept until its images are made again.
                if folder.staging.shards() <= folder.commits.done():
                    folder.staging.clear()
        return progress.report(specs, failures.max_ratio)


@dataclass(frozen=True)
class _Shards(Sequence[Shard]):
    """The shards of a pass, by number. Objects are created on access, since there may be a million.

    num_rows: the number of rows of every shard of the run.
    """

    numbers: array[int]
    num_rows: array[int]

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, position: int) -> Shard: ...
    @overload
    def __getitem__(self, position: slice) -> _Shards: ...
    def __getitem__(self, position: int | slice) -> Shard | _Shards:
        if isinstance(position, slice):
            return _Shards(self.numbers[position], self.num_rows)
        number = self.numbers[position]
        # Annotators read no prompts, so the file range has no file.
        return Shard(index=number, parts=(FileRange(uri="", name="", start=0, num_rows=self.num_rows[number]),))


@dataclass
class _Pass:
    """One call of `annotate`: its shards, their execution and the report."""

    run: SavedRun
    folders: Sequence[AnnotationFolder]
    num_gpus: float = 0.0
    num_new: int = 0
    errors: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def todo(self) -> _Shards:
        """Return the committed shards that an annotation lacks."""
        annotated = [folder.commits.listed() for folder in self.folders]
        done = self.run.commits.listed()
        missing = (shard for shard in done if not all(shard in each for each in annotated))
        return _Shards(array("i", missing), self.run.outline.num_rows)

    def follow(
        self,
        engine: Engine,
        factory: AnnotateFactory,
        todo: _Shards,
        stop: Stop,
        show: Callable[[Snapshot], None] | None,
    ) -> None:
        """Run shards and show the progress. Raises: Interrupted if a stop left shards undone."""
        progress = Progress(
            self.run.store,
            len(todo),
            Totals(),
            num_left=sum(map(self._expected, todo.numbers)),
            expected=self._expected,
            num_gpus=self.num_gpus,
            stop_reason=lambda: stop.reason,
            first_images="the annotators to open, and the first values",
            has_file=False,
        )
        num_settled = 0
        with progress.shown(show) as state:
            for result in engine.run(factory, todo, stop, state):
                num_settled += 1
                progress.add(result)
                self.num_new += result.is_new
        self.errors += progress.errors
        if stop.is_requested and num_settled < len(todo):
            raise Interrupted(f"{stop.reason}: {num_settled} of {len(todo)} shards were annotated now; {stop.advice}")

    def _expected(self, shard: int) -> int:
        """Return the expected number of images of a shard; single rows may ask for another number."""
        return self.run.outline.num_rows[shard] * self.run.config.sampling.num_images_per_prompt

    def report(self, specs: Sequence[AnnotatorSpec], max_failed_ratio: float) -> AnnotateReport:
        """Return the state of all annotations, read from their commits."""
        return AnnotateReport(
            output=self.run.store.uri,
            num_shards=self.run.num_shards,
            num_new_shards=self.num_new,
            max_failed_ratio=max_failed_ratio,
            wall_s=round(time.monotonic() - self.started, 3),
            annotations=tuple(_counts(spec, folder) for spec, folder in zip(specs, self.folders, strict=True)),
            errors=tuple(self.errors),
        )


def _failures(config: JobConfig, settings: Sequence[str]) -> FailuresConfig:
    """Return the failures section of a run, overridden by the KEY=VALUE settings of `--failures`. Raises: JobError."""
    try:
        return JobConfig.from_yaml(config.to_yaml(), "job.yaml", [f"failures.{each}" for each in settings]).failures
    except JobError as error:
        said = str(error).replace("--set failures.", "--failures ").replace("section.key=value", "KEY=VALUE")
        raise JobError(said) from None


def _check_begun(folders: Sequence[AnnotationFolder], specs: Sequence[AnnotatorSpec]) -> None:
    """Raise PlanMismatch if one of these names was begun by another annotator or other options.

    No annotator is opened. Raises: JobError for an option that an annotator does not have.
    """
    for folder, spec in zip(folders, specs, strict=True):
        if (saved := read_identity(folder)) is not None:
            # All other options may be ones that change no results.
            given = spec.identity["options"]
            unknown = changing_options(spec, given.keys() - saved["options"].keys())
            options = {key: value for key, value in given.items() if key in saved["options"] or key in unknown}
            check_identity(folder, saved, {"annotator": spec.annotator, "options": options})


def _prepare(folder: AnnotationFolder, *, retry_failed: bool, anew: bool) -> None:
    """Remove the annotations that are to be made again; needs the lease."""
    if anew:
        folder.remove()
    elif retry_failed:
        for commit in folder.commits.read_all(sorted(folder.commits.done())):
            if commit.num_failed:
                folder.revert(commit.shard, keep_failed=False)
        folder.remove_staged_failures()  # rows of shards that a killed pass did not commit
    folder.remove_uncommitted()


def _counts(spec: AnnotatorSpec, folder: AnnotationFolder) -> _Counts:
    totals = Totals()
    first: dict[str, int] = {}
    for commit in folder.commits.read_all(sorted(folder.commits.done())):
        totals.add(commit)
        for name in commit.failures:
            first.setdefault(name, commit.shard)
    return _Counts(
        name=spec.name,
        annotator=spec.annotator,
        num_committed=totals.num_committed,
        num_images=totals.num_images,
        num_failed=totals.num_failed,
        failures=dict(sorted(totals.failures.items())),
        seconds=round(totals.device_s, 3),
        examples=_examples(folder, first),
    )


def _examples(folder: AnnotationFolder, first: Mapping[str, int]) -> dict[str, str]:
    """Return the key and message of an image for each reason. first: a shard by reason."""
    examples: dict[str, str] = {}
    for name, shard in sorted(first.items())[:_MAX_EXAMPLES]:
        try:
            rows = folder.read(shard).select(["key", "error_type", "error_message"]).to_pylist()
        except (NotFound, *DECODE_ERRORS):  # damaged, which `verify` reports: a missing example must not fail the pass
            continue
        row = next((each for each in rows if each["error_type"] == name), None)
        if row is not None:
            examples[name] = f"{row['key']}: {row['error_message']}"[:_MAX_EXAMPLE]
    return examples


def annotate_pool(run: SavedRun, settings: AnnotateSettings, failures: FailuresConfig) -> Engine:
    """Return a pool of Ray actors. No shard runs twice at the end of a pass, since an annotator may cost money."""
    if not joins_cluster():
        keep_environment()
    from flux_batch.engine.ray_pool import RayPool

    num_gpus = settings.num_gpus if joins_cluster() or has_gpu() else 0
    if settings.num_gpus and not num_gpus:
        log.warning("there is no GPU on this machine: the workers run on its CPU")
    return RayPool(
        max_workers=settings.max_workers,
        num_gpus=num_gpus,
        num_cpus=settings.num_cpus,
        max_attempts=failures.max_attempts,
        hang_s=failures.hang_s,
        load_hang_s=failures.load_hang_s,
        drain_s=failures.drain_s,
        outage_s=failures.outage_s,
        slow_factor=math.inf,
        name=f"{run.config.name}:annotate",
        runtime_env=settings.runtime_env,
    )
