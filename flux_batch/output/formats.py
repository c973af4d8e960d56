"""The output formats: the files of a shard in each, their bytes, and how images are read back.

Bytes are a function of the records and the images alone: times and owners in tars are fixed, and so is every order.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from flux_batch.config.schema import OutputConfig
from flux_batch.images import SUFFIXES
from flux_batch.output.metadata import parquet_bytes, record_row, sample_columns, sample_fields
from flux_batch.output.paths import TRAIN
from flux_batch.records import ImageRecord
from flux_batch.storage.passthrough import feature
from flux_batch.storage.store import BLOCK_BYTES, Store

# Row groups of at most 100 images, so that dataset viewers can page through them. Arrow cannot read a row group with
# 2 GiB of images (90 of 4096 x 4096) at once, but it can read a few images of it at a time.
IMAGES_PER_ROW_GROUP = 100
BYTES_PER_ROW_GROUP = 1 << 30
_IMAGES_IN_MEMORY = 16
# A bound on the bytes of a source image, larger than any: the metadata has only its hash, not its size.
MAX_SOURCE_BYTES = 256 * 2**20
# The errors that readers of tars and Parquet raise for damaged bytes.
DECODE_ERRORS = (
    *(tarfile.TarError, pa.ArrowException, OSError, EOFError),
    *(ValueError, KeyError, TypeError, AttributeError),
)
_NO_PASSTHROUGH = pa.schema([])


@dataclass(frozen=True, slots=True)
class Sample:
    """A successful image: its record and its encoded bytes on local disk.

    If the job writes source images, they lie beside it: see `source_path`.
    """

    record: ImageRecord
    path: Path

    def read(self, source: str = "") -> bytes:
        """Return the encoded bytes of the image, or of one of its source images."""
        return self._file(source).read_bytes()

    def size(self, source: str = "") -> int:
        """Return the number of bytes of the image, or of one of its source images."""
        return self._file(source).stat().st_size

    def _file(self, source: str) -> Path:
        return source_path(self.path, source) if source else self.path


@dataclass(frozen=True, slots=True)
class StoredSample:
    """The bytes of a stored image, and of its source images by name."""

    key: str
    image: bytes
    sources: Mapping[str, bytes]


def source_path(path: Path, source: str) -> Path:
    """Return the local file of a source image, beside the file of its image."""
    return path.with_name(f"{path.name}.{source}")


class OutputFormat(Protocol):
    """A way to name, pack and unpack the images of a shard. All files are in TRAIN, named after the shard."""

    @property
    def suffix(self) -> str:
        """The suffix of an image's name, without the dot."""
        ...

    @property
    def sources(self) -> tuple[str, ...]:
        """The names of the source images that are written beside each image."""
        ...

    @property
    def loader_pattern(self) -> str:
        """The pattern with which `datasets` finds the files of all shards."""
        ...

    def location(self, shard: str) -> str:
        """Return the file, or the folder, that holds everything of a shard."""
        ...

    def file_name(self, shard: str, key: str) -> str:
        """Return the name of the file that holds an image, relative to the output."""
        ...

    def image_files(self, shard: str, key: str) -> tuple[str, ...]:
        """Return the names of the files that hold an image and its source images."""
        ...

    def files(self, shard: str, keys: Iterable[str]) -> set[str]:
        """Return the names of all files of a shard with these images."""
        ...

    def pack(self, shard: str, samples: Sequence[Sample], scratch: Path) -> Iterator[tuple[str, Path]]:
        """Yield each file with images: its key in the store, and its local path, which may be under `scratch`."""
        ...

    def list_images(self, shard: str, records: Sequence[ImageRecord], scratch: Path) -> Iterator[tuple[str, Path]]:
        """Yield the files that list the images of a shard. records: the records of stored images."""
        ...

    def entries(self, shard: str, files: Mapping[str, Path]) -> Iterator[tuple[str, bytes]]:
        """Yield the contents of the data files: each image as KEY.suffix, followed by its other entries.

        A source image is KEY.source.suffix. Raises: one of DECODE_ERRORS if the files are damaged.
        """
        ...

    def entry_names(self, keys: Iterable[str]) -> Iterator[str]:
        """Yield the name of every entry that belongs to the images with these keys."""
        ...

    def read_images(self, store: Store, file_name: str, sizes: Mapping[str, int]) -> Iterator[tuple[str, bytes]]:
        """Yield key and encoded bytes of some images of a stored file, in its order.

        KEY.source stands for a source image of the image KEY, which the file holds. Little is read of other images.
        `sizes`: the recorded number of bytes by key; from a tar or an image file at most one byte more is read. Of a
        Parquet file, a row group is in memory. Raises: StoreError; one of DECODE_ERRORS for a damaged file.
        """
        ...


