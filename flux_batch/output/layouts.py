"""The files of a shard in each output format: which names, which bytes, and how to read them back.

Knows records and encoded images; does not know how they were made or when a shard counts as done (commits.py).
Bytes are a function of the records and the images: fixed times and owners in tars, fixed order everywhere.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from flux_batch.config.schema import OutputConfig
from flux_batch.images import SUFFIXES
from flux_batch.output.paths import FAILED
from flux_batch.records import ImageRecord
from flux_batch.storage.passthrough import as_json, feature, passthrough_of

RECORD_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("id", pa.string(), nullable=False),
        pa.field("image_index", pa.int32(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        ("negative_prompt", pa.string()),
        ("seed", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("num_inference_steps", pa.int32()),
        ("embedded_guidance", pa.float64()),
        ("cfg_scale", pa.float64()),
        ("t5_sequence_length", pa.int32()),
        ("sigma_shift", pa.float64()),
        ("denoising_strength", pa.float64()),
        ("input_image", pa.string()),
        ("lora", pa.string()),
        ("lora_scale", pa.float64()),
        ("tile_size", pa.int32()),
        ("clip_truncated", pa.bool_()),
        ("t5_truncated", pa.bool_()),
        pa.field("model", pa.string(), nullable=False),
        pa.field("quantization", pa.string(), nullable=False),
        pa.field("step_cache", pa.float64(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        ("error_type", pa.string()),
        ("error_message", pa.string()),
        ("file_name", pa.string()),
        ("sha256", pa.string()),
        ("bytes", pa.int64()),
    ]
)
# What a sample need not say: it was made, and it is where it is.
NOT_OF_SAMPLES = {"status", "error_type", "error_message", "file_name"}
# Row groups of at most 100 images: what dataset viewers can still page through.
IMAGES_PER_ROW_GROUP = 100
IMAGES_IN_MEMORY = 16
# What readers of tars and Parquet raise at bytes that are none.
DAMAGE = (tarfile.TarError, pa.ArrowException, OSError, ValueError, EOFError, KeyError, TypeError, AttributeError)


@dataclass(frozen=True, slots=True)
class Sample:
    """An image that was made: its record and its encoded bytes on local disk."""

    record: ImageRecord
    path: Path


class Layout(Protocol):
    """How one output format names, packs and unpacks the images of a shard."""

    @property
    def suffix(self) -> str:
        """How the names of images end, without the dot."""
        ...

    def file_name(self, shard: str, key: str) -> str:
        """Name the file that holds an image, relative to the output."""
        ...

    def pack(self, shard: str, samples: Sequence[Sample], scratch: Path) -> Iterator[tuple[str, Path]]:
        """Yield each file that holds images: its key in the store, and where its bytes lie under `scratch`."""
        ...

    def list_images(self, shard: str, records: Sequence[ImageRecord], scratch: Path) -> Iterator[tuple[str, Path]]:
        """Yield the files that describe images from outside; made when it is settled which images are stored."""
        ...

    def entries(self, shard: str, files: Mapping[str, Path]) -> Iterator[tuple[str, bytes]]:
        """Yield what the data files hold, one by one: each image as KEY.suffix, and what lies beside it.

        Raises: one of DAMAGE if the files are not what they should be.
        """
        ...

    def names(self, keys: Iterable[str]) -> Iterator[str]:
        """Name every entry that belongs to the images of these keys."""
        ...


def unpack(layout: Layout, shard: str, files: Mapping[str, Path]) -> dict[str, bytes]:
    """Read the images back from the files that `pack` named: image key -> bytes."""
    return dict(stored_images(layout, shard, files))


def stored_images(layout: Layout, shard: str, files: Mapping[str, Path]) -> Iterator[tuple[str, bytes]]:
    """Yield the key and the bytes of each image in the data files of a shard, one by one. Raises: as `entries`."""
    for name, data in layout.entries(shard, files):
        if name.endswith(f".{layout.suffix}"):
            yield name.removesuffix(f".{layout.suffix}"), data


def layout_for(output: OutputConfig, passthrough: pa.Schema) -> Layout:
    """Choose the layout of a job file's `output.format`."""
    suffix = SUFFIXES[output.image.type]
    if output.format == "webdataset":
        return WebDataset(suffix, passthrough)
    if output.format == "files":
        return Files(suffix, passthrough)
    return Parquet(suffix, passthrough)


