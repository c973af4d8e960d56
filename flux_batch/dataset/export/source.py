"""The source of an export: the images of a run or a selection, cut into shards, with annotations as columns.

Images are copied as bytes, and each is checked against the sha256 in its metadata.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from flux_batch.config.schema import SOURCE_COLUMNS, ImageConfig
from flux_batch.dataset.select.files import annotated_shards, committed_shards, read_schema, read_tables, table_of
from flux_batch.dataset.select.selection import read_selection
from flux_batch.errors import DamagedObject, JobError, NotFound, StoreError, one_line
from flux_batch.images import AI_SOURCE_TYPE, encode, encode_source, read_provenance, to_rgb
from flux_batch.output.annotations import AnnotationFolder
from flux_batch.output.formats import DECODE_ERRORS, MAX_SOURCE_BYTES, Sample, key_and_source, source_path
from flux_batch.output.metadata import RECORD_SCHEMA, passthrough_name, record_row, source_digests
from flux_batch.output.paths import TRAIN, is_within, shard_name
from flux_batch.records import Commit, ImageRecord
from flux_batch.report.saved_run import SavedRun
from flux_batch.sampling_params import SAMPLING_FIELDS, SamplingParams
from flux_batch.storage.store import Store

log = logging.getLogger(__name__)

# Columns with the stored size of a resized image; `width` and `height` have its original size.
_STORED_SIZE = pa.schema([("stored_width", pa.int32()), ("stored_height", pa.int32())])
_KEY = pa.field("key", pa.string())
_MADE = pa.schema([_KEY, ("sha256", pa.string()), ("status", pa.string())])
_KEPT = pa.schema([_KEY, ("sha256", pa.string()), ("shard", pa.int32())])
_REASON = ("error_type", "error_message")
# A file is read whole if at least this share of it is wanted.
_WHOLE_FROM = 0.5
_DIGEST_BYTES = 16
# The number of shards whose tables are in memory at once, and of images to hash at a time.
_SHARDS_AT_ONCE = 256
_IMAGES_AT_ONCE = 65_536
_LEAST_SIDE = 16
_Finish: TypeAlias = Callable[[bytes, Mapping[str, Any]], bytes]


@dataclass(frozen=True, eq=False)
class Piece:
    """A shard of an export: images of one split. images: key, sha256 and the run's shard of each."""

    split: str
    name: str  # 00000
    images: pa.Table

    @property
    def num_images(self) -> int:
        """The number of images."""
        return int(self.images.num_rows)

    @property
    def hashes(self) -> dict[int, dict[str, str]]:
        """The sha256 of each image by key, by shard of the run, in order. It is not cached: there may be millions."""
        found: dict[int, dict[str, str]] = {}
        columns = [self.images[name].to_pylist() for name in ("key", "sha256", "shard")]
        for key, sha256, shard in zip(*columns, strict=True):
            found.setdefault(shard, {})[key] = sha256
        return found


@dataclass(frozen=True)
class _AnnotationColumn:
    """A column of an annotation, and its name in the export."""

    annotation: str
    column: str
    name: str
    kind: pa.DataType


