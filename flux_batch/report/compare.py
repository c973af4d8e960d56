"""The comparison of two runs: differences in settings, images and scores."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from flux_batch.images import Difference, decode, difference
from flux_batch.output.metadata import RECORD_SCHEMA
from flux_batch.output.paths import PRECISION, REPORT, metadata_file
from flux_batch.records import IMAGE_COLUMNS
from flux_batch.report.gallery.rows import annotators, read_annotations, read_table
from flux_batch.report.reproduction import surroundings_of_run
from flux_batch.report.saved_run import SavedRun, read_json
from flux_batch.sampling_params import SAMPLING_FIELDS
from flux_batch.storage.store import Store

# The default number of images to decode, and the number of lines of each part of the text.
_MAX_DECODED = 10
_MAX_LISTED = 10
_MAX_VALUE_LENGTH = 100
_READERS = 8
# Columns of the metadata that are settings of an image.
_SETTINGS = (
    *("prompt", "seed", *SAMPLING_FIELDS, *IMAGE_COLUMNS, "lora", "lora_scale", "tile_size"),
    *("model", "quantization", "step_cache"),
)

_COLUMNS = frozenset(RECORD_SCHEMA.names)

_Row = Mapping[str, Any]
_Pair = tuple[_Row, _Row]


@dataclass
class _Comparison:
    """The differences of two runs, A and B. Images are matched by id and index.

    `settings`, `versions`: by name, the value in each run; only versions known of both. `num_equal`, `num_differ`:
    compared by the bytes of files, which also contain the settings. `rows`: by setting, the number of images that
    differ in it. `pixels`: by key in A, the difference of some differing images; None for another size. `scores`: by
    numeric column, its mean in each run over the images that have it in both. `problems`: files that could not be read.
    """

    runs: tuple[str, str]
    settings: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    versions: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    num_images: list[int] = field(default_factory=lambda: [0, 0])
    num_failed: list[int] = field(default_factory=lambda: [0, 0])
    num_in_both: int = 0
    num_equal: int = 0
    num_differ: int = 0
    num_failed_in_one: int = 0
    rows: Counter[str] = field(default_factory=Counter)
    pixels: dict[str, Difference | None] = field(default_factory=dict)
    scores: dict[str, tuple[float, float]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return the differences as plain values."""
        pixels = {key: apart and apart._asdict() for key, apart in self.pixels.items()}
        return vars(self) | {"rows": dict(self.rows.most_common()), "pixels": pixels}

    @property
    def text(self) -> str:
        """The differences as lines for people."""
        lines = [f"A        {self.runs[0]}", f"B        {self.runs[1]}"]
        for title, values in (("settings", self.settings), ("versions", self.versions)):
            lines += _lines(title, (f"{name}: {_short(one)} -> {_short(two)}" for name, (one, two) in values.items()))
        counts = [
            f"{images} ({failed} failed)" for images, failed in zip(self.num_images, self.num_failed, strict=True)
        ]
        lines.append(
            f"images   {' and '.join(counts)}; of {self.num_in_both} in both, {self.num_equal} have equal files, "
            f"{self.num_differ} other ones, {self.num_failed_in_one} failed in one run"
        )
        lines += _lines("rows", (f"{name} differs in {number} of them" for name, number in self.rows.most_common()))
        lines += _lines("pixels", (f"{key}: {apart or 'is of another size'}" for key, apart in self.pixels.items()))
        changed = ((name, *means) for name, means in self.scores.items() if means[0] != means[1])
        lines += _lines("scores", (f"{name}: mean {one:.4g} -> {two:.4g}" for name, one, two in changed))
        return "\n".join([*lines, *_lines("problems", self.problems)])

    def add(self, pair: _Pair) -> bool:
        """Count an image that both runs have. Returns: whether it succeeded in both, and differs."""
        one, two = pair
        self.num_in_both += 1
        self.rows.update(name for name in _SETTINGS if one.get(name) != two.get(name))
        if one["status"] != two["status"]:
            self.num_failed_in_one += 1
        elif one["status"] == "success":
            self.num_equal += one["sha256"] == two["sha256"]
            self.num_differ += one["sha256"] != two["sha256"]
            return bool(one["sha256"] != two["sha256"])
        return False


@dataclass(slots=True)
class _Sums:
    """The sums of a column over the images that have it in both runs."""

    one: float = 0.0
    two: float = 0.0
    number: int = 0

    def add(self, one: float, two: float) -> None:
        """Add the values of an image."""
        self.one += one
        self.two += two
        self.number += 1

    @property
    def means(self) -> tuple[float, float]:
        """The mean in each run."""
        return self.one / self.number, self.two / self.number


