"""The data set of prompts: which files it has, what its columns mean, rows -> ImageRequests.

Knows the `prompts` and `sampling` sections of the job file; does not know shards of output or images.
"""

from __future__ import annotations

import hashlib
import math
import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import fsspec
import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from flux_batch.config.schema import PROMPT_FIELDS, LoraConfig, PromptsConfig, SamplingConfig
from flux_batch.errors import InvalidSetting, RowError, SourceError
from flux_batch.prompts.access import Places
from flux_batch.prompts.input_images import given_bytes
from flux_batch.prompts.row_loras import RowLoras
from flux_batch.prompts.tables import FORMATS, BadRow, Row, RowRange, Table, open_table
from flux_batch.records import FailedRow, ImageRequest, InputImage, LoraUse, Shard, image_seed
from flux_batch.redaction import public_uri
from flux_batch.sampling_params import ALIASES, MAX_SEED, SAMPLING_FIELDS, SamplingParams, check_integer
from flux_batch.storage.errors import translated
from flux_batch.storage.passthrough import is_text, portable
from flux_batch.storage.store import open_filesystem

# Enough to notice an edit of a file whose store gives no checksum, at the price of two small reads.
SAMPLED_BYTES = 64 * 1024
READERS = 16


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
        """List the data set in a fixed order. Raises: SourceError if a file is missing or nothing is found."""
        expanded = [self._expand(uri) for uri in self._config.uri]
        found = {path: fs for fs, _, paths in expanded for path in paths}
        if not found:
            raise SourceError(
                f"{', '.join(self._config.uri)}: no prompts found; expected files ending in {_suffixes()}"
            )
        base = _common_folder([folder for _, folder, _ in expanded])
        with ThreadPoolExecutor(READERS) as pool:
            return list(pool.map(lambda path: _describe(found[path], path, base), sorted(found)))

    def split(self, file: PromptFile, num_rows: int) -> list[RowRange]:
        """Cut one file into row ranges. Raises: SourceError if a column of the job file is not in it."""
        table = self._table(file.uri)
        ranges = list(table.split(num_rows))
        if ranges:  # a text file without rows has no columns either
            self._check_columns(table, file.uri)
        return ranges

    def passthrough_schema(self, files: Sequence[PromptFile]) -> pa.Schema:
        """Find the types of the passthrough columns over all files. Raises: SourceError if they do not agree."""
        if not self._config.passthrough:
            return pa.schema([])
        with ThreadPoolExecutor(READERS) as pool:
            schemas = list(pool.map(lambda file: self._passthrough_of(file.uri), files))
        try:
            return pa.unify_schemas(schemas, promote_options="permissive")
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise SourceError(f"prompts.passthrough: the files disagree on a column's type: {error}") from error

    def read(
        self, shard: Shard, sampling: SamplingConfig, loras: Sequence[LoraConfig] = ()
    ) -> Iterator[ImageRequest | FailedRow]:
        """Read and validate the rows of a shard, in order; a row that cannot be used is a FailedRow."""
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
        """Find what a file, folder or glob means: its file system, the folder it is about, the prompt files."""
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


