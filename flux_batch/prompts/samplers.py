"""Values drawn for a row; each depends only on the run's seed, the row and the sampler's name.

This module knows the key `prompts.samplers` of the job file, not the use of the values.
"""

from __future__ import annotations

import math
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from itertools import accumulate
from statistics import NormalDist
from typing import Any

import pyarrow as pa

from flux_batch.errors import JobError, NotFound, SourceError, did_you_mean
from flux_batch.prompts.formats.table import check_whole_characters
from flux_batch.prompts.rows import text_of

_KINDS = ("choice", "uniform", "normal", "integer", "file", "by")
# Draws have 53 bits, which are exact in a float.
_BITS = 53


@dataclass(frozen=True)
class _Choice:
    """A weighted choice among values."""

    values: tuple[Any, ...]
    weights: tuple[float, ...]

    @cached_property
    def kind(self) -> pa.DataType:
        """The type that holds all values."""
        kinds = {type(value) for value in self.values if value is not None}
        if kinds == {int}:
            return pa.int64()
        return pa.float64() if kinds and kinds <= {int, float} else pa.string()

    @cached_property
    def _bounds(self) -> list[float]:
        return list(accumulate(self.weights))

    @cached_property
    def takes_all(self) -> bool:
        """True if every value can be drawn: no weight is 0."""
        return all(self.weights)

    def share_of(self, index: int) -> float:
        """Return a share for which `value` returns the value at an index."""
        bounds = self._bounds
        return ((bounds[index - 1] if index else 0.0) + bounds[index]) / 2 / bounds[-1]

    def value(self, share: float) -> Any:
        """Return the value at a share from 0 to 1 of the total weight."""
        bounds = self._bounds
        value = self.values[min(bisect_right(bounds, share * bounds[-1]), len(bounds) - 1)]
        return str(value) if value is not None and pa.types.is_string(self.kind) else value


@dataclass(frozen=True)
class _Spread:
    """A random number: `uniform` or `integer` between two limits, or `normal` around a mean."""

    name: str
    first: float
    second: float

    @property
    def kind(self) -> pa.DataType:
        """The type of its values."""
        return pa.int64() if self.name == "integer" else pa.float64()

    def value(self, share: float) -> Any:
        """Return the value at a share from 0 to 1 of the distribution."""
        if self.name == "integer":
            low, high = int(self.first), int(self.second)
            return min(low + math.floor(share * (high - low + 1)), high)
        if self.name == "normal":
            return NormalDist(self.first, self.second).inv_cdf(max(share, 2.0**-_BITS)) if self.second else self.first
        return self.first + share * (self.second - self.first)


@dataclass(frozen=True)
class Dependent:
    """A choice that depends on the value of another sampler or column."""

    by: str
    cases: Mapping[str, _Choice | _Spread]

    @cached_property
    def kind(self) -> pa.DataType:
        """The type that holds the values of all cases."""
        kinds = {case.kind for case in self.cases.values()}
        if len(kinds) == 1:
            return next(iter(kinds))
        return pa.string() if pa.string() in kinds else pa.float64()


Sampler = _Choice | _Spread | Dependent


def samplers_of(config: Mapping[str, Any], read_lines: Callable[[str], list[str]]) -> dict[str, Sampler]:
    """Return the samplers of a job, each after the ones it depends on. Raises: JobError that names the sampler."""
    found = {name: _sampler(f"prompts.samplers.{name}", value, read_lines) for name, value in config.items()}
    ordered: dict[str, Sampler] = {}
    while len(ordered) < len(found):
        ready = [
            name
            for name, each in found.items()
            if name not in ordered and not (isinstance(each, Dependent) and each.by in found and each.by not in ordered)
        ]
        if not ready:
            names = ", ".join(name for name in found if name not in ordered)
            raise JobError(f"prompts.samplers: {names} depend on each other in a circle")
        ordered.update({name: found[name] for name in ready})
    return ordered


