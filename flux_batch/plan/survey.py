"""A check of a plan's rows before a run: rows that fail, repeat others, or are truncated.

It reads prompts and tokenizers, and loads no weights.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import islice
from typing import Any

from flux_batch.config.schema import JobConfig, SamplingConfig
from flux_batch.errors import RowError, StoreError, count_of
from flux_batch.plan.plan import Plan
from flux_batch.plan.tokenizers import Tokenizers
from flux_batch.prompts.input_images import load_images
from flux_batch.prompts.source import PromptSource
from flux_batch.records import FailedRow, ImageRequest, RowImages
from flux_batch.sampling_params import SAMPLING_FIELDS

# The number of rows that `plan` checks, and of those compared with each other, at some 200 bytes per row.
PLAN_ROWS, _COMPARED_ROWS = 10_000, 5_000_000
_TOKENIZED_AT_ONCE = 512
_EXAMPLES = 3
# The numbers of reasons or sizes shown, of prompts shown, and of characters of a prompt.
_SHOWN, _FIRST_PROMPTS, _SHOWN_LENGTH = 10, 2, 100
# Values in the reason of a failed row; without them, the same reason of different rows is one text.
_VALUES = re.compile(
    r"(?<== )('.*?'|[-+.\w]+)|(?<=byte )0x\w+|(?<=lines )\d+ to \d+|(?<=nearest are )\d+ and \d+|\b\d+(?= fields )"
    r"|(?:(?<=line )|(?<=column )|(?<=char )|(?<=holds )|(?<=text of ))\d+"
)
# A limit for reasons with a name of their row, which all differ.
MAX_REASONS = 100
# Wildcards of other programs; here they are plain text unless the job sets prompts.wildcards.
_WILDCARDS = re.compile(r"__[\w./*-]*?[\w*]__|\{[^{}|]*\|[^{}]*\}")
# Texts that the tokenizers of CLIP and T5 read as special tokens, as in diffusers.
_SPECIAL = re.compile(r"<\|(?:startoftext|endoftext)\|>|</s>|<pad>|<unk>|<extra_id_\d{1,2}>")

# The label for images that take their size from a reference, which is unknown until that is read.
_AS_REFERENCE = "as the reference"
_OF_ONE = {"have": "has", "repeat": "repeats", "hold": "holds", "are": "is"}


@dataclass
class Survey:
    """The counts of a data set's first `num_rows` rows; `failures` and `examples` are by reason.

    overrides: the number of rows with another value than the job's, by field. sizes: the number of images by width and
    height. reference_size: (width, height) of the first image that takes its size from a reference; None without one.
    """

    num_rows: int = 0
    num_failed: int = 0
    num_repeated_ids: int = 0
    num_repeated_prompts: int = 0
    num_near_duplicates: int = 0
    num_special_tokens: int = 0
    num_wildcards: int = 0
    num_clip_truncated: int | None = None
    num_t5_truncated: int | None = None
    not_tokenized: str = ""
    failures: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    num_images: int = 0
    overrides: Counter[str] = field(default_factory=Counter)
    sizes: Counter[str] = field(default_factory=Counter)
    first_prompts: list[str] = field(default_factory=list)
    reference_size: tuple[int, int] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the counts as plain values."""
        counts = {name: dict(getattr(self, name).most_common()) for name in ("failures", "overrides", "sizes")}
        return {**vars(self), **counts}

    def sized(self, config: JobConfig) -> JobConfig:
        """Return the job with the size of its references, if that is most frequent."""
        if self.reference_size is None or self.sizes.most_common(1)[0][0] != _AS_REFERENCE:
            return config
        width, height = self.reference_size
        sampling = config.sampling.model_copy(update={"width": width, "height": height})
        return config.model_copy(update={"sampling": sampling})

    @property
    def failed_ratio(self) -> float:
        """The share of rows that fail."""
        return self.num_failed / max(1, self.num_rows)


def survey(config: JobConfig, plan: Plan, max_rows: int | None = None) -> Survey:
    """Return the counts of the first `max_rows` rows of a plan, or of all. Raises: SourceError, StoreError."""
    found = Survey()
    tokenizers = Tokenizers(config)
    found.not_tokenized = tokenizers.missing
    has_no_wildcards = not config.prompts.wildcards
    ids, prompts, near = _Seen(), _Seen(), _Seen()
    rows = islice(_rows(config, plan), max_rows)
    while batch := list(islice(rows, _TOKENIZED_AT_ONCE)):
        found.num_rows += len(batch)
        requests = [row for row in batch if isinstance(row, ImageRequest)]
        for row in batch:
            found.num_repeated_ids += ids.again(row.id)
            if isinstance(row, FailedRow):
                _count_failure(found, row)
        for request in requests:
            if request.size_from_reference and _AS_REFERENCE not in found.sizes:  # only the first: reading may be slow
                found.reference_size = _reference_size(request, config)
            _count_settings(found, request, config.sampling)
            is_repeated = prompts.again(request.prompt)
            found.num_repeated_prompts += is_repeated
            found.num_near_duplicates += near.again(_plain(request.prompt)) and not is_repeated
            found.num_special_tokens += _SPECIAL.search(request.prompt) is not None
            found.num_wildcards += has_no_wildcards and _WILDCARDS.search(request.prompt) is not None
        if not tokenizers.missing:
            clip, t5 = tokenizers.count(requests)
            found.num_clip_truncated = (found.num_clip_truncated or 0) + clip
            found.num_t5_truncated = (found.num_t5_truncated or 0) + t5
    return found


