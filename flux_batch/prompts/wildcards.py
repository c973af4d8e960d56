"""Wildcards in prompts: `__animal__` takes a line of a file, `{a|b}` takes one of the options.

The syntax is that of adieyal/dynamicprompts (docs/SYNTAX.md) and ltdrdata/ComfyUI-Impact-Pack, where these agree.
Several options are joined by a comma, as in the former. This module knows texts and draws, not the place of files.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import lru_cache
from itertools import accumulate, pairwise

from flux_batch.errors import JobError, did_you_mean
from flux_batch.prompts.template import MAX_RESULT

_MAX_DEPTH, _MAX_DRAWS = 30, 1000
_JOINED_BY = ", "
_NAME = re.compile(r"__([\w./*-]*?[\w*])__")
_WEIGHT = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)::")
_COUNT = re.compile(r"\s*(?:(\d+)|(\d*)-(\d*))\$\$(?:([^{}|$]*)\$\$)?")
_ESCAPED = "\\{}|"

_Draw = Callable[[str], float]


@dataclass(frozen=True)
class _Choice:
    """The options of `{...}`, the running sums of their weights, and the number to take.

    text: the source text. low, high: the range of that number; high is None for all options.
    from_list: the name of the list whose lines are the options, in `{2$$__animal__}`.
    """

    text: str
    options: Sequence[Sequence[_Part]]
    sums: Sequence[float]
    low: int
    high: int | None
    joined_by: str
    from_list: str | None = None


@dataclass(frozen=True)
class _Lines:
    """The lines of a list, and the running sums of their weights."""

    texts: Sequence[str]
    sums: Sequence[float]


@dataclass(frozen=True)
class _Wildcard:
    """A name between underscores."""

    name: str


_Part = str | _Choice | _Wildcard


class Wildcards:
    """The lists of a folder by name; lines that begin with # are comments."""

    def __init__(self, lists: Mapping[str, Sequence[str]], folder: str) -> None:
        kept = {name: [line for line in lines if not line.startswith("#")] for name, lines in lists.items()}
        self._lists = {name: lines for name, lines in kept.items() if lines}
        self._folder = folder
        self._parsed = lru_cache(4096)(_parsed)
        self._found = lru_cache(4096)(self._lines_of)

    def check(self, text: str, key: str) -> None:
        """Raise JobError for a wildcard in a template that has no list."""
        for name in _NAME.findall(text):
            try:
                self._found(name)
            except ValueError as error:
                raise JobError(f"{key}: {error}") from error

    def filled(self, text: str, draw: _Draw) -> str:
        """Return a text with each wildcard and choice replaced by a draw. Raises: ValueError with the reason.

        draw: returns a number in [0, 1) for a name: the text of a wildcard or choice, and its number among equal ones.
        """
        if "{" not in text and "__" not in text and "\\" not in text:
            return text
        return _Filling(self._parsed, self._found, draw).text_of(self._parsed(text))

    def _lines_of(self, name: str) -> _Lines:
        """Return the lines of a list, or of all lists that match a pattern. Raises: ValueError if there is none."""
        names = [name] if name in self._lists else [each for each in sorted(self._lists) if fnmatchcase(each, name)]
        found = [_weight_of(line) for each in names for line in self._lists[each]]
        if any(weight for weight, _ in found):
            return _Lines([text.strip() for _, text in found], list(accumulate(weight for weight, _ in found)))
        hint = did_you_mean(name, self._lists) or f"; there are {', '.join(sorted(self._lists)[:10]) or 'none'}"
        raise ValueError(f"__{name}__: no such list in {self._folder}{hint}")


def joined_lists(lists: Iterable[Iterable[tuple[str, Sequence[str]]]]) -> dict[str, list[str]]:
    """Return the lists of several files as one mapping; lists with the same name are joined."""
    found: dict[str, list[str]] = {}
    for each in lists:
        for name, lines in each:
            found[name] = found.get(name, []) + list(lines)
    return found


def lists_of_yaml(tree: object, name: str = "") -> dict[str, list[str]]:
    """Return the lists of a YAML file, named by its keys joined with slashes. Raises: ValueError."""
    if isinstance(tree, Mapping):
        below = ((f"{name}/{key}" if name else str(key), value) for key, value in tree.items())
        return joined_lists(lists_of_yaml(value, each).items() for each, value in below)
    values = tree if isinstance(tree, list) else [tree]
    if not name or any(isinstance(value, (Mapping, list)) for value in values):
        raise ValueError(f"{name or 'it'}: must be texts or sections of them; quote a text with a colon")
    return {name: [str(value) for value in values if value is not None]}


