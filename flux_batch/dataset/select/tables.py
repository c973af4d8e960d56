"""The metadata and annotations of a run as tables of DuckDB, for expressions.

Only the columns that an expression names are read. Expressions can reach these tables only: no file, no network, no
clock, no random numbers, no second statement.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import duckdb
import pyarrow as pa

from flux_batch.dataset.select.files import annotated_shards, committed_shards, read_schema, read_tables
from flux_batch.errors import JobError
from flux_batch.output.paths import ANNOTATIONS, METADATA
from flux_batch.report.saved_run import SavedRun

# DuckDB's memory limit; it needs about 150 bytes for each image for a selection by a few numbers.
_MEMORY = "600MB"
# The number of shards whose tables are in memory at once, before they are inserted into DuckDB.
_SHARDS_AT_ONCE = 128
# Columns of the metadata that every selection needs.
_NEEDED = ("key", "id", "status")
# DuckDB's message about a missing column.
_NO_COLUMN = re.compile(r'Referenced column (".*?") not found in FROM clause!\s+Candidate bindings: ')
# Settings without access to files or the network, and without a way to change that later.
_LOCKED = {
    "python_enable_replacements": "false",
    "autoload_known_extensions": "false",
    "autoinstall_known_extensions": "false",
    "enable_external_access": "false",
    "memory_limit": _MEMORY,
}


class Tables:
    """The tables `metadata` and one for each annotation, joined by `key`; `ordinal` is the order of the images."""

    def __init__(self, run: SavedRun, expressions: Iterable[str]) -> None:
        """Check expressions and load the columns that they name.

        Raises: JobError for an invalid expression, DamagedObject for a table that cannot be read.
        """
        self._run = run
        self._shards = committed_shards(run)
        self.connection = duckdb.connect(":memory:", config=_LOCKED)
        self.connection.execute("SET lock_configuration = true")
        self._schemas = self._find_schemas()
        self._names = {table: _distinct(table, schema.names) for table, schema in self._schemas.items()}
        expressions = [*expressions]
        self._bind(expressions)
        self._load({name.lower() for text in expressions for name in self._named(text)})

    @property
    def num_shards(self) -> int:
        """The number of committed shards; only these are read."""
        return len(self._shards)

    @property
    def annotations(self) -> list[str]:
        """The names of the annotations."""
        return [name for name in self._schemas if name != METADATA]

    def values(self, **expressions: str) -> str:
        """Return a query for the ordinals of images in `chosen` and the values of expressions."""
        columns = "".join(f", (\n{text}\n) AS {name}" for name, text in expressions.items())
        return f"SELECT ordinal{columns} FROM {self._joined()}"

    def rows(self, query: str, parameters: Sequence[Any] = ()) -> list[Any]:
        """Run a query. Returns: its rows. Raises: JobError for a computation that fails, such as 'x'::INTEGER."""
        try:
            return list(self.connection.execute(query, parameters).fetchall())
        except duckdb.OutOfMemoryException as error:
            raise JobError(f"the selection needs more than {_MEMORY}: {_sentence(error)}") from error
        except duckdb.Error as error:
            raise JobError(f"the expression cannot be computed: {_sentence(error)}") from error

    def type_of(self, expression: str) -> str:
        """Return DuckDB's name for the type of an expression."""
        return str(self.rows(f"DESCRIBE {self.values(value=expression)}")[1][1])

    def _joined(self) -> str:
        joins = " ".join(f"LEFT JOIN {_quoted(name)} USING (key)" for name in self.annotations)
        return f"(SELECT * FROM {METADATA} SEMI JOIN chosen USING (ordinal)) AS {METADATA} {joins}"

    def _find_schemas(self) -> dict[str, pa.Schema]:
        """Read the columns of each table from its first file."""
        if not self._shards:
            raise JobError(f"{self._run.store.uri}: no shard is committed yet, so there is nothing to select from")
        schemas = {METADATA: read_schema(self._run, None, self._shards[0])}
        for name, shards in annotated_shards(self._run).items():
            if name == METADATA:
                raise JobError(f"{ANNOTATIONS}/{name}: an annotation must not have that name")
            if shards:
                schemas[name] = read_schema(self._run, name, min(shards))
        return schemas

    def _bind(self, expressions: Sequence[str]) -> None:
        """Check every expression against empty tables of all columns. Raises: JobError."""
        for name, schema in self._schemas.items():
            self._create(name, schema.names)
        self.connection.execute("CREATE TABLE chosen (ordinal BIGINT)")
        for text in expressions:
            self._check_alone(text)
            self._check_distinct(text)
            try:
                self.connection.execute(self.values(value=text))
            except duckdb.Error as error:
                raise JobError(f"{text!r}: {_sentence(error)}{_hint(error, text)}") from error
        self.connection.execute("DROP TABLE chosen")

    def _check_alone(self, text: str) -> None:
        """Raise JobError unless a text is one expression with the same value every time."""
        tree = self._parsed(text)
        if tree.get("error"):
            raise JobError(f"{text!r}: is no expression: {tree.get('error_message')}")
        nodes = [statement["node"] for statement in tree["statements"]]
        alone: dict[str, Any] = {
            "modifiers": [],
            "where_clause": None,
            "group_expressions": [],
            "having": None,
            "qualify": None,
        }
        if len(nodes) != 1 or any(nodes[0].get(name) != empty for name, empty in alone.items()):
            raise JobError(f"{text!r}: must be one expression, as in clip > 0.27")
        columns = nodes[0]["select_list"]
        arguments = columns[0].get("arguments") or columns[0].get("children")  # names of DuckDB 2 and DuckDB 1
        is_empty = columns[0].get("function_name") == "row" and not arguments
        if len(columns) != 1 or is_empty or nodes[0]["from_table"]["type"] != "EMPTY":
            raise JobError(f"{text!r}: must be one expression, as in clip > 0.27")
        if any(node.get("class") == "SUBQUERY" for node in _nodes(tree)):
            raise JobError(f"{text!r}: must not have a SELECT of its own")
        changing = {row[0] for row in self.rows(_CHANGING)}
        for node in _nodes(tree):
            if (name := str(node.get("function_name", "")).lower()) in changing:
                raise JobError(f"{text!r}: {name}() has another value each time, but a selection must be reproducible")

    def _check_distinct(self, text: str) -> None:
        """Raise JobError for a name that differs from another column's only in case."""
        for names in self._names.values():
            for name in sorted(self._named(text) & names.keys()):
                if name != names[name]:
                    others = (repr(each) for each in names if each != name and each.lower() == name.lower())
                    other = next(others, "the order of the images")
                    raise JobError(
                        f"{text!r}: write {names[name]} for the column {name!r}, "
                        f"since an expression cannot distinguish it from {other}"
                    )

    def _named(self, text: str) -> set[str]:
        """Return every name in an expression that can be a column."""
        return {name for node in _nodes(self._parsed(text)) for name in node.get("column_names", ())}

    def _parsed(self, text: str) -> dict[str, Any]:
        (answer,) = self.rows("SELECT json_serialize_sql(?)", [f"SELECT (\n{text}\n) AS value"])[0]
        return dict(json.loads(answer))

    def _load(self, names: set[str]) -> None:
        """Create the tables again with only the named columns, and fill them."""
        for table, schema in self._schemas.items():
            needed = _NEEDED if table == METADATA else ("key",)
            own = self._names[table]
            columns = [name for name in schema.names if name in needed or own[name].lower() in names]
            self._create(table, columns)
            if table == METADATA or len(columns) > 1:
                self._fill(table, columns)

    def _create(self, table: str, columns: Sequence[str]) -> None:
        """Create an empty table with the types of the files."""
        self.connection.register("batch", self._distinct_table(table, self._schema(table, columns).empty_table()))
        ordinal = "0::BIGINT AS ordinal, " if table == METADATA else ""
        self.connection.execute(f"CREATE OR REPLACE TABLE {_quoted(table)} AS SELECT {ordinal}* FROM batch")
        self.connection.unregister("batch")

    def _fill(self, table: str, columns: Sequence[str]) -> None:
        """Insert the rows of all shards. NaN becomes NULL, since DuckDB sorts it above every number."""
        num_rows = 0
        schema = self._schema(table, columns)
        values = ", ".join(_without_nan(field.with_name(self._names[table][field.name])) for field in schema)
        for batch in self._batches(table, schema):
            self.connection.register("batch", self._distinct_table(table, batch))
            ordinal = f"{num_rows} + row_number() OVER () - 1 AS ordinal, " if table == METADATA else ""
            self.connection.execute(f"INSERT INTO {_quoted(table)} SELECT {ordinal}{values} FROM batch")
            self.connection.unregister("batch")
            num_rows += batch.num_rows

    def _schema(self, table: str, columns: Sequence[str]) -> pa.Schema:
        return pa.schema([self._schemas[table].field(name) for name in columns])

    def _distinct_table(self, table: str, rows: pa.Table) -> pa.Table:
        """Return rows with the columns' names in expressions."""
        return rows.rename_columns([self._names[table][name] for name in rows.column_names])

    def _batches(self, table: str, schema: pa.Schema) -> Iterator[pa.Table]:
        """Yield the rows of a table in order, several shards at a time."""
        shards = self._shards
        if table != METADATA:
            shards = sorted({*shards} & annotated_shards(self._run)[table])
        tables = read_tables(self._run, shards, None if table == METADATA else table, schema)
        while some := [*islice(tables, _SHARDS_AT_ONCE)]:
            yield pa.concat_tables(some).combine_chunks()


