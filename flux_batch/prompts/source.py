"""The data set of prompts: its files, how they split into ranges of rows, and the requests of a shard.

Knows the section `prompts` of the job file; does not know shards of output or images.
"""

from __future__ import annotations

import hashlib
import posixpath
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import fsspec
import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from flux_batch.config.schema import LoraConfig, PromptsConfig, SamplingConfig
from flux_batch.errors import SourceError
from flux_batch.prompts.rows import RowParser
from flux_batch.prompts.tables import TABLE_FORMATS, RowRange, Table, open_table
from flux_batch.records import FailedRow, ImageRequest, Shard
from flux_batch.redaction import public_uri
from flux_batch.storage.errors import translated
from flux_batch.storage.passthrough import is_text, portable
from flux_batch.storage.store import open_filesystem

# Enough to notice an edit of a file whose store has no checksum, at the price of two small reads.
_SAMPLED_BYTES = 64 * 1024
_READER_THREADS = 16


@dataclass(frozen=True, slots=True)
class PromptFile:
    """One file of the data set; `name` is relative to it, `version` changes when the contents do."""

    uri: str
    name: str
    size: int
    version: str


class PromptSource:
    """The prompts of a job, as the job file describes them."""

    def __init__(self, config: PromptsConfig) -> None:
        self._config = config
        self._options = config.storage_options

    def files(self) -> list[PromptFile]:
        """Return the files in a fixed order. Raises: SourceError if a file is missing or nothing is found."""
        expanded = [self._expand(uri) for uri in self._config.uri]
        found = {path: fs for fs, _, paths in expanded for path in paths}
        if not found:
            raise SourceError(
                f"{', '.join(self._config.uri)}: no prompts found; expected files ending in {_suffixes()}"
            )
        base = _common_folder([folder for _, folder, _ in expanded])
        with ThreadPoolExecutor(_READER_THREADS) as pool:
            return list(pool.map(lambda path: _describe(found[path], path, base), sorted(found)))

    def split(self, file: PromptFile, num_rows: int) -> list[RowRange]:
        """Return one file cut into row ranges. Raises: SourceError if a column of the job file is not in it."""
        table = self._table(file.uri)
        ranges = list(table.split(num_rows))
        if ranges:  # a text file without rows has no columns either
            self._check_columns(table, file.uri)
        return ranges

    def passthrough_schema(self, files: Sequence[PromptFile]) -> pa.Schema:
        """Return the types of the passthrough columns over all files. Raises: SourceError if they do not agree."""
        if not self._config.passthrough:
            return pa.schema([])
        with ThreadPoolExecutor(_READER_THREADS) as pool:
            schemas = list(pool.map(lambda file: self._passthrough_of(file.uri), files))
        try:
            return pa.unify_schemas(schemas, promote_options="permissive")
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise SourceError(f"prompts.passthrough: the files disagree on a column's type: {error}") from error

    def read(
        self, shard: Shard, sampling: SamplingConfig, loras: Sequence[LoraConfig] = ()
    ) -> Iterator[ImageRequest | FailedRow]:
        """Yield the validated rows of a shard, in order; an invalid row is a FailedRow."""
        parser = RowParser(self._config, sampling, shard.uri, loras)
        rows = self._table(shard.uri).stream(RowRange(shard.start, shard.num_rows, shard.offset), parser.columns)
        found = 0
        for row, values in enumerate(rows):
            yield parser.parse(values, row=row, default_id=f"{shard.name}:{shard.start + row}")
            found += 1
        if found != shard.num_rows:
            raise SourceError(
                f"{shard.uri}: {found} rows from row {shard.start} where the plan has {shard.num_rows}; "
                "the file changed since the run was planned"
            )

    def _passthrough_of(self, uri: str) -> pa.Schema:
        types = self._table(uri).types(self._config.passthrough)
        fields = []
        for name in self._config.passthrough:
            if name not in types:
                raise SourceError(f"{uri}: no column {name!r}, which prompts.passthrough names")
            try:
                fields.append((name, portable(types[name])))
            except ValueError as error:
                raise SourceError(
                    f"{uri}: column {name!r}, which prompts.passthrough names: {error}; leave it out or make it text"
                ) from error
        return pa.schema(fields)

    def _table(self, uri: str) -> Table:
        return open_table(uri, self._options)

    def _expand(self, uri: str) -> tuple[fsspec.AbstractFileSystem, str, list[str]]:
        """Return the file system, the base folder and the prompt files of a file, folder or glob."""
        fs, path = open_filesystem(uri, self._options)
        with translated(uri, "list prompts"):
            if fs.isdir(path):
                return fs, path.rstrip("/"), [found for found in fs.find(path) if _is_prompts(found)]
            if fs.exists(path):
                return fs, posixpath.dirname(public_uri(path)), [path]
            if magic := re.search(r"[*?[]", path):
                folder = posixpath.dirname(path[: magic.start()])
                return fs, folder, [found for found in fs.glob(path) if _is_prompts(found)]
        raise SourceError(f"{uri}: no such prompts file or folder")

    def _check_columns(self, table: Table, uri: str) -> None:
        wanted = {"prompt": self._config.columns.get("prompt", "prompt"), **self._config.columns}
        types = table.types(wanted.values())
        for field, column in wanted.items():
            if column not in types:
                hint = f", which prompts.columns.{field} names" if field in self._config.columns else ""
                advice = "" if hint else "; name yours in prompts.columns.prompt"
                raise SourceError(f"{uri}: no column {column!r}{hint}{advice}")
        kind = types[wanted["prompt"]]
        if not is_text(kind):
            raise SourceError(f"{uri}: column {wanted['prompt']!r} holds {kind}, but prompts must be text")


def _suffixes() -> str:
    return ", ".join(f".{suffix}" for suffix in TABLE_FORMATS)


def _is_prompts(path: str) -> bool:
    """Return whether a file in a folder holds prompts: a known suffix, and not hidden as `_metadata` is."""
    name = posixpath.basename(path)
    return not name.startswith((".", "_")) and name.rpartition(".")[2].lower() in TABLE_FORMATS


def _common_folder(folders: Sequence[str]) -> str:
    """Return the folder that names are relative to; empty if a list mixes a disk with a bucket."""
    try:
        return posixpath.commonpath(folders)
    except ValueError:
        return ""


def _describe(fs: fsspec.AbstractFileSystem, path: str, base: str) -> PromptFile:
    uri = path if isinstance(fs, LocalFileSystem) else fs.unstrip_protocol(path)
    with translated(uri, "read"):
        info = fs.info(path)
        size = int(info["size"])
        version = str(info.get("ETag") or info.get("etag") or "").strip('"') or _sample_hash(fs, path, size)
    name = public_uri(path)  # ids are made of it: no signature, which changes from day to day
    return PromptFile(uri=uri, name=posixpath.relpath(name, base) if base else name, size=size, version=version)


def _sample_hash(fs: fsspec.AbstractFileSystem, path: str, size: int) -> str:
    digest = hashlib.blake2b(digest_size=12)
    digest.update(fs.cat_file(path, start=0, end=min(size, _SAMPLED_BYTES)))
    if size > _SAMPLED_BYTES:
        digest.update(fs.cat_file(path, start=max(_SAMPLED_BYTES, size - _SAMPLED_BYTES), end=size))
    return digest.hexdigest()
