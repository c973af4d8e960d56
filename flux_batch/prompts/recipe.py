"""Prompts from a recipe: rows without a file, samplers that add columns, a template that makes the prompt."""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import blake2b
from itertools import islice

import pyarrow as pa

from flux_batch.config.schema import PromptsConfig
from flux_batch.errors import JobError
from flux_batch.prompts.formats.lines import LineTable
from flux_batch.prompts.formats.open import open_table
from flux_batch.prompts.formats.table import BadRow, Row, Table
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
from flux_batch.redaction import public_tree, public_uri

# The file that rows without a file come from: their ids are `rows:0`, `rows:1`, ...
ROWS = "rows"


class Recipe:
    """The samplers and the template of a job. Raises: JobError for a key that cannot be used."""

    def __init__(self, config: PromptsConfig) -> None:
        self._config = config
        self._lines: dict[str, list[str]] = {}
        self.samplers: Mapping[str, Sampler] = samplers_of(config.samplers, self._read_lines)
        self.template = PromptTemplate(config.template) if config.template is not None else None
        if config.design == "grid":
            combinations(self.samplers)
        if config.rows is not None:
            self._check_names([])
            if "prompt" not in self.made.names and config.columns.get("prompt") not in self.made.names:
                raise JobError("prompts.template: missing, and no sampler is called prompt")

    @property
    def num_rows(self) -> int:
        """The number of rows without a file."""
        return self._config.rows or 0

    @property
    def schema(self) -> pa.Schema:
        """The columns that the samplers add."""
        return pa.schema([(name, sampler.kind) for name, sampler in self.samplers.items()])

    @property
    def made(self) -> pa.Schema:
        """The columns that a row has of the recipe: the samplers', and the prompt of the template."""
        prompt = pa.field(self._config.columns.get("prompt", "prompt"), pa.string())
        return pa.schema([*self.schema, *([prompt] if self.template else [])])

    @property
    def columns(self) -> set[str]:
        """The columns of a file that the recipe reads."""
        by = {sampler.by for sampler in self.samplers.values() if isinstance(sampler, Dependent)}
        return by | (self.template.names if self.template else set())

    @property
    def version(self) -> str:
        """A text that changes when other rows come of the recipe."""
        config = self._config
        # Without signatures, which are new every day.
        lines = self._public_lines()
        content = [public_tree(config.samplers), config.template, config.design, config.rows, lines]
        return blake2b(json.dumps(content, default=str).encode(), digest_size=12).hexdigest()

    @property
    def lists(self) -> str:
        """A text that changes when a list of values in a file does; empty without such lists."""
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
        if self.template:
            self.template.check_names(known)

    def completed(self, cells: Row | BadRow, seed: int, row_id: str, number: int) -> Row | BadRow:
        """Return a row with a value of each sampler, and the prompt of the template."""
        if isinstance(cells, BadRow) or not (self.samplers or self.template):
            return cells
        design = self._config.design
        if design == "grid":
            shares = dict(grid_shares(self.samplers, number)).__getitem__
        elif design == "balanced":
            num_rows = self.num_rows

            def shares(name: str) -> float:
                return balanced_share(seed, number, num_rows, name)
        else:

            def shares(name: str) -> float:
                return draw(seed, row_id, name)

        try:
            cells = {**cells, **sampled(self.samplers, shares, cells)}
        except ValueError as error:
            return BadRow(str(error))
        if self.template:
            try:
                cells[self._config.columns.get("prompt", "prompt")] = self.template.render(cells)
            except ValueError as error:
                return BadRow(f"prompts.template: {error}")
        return cells

    def _read_lines(self, uri: str) -> list[str]:
        """Return the values of a file with one a line."""
        table = open_table(uri, self._config.storage_options)
        lines = []
        rows = (row for part in table.split(1 << 20) for row in table.stream(part, {"prompt"}))
        for number, row in enumerate(rows, start=1):
            if isinstance(row, BadRow):
                raise JobError(f"{public_uri(uri)}: {_place(table, number)}: {row.reason}")
            if row.get("prompt") is not None:
                lines.append(str(row["prompt"]))
        self._lines[uri] = lines
        return lines

    def _public_lines(self) -> dict[str, list[str]]:
        """Return the lines by address without query; those of addresses that differ by it alone are joined."""
        found: dict[str, list[str]] = {}
        for uri, lines in self._lines.items():
            found[public_uri(uri)] = found.get(public_uri(uri), []) + lines
        return found


def _place(table: Table, number: int) -> str:
    """Return the place of a row, counted from 1: its line, since blank lines are no rows, where a row has one."""
    if not isinstance(table, LineTable):
        return f"row {number}"
    return f"line {next(islice(table.split(1), number - 1, None)).line}"