@dataclass
class _Filling:
    """The state of filling one text: the number of draws for each name, and the length so far."""

    parse: Callable[[str], Sequence[_Part]]
    lines: Callable[[str], _Lines]
    draw: _Draw
    counts: Counter[str] = field(default_factory=Counter)
    size: int = 0

    def text_of(self, parts: Iterable[_Part], depth: int = 0) -> str:
        if depth > _MAX_DEPTH:
            raise ValueError("wildcards name each other in a circle")
        filled = []
        for part in parts:
            if isinstance(part, str):
                self.size += len(part)
                filled.append(part)
            elif isinstance(part, _Choice):
                filled.append(self._chosen(part, depth))
            else:
                lines = self.lines(part.name)
                index = self._index(f"__{part.name}__", lines.sums)
                filled.append(self.text_of(self.parse(lines.texts[index]), depth + 1))
            if self.size > MAX_RESULT:
                raise ValueError(f"is longer than {MAX_RESULT} characters")
        return "".join(filled)

    def _chosen(self, choice: _Choice, depth: int) -> str:
        options, sums = self._options_of(choice)
        count = self._number_of(choice, sum(above > below for below, above in pairwise((0.0, *sums))))
        texts = []
        for _ in range(count):
            index = self._index(choice.text, sums)
            option = options.pop(index)
            texts.append(self.text_of(self.parse(option) if isinstance(option, str) else option, depth + 1))
            if count > 1:  # each option is taken at most once
                weights = [above - below for below, above in pairwise((0.0, *sums))]
                sums = list(accumulate(weight for at, weight in enumerate(weights) if at != index))
        return choice.joined_by.join(texts)

    def _options_of(self, choice: _Choice) -> tuple[list[str | Sequence[_Part]], Sequence[float]]:
        """Return the options and the running sums of their weights; the lines of a list are not yet parsed."""
        if choice.from_list is None:
            return [*choice.options], choice.sums
        lines = self.lines(choice.from_list)
        return [*lines.texts], lines.sums

    def _number_of(self, choice: _Choice, most: int) -> int:
        """Draw the number of options to take, at most `most`."""
        low, high = sorted(min(most if bound is None else bound, most) for bound in (choice.low, choice.high))
        if high == low:
            return low
        return low + min(int(self._next(f"{choice.text}$$") * (high - low + 1)), high - low)

    def _index(self, name: str, sums: Sequence[float]) -> int:
        """Draw an index; one with weight 0 is never drawn."""
        return min(bisect_right(sums, self._next(name) * sums[-1]), len(sums) - 1)

    def _next(self, name: str) -> float:
        """Return the next draw for a name; draws for other names do not change it."""
        self.counts[name] += 1
        if self.counts.total() > _MAX_DRAWS:
            raise ValueError(f"has more than {_MAX_DRAWS} wildcards and choices")
        return self.draw(f"{name}\x1f{self.counts[name] - 1}")


def _parsed(text: str) -> Sequence[_Part]:
    """Return the parts of a text. Raises: ValueError for an unmatched brace."""
    parts, end = _parts(text, 0, 0)
    if end < len(text):
        raise ValueError(f"a }} is not opened: {text[max(0, end - 20) : end + 1]}")
    return parts


def _parts(text: str, at: int, depth: int) -> tuple[list[_Part], int]:
    """Read parts up to the end of the text or, inside braces, of the option."""
    if depth > _MAX_DEPTH:
        raise ValueError(f"braces are nested deeper than {_MAX_DEPTH}")
    parts: list[_Part] = []
    while at < len(text):
        if text[at] == "\\" and text[at + 1 : at + 2] in _ESCAPED and at + 1 < len(text):
            parts.append(text[at + 1])
            at += 2
        elif text[at] == "{":
            choice, at = _choice(text, at, depth)
            parts.append(choice)
        elif text[at] == "}" or (text[at] == "|" and depth):
            break
        elif found := _NAME.match(text, at):
            parts.append(_Wildcard(found[1]))
            at = found.end()
        else:
            end = at + 1
            while end < len(text) and text[end] not in "\\{}|_":
                end += 1
            parts.append(text[at:end])
            at = end
    return parts, at


def _choice(text: str, begin: int, depth: int) -> tuple[_Choice, int]:
    """Read a `{...}` that begins at `begin`."""
    at, low, high, joined_by = begin + 1, "1", "1", _JOINED_BY
    if found := _COUNT.match(text, at):
        at = found.end()
        low, high = (found[1], found[1]) if found[1] else (found[2], found[3])
        joined_by = _JOINED_BY if found[4] is None else found[4]
    options: list[list[_Part]] = []
    weights: list[float] = []
    while True:
        weight, rest = _weight_of(text[at : at + 40])
        at += min(len(text) - at, 40) - len(rest)
        parts, at = _parts(text, at, depth + 1)
        options.append(parts)
        weights.append(weight)
        if at >= len(text):
            raise ValueError(f"a {{ is not closed: {text[begin : begin + 40]}")
        at += 1
        if text[at - 1] == "}":
            break
    whole = text[begin:at]
    if not sum(weights):
        raise ValueError(f"all weights are 0: {whole[:60]}")
    first, last = int(low or 0), int(high) if high else None
    from_list: str | None = None
    match options:
        case [[_Wildcard(name)]] if last != 1:
            from_list = name
    return _Choice(whole, options, list(accumulate(weights)), first, last, joined_by, from_list), at


def _weight_of(text: str) -> tuple[float, str]:
    """Return the weight of an option or line, 1 by default, and the remaining text."""
    found = _WEIGHT.match(text)
    return (float(found[1]), text[found.end() :]) if found else (1.0, text)