# Functions whose value does not depend on their arguments only.
_CHANGING = """
SELECT DISTINCT function_name FROM duckdb_functions() WHERE stability = 'VOLATILE' OR function_name = 'age'
OR (stability = 'CONSISTENT_WITHIN_QUERY' AND len(parameters) = 0)
"""


def _nodes(tree: Any) -> Iterator[Mapping[str, Any]]:
    """Yield every node of a parsed expression."""
    if isinstance(tree, dict):
        yield tree
        tree = list(tree.values())
    if isinstance(tree, list):
        for each in tree:
            yield from _nodes(each)


def _distinct(table: str, columns: Iterable[str]) -> dict[str, str]:
    """Return the columns' names in expressions; a name that differs from another only in case gets a `_`."""
    taken, names = {"ordinal"} if table == METADATA else set(), {}
    for name in columns:
        own = name
        while own.lower() in taken:
            own += "_"
        taken.add(own.lower())
        names[name] = own
    return names


def _without_nan(column: pa.Field) -> str:
    name = _quoted(column.name)
    return f"CASE WHEN NOT isnan({name}) THEN {name} END" if pa.types.is_floating(column.type) else name


def _quoted(name: str) -> str:
    escaped = name.replace('"', '""')
    return f'"{escaped}"'


def _sentence(error: Exception) -> str:
    """Return the sentence of an error of DuckDB, without its class and position."""
    said = " ".join(str(error).partition("\n\nLINE")[0].split())
    return _NO_COLUMN.sub(r"there is no column \1; near it are ", re.sub(r"^\w+ Error: ", "", said))


def _hint(error: Exception, expression: str) -> str:
    if "must appear in the GROUP BY" in str(error):
        return "; over all images it is written with OVER (), as avg(x) OVER ()"
    if (found := _NO_COLUMN.search(str(error))) and found[1] in expression:
        return f"; a text is in single quotes, as '{found[1][1:-1]}'"
    if found:
        return "; columns of annotations are there after `flux-batch annotate`"
    return ""
