"""The export of a run: its images, or those of a selection, as a separate data set.

    SPLIT/NNNNN.tar                        as in a run (output/formats.py); also .parquet, or a folder of files
    SPLIT.lance                            or a data set of Lance (lance.py)
    README.md                              a card, so that `datasets.load_dataset(DEST)` works
    _SUCCESS                               written last
    _export/export.json                    the identity of the export: an export of something else is refused
    _export/commits/SPLIT-NNNNN.json       the commit of a shard: its files with size and sha256

Each shard depends only on the run, the selection and the options, and is written whole. A killed export is resumed with
the shards that have no commit, and ends with the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

from flux_batch.config.schema import OutputConfig
from flux_batch.dataset.export.card import export_card
from flux_batch.dataset.export.lance import LanceFormat, check_lance, write_version
from flux_batch.dataset.export.source import ExportSource, Piece
from flux_batch.dataset.select.selection import difference
from flux_batch.errors import AlreadyExists, DamagedObject, JobError, bytes_text
from flux_batch.images import SUFFIXES
from flux_batch.output.formats import OutputFormat, format_for
from flux_batch.output.paths import CARD, PLAN, SUCCESS, TRAIN, is_of_run
from flux_batch.records import StoredFile
from flux_batch.storage.scratch import scratch_folder
from flux_batch.storage.store import Store

_Format: TypeAlias = Literal["webdataset", "files", "parquet", "lance"]

_IDENTITY = "_export/export.json"
_COMMITS = "_export/commits"
# The version of the identity; version 1 lacked the hashes of images and annotations.
_VERSION = 2
# The number of shards to pack and upload at once; the images of each are on the local disk meanwhile.
_SHARDS_AT_ONCE = 4
_WRITERS = 8
_READERS = 16
# The number of commits in memory at once.
_READ_AHEAD = 256
_READ_BYTES = 8 << 20


@dataclass(frozen=True)
class _Exported:
    """The outcome of `export`: counts for people and programs."""

    dest: str
    format: str
    splits: Mapping[str, int]
    num_shards: int
    num_new_shards: int
    num_bytes: int


@dataclass(frozen=True)
class Packer:
    """The packer of pieces into local files, with their names in the data set."""

    source: ExportSource
    format: _Format

    @property
    def output_format(self) -> OutputFormat | LanceFormat:
        """The writer of this format, with all columns of the export."""
        output = self.source.run.config.output
        if self.format == "lance":
            return LanceFormat(SUFFIXES[output.image.type], self.source.columns, output.source_names)
        config = OutputConfig.model_validate({**output.model_dump(), "format": self.format})
        return format_for(config, self.source.columns)

    def loader_pattern(self, split: str) -> str:
        """Return the pattern with which `datasets` finds the files of a split."""
        return _of_split(self.output_format.loader_pattern, split)

    def file_name(self, piece: Piece) -> str:
        """Return the name of the file of a piece, or of its folder."""
        return _of_split(self.output_format.location(piece.name), piece.split)

    def pack(self, piece: Piece, scratch: Path) -> Iterator[tuple[str, Path]]:
        """Yield the files of a piece: name in the data set, and local path."""
        output_format = self.output_format
        samples = self.source.samples(piece, scratch)
        records = [sample.record for sample in samples]
        for name, path in output_format.pack(piece.name, samples, scratch):
            yield _of_split(name, piece.split), path
        for name, path in output_format.list_images(piece.name, records, scratch):
            yield _of_split(name, piece.split), path

    def identity(self, shard_size: int) -> dict[str, Any]:
        """Return everything that determines the bytes of the shards."""
        columns = {field.name: str(field.type) for field in self.source.columns}
        return {
            "version": _VERSION,
            "images": self.source.digest,
            "annotations": self.source.annotation_digests,
            "selection": self.source.selection,
            "format": self.format,
            "shard_size": shard_size,
            "max_side": self.source.max_side,
            "finish": self.source.finish,
            "columns": columns,
        }


def export(
    store: Store,
    dest: Store,
    *,
    selection: str | None = None,
    format: _Format = "webdataset",
    shard_size: int = 1000,
    max_side: int | None = None,
    finish: str | None = None,
    licence: str | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> _Exported:
    """Write images of a run as a data set at `dest`, or resume an export.

    Raises: JobError if `dest` has another data set or other files, or if there is nothing to export; StoreError.

    >>> exported = export(Store("out/done"), Store("out/set"), format="parquet")
    >>> dict(exported.splits)
    {'train': 10}
    """
    if shard_size < 1:
        raise JobError(f"--shard-size {shard_size}: must be 1 or more")
    if format == "lance":
        check_lance()
    packer = Packer(ExportSource.open(store, selection, max_side, finish), format)
    pieces = packer.source.pieces(shard_size)
    _check_place(store, dest)
    if not dest.exists(_IDENTITY):
        _check_empty(dest, {packer.file_name(piece).partition("/")[0] for piece in pieces})
    _settle(dest, packer.identity(shard_size))
    done = {name.removesuffix(".json") for name in dest.children(_COMMITS)}
    missing = [piece for piece in pieces if _label(piece) not in done]
    card = export_card(packer, address=dest.uri, shard_size=shard_size, licence=licence)
    dest.write(CARD, card.encode())
    with ThreadPoolExecutor(_SHARDS_AT_ONCE, "export") as pool:
        try:
            for number, _ in enumerate(pool.map(lambda piece: _write(packer, dest, piece), missing), 1):
                on_progress(len(pieces) - len(missing) + number, len(pieces))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    num_bytes = _check(dest, pieces)
    if isinstance(packer.output_format, LanceFormat):
        _write_versions(packer.output_format, dest, pieces)
    dest.write(SUCCESS, b"")
    return _Exported(dest.uri, format, packer.source.splits, len(pieces), len(missing), num_bytes)


def format_exported(exported: _Exported) -> str:
    """Return lines for people."""
    lines = [f"{split:<12} {number:>10,} images" for split, number in exported.splits.items()]
    before = exported.num_shards - exported.num_new_shards
    found = f", {before} of them found written already" if before else ""
    shards, size = f"{'shards':<12} {exported.num_shards:>10,}", bytes_text(exported.num_bytes)
    lines.append(f"{shards} of {exported.format}, {size}{found}")
    return "\n".join([*lines, f"in {exported.dest}"])


def check_same(theirs: Mapping[str, Any], ours: Mapping[str, Any], where: str) -> None:
    """Raise JobError if the existing export is of something else."""
    changed = [name for name in ours if theirs.get(name) != ours[name]]
    if changed:
        said = ", ".join(_difference(name, theirs.get(name), ours[name]) for name in changed)
        if "version" in changed:
            said = (
                f"it was begun by another version of this program ({theirs.get('version')!r} in its description, "
                f"{ours['version']!r} here), so its images and annotations cannot be compared"
            )
        raise JobError(f"{where}: holds another export: {said}; take another address, or remove that one")


def _difference(name: str, theirs: Any, ours: Any) -> str:
    """Return the difference of two exports in one entry, in words instead of hashes."""
    if name == "images":
        return "the images are others, or were made again"
    if name in ("annotations", "columns"):
        before = theirs if isinstance(theirs, Mapping) else {}
        changed = [repr(each) for each in sorted({*before, *ours}) if before.get(each) != ours.get(each)]
        return f"the {name} {', '.join(changed)} are others{', or were made again' if name == 'annotations' else ''}"
    return difference(name, theirs, ours)


def _check_place(store: Store, dest: Store) -> None:
    """Raise JobError for a destination among the files of a run: `gc` would remove what is written there."""
    if dest.exists(PLAN):
        raise JobError(f"{dest.uri}: is the output of a run; an export needs a folder of its own")
    run, place = _address(store), _address(dest)
    if place.startswith(f"{run}/") and is_of_run(f"{place.removeprefix(f'{run}/')}/"):
        raise JobError(f"{dest.uri}: lies among the files of the run; an export needs a folder of its own")


def _address(store: Store) -> str:
    """Return the address of a store; for a local folder the absolute path, with links resolved."""
    return os.path.realpath(store.uri.removeprefix("file://")) if store.is_local else store.uri


def _check_empty(dest: Store, folders: Iterable[str]) -> None:
    """Raise JobError for a destination where a new export would overwrite other files."""
    foreign = CARD if dest.exists(CARD) else next(filter(None, map(dest.any_key, sorted(folders))), None)
    if foreign:
        raise JobError(f"{dest.uri}: holds {foreign}, but no export; use an empty folder")


def _settle(dest: Store, identity: Mapping[str, Any]) -> None:
    """Write the identity of the export, or compare it with the existing one."""
    try:
        dest.put_if_absent(_IDENTITY, json.dumps(identity, indent=1, sort_keys=True).encode())
    except AlreadyExists:
        try:
            theirs = json.loads(dest.read(_IDENTITY))
        except ValueError as error:
            raise DamagedObject(f"{dest.url(_IDENTITY)}: is damaged; remove the export and begin again") from error
        check_same(theirs, identity, dest.uri)


def _write(packer: Packer, dest: Store, piece: Piece) -> None:
    """Write the files of a piece, then its commit."""
    with scratch_folder() as scratch, ThreadPoolExecutor(_WRITERS) as writers:
        is_same = packer.source.finish is None
        put = partial(_put, dest, is_same_each_time=is_same)
        files = list(writers.map(lambda file: put(*file), packer.pack(piece, scratch)))
    commit = {"version": 1, "num_images": piece.num_images, "files": [asdict(file) for file in files]}
    dest.write(f"{_COMMITS}/{_label(piece)}.json", json.dumps(commit, indent=1).encode())


def _put(dest: Store, name: str, path: Path, *, is_same_each_time: bool) -> StoredFile:
    """Write a file, unless a killed export has written the same bytes.

    Other versions of the packing and encoding libraries give other bytes for the same images; such files are replaced.
    """
    file = _stored_file(name, path)
    try:
        if is_same_each_time:
            dest.put_if_absent(name, path)
        else:
            dest.write(name, path)
    except AlreadyExists:
        if not _is_stored(dest, file):
            dest.write(name, path)
    return file


def _is_stored(dest: Store, file: StoredFile) -> bool:
    """Return whether a file exists at the destination with these bytes. It is read in pieces."""
    if dest.size(file.path) != file.bytes:
        return False
    digest = hashlib.sha256()
    for start in range(0, file.bytes, _READ_BYTES):
        digest.update(dest.read_range(file.path, start, min(start + _READ_BYTES, file.bytes)))
    return digest.hexdigest() == file.sha256


def _stored_file(name: str, path: Path) -> StoredFile:
    """Return the record of a local file."""
    with path.open("rb") as data:
        return StoredFile(path=name, bytes=path.stat().st_size, sha256=hashlib.file_digest(data, "sha256").hexdigest())


def _check(dest: Store, pieces: Sequence[Piece]) -> int:
    """Compare the files at the destination with the commits. Returns: bytes. Raises: StoreError, DamagedObject."""
    listed: dict[str, dict[str, int | None]] = {}  # the sizes in the folders of the current piece
    num_bytes = 0
    for key, commit in _read_commits(dest, pieces):
        files = [(*file["path"].rpartition("/")[::2], file["bytes"]) for file in commit["files"]]
        folders = {folder for folder, _, _ in files}
        listed = {folder: listed[folder] if folder in listed else dest.children(folder) for folder in folders}
        for folder, name, size in files:
            if listed[folder].get(name) != size:
                raise DamagedObject(
                    f"{dest.url(f'{folder}/{name}')}: is not as it was written; "
                    f"remove {dest.url(key)} and run the same command again, which writes it again"
                )
            num_bytes += size
    return num_bytes


def _read_commits(dest: Store, pieces: Sequence[Piece]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the commit of each piece with its key, in order; a few are read ahead."""

    def read(piece: Piece) -> tuple[str, Mapping[str, Any]]:
        key = f"{_COMMITS}/{_label(piece)}.json"
        return key, json.loads(dest.read(key))

    with ThreadPoolExecutor(_READERS, "check") as pool:
        for first in range(0, len(pieces), _READ_AHEAD):
            yield from pool.map(read, pieces[first : first + _READ_AHEAD])


def _write_versions(lance_format: LanceFormat, dest: Store, pieces: Iterable[Piece]) -> None:
    """Write the list of shards of each split's data set."""
    num_rows: dict[str, dict[str, int]] = {}
    for piece in pieces:
        folder, _, name = _of_split(lance_format.location(piece.name), piece.split).partition("/data/")
        num_rows.setdefault(folder, {})[name] = piece.num_images
    for folder, files in num_rows.items():
        write_version(dest, folder, lance_format.schema, files)


def _label(piece: Piece) -> str:
    return f"{piece.split}-{piece.name}"


def _of_split(name: str, split: str) -> str:
    """Return the name of a run's file, moved into the folder of a split."""
    return split + name.removeprefix(TRAIN)
