"""The commands `select`, `export` and `publish`: arguments, call, output. Heavy imports happen in the call."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, TypeAlias

from flux_batch.errors import JobError

_Progress: TypeAlias = Callable[[int, int], None]

log = logging.getLogger(__name__)


def add_select(command: argparse.ArgumentParser) -> None:
    """Add the arguments of `select`."""
    command.add_argument("output", metavar="OUTPUT_URI", help="the output of a run: output.uri of its job file")
    command.add_argument("name", metavar="NAME", help="the name of the selection")
    command.add_argument("--where", metavar="EXPRESSION", help="keep images if true, e.g. clip > 0.27 (DuckDB's SQL)")
    command.add_argument("--keys", metavar="FILE", help="keep these keys: one a line, CSV, JSON or Parquet")
    command.add_argument("--dedup", metavar="phash|COLUMN", help="keep the best of near-duplicates")
    command.add_argument("--distance", type=float, metavar="D", help="limit of --dedup: bits (10) or 1 - cosine (0.05)")
    command.add_argument("--top", type=int, metavar="N", help="keep the N images with the greatest --by")
    command.add_argument("--by", metavar="EXPRESSION", help="greater is better; --by=-noise prefers the least")
    command.add_argument("--within", metavar="EXPRESSION", help="keep the best N of each group with the same value")
    command.add_argument("--take", type=int, metavar="N", help="keep exactly N, drawn by hash")
    command.add_argument("--split", metavar="NAME=SHARE,...", help="splits: train=0.9,test=0.1 (default train=1)")
    command.add_argument("--stratify", metavar="EXPRESSION", help="split each group of equal values by the same shares")
    command.add_argument("--replace", action="store_true", help="replace an existing selection of that name")
    command.add_argument("--json", action="store_true", help="print JSON on stdout")


def add_export(command: argparse.ArgumentParser) -> None:
    """Add the arguments of `export`."""
    command.add_argument("output", metavar="OUTPUT_URI", help="the output of a run: output.uri of its job file")
    command.add_argument("dest", metavar="DEST", help="a folder or an address, used only for this export")
    _add_images(command, ["webdataset", "files", "parquet", "lance"])
    command.add_argument(
        "--dest-option", action="append", default=[], metavar="KEY=VALUE", help="fsspec option of DEST; repeatable"
    )


def add_publish(command: argparse.ArgumentParser) -> None:
    """Add the arguments of `publish`."""
    command.add_argument("output", metavar="OUTPUT_URI", help="the output of a run: output.uri of its job file")
    command.add_argument("dest", metavar="hf://datasets/OWNER/NAME", help="a data set of the Hub, new or existing")
    _add_images(command, ["parquet", "webdataset"])
    command.add_argument("--private", action="store_true", help="if the data set is new, make it private")


def _add_images(command: argparse.ArgumentParser, formats: list[str]) -> None:
    command.add_argument("--selection", metavar="NAME", help="the images of a selection (default: all)")
    command.add_argument("--format", choices=formats, default=formats[0], help=f"default {formats[0]}")
    command.add_argument("--shard-size", type=int, default=1000, metavar="N", help="images in a shard (default 1000)")
    command.add_argument("--max-side", type=int, metavar="PIXELS", help="shrink larger images (default: copy bytes)")
    command.add_argument(
        "--finish", metavar="MODULE:FUNCTION", help="a function applied to every image: a watermark, a signature"
    )
    command.add_argument("--license", metavar="ID", help="the Hub's id of the images' licence, such as cc-by-4.0")
    command.add_argument("--json", action="store_true", help="print JSON on stdout")


def export_command(arguments: argparse.Namespace, options: dict[str, Any], progress: _Progress) -> str:
    """Export images. Returns: the lines to print, or JSON."""
    from flux_batch.config.text import read_pairs
    from flux_batch.dataset.export.export import export, format_exported
    from flux_batch.storage.store import Store

    dest = Store(arguments.dest, read_pairs(arguments.dest_option, "--dest-option"))
    exported = export(Store(arguments.output, options), dest, on_progress=progress, **_images(arguments))
    return json.dumps(asdict(exported)) if arguments.json else format_exported(exported)


def publish_command(arguments: argparse.Namespace, options: dict[str, Any], progress: _Progress) -> str:
    """Publish images. Returns: the lines to print, or JSON."""
    from flux_batch.dataset.publish.hub import HubDataset
    from flux_batch.dataset.publish.publish import format_published, publish
    from flux_batch.storage.store import Store

    store, hub = Store(arguments.output, options), HubDataset(arguments.dest)
    published = publish(store, hub, private=arguments.private, on_progress=progress, **_images(arguments))
    return json.dumps(asdict(published)) if arguments.json else format_published(published)


def _images(arguments: argparse.Namespace) -> dict[str, Any]:
    names = ("selection", "format", "shard_size", "max_side", "finish")
    return {name: getattr(arguments, name) for name in names} | {"licence": arguments.license}


def select_command(arguments: argparse.Namespace, options: dict[str, Any]) -> str:
    """Select images. Returns: the table to print, or JSON."""
    from flux_batch.dataset.select.select import Criteria, format_selected, select
    from flux_batch.storage.store import Store

    names = ("where", "keys", "dedup", "distance", "top", "by", "within", "take", "stratify")
    given = {name: getattr(arguments, name) for name in names}
    if arguments.split is not None:
        given["split"] = _shares(arguments.split)
    store = Store(arguments.output, options)
    selected = select(store, arguments.name, Criteria(**given), replace=arguments.replace)
    if selected.num_shards < selected.num_planned:
        log.warning("%d of %d shards are committed; the others are not seen", selected.num_shards, selected.num_planned)
    if arguments.json:
        return json.dumps(asdict(selected) | {"num_chosen": selected.num_chosen})
    state = "written" if selected.is_new else "the same is there already"
    return f"{format_selected(selected)}\nselection {selected.name}: {state}"


def _shares(text: str) -> dict[str, float]:
    """Parse train=0.9,test=0.1. Raises: JobError."""
    shares: dict[str, float] = {}
    for pair in text.split(","):
        name, _, share = pair.strip().partition("=")
        try:
            number = float(share)
        except ValueError:
            number = 0.0
        if not name.isidentifier() or name in shares or name == "all" or not 0 < number <= 1:
            raise JobError(f"--split {text}: {pair.strip()!r} must be a name and a share, as in train=0.9,test=0.1")
        shares[name] = number
    return shares