@dataclass(frozen=True, slots=True)
class WebDataset:
    """One tar a shard: KEY.png, KEY.txt, KEY.json a sample; loads with webdataset and datasets."""

    suffix: str
    passthrough: pa.Schema

    def file_name(self, shard: str, key: str) -> str:
        """Name the tar."""
        return f"train/{shard}.tar"

    def pack(self, shard: str, samples: Sequence[Sample], scratch: Path) -> Iterator[tuple[str, Path]]:
        """Write the tar."""
        path = scratch / f"{shard}.tar"
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for sample in samples:
                key = sample.record.key
                # A failed row must never be a member: one sample without its image makes the whole set unreadable.
                _add(tar, f"{key}.{self.suffix}", sample.path.read_bytes())
                _add(tar, f"{key}.txt", sample.record.prompt.encode())
                _add(tar, f"{key}.json", _json(sample_fields(sample.record, self.passthrough)))
        yield f"train/{shard}.tar", path

    def list_images(self, shard: str, records: Sequence[ImageRecord], scratch: Path) -> Iterator[tuple[str, Path]]:
        """Yield nothing: each sample has its record beside it."""
        return iter(())

    def entries(self, shard: str, files: Mapping[str, Path]) -> Iterator[tuple[str, bytes]]:
        """Yield the members of the tar."""
        with tarfile.open(files[f"train/{shard}.tar"], "r:") as tar:
            for member in tar:
                file = tar.extractfile(member) if member.isreg() else None
                yield member.name, file.read() if file else b""

    def names(self, keys: Iterable[str]) -> Iterator[str]:
        """Name the members."""
        return (f"{key}.{kind}" for key in keys for kind in (self.suffix, "txt", "json"))


@dataclass(frozen=True, slots=True)
class Files:
    """One folder a shard: a file an image, and a metadata.parquet that makes it a Hugging Face imagefolder.

    Parquet and not JSON lines, since types must be those of all shards and not what a loader guesses from one.
    """

    suffix: str
    passthrough: pa.Schema

    def file_name(self, shard: str, key: str) -> str:
        """Name the image."""
        return f"train/{shard}/{key}.{self.suffix}"

    def pack(self, shard: str, samples: Sequence[Sample], scratch: Path) -> Iterator[tuple[str, Path]]:
        """Give each image as it is."""
        for sample in samples:
            yield self.file_name(shard, sample.record.key), sample.path

    def list_images(self, shard: str, records: Sequence[ImageRecord], scratch: Path) -> Iterator[tuple[str, Path]]:
        """Write metadata.parquet."""
        rows = [
            record_row(record, self.passthrough) | {"file_name": f"{record.key}.{self.suffix}"}
            for record in records
            if record.status == "success"
        ]
        if rows:
            schema = pa.schema([("file_name", pa.string()), *_sample_columns(self.passthrough)])
            path = scratch / "metadata.parquet"
            path.write_bytes(_parquet_bytes(pa.Table.from_pylist(rows, schema)))
            yield f"train/{shard}/metadata.parquet", path

    def entries(self, shard: str, files: Mapping[str, Path]) -> Iterator[tuple[str, bytes]]:
        """Yield the files of the folder."""
        folder = f"train/{shard}/"
        return (
            (name.removeprefix(folder), path.read_bytes()) for name, path in files.items() if name.startswith(folder)
        )

    def names(self, keys: Iterable[str]) -> Iterator[str]:
        """Name the files."""
        names = [f"{key}.{self.suffix}" for key in keys]
        return iter([*names, "metadata.parquet"] if names else [])