def format_for(output: OutputConfig, passthrough: pa.Schema = _NO_PASSTHROUGH) -> OutputFormat:
    """Return the format of the section `output` of a job file."""
    suffix = SUFFIXES[output.image.type]
    if output.format == "webdataset":
        return _WebDataset(suffix, passthrough, output.source_names)
    if output.format == "files":
        return _Files(suffix, passthrough, output.source_names)
    return _Parquet(suffix, passthrough, output.source_names)


def iter_images(output_format: OutputFormat, shard: str, files: Mapping[str, Path]) -> Iterator[tuple[str, bytes]]:
    """Yield key and bytes of each image in local data files. Raises: the errors of `entries`."""
    for name, data in output_format.entries(shard, files):
        key, _, rest = name.partition(".")
        if rest == output_format.suffix:
            yield key, data


def iter_samples(output_format: OutputFormat, shard: str, files: Mapping[str, Path]) -> Iterator[StoredSample]:
    """Yield each image in local data files with its source images. Raises: the errors of `entries`."""
    names = {f"{source}.{output_format.suffix}": source for source in output_format.sources}
    for key, entries in groupby(output_format.entries(shard, files), lambda entry: entry[0].partition(".")[0]):
        parts = {name.partition(".")[2]: data for name, data in entries}
        if output_format.suffix in parts:
            sources = {source: parts[name] for name, source in names.items() if name in parts}
            yield StoredSample(key, parts[output_format.suffix], sources)


@dataclass(frozen=True, slots=True)
class _OneFile:
    """A format with one file for each shard, which holds the images and their records."""

    suffix: str
    passthrough: pa.Schema
    sources: tuple[str, ...]
    file_suffix: ClassVar[str]

    @property
    def loader_pattern(self) -> str:
        """The pattern of the files."""
        return self.location("*")

    def location(self, shard: str) -> str:
        """Return the name of the file."""
        return f"{TRAIN}/{shard}.{self.file_suffix}"

    def file_name(self, shard: str, key: str) -> str:
        """Return the name of the file."""
        return self.location(shard)

    def image_files(self, shard: str, key: str) -> tuple[str, ...]:
        """Return the name of the file."""
        return (self.location(shard),)

    def files(self, shard: str, keys: Iterable[str]) -> set[str]:
        """Return the name of the file; an empty set without images."""
        return {self.file_name(shard, key) for key in keys}

    def list_images(self, shard: str, records: Sequence[ImageRecord], scratch: Path) -> Iterator[tuple[str, Path]]:
        """Yield nothing: each image has its record beside it."""
        return iter(())


class _WebDataset(_OneFile):
    """One tar for each shard, with KEY.png, KEY.txt and KEY.json; loads with webdataset and datasets.

    Source images are KEY.source.png, KEY.source_1.png and so on; loaders name them source.png and so on.
    """

    file_suffix = "tar"

    def pack(self, shard: str, samples: Sequence[Sample], scratch: Path) -> Iterator[tuple[str, Path]]:
        """Write the tar."""
        path = scratch / f"{shard}.tar"
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for sample in samples:
                key = sample.record.key
                # A failed row must never be a member: one sample without its image makes the whole set unreadable.
                _add(tar, f"{key}.{self.suffix}", sample.read())
                for source in self.sources:
                    _add(tar, f"{key}.{source}.{self.suffix}", sample.read(source))
                _add(tar, f"{key}.txt", sample.record.prompt.encode())
                _add(tar, f"{key}.json", _json(sample_fields(sample.record, self.passthrough)))
        yield self.location(shard), path

    def entries(self, shard: str, files: Mapping[str, Path]) -> Iterator[tuple[str, bytes]]:
        """Yield the members of the tar."""
        with tarfile.open(files[self.location(shard)], "r:") as tar:
            for member in tar:
                file = tar.extractfile(member) if member.isreg() else None
                yield member.name, file.read() if file else b""

    def entry_names(self, keys: Iterable[str]) -> Iterator[str]:
        """Yield the names of the members."""
        sources = [f"{source}.{self.suffix}" for source in self.sources]
        return (f"{key}.{kind}" for key in keys for kind in (self.suffix, *sources, "txt", "json"))

    def read_images(self, store: Store, file_name: str, sizes: Mapping[str, int]) -> Iterator[tuple[str, bytes]]:
        """Read header after header, and stop after the last wanted image."""
        left = set(sizes)
        with store.open(file_name) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                key, _, suffix = member.name.rpartition(".")
                if key in left and suffix == self.suffix and (content := tar.extractfile(member)):
                    left.remove(key)
                    yield key, content.read(sizes[key] + 1)
                if not left:
                    return