def draw(seed: int, row: str, name: str) -> float:
    """Return a pseudorandom number in [0, 1) for a sampler of a row."""
    digest = blake2b(f"{seed}\x1f{row}\x1f{name}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return (int.from_bytes(digest) >> (64 - _BITS)) / float(1 << _BITS)


def sampled(samplers: Mapping[str, Sampler], shares: Callable[[str], float], row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a value of each sampler. Raises: ValueError if a dependent sampler has no case for a value."""
    values: dict[str, Any] = {}
    for name, sampler in samplers.items():
        case = sampler
        if isinstance(case, Dependent):
            key = values[case.by] if case.by in values else row.get(case.by)
            if text_of(key) not in case.cases:
                raise ValueError(f"sampler {name} has no case for {case.by} = {key!r}; it has {', '.join(case.cases)}")
            value = case.cases[text_of(key)].value(shares(name))
            values[name] = str(value) if pa.types.is_string(case.kind) and value is not None else value
        else:
            values[name] = case.value(shares(name))
    return values


def _sampler(path: str, value: Any, read_lines: Callable[[str], list[str]]) -> Sampler:
    if isinstance(value, Mapping) and "by" in value:
        for key in value:
            if isinstance(key, bool) or not isinstance(key, (str, int, float, type(None))):
                raise JobError(f"{path}: the case {key!r} is neither a text nor a number: quote it")
        cases = {text_of(key): _simple(f"{path}.{key}", case, read_lines) for key, case in value.items() if key != "by"}
        if not isinstance(value["by"], str) or not cases:
            raise JobError(f"{path}: must have `by`, a sampler or column, and a case for each of its values")
        return Dependent(value["by"], cases)
    return _simple(path, value, read_lines)


def _simple(path: str, value: Any, read_lines: Callable[[str], list[str]]) -> _Choice | _Spread:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return _choice(path, list(value), [1.0] * len(value))
    if not isinstance(value, Mapping) or len(value) != 1:
        raise JobError(f"{path}: must be a list of values, or one of {', '.join(_KINDS)}")
    ((kind, content),) = value.items()
    if kind == "choice" and isinstance(content, Mapping):
        return _choice(path, list(content), list(content.values()))
    if kind == "choice" and isinstance(content, list):
        return _choice(path, content, [1.0] * len(content))
    if kind == "file" and isinstance(content, str):
        try:
            lines = read_lines(content)
        except (NotFound, SourceError) as error:
            raise JobError(f"{path}: file: {error}") from error
        return _choice(f"{path}: {content}", lines, [1.0] * len(lines))
    if kind in ("uniform", "normal", "integer"):
        return _spread(path, str(kind), content)
    raise JobError(f"{path}: {kind!r} is not a kind of sampler{did_you_mean(str(kind), _KINDS)}")


def _choice(path: str, values: Sequence[Any], weights: Sequence[Any]) -> _Choice:
    if not values:
        raise JobError(f"{path}: must have at least one value")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (str, int, float, type(None))):
            raise JobError(f"{path}: {value!r} is neither a text nor a number; quote yes, no and the like in YAML")
        try:
            check_whole_characters(value)
        except ValueError as error:
            raise JobError(f"{path}: {value!r} is not valid Unicode: it holds half of a surrogate pair") from error
    largest = 2**53 if any(isinstance(value, float) for value in values) else 2**63
    for value in values:
        if isinstance(value, int) and not -largest <= value < largest:
            raise JobError(f"{path}: a whole number is too large; quote it to use it as text")
    if not all(_is_number(weight) and weight >= 0 for weight in weights) or not 0 < sum(map(float, weights)) < math.inf:
        raise JobError(f"{path}: weights must be numbers of at least 0, and not all 0")
    return _Choice(tuple(values), tuple(float(weight) for weight in weights))


def _spread(path: str, kind: str, content: Any) -> _Spread:
    form = {"uniform": "[low, high]", "normal": "[mean, standard deviation]", "integer": "[low, high]"}[kind]
    if not isinstance(content, list) or len(content) != 2 or not all(map(_is_number, content)):
        raise JobError(f"{path}: {kind} must be {form}, two numbers")
    first, second = content
    if kind == "integer" and not (isinstance(first, int) and isinstance(second, int)):
        raise JobError(f"{path}: integer must be {form}, two whole numbers")
    if (kind == "normal" and second < 0) or (kind != "normal" and first > second):
        raise JobError(f"{path}: {kind} must be {form}, and {second} is too small")
    if kind == "integer" and not -(2**53) < first <= second < 2**53:
        raise JobError(f"{path}: integer must lie between -2^53 and 2^53")
    return _Spread(kind, first, second)


def _is_number(value: Any) -> bool:
    largest = sys.float_info.max
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -largest <= value <= largest


def combinations(samplers: Mapping[str, Sampler]) -> int:
    """Return the number of combinations of a grid. Raises: JobError for a sampler without a list of values."""
    return math.prod(_num_values(name, sampler) for name, sampler in samplers.items())


def grid_shares(samplers: Mapping[str, Sampler], number: int) -> Iterator[tuple[str, float]]:
    """Yield the share of each sampler in row `number` of the cross product; the last sampler varies fastest."""
    for name, sampler in reversed(list(samplers.items())):
        number, index = divmod(number, _num_values(name, sampler))
        assert isinstance(sampler, _Choice)
        yield name, sampler.share_of(index)


def _num_values(name: str, sampler: Sampler) -> int:
    if not isinstance(sampler, _Choice) or not sampler.takes_all:
        raise JobError(f"prompts.samplers.{name}: prompts.design: grid takes only lists of values")
    return len(sampler.values)


def balanced_share(seed: int, number: int, num_rows: int, name: str) -> float:
    """Return the share of row `number` in a Latin hypercube: one row in each of `num_rows` equal parts."""
    part = _permuted(number, num_rows, f"{seed}\x1f{name}")
    return (part + draw(seed, f"rows:{number}", name)) / num_rows


def _permuted(number: int, size: int, key: str) -> int:
    """Return a number's place in a pseudorandom permutation of `size` numbers, without building it.

    This is a Feistel network of four rounds over the next power of 4, repeated until the result is less than `size`:
    Black and Rogaway, 2002, Ciphers with Arbitrary Finite Domains.
    """
    half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = number >> half, number & mask
        for step in range(4):
            digest = blake2b(f"{key}\x1f{step}\x1f{right}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest) & mask)
        number = left << half | right
        if number < size:
            return number