def compare_runs(one: Store, two: Store, max_decoded: int = _MAX_DECODED) -> _Comparison:
    """Return the differences between the committed parts of two runs.

    max_decoded: the number of differing images to decode. Raises: JobError if there is no run; StoreError.
    """
    runs = SavedRun.open(one), SavedRun.open(two)
    found = _Comparison((one.uri, two.uri))
    found.settings = _different(*(run.config.identity() for run in runs))
    versions = [_versions(run.store) for run in runs]
    known = versions[0].keys() & versions[1].keys()
    found.versions = {name: pair for name, pair in _different(*versions).items() if name in known}
    without_report = [run.store.uri for run in runs if not run.store.exists(REPORT)]
    found.problems += [f"{uri}: has no report yet, so its versions are not all known" for uri in without_report]
    sums: dict[str, _Sums] = defaultdict(_Sums)
    differ: list[_Pair] = []
    rows_of_runs = [_counted_rows(run, found, side) for side, run in enumerate(runs)]
    for pair in _pairs(*rows_of_runs):
        if found.add(pair) and len(differ) < max_decoded:
            differ.append(pair)
        for name, values in _scores(pair):
            sums[name].add(*values)
    found.scores = {name: each.means for name, each in sorted(sums.items())}
    for pair in sorted(differ, key=lambda pair: str(pair[0]["key"])):
        data = [run.image(row) for run, row in zip(runs, pair, strict=True)]
        if data[0] is not None and data[1] is not None:  # otherwise `verify` reports the problem
            found.pixels[pair[0]["key"]] = difference(decode(data[0]), decode(data[1]))
    return found


def _different(one: Mapping[str, Any], two: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    names = dict.fromkeys([*one, *two])
    return {name: (one.get(name), two.get(name)) for name in names if one.get(name) != two.get(name)}


def _versions(store: Store) -> dict[str, Any]:
    """Return the known surroundings of a run, and the dtype that its first worker chose."""
    settled = read_json(store, PRECISION) or {}
    return surroundings_of_run(store) | ({"settled dtype": settled["dtype"]} if "dtype" in settled else {})


def _counted_rows(run: SavedRun, found: _Comparison, side: int) -> Iterator[_Row]:
    """Yield the metadata rows of a run with their annotations, in order, and count them."""
    names = annotators(run.commits)
    shards = sorted(shard for shard in run.commits.done() if shard < run.num_shards)

    def read(shard: int) -> tuple[list[dict[str, Any]], str]:
        rows, problem = read_table(run.commits, metadata_file(run.name(shard)))
        said = read_annotations(run.commits, names, shard)
        return [{**row, **said.get(row["key"], {})} for row in rows], problem

    with ThreadPoolExecutor(_READERS) as pool:
        for first in range(0, len(shards), _READERS):
            for rows, problem in pool.map(read, shards[first : first + _READERS]):
                found.problems += [f"{run.store.uri}: {problem}"] if problem else []
                found.num_images[side] += len(rows)
                found.num_failed[side] += sum(row["status"] == "failed" for row in rows)
                yield from rows


def _pairs(one: Iterable[_Row], two: Iterable[_Row]) -> Iterator[_Pair]:
    """Yield the rows of both runs that have the same id and index.

    Only rows without their counterpart so far are in memory: few, if both runs have the same prompts.
    """
    waiting: tuple[dict[Any, _Row], dict[Any, _Row]] = ({}, {})
    for both in zip_longest(one, two):
        for side, row in enumerate(both):
            if row is None:
                continue
            image = row["id"], row["image_index"]
            other = waiting[1 - side].pop(image, None)
            if other is None:
                waiting[side][image] = row
            else:
                yield (row, other) if side == 0 else (other, row)


def _scores(pair: _Pair) -> Iterator[tuple[str, tuple[float, float]]]:
    """Yield the numbers in both rows that are not settings: columns of prompts, annotations, `quality`."""
    one, two = pair
    for name, value in one.items():
        if name not in _COLUMNS and _is_number(value) and _is_number(two.get(name)):
            yield name, (float(value), float(two[name]))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _lines(title: str, texts: Iterable[str]) -> Iterator[str]:
    """Yield texts as the lines of a part, and the number of left-out ones."""
    listed = list(texts)
    for number, text in enumerate(listed[:_MAX_LISTED]):
        yield f"{'' if number else title:<9}{text}"
    if len(listed) > _MAX_LISTED:
        yield f"{'':<9}... and {len(listed) - _MAX_LISTED} more (--json has all)"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_VALUE_LENGTH else f"{text[:_MAX_VALUE_LENGTH]}..."
