"""The commands `gallery`, `verify` and `gc`: call, and output as JSON and text. Heavy imports happen in the call."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from flux_batch.errors import JobError, count_of

if TYPE_CHECKING:
    from flux_batch.report.gallery.content import RunSize
    from flux_batch.storage.store import Store

_Progress: TypeAlias = Callable[[int, int], None]
_Said: TypeAlias = tuple[dict[str, Any], str]
"""The result of a command for programs, and as text for people."""

_SINGLE_FILE_IMAGES, _GALLERY_IMAGES = 200, 100_000
_REMAINS = "; the bucket keeps versions, so their bytes remain until a lifecycle rule of the bucket ends them"


def check_outputs(arguments: argparse.Namespace) -> None:
    """Raise JobError for a file in place of the output of a run."""
    for name in ("output", "other", "beside"):
        uri = getattr(arguments, name, None)
        if not uri or not os.path.isfile(uri):  # Path.is_file raises for a name that is too long
            continue
        if not uri.endswith((".yaml", ".yml")):
            raise JobError(f"{uri} is a file; this command takes the output of a run, which is a folder")
        from flux_batch.config.text import load_yaml

        tree = load_yaml(Path(uri).read_text("utf-8", "replace"), uri)
        output = tree.get("output") if isinstance(tree, dict) else None
        named = f": {output['uri']}" if isinstance(output, dict) and "uri" in output else ""
        raise JobError(f"{uri} is a job file; this command takes the output of a run{named}")


def gallery_command(arguments: argparse.Namespace, options: dict[str, Any], progress: _Progress) -> _Said:
    """Write a gallery. Raises: JobError, StoreError."""
    from flux_batch.report.gallery.write import write_gallery, write_single_file
    from flux_batch.storage.store import Store

    store = Store(arguments.output, options)
    columns = None if arguments.columns is None else [name for name in arguments.columns.split(",") if name]
    max_images = arguments.max_images
    if max_images is None:
        max_images = _SINGLE_FILE_IMAGES if arguments.single_file else _GALLERY_IMAGES
    if not arguments.single_file:
        beside = Store(arguments.beside, options) if arguments.beside else None
        shown = write_gallery(store, max_images, columns, beside, progress)
        return said_of_gallery(store, shown, shown.chunks.num_images)
    if arguments.beside:
        raise JobError("--single-file shows one run; leave out --beside, or --single-file")
    gallery = write_single_file(store, max_images, columns)
    return said_of_gallery(store, gallery, len(gallery.images))


def said_of_gallery(store: Store, size: RunSize, num_shown: int) -> _Said:
    """Return the result and the text for a gallery of `store`."""
    from flux_batch.report.gallery.write import PAGE, SHEET, format_gallery

    counts = ("name", "num_images", "num_failed", "num_committed", "num_shards", "is_complete")
    data = {"page": store.url(PAGE), "contact_sheet": store.url(SHEET), "num_shown": num_shown}
    return data | {name: getattr(size, name) for name in counts}, format_gallery(store, size, num_shown)


def verify_command(arguments: argparse.Namespace, options: dict[str, Any], progress: _Progress) -> tuple[_Said, int]:
    """Verify a run, and repair it if requested. Returns: the result and the exit code."""
    from flux_batch.report.saved_run import opened_run
    from flux_batch.report.verify import format_verdict, repair, verify
    from flux_batch.storage.store import Store

    with opened_run(Store(arguments.output, options), to_write=arguments.repair) as run:
        verdict = verify(run.store, quick=arguments.quick, on_progress=progress)
        text = format_verdict(verdict)
        data = {each.name: getattr(verdict, each.name) for each in fields(verdict)}
        data |= {"problems": [asdict(problem) for problem in verdict.problems], "broken": verdict.broken}
        data |= {"exit_code": verdict.exit_code, "num_repaired": 0}
        if arguments.repair and verdict.problems:
            num_broken = len(repair(run.store, verdict))
            data["num_repaired"] = num_broken
            are = "is" if num_broken == 1 else "are"
            text += f"\nrepaired; {count_of(num_broken, 'shard')} {are} missing now: run the job to make them again"
    return (data, text), verdict.exit_code


def gc_command(arguments: argparse.Namespace, options: dict[str, Any]) -> _Said:
    """Remove what no commit names, or list it. Raises: JobError, RunHeld, StoreError."""
    from flux_batch.output.commit_log import CommitLog
    from flux_batch.output.gc import Listing, find_leftovers, logged_shards, remove_leftovers
    from flux_batch.report.saved_run import opened_run
    from flux_batch.storage.store import Store

    with opened_run(Store(arguments.output, options), to_write=not arguments.dry_run) as run:
        listing = Listing.of(run.folder, run.output_format)
        is_logged = logged_shards(run.folder, listing, CommitLog.saved(run.commits)[0])
        leftovers = list(find_leftovers(run.folder, listing, is_logged))
        if arguments.dry_run:
            listed = [{"kind": each.kind, "key": each.key} for each in leftovers]
            lines = [f"{each['kind']:<12} {each['key']}" for each in listed]
            return {"leftovers": listed}, "\n".join(lines) or "nothing to remove"
        num_removed = remove_leftovers(run.folder, run.output_format, leftovers)
        remains = _REMAINS if num_removed and run.store.keeps_versions else ""
        text = f"{count_of(num_removed, 'object')} removed{remains}" if num_removed else "nothing to remove"
        return {"num_removed": num_removed}, text