@dataclass(frozen=True, eq=False)
class ExportSource:
    """The chosen images of a run."""

    run: SavedRun
    selection: str | None = None
    max_side: int | None = None
    finish: str | None = None

    @classmethod
    def open(
        cls, store: Store, selection: str | None = None, max_side: int | None = None, finish: str | None = None
    ) -> ExportSource:
        """Open a run. `finish` is MODULE:FUNCTION.

        Raises: JobError if there is no run, or no such selection or function.
        """
        if max_side is not None and max_side < _LEAST_SIDE:
            raise JobError(f"--max-side {max_side}: must be {_LEAST_SIDE} or more")
        source = cls(SavedRun.open(store), selection, max_side, finish)
        source.finished  # noqa: B018, imports the function before anything is written
        return source

    @cached_property
    def finished(self) -> _Finish | None:
        """The function that `finish` names: encoded bytes and the record's fields -> encoded bytes."""
        if self.finish is None:
            return None
        module, _, name = self.finish.partition(":")
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        try:
            function = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise JobError(f"--finish {self.finish}: must be MODULE:FUNCTION: {one_line(error)}") from error
        return function  # type: ignore[no-any-return]

    @cached_property
    def chosen(self) -> pa.Table:
        """The chosen images: key, split, sha256 and shard of the run, in order. Raises: JobError if there are none."""
        shards = committed_shards(self.run)
        if len(shards) < self.run.num_shards:
            log.warning("%d of %d shards are committed; the others are not seen", len(shards), self.run.num_shards)
        tables, parts = map(_made, shards, read_tables(self.run, shards, None, _MADE)), [_KEPT.empty_table()]
        while some := [*islice(tables, _SHARDS_AT_ONCE)]:  # many small tables take more memory than one
            parts.append(pa.concat_tables(some).combine_chunks())
        table = pa.concat_tables(parts)
        if self.selection is None:
            table = table.append_column("split", pa.repeat(TRAIN, table.num_rows))
        else:
            table = self._selected(table)
        if not table.num_rows:
            raise JobError(f"{self.run.store.uri}: has no image to export")
        return table.select(["key", "split", "sha256", "shard"])

    def _selected(self, made: pa.Table) -> pa.Table:
        selection = read_selection(self.run.store, str(self.selection)).select(["key", "split"])
        is_made = pc.is_in(selection["key"], value_set=made["key"])
        missing = selection["key"].filter(pc.invert(is_made))
        if missing:
            raise JobError(
                f"selection {self.selection!r} has {len(missing)} images that the run has not, as {pc.min(missing)}; "
                "select again, with --replace"
            )
        places = pc.index_in(made["key"], value_set=selection["key"])
        table = made.append_column("split", selection["split"].take(places))
        return table.filter(table["split"].is_valid())

    @cached_property
    def splits(self) -> dict[str, int]:
        """The number of images of each split: `train` first, the others sorted by name."""
        counts = {each["values"]: each["counts"] for each in self.chosen["split"].value_counts().to_pylist()}
        return {name: counts[name] for name in sorted(counts, key=lambda name: (name != TRAIN, name))}

    @cached_property
    def digest(self) -> str:
        """A hash of key, sha256 and split of each image.

        Exports with the same digest have the same images. Keys are not enough: an image made again keeps its key.
        """
        digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
        for batch in self.chosen.to_batches(_IMAGES_AT_ONCE):
            columns = (batch[name].to_pylist() for name in ("key", "sha256", "split"))
            digest.update(
                "".join(f"{key} {sha256} {split}\n" for key, sha256, split in zip(*columns, strict=True)).encode()
            )
        return digest.hexdigest()

    @cached_property
    def annotation_digests(self) -> dict[str, str]:
        """A hash of each annotation, from the hashes of its files in its commits.

        Only the shards of the chosen images count.
        Raises: NotFound if an annotation is removed meanwhile; DamagedObject.
        """
        digests = {}
        for name, hashes in self._annotation_hashes.items():
            digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
            for shard, sha256 in hashes.items():
                digest.update(f"{shard} {sha256}\n".encode())
            digests[name] = digest.hexdigest()
        return digests

    @cached_property
    def _annotation_hashes(self) -> dict[str, dict[int, str | None]]:
        """The sha256 of the files of each annotation, by shard."""
        shards = pc.unique(self.chosen["shard"]).to_pylist()
        found: dict[str, dict[int, str | None]] = {}
        for name in dict.fromkeys(column.annotation for column in self.annotation_columns):
            folder, done = AnnotationFolder(self.run.folder, name), sorted(self.annotated[name].intersection(shards))
            hashes = found.setdefault(name, {})
            for commit in folder.commits.read_all(done):
                hashes[commit.shard] = _hash_in(commit, folder.file(commit.shard))
        return found

    def pieces(self, shard_size: int) -> list[Piece]:
        """Cut each split into shards of `shard_size` images, in order."""
        pieces = []
        for split, num_images in self.splits.items():
            is_of_split = pc.equal(self.chosen["split"], split)
            table = self.chosen.select(["key", "sha256", "shard"]).filter(is_of_split).combine_chunks()
            num_pieces = -(-num_images // shard_size)
            for number in range(num_pieces):
                images = table.slice(number * shard_size, shard_size)
                pieces.append(Piece(split, shard_name(number, num_pieces), images))
        return pieces

    @cached_property
    def annotation_columns(self) -> list[_AnnotationColumn]:
        """The columns of all annotations with their names in an export: `score` of `clip` is `clip_score`."""
        taken = {*self.run.outline.passthrough.names, *self.run.output_format.sources}
        columns = []
        for name, shards in self.annotated.items():
            for field in read_schema(self.run, name, min(shards)) if shards else ():
                if field.name == "key" or field.name in _REASON:
                    continue
                own = field.name if field.name == name or field.name.startswith(f"{name}_") else f"{name}_{field.name}"
                while own in taken:
                    own += "_"
                taken.add(own)
                columns.append(_AnnotationColumn(name, field.name, own, field.type))
        return columns

    @cached_property
    def columns(self) -> pa.Schema:
        """The columns in addition to those of every record: passthrough, annotations, the size of resized images."""
        fields = [*self.run.outline.passthrough]
        fields += [pa.field(column.name, column.kind) for column in self.annotation_columns]
        return pa.schema([*fields, *(_STORED_SIZE if self.max_side else ())])

    def samples(self, piece: Piece, scratch: Path) -> list[Sample]:
        """Copy the images of a piece into a folder. Returns: the images with their records, in order.

        Raises: DamagedObject for an image that is missing or differs from its metadata; JobError if images or
        annotations were made again since the source was opened.
        """
        samples = []
        for shard, hashes in piece.hashes.items():
            records = self._records(shard, hashes)
            paths = {key: scratch / f"{key}.image" for key in hashes}
            missing = dict.fromkeys(name for key in hashes for name in (key, *self._source_names(key)))
            for name, data in self._read(shard, records, scratch):
                key, source = key_and_source(name, self.run.output_format.sources)
                records[key], data = self._stored(records[key], data, source)
                (source_path(paths[key], source) if source else paths[key]).write_bytes(data)
                missing.pop(name, None)
            if name := next(iter(missing), ""):
                raise DamagedObject(f"{self.run.store.uri}: image {name} is missing; `flux-batch verify` says more")
            samples += [Sample(records[key], paths[key]) for key in hashes]
        return samples

    def _records(self, shard: int, hashes: Mapping[str, str]) -> dict[str, ImageRecord]:
        """Read the records of images by their sha256, with annotations as further passthrough columns.

        Raises: JobError if the images, or their annotations, were made again.
        """
        try:
            rows = {row["key"]: row for row in self.run.records(shard)}
            annotations = self._annotations(shard)
        except NotFound:
            raise self._made_again(shard) from None
        if any(rows.get(key, {}).get("sha256") != sha256 for key, sha256 in hashes.items()):
            raise self._made_again(shard)
        return {key: self._record(rows[key], annotations.get(key, {})) for key in hashes}

    def _record(self, row: Mapping[str, Any], annotations: Mapping[str, Any]) -> ImageRecord:
        sampling = SamplingParams(**{name: row[name] for name in SAMPLING_FIELDS if name in row})
        names = [name for name in RECORD_SCHEMA.names if name not in SAMPLING_FIELDS and name in row]
        own = {field.name: row.get(passthrough_name(field.name)) for field in self.run.outline.passthrough}
        fields = {name: row[name] for name in names}
        return ImageRecord(**fields, sampling=sampling, passthrough={**own, **annotations})

    def _annotations(self, shard: int) -> dict[str, dict[str, Any]]:
        """Read the annotations of a shard by key; annotations made after the source was opened are null."""
        values: dict[str, dict[str, Any]] = {}
        for name, hashes in self._annotation_hashes.items():
            if shard not in hashes:
                continue
            columns = [column for column in self.annotation_columns if column.annotation == name]
            schema = pa.schema([_KEY, *(pa.field(each.column, each.kind) for each in columns)])
            table = self._annotation(AnnotationFolder(self.run.folder, name), shard, hashes[shard], schema)
            for row in table.to_pylist():
                values.setdefault(row["key"], {}).update({each.name: row.get(each.column) for each in columns})
        return values

    def _annotation(self, folder: AnnotationFolder, shard: int, sha256: str | None, schema: pa.Schema) -> pa.Table:
        """Read columns of an annotation. Raises: JobError if it was made again, DamagedObject, NotFound."""
        key = folder.file(shard)
        data = self.run.store.read(key)
        if hashlib.sha256(data).hexdigest() == sha256:
            return table_of(data, schema, self.run.store.url(key))
        if _hash_in(folder.commits.read(shard), key) != sha256:
            raise self._made_again(shard)
        raise DamagedObject(f"{self.run.store.url(key)}: is not as it was committed; `flux-batch verify` says more")

    def _made_again(self, shard: int) -> JobError:
        return JobError(
            f"{self.run.store.uri}: images of shard {shard}, or their annotations, were made again meanwhile; let that "
            "end, and export to an empty folder"
        )

    @cached_property
    def annotated(self) -> dict[str, set[int]]:
        """The shards with committed annotations, by the name of the annotation."""
        return annotated_shards(self.run)

    def _read(self, shard: int, records: Mapping[str, ImageRecord], scratch: Path) -> Iterator[tuple[str, bytes]]:
        """Yield the images of some records and their source images, checked against the metadata."""
        files: dict[str, dict[str, int]] = {}
        for record in records.values():
            sizes = files.setdefault(str(record.file_name), {})
            sizes[record.key] = int(record.bytes or 0)
            sizes |= dict.fromkeys(self._source_names(record.key), MAX_SOURCE_BYTES)
        for file_name, sizes in files.items():
            if not is_within(file_name, TRAIN):
                raise DamagedObject(f"{self.run.store.uri}: {file_name} does not lie in {TRAIN}")
            try:
                for name, data in self._read_file(shard, file_name, sizes, scratch):
                    if name in sizes:
                        key, source = key_and_source(name, self.run.output_format.sources)
                        self._check(records[key], data, source)
                        yield name, data
            except StoreError:
                raise
            except DECODE_ERRORS as error:
                raise DamagedObject(f"{self.run.store.url(file_name)}: cannot be read: {one_line(error)}") from error

    def _read_file(
        self, shard: int, file_name: str, sizes: Mapping[str, int], scratch: Path
    ) -> Iterator[tuple[str, bytes]]:
        """Yield images of a file: from a local copy if most are wanted, else by ranges of the stored file."""
        output_format = self.run.output_format
        is_shard = output_format.location(self.run.name(shard)) == file_name
        num_images = len(sizes) / (1 + len(output_format.sources))
        if not is_shard or num_images < _WHOLE_FROM * self.run.outline.num_rows[shard]:
            yield from output_format.read_images(self.run.store, file_name, sizes)
            return
        copy = self.run.store.local_file(file_name, scratch)
        for name, data in output_format.entries(self.run.name(shard), {file_name: copy}):
            yield name.removesuffix(f".{output_format.suffix}"), data
        if copy.is_relative_to(scratch):
            copy.unlink()

    def _source_names(self, key: str) -> list[str]:
        return [f"{key}.{source}" for source in self.run.output_format.sources]

    def _check(self, record: ImageRecord, data: bytes, source: str) -> None:
        recorded = source_digests(record.passthrough).get(source) if source else record.sha256
        if hashlib.sha256(data).hexdigest() != recorded:
            raise DamagedObject(
                f"{self.run.store.uri}: the bytes of image {record.key} differ from its metadata (sha256); "
                "`flux-batch verify --repair` and a run make it again"
            )

    def _stored(self, record: ImageRecord, data: bytes, source: str) -> tuple[ImageRecord, bytes]:
        """Return an image as it is exported: resized and passed to `finish` if the options ask for it.

        Source images are not passed to `finish`, which is for generated images only.
        """
        if source:
            return self._stored_source(record, data, source)
        size: dict[str, int] = {}
        if self.max_side is not None:
            data, *sides = _shrunk(data, self.max_side, self.run.config.output.image)
            size = dict(zip(_STORED_SIZE.names, sides, strict=True))
        if self.finished is not None:
            data = self._finished(record, data)
        digest = hashlib.sha256(data).hexdigest()
        return replace(record, sha256=digest, bytes=len(data), passthrough={**record.passthrough, **size}), data

    def _stored_source(self, record: ImageRecord, data: bytes, source: str) -> tuple[ImageRecord, bytes]:
        if self.max_side is None:
            return record, data
        data = _shrunk(data, self.max_side, self.run.config.output.image, is_source=True)[0]
        digests = source_digests(record.passthrough) | {source: hashlib.sha256(data).hexdigest()}
        passthrough = {**record.passthrough, SOURCE_COLUMNS[0]: ", ".join(digests.values())}
        return replace(record, passthrough=passthrough), data

    def _finished(self, record: ImageRecord, data: bytes) -> bytes:
        """Return the result of `finish` for an image. Raises: JobError if it is not such an image or lost its label."""
        assert self.finished is not None
        try:
            data = self.finished(data, record_row(record, self.columns))
            with Image.open(io.BytesIO(data)) as image:
                kind = str(image.format).lower()
        except Exception as error:  # a user's code raises anything
            raise JobError(f"--finish {self.finish}: image {record.key}: {one_line(error)}") from error
        if kind != self.run.config.output.image.type:
            raise JobError(f"--finish {self.finish}: image {record.key}: has become {kind}")
        if AI_SOURCE_TYPE.encode() not in data:
            raise JobError(
                f"--finish {self.finish}: image {record.key}: has lost its AI label; pass on what is in the metadata, "
                "or encode it by `flux_batch.images.encode`"
            )
        return data


def _hash_in(commit: Commit, path: str) -> str | None:
    """Return the sha256 of a file in a commit; None if it is not named there."""
    return next((file.sha256 for file in commit.files if file.path == path), None)


def _made(shard: int, rows: pa.Table) -> pa.Table:
    """Return the successful images of a shard."""
    made = rows.filter(pc.equal(rows["status"], "success"))
    return pa.table([made["key"], made["sha256"], pa.array([shard] * made.num_rows, pa.int32())], schema=_KEPT)


def _shrunk(data: bytes, max_side: int, config: ImageConfig, *, is_source: bool = False) -> tuple[bytes, int, int]:
    """Return an image with sides of at most `max_side` pixels, and its size. Its AI label is kept, if it has one."""
    with Image.open(io.BytesIO(data)) as image:
        if max(image.size) <= max_side:
            return data, image.width, image.height
        small = to_rgb(image)
        small.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
        if is_source:
            return encode_source(small, config), *small.size
        pixels = np.asarray(small)
    height, width, _ = pixels.shape
    return encode(pixels, config, read_provenance(data)), width, height
