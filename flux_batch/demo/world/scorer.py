"""The comparison of captions with images, fact by fact, and its scores."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any, Literal, get_args

from PIL import Image

from flux_batch.demo.world.captions import POSITIONS, Caption, Position, Relation, Scene, Thing
from flux_batch.demo.world.drawing import CENTRES
from flux_batch.demo.world.reading import Reading, ReadThing, read_image

Kind = Literal["count", "shape", "colour", "size", "position", "relation", "texture", "background colour"]

_KINDS: tuple[Kind, ...] = get_args(Kind)
# The number of largest things of an image that are compared with those of a caption.
_MAX_COMPARED = 6
# The least distance between two things in a relation, in shares of the image.
_MIN_APART = 0.15


@dataclass(frozen=True, slots=True)
class Fact:
    """One fact of a caption, and the same fact of its image ("" if missing)."""

    kind: Kind
    said: str
    shown: str
    holds: bool


@dataclass(frozen=True)
class Scores:
    """The facts of captions, each of which holds in its image or does not."""

    num_images: int
    facts: tuple[Fact, ...]

    def share(self, kind: Kind | None = None) -> float:
        """Return the share of facts of a kind, or of all, that hold. It is 1 if there are none."""
        found = [fact.holds for fact in self.facts if kind in (None, fact.kind)]
        return sum(found) / len(found) if found else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Return the shares for JSON."""
        return {
            "num_images": self.num_images,
            "num_facts": len(self.facts),
            "share": round(self.share(), 4),
            "by_kind": {kind: round(self.share(kind), 4) for kind in self.kinds()},
        }

    def __str__(self) -> str:
        lines = [f"{'fact':<18} {'said':>6} {'hold':>6} {'share':>8}"]
        for kind in [*self.kinds(), None]:
            found = [fact.holds for fact in self.facts if kind in (None, fact.kind)]
            lines.append(f"{kind or 'all':<18} {len(found):>6} {sum(found):>6} {100 * self.share(kind):>6.1f} %")
        return "\n".join(lines)

    def kinds(self) -> list[Kind]:
        """Return the kinds of the facts, in the order of all kinds."""
        return [kind for kind in _KINDS if any(fact.kind == kind for fact in self.facts)]


def score_all(captions: Iterable[Caption], images: Iterable[Image.Image]) -> Scores:
    """Compare captions with images in the same order. Raises: ValueError if their numbers differ."""
    scored = [score(caption, image) for caption, image in zip(captions, images, strict=True)]
    return Scores(len(scored), tuple(fact for facts in scored for fact in facts))


def score(caption: Caption, image: Image.Image) -> list[Fact]:
    """Return every fact of a caption, compared with an image."""
    return _compare(caption, read_image(image))


def _compare(caption: Caption, reading: Reading) -> list[Fact]:
    """Return every fact of a caption, compared with a reading. Facts that a caption leaves out do not count.

    Things of an image have no order: the assignment in which most facts hold counts.
    """
    said = [thing for thing in (caption.scene.first, caption.scene.second) if thing]
    facts = [_make_fact("count", str(len(said)), str(len(reading.things)))]
    ways = (list(_facts_of_things(caption, shown)) for shown in _assignments(reading.things, len(said)))
    facts += max(ways, key=lambda way: sum(fact.holds for fact in way))
    if "background" not in caption.unsaid:
        facts += _facts_of_background(caption.scene, reading)
    return facts


def _assignments(things: Sequence[ReadThing], count: int) -> Iterator[tuple[ReadThing | None, ...]]:
    """Yield every ordered choice of `count` things; None stands for a missing one."""
    missing = [None] * max(count - len(things), 0)
    yield from permutations([*things[:_MAX_COMPARED], *missing], count)


def _facts_of_things(caption: Caption, shown: Sequence[ReadThing | None]) -> Iterator[Fact]:
    """Yield the facts about the things of a caption, given those of its image."""
    scene = caption.scene
    yield from _facts_of_thing(caption, scene.first, shown[0])
    if scene.second:
        yield from _facts_of_thing(caption, scene.second, shown[1])
    if "place" in caption.unsaid:
        return
    if scene.position:
        yield _make_fact("position", scene.position, _position_of(shown[0]) if shown[0] else "")
    if scene.relation:
        yield _make_fact("relation", scene.relation, _relation_of(shown[0], shown[1]) if shown[0] and shown[1] else "")


def _facts_of_thing(caption: Caption, said: Thing, shown: ReadThing | None) -> Iterator[Fact]:
    """Yield the facts about one thing."""
    yield _make_fact("shape", said.shape, shown.shape if shown else None)
    if "colour" not in caption.unsaid:
        yield _make_fact("colour", said.colour, shown.colour if shown else None)
    yield _make_fact("size", said.size, shown.size if shown else None)


def _facts_of_background(scene: Scene, reading: Reading) -> Iterator[Fact]:
    """Yield the facts about the background; the order of its colours matters only in a gradient."""
    said, shown = scene.background, reading.background
    yield _make_fact("texture", said.texture, shown.texture if shown else None)
    seen = (shown.colour, shown.second) if shown else (None, None)
    is_ordered = said.texture == "gradient" and shown is not None and shown.texture == "gradient"
    for index, colour in enumerate((said.colour, said.second)):
        if colour:
            one = seen[index] if is_ordered or colour not in seen else colour
            yield _make_fact("background colour", colour, one)


def _make_fact(kind: Kind, said: str, shown: str | None) -> Fact:
    """Return a fact, which holds if caption and image are equal."""
    return Fact(kind, said, shown or "", said == shown)


def _position_of(thing: ReadThing) -> Position:
    """Return the position nearest to a thing's centre."""
    return min(POSITIONS, key=lambda name: (CENTRES[name][0] - thing.x) ** 2 + (CENTRES[name][1] - thing.y) ** 2)


def _relation_of(first: ReadThing, second: ReadThing) -> Relation | None:
    """Return the relation of the first thing to the second, None if too close.

    The axis of the larger distance counts.
    """
    x, y = first.x - second.x, first.y - second.y
    if max(abs(x), abs(y)) < _MIN_APART:
        return None
    if abs(x) > abs(y):
        return "left of" if x < 0 else "right of"
    return "above" if y < 0 else "below"
