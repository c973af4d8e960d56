"""The publication of a run: its images, or those of a selection, as a data set of the Hugging Face Hub.

    README.md                        the card
    samples.jpg                      some of the images
    SPLIT/NNNNN.parquet              the images; also .tar
    publication.json                 the identity of the publication: another one in its place is refused

The first commit has the card and publication.json; then come the shards. Each shard is packed on the local disk,
uploaded, and removed. A commit makes uploaded shards visible: first one, then two, four, up to 50 at a time, so that a
killed publication loses little and a long one makes few commits. Committed shards are never packed again. Shards that
were uploaded but not committed before a kill are packed again, since their hash is needed, but not sent again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from flux_batch.dataset.export.card import export_card
from flux_batch.dataset.export.export import Packer, check_same
from flux_batch.dataset.export.facts import sample_sheet
from flux_batch.dataset.export.source import ExportSource, Piece
from flux_batch.dataset.publish.hub import HubDataset, HubFile
from flux_batch.errors import JobError, StoreError, bytes_text, count_of
from flux_batch.output.paths import CARD
from flux_batch.storage.scratch import scratch_folder
from flux_batch.storage.store import Store

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd

_Format: TypeAlias = Literal["parquet", "webdataset"]

_IDENTITY = "publication.json"
_SAMPLES = "samples.jpg"
# The number of shards to pack and upload at once; the images of each are on the local disk meanwhile.
_SHARDS_AT_ONCE = 4
# The largest number of shards in a commit: the Hub allows 128 commits an hour.
_MOST_A_COMMIT = 50


@dataclass(frozen=True)
class Published:
    """The outcome of `publish`: counts for people and programs."""

    address: str
    splits: Mapping[str, int]
    num_shards: int
    num_new_shards: int
    num_bytes: int


def publish(
    store: Store,
    hub: HubDataset,
    *,
    licence: str | None,
    selection: str | None = None,
    format: _Format = "parquet",
    shard_size: int = 1000,
    max_side: int | None = None,
    finish: str | None = None,
    private: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Published:
    """Publish the images of a run or a selection, or resume a killed publication.

    Raises: JobError without a licence or a token, or if the repository has another data set; StoreError.
    """
    if not licence:
        raise JobError(
            "--license is missing: say under which licence you publish, by the Hub's word for it, as cc-by-4.0 or "
            "other; it is never guessed, and the licence of the model may reach it (FLUX.1-dev's does)"
        )
    if shard_size < 1:
        raise JobError(f"--shard-size {shard_size}: must be 1 or more")
    hub.check_token()
    packer = Packer(ExportSource.open(store, selection, max_side, finish), format)
    pieces = packer.source.pieces(shard_size)
    hub.create(private=private)
    files = hub.files()
    _begin(packer, hub, files, shard_size, licence)
    names = {piece: packer.file_name(piece) for piece in pieces}
    missing = [piece for piece in pieces if names[piece] not in files]
    _upload_all(packer, hub, missing, lambda number: on_progress(len(pieces) - len(missing) + number, len(pieces)))
    files = hub.files() if missing else files
    if lost := [name for name in names.values() if name not in files]:
        raise StoreError(f"{hub.address}: {lost[0]} is missing after the upload; run the same command again")
    num_bytes = sum(files[name].size for name in names.values())
    return Published(hub.address, packer.source.splits, len(pieces), len(missing), num_bytes)


def format_published(published: Published) -> str:
    """Return lines for people."""
    lines = [f"{split:<12} {number:>10,} images" for split, number in published.splits.items()]
    before = published.num_shards - published.num_new_shards
    found = f", {before} of them found there already" if before else ""
    lines.append(f"{'shards':<12} {published.num_shards:>10,}, {bytes_text(published.num_bytes)}{found}")
    return "\n".join([*lines, f"in {published.address}"])


def _begin(packer: Packer, hub: HubDataset, files: Mapping[str, HubFile], shard_size: int, licence: str) -> None:
    """Commit the card and publication.json if they are missing or outdated."""
    identity = packer.identity(shard_size)
    body = json.dumps(identity, indent=1, sort_keys=True).encode()
    if _IDENTITY in files:
        if not files[_IDENTITY].has(body):
            check_same(_read_identity(hub), identity, hub.address)
    elif others := [name for name in files if name not in (".gitattributes", CARD, _SAMPLES)]:
        raise JobError(f"{hub.address}: has files of another data set, as {others[0]}; take another name")
    card = export_card(packer, address=hub.address, shard_size=shard_size, licence=licence, samples=_SAMPLES)
    wanted = {CARD: card.encode(), _IDENTITY: body}
    if _SAMPLES not in files or _IDENTITY not in files:  # the same images have the same samples
        wanted[_SAMPLES] = sample_sheet(packer.source)
    if changed := {name: data for name, data in wanted.items() if name not in files or not files[name].has(data)}:
        hub.commit(changed, "Begin the data set" if _IDENTITY not in files else "Renew the card")


def _read_identity(hub: HubDataset) -> dict[str, Any]:
    with scratch_folder() as scratch:
        text = hub.read(_IDENTITY, scratch)
    try:
        return dict(json.loads(text))
    except ValueError as error:
        raise JobError(f"{hub.address}: {_IDENTITY} is not of this program; take another name") from error


def _upload_all(packer: Packer, hub: HubDataset, pieces: Sequence[Piece], done: Callable[[int], None]) -> None:
    """Pack, upload and commit pieces in groups; each group is committed before the next one begins."""
    first, most = 0, 1
    with ThreadPoolExecutor(_SHARDS_AT_ONCE, "publish") as pool:
        while group := pieces[first : first + most]:
            try:
                uploaded = list(chain.from_iterable(pool.map(partial(_upload, packer, hub), group)))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
            first, most = first + len(group), min(2 * most, _MOST_A_COMMIT)
            hub.commit(uploaded, f"Add {count_of(len(group), 'shard')}, {first} of {len(pieces)}")
            done(first)


def _upload(packer: Packer, hub: HubDataset, piece: Piece) -> list[CommitOperationAdd]:
    with scratch_folder() as scratch:
        return [hub.upload(name, path) for name, path in packer.pack(piece, scratch)]