@dataclass(frozen=True, slots=True)
class _Files:
    """One folder for each shard: image files and a metadata.parquet, which make it a Hugging Face imagefolder.

    Source images are files too: KEY.source.png, in the column `source_file_name`, which loaders name `source`. The
    metadata is Parquet, not JSON lines, so that loaders need not guess types, which could differ between shards.
    """

    suffix: str
    passthrough: pa.Schema
    sources: tuple[str, ...]
    loader_pattern = f"{TRAIN}/*/*"

    def location(self, shard: str) -> str:
        """Return the name of the folder."""
        return f"{TRAIN}/{shard}"

    def file_name(self, shard: str, key: str) -> str:
        """Return the name of the image."""
        return f"{self.location(shard)}/{key}.{self.suffix}"

    def image_files(self, shard: str, key: str) -> tuple[str, ...]:
        """Return the names of the image and of its source images."""
        return tuple(f"{self.location(shard)}/{name}" for name in self._names(key))

    def files(self, shard: str, keys: Iterable[str]) -> set[str]:
        """Return the names of the images and of their list; an empty set without images."""
        return {f"{self.location(shard)}/{name}" for name in self.entry_names(keys)}

    def pack(self, shard: str, samples: Sequence[Sample], scratch: Path) -> Iterator[tuple[str, Path]]:
        """Yield each image file unchanged."""
        for sample in samples:
            paths = (sample.path, *(source_path(sample.path, source) for source in self.sources))
            yield from zip(self.image_files(shard, sample.record.key), paths, strict=True)

    def list_images(self, shard: str, records: Sequence[ImageRecord], scratch: Path) -> Iterator[tuple[str, Path]]:
        """Write metadata.parquet."""
        columns = ["file_name", *(f"{source}_file_name" for source in self.sources)]
        rows = [
            record_row(record, self.passthrough) | dict(zip(columns, self._names(record.key), strict=True))
            for record in records
            if record.status == "success"
        ]
        if rows:
            schema = pa.schema([*((name, pa.string()) for name in columns), *sample_columns(self.passthrough)])
            path = scratch / "metadata.parquet"
            path.write_bytes(parquet_bytes(pa.Table.from_pylist(rows, schema)))
            yield f"{self.location(shard)}/metadata.parquet", path

    def entries(self, shard: str, files: Mapping[str, Path]) -> Iterator[tuple[str, bytes]]:
        """Yield the files of the folder."""
        folder = f"{self.location(shard)}/"
        return (
            (name.removeprefix(folder), path.read_bytes())
            for name, path in sorted(files.items())
            if name.startswith(folder)
        )

    def entry_names(self, keys: Iterable[str]) -> Iterator[str]:
        """Yield the names of the files."""
        names = [name for key in keys for name in self._names(key)]
        return iter([*names, "metadata.parquet"] if names else [])

    def read_images(self, store: Store, file_name: str, sizes: Mapping[str, int]) -> Iterator[tuple[str, bytes]]:
        """Read the image of a file; its source images are files of their own."""
        for name, size in sizes.items():
            _, source = key_and_source(name, self.sources)
            beside = f"{file_name.removesuffix(self.suffix)}{source}.{self.suffix}"
            with store.open(beside if source else file_name) as file:
                yield name, file.read(size + 1)

    def _names(self, key: str) -> list[str]:
        return [f"{key}.{self.suffix}", *(f"{key}.{source}.{self.suffix}" for source in self.sources)]


