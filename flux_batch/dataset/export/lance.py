"""Exports in Lance: a data set for each split, with a fragment for each shard. Needs the extra `lance`.

    SPLIT.lance/data/NNNNN.lance    the images and records of a shard
    SPLIT.lance/_versions/...       the list of fragments; written after all of them

The layout is that of https://lancedb.github.io/lance/format/table. The library packs a shard on the local disk, and
this program stores it like any other file, so an export works with every store and is resumed after a kill.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from flux_batch.errors import JobError
from flux_batch.output.formats import Sample
from flux_batch.output.metadata import record_row, sample_columns
from flux_batch.output.paths import TRAIN
from flux_batch.records import ImageRecord
from flux_batch.storage.scratch import scratch_folder
from flux_batch.storage.store import Store

_IMAGES_IN_MEMORY = 16
# The limit of rows in a fragment, so that every shard is one fragment.
_NO_LIMIT = 2**40


@dataclass(frozen=True, slots=True)
class LanceFormat:
    """The packer of shards as fragments of a Lance data set."""

    suffix: str
    passthrough: pa.Schema
    sources: tuple[str, ...]

    @property
    def loader_pattern(self) -> str:
        """The pattern with which `datasets` finds the files of a split."""
        return f"{TRAIN}.lance/**"

    @property
    def schema(self) -> pa.Schema:
        """The columns: each image as encoded bytes, then its record."""
        images = [pa.field(name, pa.large_binary()) for name in ("image", *self.sources)]
        return pa.schema([*images, *(field.with_nullable(True) for field in sample_columns(self.passthrough))])

    def location(self, shard: str) -> str:
        """Return the name of the file of a shard."""
        return f"{TRAIN}.lance/data/{shard}.lance"

    def pack(self, shard: str, samples: Sequence[Sample], scratch: Path) -> Iterator[tuple[str, Path]]:
        """Yield the file of a shard: its name, and its local path below `scratch`."""
        folder = scratch / f"{shard}.lance"
        _write_fragment(folder, pa.RecordBatchReader.from_batches(self.schema, self._batches(samples)))
        (path,) = (folder / "data").iterdir()
        yield self.location(shard), path

    def list_images(self, shard: str, records: Sequence[ImageRecord], scratch: Path) -> Iterator[tuple[str, Path]]:
        """Yield nothing: each image has its record beside it."""
        return iter(())

    def _batches(self, samples: Sequence[Sample]) -> Iterator[pa.RecordBatch]:
        for first in range(0, len(samples), _IMAGES_IN_MEMORY):
            rows = [
                {"image": sample.read(), **{source: sample.read(source) for source in self.sources}}
                | record_row(sample.record, self.passthrough)
                for sample in samples[first : first + _IMAGES_IN_MEMORY]
            ]
            yield pa.RecordBatch.from_pylist(rows, self.schema)


def check_lance() -> None:
    """Raise JobError if the library is missing."""
    try:
        import lance  # noqa: F401
    except ImportError as error:
        raise JobError("--format lance: needs a library: pip install 'flux-batch[lance]'") from error


def write_version(dest: Store, folder: str, schema: pa.Schema, num_rows: Mapping[str, int]) -> None:
    """Write the list of a data set's fragments. Before that, readers see no data set.

    folder: the data set's folder in `dest`. num_rows: the rows of each file below `data`, in order.
    """
    import lance

    if any(name.endswith(".manifest") for name in dest.children(f"{folder}/_versions")):
        return
    sizes = dest.children(f"{folder}/data")
    with scratch_folder() as scratch:
        (template,) = _write_fragment(scratch / "template", pa.Table.from_pylist([{}], schema))
        fragments = [
            _fragment(template, number, name, num_rows[name], sizes[name]) for number, name in enumerate(num_rows)
        ]
        local = scratch / "version"
        lance.LanceDataset.commit(str(local), lance.LanceOperation.Overwrite(schema, fragments))
        # The manifest comes last, so that no reader finds a part of the data set.
        for path in sorted(local.rglob("*"), key=lambda path: (path.suffix == ".manifest", path.suffix == ".json")):
            if path.is_file():
                dest.write(f"{folder}/{path.relative_to(local)}", path)


def _write_fragment(folder: Path, data: pa.RecordBatchReader | pa.Table) -> list[dict[str, Any]]:
    """Write rows as one fragment. Returns: its description in Lance's JSON."""
    from lance.fragment import write_fragments

    fragments = write_fragments(
        data, str(folder), mode="create", max_rows_per_file=_NO_LIMIT, max_bytes_per_file=_NO_LIMIT
    )
    return [dict(fragment.to_json()) for fragment in fragments]


def _fragment(template: Mapping[str, Any], number: int, name: str, num_rows: int, num_bytes: int | None) -> Any:
    """Return the description of a stored fragment; fragments of a schema differ only in these figures."""
    from lance.fragment import FragmentMetadata

    (file,) = template["files"]
    file = {**file, "path": name, "file_size_bytes": num_bytes}
    return FragmentMetadata.from_json(
        json.dumps({**template, "id": number, "physical_rows": num_rows, "files": [file]})
    )