def survey_rows(found: Survey, num_prompts: int) -> list[tuple[str, str]]:
    """Return the counts as rows of a table, without those that are 0."""
    of = "rows" if found.num_rows == num_prompts else f"of the first {found.num_rows} rows"
    counts = [
        (found.num_failed, "cannot be rendered, and will be recorded as failed"),
        (found.num_repeated_ids, "have the id of another row: with the same prompt, the image is the same too"),
        (found.num_repeated_prompts, "repeat a prompt word for word"),
        (found.num_near_duplicates, "repeat a prompt except for case, spaces or punctuation"),
        (found.num_special_tokens, "hold a special token, which is not read as letters, as in diffusers"),
        (found.num_wildcards, "hold __name__ or {a|b}, which is read as plain text; see prompts.wildcards"),
        (found.num_clip_truncated, "are longer than CLIP reads; T5 reads more"),
        (found.num_t5_truncated, "are longer than T5 reads: the end is left out"),
    ]
    lines = [_sentence(count, of, text) for count, text in counts if count]
    if not found.num_failed:
        every = f"all {of}" if of != "rows" else f"all {found.num_rows} rows" if found.num_rows > 1 else "the one row"
        lines.insert(0, f"{every} can be rendered")
    if found.not_tokenized:
        lines.append(f"truncated prompts were not counted: {found.not_tokenized}")
    failed = [
        f"{count}: {reason}; e.g. {', '.join(found.examples[reason])}"
        for reason, count in found.failures.most_common(_SHOWN)
    ]
    overrides = [f"{name} in {count_of(count, 'row')}" for name, count in found.overrides.most_common()]
    sizes = [f"{size}: {count}" for size, count in found.sizes.most_common(_SHOWN)]
    more = [f"{len(found.sizes) - _SHOWN} further sizes"] if len(found.sizes) > _SHOWN else []
    return [
        *(("" if number else "rows", line) for number, line in enumerate(lines)),
        *(("" if number else "failed", line) for number, line in enumerate(failed)),
        *([("overrides", ", ".join(overrides))] if overrides else []),
        *([("sizes", ", ".join(sizes + more))] if len(sizes) > 1 or _AS_REFERENCE in found.sizes else []),
        *(("" if number else "first", _shortened(prompt)) for number, prompt in enumerate(found.first_prompts)),
    ]


def _sentence(count: int, of: str, text: str) -> str:
    """Return a sentence about a number of rows; `text` begins with its verb, in the plural."""
    if count > 1:
        return f"{count} {of} {text}"
    verb, _, rest = text.partition(" ")
    return f"1 {'row' if of == 'rows' else of} {_OF_ONE.get(verb, verb)} {rest}"


class _Seen:
    """The texts seen so far, as hashes of 8 bytes, up to a limit."""

    def __init__(self) -> None:
        self._hashes: set[bytes] = set()

    def again(self, text: str) -> bool:
        """Return whether a text was seen before, and remember it."""
        digest = blake2b(text.encode("utf-8", "replace"), digest_size=8).digest()
        if digest in self._hashes:
            return True
        if len(self._hashes) < _COMPARED_ROWS:
            self._hashes.add(digest)
        return False


def _rows(config: JobConfig, plan: Plan) -> Iterator[ImageRequest | FailedRow]:
    source = PromptSource(config.prompts, plan.rules)
    for shard in plan.shards:
        yield from source.read(shard, config.sampling, config.model.loras)


def _count_settings(found: Survey, request: ImageRequest, job: SamplingConfig) -> None:
    """Count the images of a row by size, and settings that differ from the job's."""
    sampling, num_images = request.sampling, len(request.seeds)
    found.num_images += num_images
    is_known = not request.size_from_reference
    found.sizes[f"{sampling.width} x {sampling.height}" if is_known else _AS_REFERENCE] += num_images
    found.overrides.update(
        name
        for name, each in SAMPLING_FIELDS.items()
        if getattr(sampling, name) not in (getattr(job, name), each.default if getattr(job, name) is None else None)
        and (is_known or name not in ("width", "height"))
    )
    if num_images != job.num_images_per_prompt:
        found.overrides["num_images_per_prompt"] += 1
    if not job.input_image:
        found.overrides.update(list(request.images.by_column))
    if len(found.first_prompts) < _FIRST_PROMPTS:
        found.first_prompts.append(request.prompt)


def _reference_size(request: ImageRequest, config: JobConfig) -> tuple[int, int] | None:
    """Return the size at which the model reads the first reference; None if it cannot be read."""
    first = RowImages(reference_image=request.images.reference_image[:1])
    resize = config.sampling.resize_references
    with suppress(RowError, StoreError):
        (image,) = load_images(first, config.prompts.storage_options, None, resize_references=resize)["reference_image"]
        return image.width, image.height
    return None


def _count_failure(found: Survey, row: FailedRow) -> None:
    """Count a failed row by its reason, without the values in the reason."""
    where, _, reason = row.error_message.partition(": ")
    kind = _VALUES.sub("...", reason)[:200]
    if kind not in found.failures and len(found.failures) >= MAX_REASONS:
        kind = "other reasons"
    found.num_failed += 1
    found.failures[kind] += 1
    examples = found.examples.setdefault(kind, [])
    if len(examples) < _EXAMPLES:
        examples.append(where)


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN_LENGTH else f"{line[: _SHOWN_LENGTH - 3]}..."


def _plain(text: str) -> str:
    """Return a text without case, spacing, punctuation and letter variants, as near duplicates share it."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))
