"""The parsing of a text into its caption."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import TypeVar

from flux_batch.demo.world.captions import (
    COLOURS,
    POSITION_WORDS,
    RELATION_WORDS,
    SHAPES,
    SIZE_WORDS,
    TEXTURES,
    WORDINGS,
    WORDINGS_WITHOUT_BACKGROUND,
    Background,
    Caption,
    Scene,
    Size,
    Thing,
    Unsaid,
    phrase,
)

_Word = TypeVar("_Word", bound=str)
_COLOUR = "|".join(COLOURS)


def parse_caption(text: str) -> Caption:
    """Return the caption that has this text. Raises: ValueError if none has."""
    for wording, pattern in enumerate(_patterns()):
        for found in (found for one in pattern if (found := one.fullmatch(text))):
            caption = _caption(text, {name: value for name, value in found.groupdict().items() if value is not None})
            if phrase(caption.scene, wording % len(WORDINGS), caption.unsaid) == text:
                return caption
    raise ValueError(f"{text!r} is no caption of the demo's world")


@cache
def _patterns() -> list[list[re.Pattern[str]]]:
    """Return the patterns of each wording, with a background and without."""
    subject = (
        rf"{_thing('first')}(?: (?P<place>{_any(_words(POSITION_WORDS))})"
        rf"| (?P<relation>and|{_any(_words(RELATION_WORDS))}) {_thing('second')})?"
    )
    background = (
        rf"(?:an? (?:plain )?(?P<plain>{_COLOUR}) background"
        rf"|a (?:gradient from|background that fades from) (?P<start>{_COLOUR}) to (?P<end>{_COLOUR})"
        rf"|an? (?P<texture>{_any(TEXTURES)}) (?P<colour>{_COLOUR}) and (?P<other>{_COLOUR}) background)"
    )

    def compiled(template: str) -> re.Pattern[str]:
        return re.compile(re.escape(template).replace(r"\{subject\}", subject).replace(r"\{background\}", background))

    without = WORDINGS_WITHOUT_BACKGROUND
    return [[compiled(one), compiled(without[number % len(without)])] for number, one in enumerate(WORDINGS)]


def _thing(name: str) -> str:
    sizes = [word for words in SIZE_WORDS.values() for word in words if word]
    return rf"an? (?P<{name}_size>{_any(sizes)})?(?:(?P<{name}_colour>{_COLOUR}) )?(?P<{name}_shape>{_any(SHAPES)})"


def _words(table: Mapping[_Word, tuple[str, ...]]) -> list[str]:
    return [word for words in table.values() for word in words]


def _any(words: Iterable[str]) -> str:
    """Return a pattern of any of the words, the longest first."""
    return "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))


def _caption(text: str, found: dict[str, str]) -> Caption:
    """Return the caption with the facts that were found; unstated facts get arbitrary values."""
    unsaid: set[Unsaid] = set()
    if "first_colour" not in found:
        unsaid.add("colour")
    if not {"plain", "start", "colour"} & set(found):
        unsaid.add("background")
    second = _found_thing("second", found) if "second_shape" in found else None
    if not {"place", "relation"} & set(found) or found.get("relation") == "and":
        unsaid.add("place")
    scene = Scene(
        first=_found_thing("first", found),
        background=_found_background(found),
        position=None if second else _key_of(POSITION_WORDS, found.get("place", "")) or "centre",
        relation=(_key_of(RELATION_WORDS, found["relation"]) or "left of") if second else None,
        second=second,
    )
    return Caption(text=text, scene=scene, unsaid=frozenset(unsaid))


def _found_thing(name: str, found: dict[str, str]) -> Thing:
    size: Size = next((size for size, words in SIZE_WORDS.items() if found.get(f"{name}_size", "") in words), "medium")
    return Thing(
        shape=_known(SHAPES, found[f"{name}_shape"]),
        colour=_known(COLOURS, found.get(f"{name}_colour", COLOURS[0])),
        size=size,
    )


def _found_background(found: dict[str, str]) -> Background:
    if "start" in found:
        texture, colour, second = "gradient", found["start"], found["end"]
    elif "colour" in found:
        texture, colour, second = found["texture"], found["colour"], found["other"]
    else:
        return Background(texture="plain", colour=_known(COLOURS, found.get("plain", COLOURS[0])))
    return Background(texture=_known(TEXTURES, texture), colour=_known(COLOURS, colour), second=_known(COLOURS, second))


def _known(words: tuple[_Word, ...], word: str) -> _Word:
    """Return the typed word of a table that equals `word`."""
    return words[words.index(word)]


def _key_of(table: Mapping[_Word, tuple[str, ...]], word: str) -> _Word | None:
    return next((key for key, words in table.items() if word in words), None)
