"""Templates of prompts: Jinja without features that could run long, use much memory, or access other objects.

Loops, assignments, attributes, calls, blocks and imports are refused when the job is read. Expressions, conditions and
filters of text and numbers are allowed; too long results are refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from jinja2 import StrictUndefined, TemplateError, Undefined, nodes
from jinja2.exceptions import SecurityError
from jinja2.meta import find_undeclared_variables
from jinja2.sandbox import ImmutableSandboxedEnvironment

from flux_batch.errors import JobError, did_you_mean, one_line

_MAX_TEMPLATE, MAX_RESULT = 20_000, 100_000
# The most characters of all expressions of a template together, as estimated before it is rendered.
_MAX_HELD = 10 * MAX_RESULT
_FILTERS = (
    *("lower", "upper", "title", "capitalize", "trim", "replace", "default", "d", "length", "first", "last"),
    *("round", "int", "float", "abs", "string"),
)
_TESTS = (
    *("defined", "undefined", "none", "true", "false", "boolean", "string", "number", "integer", "float", "in"),
    *("eq", "equalto", "==", "ne", "!=", "lt", "lessthan", "<", "le", "<=", "gt", "greaterthan", ">", "ge", ">="),
)
_OWN_NAMES = ("self", "super", "caller", "loop", "varargs", "kwargs")
_NODES = (
    *(nodes.Template, nodes.Output, nodes.TemplateData, nodes.Name, nodes.Const, nodes.If, nodes.CondExpr),
    *(nodes.Filter, nodes.Test, nodes.Compare, nodes.Operand, nodes.And, nodes.Or, nodes.Not, nodes.Neg, nodes.Pos),
    *(nodes.Add, nodes.Sub, nodes.Mul, nodes.Div, nodes.FloorDiv, nodes.Mod, nodes.Concat, nodes.Getitem),
    *(nodes.List, nodes.Tuple, nodes.Keyword),
)


class _Null(Undefined):
    """A null cell: `default` replaces it, its conversion to text fails, and it is false and equals only null."""

    __str__ = __iter__ = __len__ = Undefined._fail_with_undefined_error

    def __eq__(self, other: object) -> bool:
        return other is None or isinstance(other, _Null)

    __hash__ = Undefined.__hash__


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with `*` and `%` for numbers only: a text times a number can have any size."""

    intercepted_binops = frozenset(["*", "%"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute a product or a remainder. Raises: SecurityError for texts."""
        if not all(isinstance(side, (int, float)) for side in (left, right)):
            raise SecurityError(f"{operator} is for numbers")
        return super().call_binop(context, operator, left, right)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """Return an item; unlike Jinja, never an attribute of that name."""
        try:
            return obj[argument]
        except (TypeError, LookupError):
            return self.undefined(obj=obj, name=argument)


class PromptTemplate:
    """A checked template. Raises: JobError with the line and the forbidden feature."""

    def __init__(self, text: str, key: str = "prompts.template") -> None:
        if len(text) > _MAX_TEMPLATE:
            raise JobError(f"{key}: {len(text)} characters; must be at most {_MAX_TEMPLATE}")
        environment = _Environment(undefined=StrictUndefined, autoescape=False)
        environment.filters = {name: environment.filters[name] for name in _FILTERS} | {
            "replace": _replaced,
            "round": _rounded,
        }
        environment.tests = {name: environment.tests[name] for name in _TESTS} | {"none": _is_null}
        environment.globals = {}
        try:
            tree = environment.parse(text)
            for node in tree.find_all(nodes.Node):
                _check(node, key)
            self._template = environment.from_string(text)
        except (TemplateError, RecursionError, SyntaxError, MemoryError) as error:
            number = getattr(error, "lineno", None)
            line = f"line {number}: " if number else ""
            raise JobError(f"{key}: {line}{one_line(error)}") from error
        self._key = key
        self.names = find_undeclared_variables(tree)
        self._num_uses = sum(1 for _ in tree.find_all(nodes.Name))

    def check_names(self, known: Iterable[str]) -> None:
        """Raise JobError for a name that is neither a sampler nor a column."""
        known = list(known)
        for name in sorted(self.names - set(known)):
            hint = did_you_mean(name, known) or f"; there are {', '.join(known)}"
            raise JobError(f"{self._key}: {name!r} is neither a sampler nor a column{hint}")

    def render(self, values: Mapping[str, Any]) -> str:
        """Return the text of a row. Raises: ValueError with the reason if there is none."""
        cells = {name: _null(name) if value is None else value for name, value in values.items()}
        try:
            longest = max((len(str(cells[name])) for name in self.names if values.get(name) is not None), default=0)
            if longest * self._num_uses > _MAX_HELD:
                raise ValueError(f"a text of {longest} characters is too long for a template")
            parts, size = [], 0
            for part in self._template.generate(cells):
                parts.append(part)
                size += len(part)
                if size > MAX_RESULT:
                    raise ValueError(f"is longer than {MAX_RESULT} characters")
            return "".join(parts)
        except ValueError:
            raise
        except Exception as error:  # Jinja's own, e.g. for a text plus a number, or a time that Python cannot hold
            raise ValueError(one_line(error)) from error


def _check(node: nodes.Node, key: str) -> None:
    if type(node) not in _NODES:
        name = {"Getattr": "an attribute", "For": "a loop", "Call": "a call", "Assign": "an assignment"}
        what = name.get(type(node).__name__, type(node).__name__.lower())
        raise JobError(f"{key}: line {node.lineno}: {what} is not allowed in a template")
    if isinstance(node, nodes.Name) and node.name in _OWN_NAMES:
        raise JobError(f"{key}: line {node.lineno}: {node.name!r} is a reserved name of Jinja")
    for kind, word, known in ((nodes.Filter, "filter", _FILTERS), (nodes.Test, "test", _TESTS)):
        if isinstance(node, kind) and node.name not in known:
            raise JobError(f"{key}: line {node.lineno}: there is no {word} {node.name!r}; there are {', '.join(known)}")


def _null(name: str) -> _Null:
    return _Null(hint=f"{name!r} is null; {name} | default('...') would give it a text", name=name)


def _is_null(value: Any) -> bool:
    return value is None or isinstance(value, _Null)


def _rounded(value: Any, precision: int = 0) -> float:
    """Return a number rounded to `precision` places. Raises: ValueError unless that is from 0 to 20."""
    if not isinstance(precision, int) or not 0 <= precision <= 20:
        raise ValueError("round takes 0 to 20 places")
    return round(float(value), precision)


def _replaced(text: Any, old: str, new: str, count: int = -1) -> str:
    """Return a text with `old` replaced by `new`. Raises: ValueError if the result is too long."""
    whole = str(text)
    if len(whole) + (whole.count(old) if old else len(whole) + 1) * len(new) > MAX_RESULT:
        raise ValueError(f"is longer than {MAX_RESULT} characters")
    return whole.replace(old, new, count)