class _Parquet(_OneFile):
    """One Parquet file for each shard: images as Hugging Face's Image feature, beside their records.

    Source images are further columns of that type: source, source_1 and so on.
    """

    file_suffix = "parquet"

    def pack(self, shard: str, samples: Sequence[Sample], scratch: Path) -> Iterator[tuple[str, Path]]:
        """Write the Parquet file, one row group of images in memory at a time."""
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        images = {"image": "", **{source: source for source in self.sources}}
        schema = pa.schema([*((name, kind) for name in images), *sample_columns(self.passthrough)])
        features = {"info": {"features": _features(schema, images)}}
        schema = schema.with_metadata({"huggingface": json.dumps(features)})
        path = scratch / f"{shard}.parquet"
        with pq.ParquetWriter(path, schema, compression="zstd") as writer:
            for group in self._row_groups(samples):
                rows = [
                    {
                        name: {"bytes": sample.read(source), "path": self._name(sample.record.key, source)}
                        for name, source in images.items()
                    }
                    | record_row(sample.record, self.passthrough)
                    for sample in group
                ]
                writer.write_table(pa.Table.from_pylist(rows, schema))
        yield self.location(shard), path

    def entries(self, shard: str, files: Mapping[str, Path]) -> Iterator[tuple[str, bytes]]:
        """Yield the images of the Parquet file."""
        with pq.ParquetFile(files[self.location(shard)]) as file:
            for batch in file.iter_batches(_IMAGES_IN_MEMORY, columns=["key", "image", *self.sources]):
                for row in batch.to_pylist():
                    yield self._name(row["key"]), row["image"]["bytes"]
                    for source in self.sources:
                        yield self._name(row["key"], source), row[source]["bytes"]

    def entry_names(self, keys: Iterable[str]) -> Iterator[str]:
        """Yield the names of the images."""
        return (self._name(key, source) for key in keys for source in ("", *self.sources))

    def read_images(self, store: Store, file_name: str, sizes: Mapping[str, int]) -> Iterator[tuple[str, bytes]]:
        """Read the keys, then whole row groups with wanted images: the images of a group lie in one page."""
        with (
            store.open(file_name) as file,
            pq.ParquetFile(file, buffer_size=BLOCK_BYTES, pre_buffer=False) as table,
        ):
            columns: dict[str, set[str]] = {}
            for name in sizes:
                key, source = key_and_source(name, self.sources)
                columns.setdefault(source, set()).add(key)
            for group in range(table.num_row_groups):
                keys = table.read_row_group(group, columns=["key"])["key"].to_pylist()
                for source, some in columns.items():
                    wanted = [number for number, key in enumerate(keys) if key in some]
                    if wanted:
                        column = source or "image"
                        images = table.read_row_group(group, columns=[f"{column}.bytes"])[column]
                        for number in wanted:
                            yield f"{keys[number]}.{source}".removesuffix("."), images[number].as_py()["bytes"]

    def _row_groups(self, samples: Sequence[Sample]) -> Iterator[list[Sample]]:
        """Yield the samples of each row group, bounded by number and by bytes."""
        group: list[Sample] = []
        num_bytes = 0
        for sample in samples:
            size = sum(sample.size(source) for source in ("", *self.sources))
            if group and (len(group) == IMAGES_PER_ROW_GROUP or num_bytes + size > BYTES_PER_ROW_GROUP):
                yield group
                group, num_bytes = [], 0
            group.append(sample)
            num_bytes += size
        if group:
            yield group

    def _name(self, key: str, source: str = "") -> str:
        return f"{key}.{source}.{self.suffix}" if source else f"{key}.{self.suffix}"


def key_and_source(name: str, sources: Sequence[str]) -> tuple[str, str]:
    """Return key and source of a name KEY.source; for any other name the name and ""."""
    key, _, source = name.partition(".")
    return (key, source) if source in sources else (name, "")


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Add a member with a fixed time and owner."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    member.mode = 0o644
    tar.addfile(member, io.BytesIO(data))


def _json(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, ensure_ascii=False).encode()


def _features(schema: pa.Schema, images: Iterable[str]) -> dict[str, Any]:
    """Return the columns as Hugging Face features, so that image columns load as images."""
    return {field.name: feature(field.type) for field in schema} | {name: {"_type": "Image"} for name in images}