@dataclass(frozen=True, slots=True)
class Parquet:
    """One Parquet file a shard: the image inside, as Hugging Face's Image feature, beside its record."""

    suffix: str
    passthrough: pa.Schema

    def file_name(self, shard: str, key: str) -> str:
        """Name the Parquet file."""
        return f"train/{shard}.parquet"

    def pack(self, shard: str, samples: Sequence[Sample], scratch: Path) -> Iterator[tuple[str, Path]]:
        """Write the Parquet file, one row group of images in memory at a time."""
        image = pa.field("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
        schema = pa.schema([image, *_sample_columns(self.passthrough)])
        schema = schema.with_metadata({"huggingface": json.dumps({"info": {"features": _features(schema)}})})
        path = scratch / f"{shard}.parquet"
        with pq.ParquetWriter(path, schema, compression="zstd") as writer:
            for first in range(0, len(samples), IMAGES_PER_ROW_GROUP):
                rows = [
                    {"image": {"bytes": sample.path.read_bytes(), "path": f"{sample.record.key}.{self.suffix}"}}
                    | record_row(sample.record, self.passthrough)
                    for sample in samples[first : first + IMAGES_PER_ROW_GROUP]
                ]
                writer.write_table(pa.Table.from_pylist(rows, schema))
        yield f"train/{shard}.parquet", path

    def list_images(self, shard: str, records: Sequence[ImageRecord], scratch: Path) -> Iterator[tuple[str, Path]]:
        """Yield nothing: each row is the record."""
        return iter(())

    def entries(self, shard: str, files: Mapping[str, Path]) -> Iterator[tuple[str, bytes]]:
        """Yield the images of the Parquet file."""
        with pq.ParquetFile(files[f"train/{shard}.parquet"]) as file:
            for batch in file.iter_batches(IMAGES_IN_MEMORY, columns=["key", "image"]):
                for row in batch.to_pylist():
                    yield f"{row['key']}.{self.suffix}", row["image"]["bytes"]

    def names(self, keys: Iterable[str]) -> Iterator[str]:
        """Name the images."""
        return (f"{key}.{self.suffix}" for key in keys)


def shard_name(index: int, num_shards: int) -> str:
    """Name a shard: five digits, more if the run has more than 99,999."""
    return f"{index:0{max(5, len(str(num_shards - 1)))}d}"


def image_key(shard: str, row: int, image_index: int) -> str:
    """Name an image: shard and row digits, `_1` and so on for further images of the row; no dots."""
    return f"{shard}{row:04d}" + (f"_{image_index}" if image_index else "")


def metadata_file(shard: str) -> str:
    """Name the metadata of a shard: one row for every requested image, failed ones included."""
    return f"metadata/{shard}.parquet"


def failed_file(shard: str) -> str:
    """Name the copy of the failed rows of a shard; there is none if nothing failed."""
    return f"{FAILED}/{shard}.parquet"


def pack_metadata(records: Iterable[ImageRecord], passthrough: pa.Schema) -> bytes:
    """Write records as Parquet, in the order given."""
    schema = pa.schema([*RECORD_SCHEMA, *_renamed(passthrough)])
    return _parquet_bytes(pa.Table.from_pylist([record_row(record, passthrough) for record in records], schema))


def pack_failures(metadata: bytes) -> bytes | None:
    """Write the failed rows of a shard's metadata as Parquet; None if there are none."""
    table = pq.read_table(io.BytesIO(metadata))
    failed = table.filter(pc.field("status") == "failed")
    return _parquet_bytes(failed) if failed.num_rows else None


def _parquet_bytes(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def unpack_metadata(data: bytes) -> list[dict[str, Any]]:
    """Read the rows that `pack_metadata` wrote."""
    return pq.read_table(io.BytesIO(data)).to_pylist()  # type: ignore[no-any-return]


def record_row(record: ImageRecord, passthrough: pa.Schema) -> dict[str, Any]:
    """Flatten a record into one table row."""
    row = asdict(record)
    extra = passthrough_of(row.pop("passthrough"), passthrough)
    return row | {passthrough_name(name): value for name, value in extra.items()}


def sample_fields(record: ImageRecord, passthrough: pa.Schema) -> dict[str, Any]:
    """Give the fields of a made image for JSON: one fixed set of keys and no nulls, as loaders infer types from them.

    A null becomes the empty value of its type; the metadata keeps it null.
    """
    row = record_row(record, passthrough)
    for field in [*RECORD_SCHEMA, *_renamed(passthrough)]:
        row[field.name] = as_json(row[field.name], field.type)
    return {name: value for name, value in row.items() if name not in NOT_OF_SAMPLES}


def passthrough_name(name: str) -> str:
    """Name a passthrough column in the metadata: its own name, or one `_` more if one of ours has it.

    So that `key_` cannot meet what becomes of `key`, it gets one more too.
    """
    return f"{name}_" if name.rstrip("_") in {*RECORD_SCHEMA.names, "image"} else name


def _sample_columns(passthrough: pa.Schema) -> list[pa.Field]:
    return [field for field in RECORD_SCHEMA if field.name not in NOT_OF_SAMPLES] + _renamed(passthrough)


def _renamed(passthrough: pa.Schema) -> list[pa.Field]:
    return [field.with_name(passthrough_name(field.name)).with_nullable(True) for field in passthrough]


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Add a member with nothing of this machine or moment in it."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    member.mode = 0o644
    tar.addfile(member, io.BytesIO(data))


def _json(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, ensure_ascii=False).encode()


def _features(schema: pa.Schema) -> dict[str, Any]:
    """Describe the columns as Hugging Face features, so that `image` loads as images."""
    return {field.name: feature(field.type) for field in schema} | {"image": {"_type": "Image"}}
