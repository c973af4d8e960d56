"""Prompts from a recipe: rows without a file, samplers that add columns, templates that make fields."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import blake2b
from itertools import islice

import pyarrow as pa

from flux_batch.config.schema import PromptsConfig
from flux_batch.config.text import load_yaml
from flux_batch.errors import JobError, SourceError, one_line
from flux_batch.prompts.formats.file import PromptBytes
from flux_batch.prompts.formats.lines import LineTable
from flux_batch.prompts.formats.open import format_of_name, open_table
from flux_batch.prompts.formats.table import BadRow, Row, Table
from flux_batch.prompts.listing import PromptFile, list_prompts
from flux_batch.prompts.samplers import (
    Dependent,
    Sampler,
    balanced_share,
    combinations,
    draw,
    grid_shares,
    sampled,
    samplers_of,
)
from flux_batch.prompts.template import PromptTemplate
from flux_batch.prompts.wildcards import Wildcards, joined_lists, lists_of_yaml
from flux_batch.records import IMAGE_COLUMNS
from flux_batch.redaction import public_tree, public_uri

# The file name of rows without a file: their ids are `rows:0`, `rows:1`, ...
ROWS = "rows"
# The fields whose texts may contain wildcards, and those for which an empty text from a template is a value.
_WITH_WILDCARDS = ("prompt", "negative_prompt")
_TEXTS = (*_WITH_WILDCARDS, "id", "lora", *IMAGE_COLUMNS)
_FORMATS_OF_LISTS = ("txt", "yaml", "yml")
_MAX_LISTS_BYTES = 64 << 20
_READER_THREADS = 16


class Recipe:
    """The samplers and the templates of a job. Raises: JobError for an invalid key."""

    def __init__(self, config: PromptsConfig) -> None:
        self._config = config
        self._lines: dict[str, list[str]] = {}
        self.samplers: Mapping[str, Sampler] = samplers_of(config.samplers, self._lines_of)
        self.templates = {name: PromptTemplate(text, _key(config, name)) for name, text in config.templates.items()}
        self._wildcards = self._read_wildcards()
        if config.design == "grid":
            combinations(self.samplers)
        if config.rows is not None:
            self._check_names([])
            if "prompt" not in self.made.names and config.columns.get("prompt") not in self.made.names:
                raise JobError("prompts.template: missing, and no sampler is called prompt")

    @property
    def num_rows(self) -> int:
        """The number of rows to make without a file."""
        return self._config.rows or 0

    @property
    def schema(self) -> pa.Schema:
        """The columns that the samplers add."""
        return pa.schema([(name, sampler.kind) for name, sampler in self.samplers.items()])

    @property
    def made(self) -> pa.Schema:
        """The columns that the samplers and the templates add to a row."""
        return pa.schema([*self.schema, *(pa.field(self._column(name), pa.string()) for name in self.templates)])

    @property
    def columns(self) -> set[str]:
        """The columns of a file that the recipe reads."""
        by = {sampler.by for sampler in self.samplers.values() if isinstance(sampler, Dependent)}
        return by.union(*(template.names for template in self.templates.values()))

    @property
    def version(self) -> str:
        """A hash that changes when the recipe makes other rows."""
        config = self._config
        # Without the signatures of addresses, which change every day.
        lines = self._public_lines()
        content = [public_tree(config.samplers), config.template, config.design, config.rows, lines]
        if config.wildcards:
            content.append("wildcards")
        return blake2b(json.dumps(content, default=str).encode(), digest_size=12).hexdigest()

    @property
    def lists(self) -> str:
        """A hash of the lists of values that are in files; empty without such lists."""
        if not self._lines:
            return ""
        return blake2b(json.dumps(self._public_lines(), sort_keys=True).encode(), digest_size=12).hexdigest()

    def check_columns(self, columns: list[str], where: str) -> None:
        """Raise JobError for a sampler named like a column, or an unknown template name."""
        for name in self.samplers:
            if name in columns:
                raise JobError(f"prompts.samplers.{name}: {where} has a column of that name")
        self._check_names(columns)

    def _check_names(self, columns: list[str]) -> None:
        known = [*self.samplers, *columns]
        for name, sampler in self.samplers.items():
            if isinstance(sampler, Dependent) and sampler.by not in known:
                raise JobError(f"prompts.samplers.{name}: by: {sampler.by!r} is neither a sampler nor a column")
        for template in self.templates.values():
            template.check_names(known)

    def completed(self, cells: Row | BadRow, seed: int, row_id: str, number: int) -> Row | BadRow:
        """Return a row with the values of samplers and templates, and with its wildcards replaced."""
        if isinstance(cells, BadRow):
            return cells
        try:
            if self.samplers:
                cells = {**cells, **sampled(self.samplers, self._shares(seed, row_id, number), cells)}
            if self.templates:
                cells = {**cells, **self._rendered(cells)}
            return {**cells, **self._filled(cells, partial(draw, seed, row_id))} if self._wildcards else cells
        except (ValueError, OverflowError) as error:  # OverflowError: a time that Python cannot hold
            return BadRow(str(error))

    def _shares(self, seed: int, row_id: str, number: int) -> Callable[[str], float]:
        """Return the function that draws a share for a sampler of a row."""
        design = self._config.design
        if design == "grid":
            return dict(grid_shares(self.samplers, number)).__getitem__
        if design == "balanced":
            return partial(balanced_share, seed, number, self.num_rows)
        return partial(draw, seed, row_id)

    def _rendered(self, cells: Row) -> Row:
        """Return the results of the templates for a row, by column. Raises: ValueError with the template's key."""
        texts: Row = {}
        for name, template in self.templates.items():
            try:
                text = template.render(cells)
            except ValueError as error:
                raise ValueError(f"{_key(self._config, name)}: {error}") from error
            # An empty result for a number means the job's default, like an empty cell.
            texts[self._column(name)] = text if text.strip() or name in _TEXTS else None
        return texts

    def _filled(self, cells: Row, draw_for: Callable[[str], float]) -> Row:
        """Return the texts of a row with their wildcards replaced. Raises: ValueError with the reason."""
        assert self._wildcards
        texts: Row = {}
        for name in _WITH_WILDCARDS:
            text = cells.get(column := self._column(name))
            if isinstance(text, str):
                try:
                    texts[column] = self._wildcards.filled(text, partial(_draw_in, draw_for, name))
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from error
        return texts

    def _column(self, field: str) -> str:
        """Return the column that a field of a row is read from."""
        return self._config.columns.get(field, field)

    def _read_wildcards(self) -> Wildcards | None:
        """Read the lists of `prompts.wildcards`. Raises: JobError for a folder or a name without a list."""
        folder = self._config.wildcards
        if not folder:
            return None
        lists = self._lists_of(folder) if isinstance(folder, str) else {}
        where = public_uri(folder) if isinstance(folder, str) else "prompts.wildcards, which is true and no folder"
        wildcards = Wildcards(lists, where)
        for name in _WITH_WILDCARDS:
            wildcards.check(self._config.templates.get(name, ""), _key(self._config, name))
        return wildcards

    def _lists_of(self, folder: str) -> dict[str, list[str]]:
        try:
            files = list_prompts([folder], self._config.storage_options, formats=_FORMATS_OF_LISTS).files
        except SourceError as error:
            raise JobError(f"prompts.wildcards: {error}") from error
        if (size := sum(file.size for file in files)) > _MAX_LISTS_BYTES:
            raise JobError(
                f"prompts.wildcards: {public_uri(folder)}: its lists have {size} bytes; must be at most "
                f"{_MAX_LISTS_BYTES}"
            )
        with ThreadPoolExecutor(_READER_THREADS) as pool:
            found = list(pool.map(self._read_lists, files))
        # In the order of the files, not of reading: `version` depends on the order.
        self._lines |= {file.uri: lines for file, (_, lines) in zip(files, found, strict=True)}
        return joined_lists(lists.items() for lists, _ in found)

    def _read_lists(self, file: PromptFile) -> tuple[Mapping[str, list[str]], list[str]]:
        """Return the lists of a file by name, and all its lines.

        A text file is one list with the name of the file. A YAML file has several, named by its keys.
        """
        kind = format_of_name(file.name)
        if kind == "txt":
            lines = self._read_lines(file.uri)
            return {file.name[: file.name.lower().rindex(".txt")]: lines}, lines
        with PromptBytes.of(file.uri, self._config.storage_options).open_text() as stored:
            data = stored.read()
        try:
            lists = lists_of_yaml(load_yaml(data.decode(), public_uri(file.uri)))
        except JobError:
            raise
        except ValueError as error:
            raise JobError(f"prompts.wildcards: {public_uri(file.uri)}: {one_line(error)}") from error
        return lists, [f"{name}: {line}" for name, lines in lists.items() for line in lines]

    def _lines_of(self, uri: str) -> list[str]:
        """Return the values of a sampler's file."""
        if uri not in self._lines:
            self._lines[uri] = self._read_lines(uri)
        return self._lines[uri]

    def _read_lines(self, uri: str) -> list[str]:
        """Return the values of a file with one value per line."""
        table = open_table(uri, self._config.storage_options)
        lines = []
        rows = (row for part in table.split(1 << 20) for row in table.stream(part, {"prompt"}))
        for number, row in enumerate(rows, start=1):
            if isinstance(row, BadRow):
                raise JobError(f"{public_uri(uri)}: {_place(table, number)}: {row.reason}")
            if row.get("prompt") is not None:
                lines.append(str(row["prompt"]))
        return lines

    def _public_lines(self) -> dict[str, list[str]]:
        """Return the lines by address without its query; join those of addresses that then are equal."""
        found: dict[str, list[str]] = {}
        for uri, lines in self._lines.items():
            found[public_uri(uri)] = found.get(public_uri(uri), []) + lines
        return found


def _draw_in(draw_for: Callable[[str], float], field: str, name: str) -> float:
    """Return the random number for a wildcard in the text of a field."""
    return draw_for(f"{field}\x1f{name}")


def _key(config: PromptsConfig, field: str) -> str:
    """Return the job file's key of the template of a field."""
    return "prompts.template" if isinstance(config.template, str) else f"prompts.template.{field}"


def _place(table: Table, number: int) -> str:
    """Return the place of row `number`, from 1, in its file: its line if the format has lines."""
    if not isinstance(table, LineTable):
        return f"row {number}"
    return f"line {next(islice(table.split(1), number - 1, None)).line}"