class RowParser:
    """One row of any format -> a validated ImageRequest, or a FailedRow with the reason."""

    def __init__(
        self, config: PromptsConfig, sampling: SamplingConfig, uri: str = "", loras: Sequence[LoraConfig] = ()
    ) -> None:
        self._passthrough = config.passthrough
        self._places = Places(config, uri)
        self._loras = RowLoras(loras, uri)
        image = sampling.input_image
        self._input_image = InputImage(name=public_uri(image), uri=image) if image else None
        self._defaults = sampling.params()
        self._num_images = sampling.num_images_per_prompt
        self._run_seed = sampling.seed
        spellings = {field: [field] for field in PROMPT_FIELDS}
        for other, field in ALIASES.items():
            spellings[field].append(other)
        self._columns = spellings | {field: [column] for field, column in config.columns.items()}

    @property
    def columns(self) -> set[str]:
        """Name every column that may be asked for."""
        return {name for names in self._columns.values() for name in names} | set(self._passthrough)

    def parse(self, values: Row | BadRow, *, row: int, default_id: str) -> ImageRequest | FailedRow:
        """Validate one row; `row` is its number in the shard."""
        if isinstance(values, BadRow):
            return FailedRow(
                row=row, id=default_id, prompt="", error_type="RowError", error_message=f"{default_id}: {values.reason}"
            )
        row_id = _text(self._cell(values, "id")) or default_id
        passthrough = {name: values.get(name) for name in self._passthrough}
        try:
            prompt = self._prompt(values)
            params = self._sampling(values)
            image = self._image(values)
            if image is None and params.denoising_strength < 1:
                raise RowError(
                    f"denoising_strength = {params.denoising_strength}: needs an input_image, and there is none"
                )
            loras = self._loras_of(values)
            seeds = self._seeds(values, row_id)
        except (RowError, InvalidSetting) as error:
            return FailedRow(
                row=row,
                id=row_id,
                prompt=_text(self._cell(values, "prompt")),
                error_type=type(error).__name__,
                error_message=f"{default_id}: {error}",
                passthrough=passthrough,
            )
        return ImageRequest(
            row=row,
            id=row_id,
            prompt=prompt,
            sampling=params,
            seeds=seeds,
            input_image=image,
            loras=loras,
            passthrough=passthrough,
        )

    def _cell(self, values: Row, field: str) -> Any:
        return next((values[name] for name in self._columns[field] if values.get(name) is not None), None)

    def _prompt(self, values: Row) -> str:
        prompt = self._cell(values, "prompt")
        column = self._columns["prompt"][0]
        if prompt is None:
            raise RowError(f"column {column!r} is null: a prompt is needed")
        if not isinstance(prompt, str):
            raise RowError(f"column {column!r} holds {type(prompt).__name__}: a prompt must be text")
        if not prompt.strip():
            raise RowError(f"column {column!r} is empty: a prompt is needed")
        return prompt

    def _sampling(self, values: Row) -> SamplingParams:
        overrides: dict[str, Any] = {}
        for field in SAMPLING_FIELDS:
            if (value := self._cell(values, field)) is not None:
                overrides[field] = _convert(field, value)
        return replace(self._defaults, **overrides) if overrides else self._defaults

    def _image(self, values: Row) -> InputImage | None:
        """Find what the row starts from: a path or an address, bytes, or both as Hugging Face writes them."""
        value = self._cell(values, "input_image")
        if isinstance(value, Mapping):
            value = value.get("path") if value.get("bytes") is None else value["bytes"]
        if value is None:
            return self._input_image
        if isinstance(value, bytes):
            return given_bytes(value)
        if isinstance(value, str):
            return self._places.find(value) if value else None
        raise RowError(
            f"column {self._columns['input_image'][0]!r} holds {type(value).__name__}: "
            "must be a path, an address, bytes, or a struct of bytes and path"
        )

    def _loras_of(self, values: Row) -> tuple[LoraUse, ...]:
        scale = self._cell(values, "lora_scale")
        return self._loras.choose(self._cell(values, "lora"), None if scale is None else _number("lora_scale", scale))

    def _seeds(self, values: Row, row_id: str) -> tuple[int, ...]:
        count = self._cell(values, "num_images_per_prompt")
        count = self._num_images if count is None else _integer("num_images_per_prompt", count)
        check_integer("num_images_per_prompt", count, 1, 1000)
        seed = self._cell(values, "seed")
        if seed is None:
            return tuple(image_seed(self._run_seed, row_id, index) for index in range(count))
        seed = _integer("seed", seed)
        check_integer("seed", seed, 0, MAX_SEED - 1)
        return tuple(seed + index for index in range(count))


def _convert(field: str, value: Any) -> Any:
    kind = SAMPLING_FIELDS[field].type
    if kind is int:
        return _integer(field, value)
    if kind is float:
        return _number(field, value)
    if not isinstance(value, str):
        raise InvalidSetting(f"{field} = {value!r}: must be text", field=field)
    return value


def _integer(field: str, value: Any) -> int:
    """Read a whole number; text and whole floats count, since CSV and pandas turn integers into them."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    with suppress(ValueError):
        if isinstance(value, str):
            return int(value)
    number = _number(field, value)
    if not number.is_integer():
        raise InvalidSetting(f"{field} = {value!r}: must be a whole number", field=field)
    return int(number)


def _number(field: str, value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidSetting(f"{field} = {value!r}: must be a number", field=field) from error
    if not math.isfinite(number):
        raise InvalidSetting(f"{field} = {value!r}: must be a finite number", field=field)
    return number


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _suffixes() -> str:
    return ", ".join(f".{suffix}" for suffix in FORMATS)


def _is_prompts(path: str) -> bool:
    """Whether a file found in a folder counts: a known suffix, and not hidden as `_metadata` and `.part` files are."""
    name = posixpath.basename(path)
    return not name.startswith((".", "_")) and name.rpartition(".")[2].lower() in FORMATS


def _common_folder(folders: Sequence[str]) -> str:
    """Find what names are relative to: none if a list mixes a disk with a bucket."""
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
    name = public_uri(path)  # what ids are made of: no signature, which another day is another
    return PromptFile(uri=uri, name=posixpath.relpath(name, base) if base else name, size=size, version=version)


def _sample_hash(fs: fsspec.AbstractFileSystem, path: str, size: int) -> str:
    digest = hashlib.blake2b(digest_size=12)
    digest.update(fs.cat_file(path, start=0, end=min(size, SAMPLED_BYTES)))
    if size > SAMPLED_BYTES:
        digest.update(fs.cat_file(path, start=max(SAMPLED_BYTES, size - SAMPLED_BYTES), end=size))
    return digest.hexdigest()
