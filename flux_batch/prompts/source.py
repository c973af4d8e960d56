"""The prompts data set: its files, their ranges of rows, and the requests of a shard.

This module knows the section `prompts` of the job file, but not the output or images.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import cache, cached_property, partial
from itertools import islice
from threading import Lock
from urllib.parse import unquote

import pyarrow as pa

from flux_batch.config.schema import PROMPT_FIELDS, LoraConfig, PromptsConfig, SamplingConfig
from flux_batch.errors import SourceError, did_you_mean
from flux_batch.prompts.access import folders_of
from flux_batch.prompts.formats.arrow import ArrowTable
from flux_batch.prompts.formats.json_lines import JsonLinesTable
from flux_batch.prompts.formats.json_table import JsonTable
from flux_batch.prompts.formats.lines import LineTable
from flux_batch.prompts.formats.open import open_table
from flux_batch.prompts.formats.parquet import ParquetTable
from flux_batch.prompts.formats.table import BadRow, Row, RowRange, Table, ranges_of
from flux_batch.prompts.formats.tar import TarTable
from flux_batch.prompts.formats.text import TextTable
from flux_batch.prompts.listing import (
    BLOCK_RULES,
    LISTING_RULES,
    NAMED_FILE_RULES,
    ONE_PROMPT_RULES,
    PARTITION_RULES,
    Listing,
    PromptFile,
    address_of,
    list_prompts,
)
from flux_batch.prompts.recipe import ROWS, Recipe
from flux_batch.prompts.rows import RowParser
from flux_batch.records import FailedRow, FileRange, ImageRequest, Shard
from flux_batch.sampling_params import ALIASES
from flux_batch.storage.passthrough import is_text, portable

# The number of a shard's small files that are opened ahead of the present row.
_READ_AHEAD = 8
_TEXT = pa.string()
_HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"
# Names of prompt columns in public data sets, the likeliest first.
PROMPT_NAMES = ("prompt", "prompts", "caption", "captions", "text", "description", "synthetic_prompt", "meta_prompt")
# Names that other programs use for our fields. Without a note, such columns would be ignored silently.
_NEAR_NAMES = {
    **dict.fromkeys(("step", "steps", "num_steps", "sampling_steps"), "num_inference_steps"),
    **dict.fromkeys(("guidance", "distilled_cfg_scale", "flux_guidance"), "embedded_guidance"),
    **dict.fromkeys(("cfg", "true_cfg"), "cfg_scale"),
    **dict.fromkeys(("negative", "neg_prompt", "uncond", "negativeprompt"), "negative_prompt"),
    **dict.fromkeys(("w", "image_width"), "width"),
    **dict.fromkeys(("h", "image_height"), "height"),
    **dict.fromkeys(("strength", "denoise", "denoising"), "denoising_strength"),
    **dict.fromkeys(("n", "num_images", "batch_size"), "num_images_per_prompt"),
    **dict.fromkeys(("random_seed", "noise_seed", "rng"), "seed"),
    **dict.fromkeys(("image", "init_image"), "input_image"),
    "lora_weight": "lora_scale",
    "loras": "lora",
}


def near_field(column: str) -> str | None:
    """Return the field that a column probably is, also by names of other programs; None if unknown."""
    plain = re.sub(r"[\s-]+", "_", column.strip().lower())
    return plain if plain in (*PROMPT_FIELDS, *ALIASES) else _NEAR_NAMES.get(plain)


class PromptSource:
    """The prompts of a job; `rules` is the version of the rules for listing its files."""

    def __init__(self, config: PromptsConfig, rules: int = LISTING_RULES) -> None:
        self._config = config
        self._rules = rules
        self._options = config.storage_options
        self._recipe = Recipe(config)
        self._schemas: dict[str, pa.Schema] = {}
        self._last: pa.Schema | None = None  # of the file that was opened last
        self._checked: pa.Schema | None = None
        self._whole: tuple[str, JsonTable] | None = None
        self._lock = Lock()

    def files(self) -> tuple[PromptFile, ...]:
        """Return the files in a fixed order. Raises: SourceError if a file is missing or none is found."""
        return self.listing().files

    def listing(self) -> Listing:
        """Return the files and the names of those left out. Raises: SourceError, see list_prompts."""
        if not self._config.uri:
            recipe = self._recipe
            return Listing((PromptFile(uri=ROWS, name=ROWS, size=recipe.num_rows, version=recipe.version),), {})
        return list_prompts(self._config.uri, self._options, self._rules)

    @property
    def lists(self) -> str:
        """A hash of the recipe's lists of values that are in files; empty without such lists."""
        return self._recipe.lists

    def split(self, file: PromptFile, num_rows: int, limit: int | None = None) -> list[RowRange]:
        """Return the row ranges of one file; with a limit, only the first ones, up to that many rows.

        A text file is read no further than these. Raises: SourceError if a column of the job file is missing in it.
        """
        if not self._config.uri:
            self._check_fields(self._recipe.made, "prompts.samplers")
            return ranges_of(self._recipe.num_rows, num_rows)
        table = self._table(file.uri)
        num_ranges = None if limit is None else -(-limit // num_rows)
        ranges = list(islice(table.split(num_rows), num_ranges))
        if ranges:  # a text file without rows has no columns either
            schema = self._schema_of(file, table, limit)
            if limit is not None and not self._fits(schema):  # later rows may have columns that the first ones lack
                schema = self._schema_of(file, table)
            if not schema.names:
                _check_first_row(table, ranges[0], file.uri)
            if schema is not self._checked:
                self._check_columns(schema, file.uri)
                self._checked = schema
        return ranges

    def unused_columns(self, files: Sequence[PromptFile]) -> list[str]:
        """Return a sentence for each unused column whose name resembles a field."""
        schemas = {id(schema): schema for schema in map(self.schema, files)}
        names = {name for schema in schemas.values() for name in schema.names} - self._columns
        notes = []
        for name in sorted(names):
            field = near_field(name)
            if field and ALIASES.get(field, field) not in self._config.columns:
                notes.append(f"column {name!r} is not used: prompts.columns: {{{field}: {name}}} would use it")
        return notes

    def passthrough_schema(self, files: Sequence[PromptFile], of_nulls: pa.DataType = _TEXT) -> pa.Schema:
        """Return the common types of the passthrough columns of all files; `of_nulls` for a column without values.

        Raises: SourceError if the files disagree.
        """
        sampled = self._recipe.schema
        if not self._config.passthrough:
            return sampled
        different = {id(self.schema(file)): file for file in reversed(files)}
        schemas = [self._passthrough_of(file) for file in reversed(different.values())]
        try:
            unified = pa.unify_schemas(schemas, promote_options="permissive")
            own = [each.with_type(of_nulls) if pa.types.is_null(each.type) else each for each in unified]
            return pa.schema([*own, *(each for each in sampled if each.name not in unified.names)])
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise SourceError(f"prompts.passthrough: the files disagree on a column's type: {error}") from error

    def read(
        self,
        shard: Shard,
        sampling: SamplingConfig,
        loras: Sequence[LoraConfig] = (),
        known: Collection[str] | None = None,
        guidance: float | None = None,
    ) -> Iterator[ImageRequest | FailedRow]:
        """Yield the validated rows of a shard, in order; an invalid row is a FailedRow.

        known, guidance: as for RowParser.
        """
        row = 0
        for piece, table, values in self._rows_of(shard):
            parser = RowParser(self._config, sampling, piece.uri, loras, known, guidance, lambda: self._folders)
            partitions = self._partitions(piece.name)
            lines = cache(partial(_lines_of, table, piece))
            is_one = self._is_one_prompt(piece, table)
            found = 0
            for found, each in enumerate(values, start=1):
                number = piece.start + found - 1
                row_id = piece.name if is_one else f"{piece.name}:{number}"
                cells = {**partitions, **each} if isinstance(each, dict) else each
                cells = self._recipe.completed(cells, sampling.seed, row_id, number)
                yield parser.parse(cells, row=row, default_id=row_id, line=partial(_line_at, lines, found - 1))
                row += 1
            if found != piece.num_rows:
                raise SourceError(
                    f"{piece.uri}: {found} rows from row {piece.start} where the plan has {piece.num_rows}; "
                    "the file changed since the run was planned"
                )

    def numbers_of(self, uri: str, fields: Sequence[str]) -> Iterator[pa.RecordBatch] | None:
        """Return the columns of some fields of a Parquet file, named by field; None if it has none."""
        table = self._table(uri) if self._config.uri else None
        if not isinstance(table, ParquetTable):
            return None
        columns = {self._config.columns.get(field, field): field for field in fields}
        found = [name for name in table.schema().names if name in columns]
        if not found or len(set(found)) < len(found):
            return None
        names = [columns[name] for name in found]
        return (pa.RecordBatch.from_arrays(each.columns, names) for each in table.columns(found))

    def one_row(self, shard: Shard, number: int) -> FileRange:
        """Return the file range of a single row of a shard."""
        for piece in shard.parts:
            if number < piece.num_rows:
                break
            number -= piece.num_rows
        start = piece.start + number
        table = self._table(piece.uri) if self._config.uri else None
        if isinstance(table, (ArrowTable, LineTable, TarTable)):
            rows = table.each_of(_row_range(piece))[number]
            return replace(piece, start=start, num_rows=1, offset=rows.offset, line=rows.line)
        return replace(piece, start=start, num_rows=1)

    def _rows_of(self, shard: Shard) -> Iterator[tuple[FileRange, Table | None, Iterator[Row | BadRow]]]:
        """Yield the parts of a shard with their rows; open some of several small files ahead."""
        columns = self._columns | self._recipe.columns

        def opened(piece: FileRange) -> tuple[Table | None, Iterator[Row | BadRow]]:
            if not self._config.uri:
                return None, ({} for _ in range(piece.num_rows))
            table = self._table(piece.uri)
            return table, table.stream(_row_range(piece), columns)

        if len(shard.parts) == 1:
            yield shard.parts[0], *opened(shard.parts[0])
            return
        with ThreadPoolExecutor(_READ_AHEAD) as pool:
            waiting: deque[Future[tuple[Table | None, Iterator[Row | BadRow]]]] = deque()
            ahead = iter(shard.parts)
            for piece in shard.parts:
                waiting.extend(pool.submit(opened, each) for each in islice(ahead, _READ_AHEAD - len(waiting)))
                yield piece, *waiting.popleft().result()

    def _is_one_prompt(self, piece: FileRange, table: Table | None) -> bool:
        """Return whether this is the only prompt of a file in a folder; its id is then the file's name."""
        if self._rules < ONE_PROMPT_RULES or piece.start or piece.num_rows > 1:
            return False
        return isinstance(table, (TextTable, JsonTable)) and piece.uri not in self._named and table.is_one_row

    @cached_property
    def _named(self) -> Collection[str]:
        """The addresses of the files that `prompts.uri` names itself."""
        uris = self._config.uri
        return {address_of(uri, self._options) for uri in uris} if self._rules >= NAMED_FILE_RULES else uris

    @cached_property
    def _folders(self) -> Sequence[str]:
        """The folders of the data set; images may lie beside its files."""
        return folders_of(self._config)

    def _passthrough_of(self, file: PromptFile) -> pa.Schema:
        schema = self.schema(file)
        fields = []
        for name in self._config.passthrough:
            try:
                fields.append((name, portable(_column(schema, name, file.uri, "prompts.passthrough"))))
            except ValueError as error:
                raise SourceError(
                    f"{file.uri}: column {name!r}, which prompts.passthrough names: {error}; leave it out or make it "
                    "text"
                ) from error
        return pa.schema(fields)

    def schema(self, file: PromptFile, limit: int | None = None) -> pa.Schema:
        """Return the columns of a file, with those named by its path; `limit`: see `_schema_of`."""
        if not self._config.uri:
            return self._recipe.schema
        with self._lock:
            known = self._schemas.get(file.uri)
        return self._schema_of(file, self._table(file.uri), limit) if known is None else known

    def _schema_of(self, file: PromptFile, table: Table, limit: int | None = None) -> pa.Schema:
        """Return the columns of an open file; consecutive files with equal columns share one object.

        limit: the number of first rows that are read for the columns of a format without a header; None reads all.
        """
        found = table.schema(limit) if isinstance(table, (JsonLinesTable, TarTable)) else table.schema()
        for name in self._partitions(file.name):
            if name not in found.names:
                found = found.append(pa.field(name, pa.string()))
        with self._lock:
            if self._last is None or not found.equals(self._last):
                self._last = found
            self._schemas[file.uri] = self._last
            return self._last

    def _fits(self, schema: pa.Schema) -> bool:
        """Return whether a file has all needed columns, and text prompts."""
        prompt = self._config.columns.get("prompt", "prompt")
        kind = schema.field(prompt).type if schema.names.count(prompt) == 1 else _TEXT
        return self._needed.issubset(schema.names) and _may_be_prompts(kind)

    @cached_property
    def _needed(self) -> set[str]:
        """The columns that a file must have."""
        columns = {"prompt": "prompt", **self._config.columns}.values()
        return {*columns, *self._config.passthrough, *self._recipe.columns}.difference(self._recipe.made.names)

    @cached_property
    def _columns(self) -> set[str]:
        """The columns that rows are read from, without those of the recipe."""
        return RowParser(self._config, SamplingConfig()).columns

    def _partitions(self, name: str) -> dict[str, str | None]:
        """Return the columns in the folder names of a file, as in Hive: `year=2026/part-0.parquet`."""
        if self._rules < PARTITION_RULES:
            return {}
        pairs = (folder.partition("=") for folder in name.split("/")[:-1])
        found = {key: None if value == _HIVE_NULL else unquote(value) for key, sign, value in pairs if sign and key}
        found.pop(self._config.columns.get("id", "id"), None)  # all rows would have the same id
        return found

    def _table(self, uri: str) -> Table:
        """Open a file; keep the last one that is read whole, since more of its shards may follow."""
        with self._lock:
            if self._whole is not None and self._whole[0] == uri:
                return self._whole[1]
        table = open_table(uri, self._options, has_blocks=self._rules >= BLOCK_RULES)
        if isinstance(table, JsonTable):
            with self._lock:
                self._whole = uri, table
        return table

    def _check_columns(self, schema: pa.Schema, uri: str) -> None:
        self._recipe.check_columns(schema.names, uri)
        self._check_fields(pa.schema([*schema, *self._recipe.made]), uri)
        for name in self._columns:
            if schema.names.count(name) > 1:
                raise SourceError(f"{uri}: column {name!r} is twice in the header")

    def _check_fields(self, schema: pa.Schema, where: str) -> None:
        """Raise SourceError for a missing column, or prompts that are not text."""
        wanted = {"prompt": self._config.columns.get("prompt", "prompt"), **self._config.columns}
        kinds = {}
        for field, column in wanted.items():
            named_by = f"prompts.columns.{field}" if field in self._config.columns else ""
            kinds[field] = _column(schema, column, where, named_by)
        kind = kinds["prompt"]
        if not _may_be_prompts(kind):
            raise SourceError(f"{where}: column {wanted['prompt']!r} holds {kind}, but prompts must be text")


def _may_be_prompts(kind: pa.DataType) -> bool:
    return is_text(kind) or pa.types.is_null(kind)


def _row_range(piece: FileRange) -> RowRange:
    return RowRange(piece.start, piece.num_rows, piece.offset, piece.line)


def _check_first_row(table: Table, rows: RowRange, uri: str) -> None:
    """Raise SourceError if the first row of a file without columns cannot be read."""
    first = next(iter(table.stream(rows, ())), None)
    if isinstance(first, BadRow):
        raise SourceError(f"{uri}: no row of it can be read; the first one: {first.reason}")


def _lines_of(table: Table | None, piece: FileRange) -> list[int]:
    """Return the line of each row of a piece; 0 if rows have no lines."""
    if not isinstance(table, LineTable):
        return [0] * piece.num_rows
    return [rows.line for rows in table.each_of(_row_range(piece))]


def _line_at(lines: Callable[[], list[int]], index: int) -> int:
    return lines()[index]


def _column(schema: pa.Schema, name: str, uri: str, named_by: str) -> pa.DataType:
    """Return the type of a column. Raises: SourceError with a hint or all column names if it is missing."""
    indices = schema.get_all_field_indices(name)
    if indices:
        return schema.field(indices[0]).type
    advice = f", which {named_by} names" if named_by else "; name yours in prompts.columns.prompt"
    likely = [name, *(PROMPT_NAMES if name == "prompt" else ())]
    by_name = {each.strip().lower(): each for each in reversed(schema.names)}
    near = next((by_name[each.lower()] for each in likely if each.lower() in by_name), None)
    hint = f"; did you mean {near!r}?" if near else did_you_mean(name, schema.names)
    names = (", ".join(schema.names[:20]) or "none") + (", ..." if len(schema.names) > 20 else "")
    raise SourceError(f"{uri}: no column {name!r}{advice}{hint or f'; it has {names}'}")
