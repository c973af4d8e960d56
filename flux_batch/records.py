"""The nouns that cross a border: between files and code, driver and worker, worker and storage.

Plain frozen dataclasses that pickle small. Knows words and ranges; knows no file, tensor or cluster.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from numbers import Integral
from typing import Any, Literal

from flux_batch.errors import InvalidSetting

# The spellings of diffusers, accepted wherever ours are: in the call, the job file and as columns.
ALIASES = {
    "guidance_scale": "embedded_guidance",
    "true_cfg_scale": "cfg_scale",
    "max_sequence_length": "t5_sequence_length",
}

# A packed latent token covers 16 x 16 pixels (8x autoencoder, 2x2 patches).
PIXELS_PER_TOKEN = 16
# Position ids of a side longer than this are no longer exact in bfloat16 pipelines, and no FLUX.1 was trained near it.
MAX_SIDE = 8192
MAX_STEPS = 1000
# torch.Generator takes 64 bits; one bit is kept free so that seed + image index never overflows a signed column.
MAX_SEED = 2**62


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """What to make from a prompt. Width and height in pixels. Raises: InvalidSetting for a value out of range."""

    width: int = 1024
    height: int = 1024
    num_inference_steps: int = 28
    embedded_guidance: float = 3.5
    cfg_scale: float = 1.0
    negative_prompt: str = ""
    t5_sequence_length: int | None = None

    def __post_init__(self) -> None:
        check_side("width", self.width)
        check_side("height", self.height)
        check_integer("num_inference_steps", self.num_inference_steps, 1, MAX_STEPS)
        check_scale("embedded_guidance", self.embedded_guidance)
        check_scale("cfg_scale", self.cfg_scale)
        check_text("negative_prompt", self.negative_prompt)
        if self.t5_sequence_length is not None:
            check_integer("t5_sequence_length", self.t5_sequence_length, 1, 4096)

    @property
    def uses_cfg(self) -> bool:
        """Whether a second forward pass with the negative prompt is needed."""
        return self.cfg_scale != 1.0


SAMPLING_FIELDS = tuple(f.name for f in fields(SamplingParams))


def check_side(name: str, value: int) -> None:
    """Raise InvalidSetting unless `value` is a picture side in pixels that FLUX can make."""
    check_integer(name, value, PIXELS_PER_TOKEN, MAX_SIDE)
    if value % PIXELS_PER_TOKEN:
        below = value - value % PIXELS_PER_TOKEN
        nearest = f"the nearest are {below} and {below + PIXELS_PER_TOKEN}"
        raise InvalidSetting(f"{name} = {value}: must be a multiple of {PIXELS_PER_TOKEN}; {nearest}", field=name)


def check_integer(name: str, value: int, low: int, high: int) -> None:
    """Raise InvalidSetting unless `value` is a whole number in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, Integral) or not low <= value <= high:
        raise InvalidSetting(f"{name} = {value!r}: must be a whole number from {low} to {high}", field=name)


def check_scale(name: str, value: float) -> None:
    """Raise InvalidSetting unless `value` is a finite number of at least 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (math.isfinite(value) and value >= 0):
        raise InvalidSetting(f"{name} = {value!r}: must be a finite number of at least 0", field=name)


def check_text(name: str, value: str) -> None:
    """Raise InvalidSetting unless `value` is text that a file can hold: YAML and JSON can spell half a character."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidSetting(f"{name} = {value!r}: must be valid Unicode", field=name) from error


def image_seed(run_seed: int, row_id: str, image_index: int) -> int:
    """Derive the seed of an image whose row names none: a function of the input alone, whatever worker or shard.

    Returns: 53 bits, exact in JSON and in double columns.
    """
    digest = hashlib.blake2b(f"{run_seed}\x1f{row_id}\x1f{image_index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 11


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """The unit of work, retry and commit: a range of rows of one prompts file. Pickles to about 200 bytes.

    `start` is the first row in the file; `offset` the byte where that row begins (text formats; 0 for Parquet);
    `name` the file's path relative to the data set, which row ids are made of.
    """

    index: int
    uri: str
    name: str
    start: int
    num_rows: int
    offset: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageRequest:
    """One prompt row, validated: `seeds` has one entry for each image wanted."""

    row: int  # within the shard
    id: str
    prompt: str
    sampling: SamplingParams
    seeds: tuple[int, ...]
    passthrough: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class FailedRow:
    """A prompt row that cannot become a request, with the reason and as much of it as could be read."""

    row: int  # within the shard
    id: str
    prompt: str
    error_type: str
    error_message: str
    passthrough: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageRecord:
    """One row of the metadata: a requested image, made or failed.

    Sampling fields are None only when the row was too broken to read them.
    """

    key: str
    id: str
    image_index: int
    prompt: str
    negative_prompt: str | None = None
    seed: int | None = None
    width: int | None = None
    height: int | None = None
    num_inference_steps: int | None = None
    embedded_guidance: float | None = None
    cfg_scale: float | None = None
    t5_sequence_length: int | None = None
    clip_truncated: bool | None = None
    t5_truncated: bool | None = None
    model: str
    status: Literal["success", "failed"]
    error_type: str | None = None
    error_message: str | None = None
    file_name: str | None = None
    sha256: str | None = None
    bytes: int | None = None
    passthrough: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredFile:
    """A file of a run that a commit vouches for; `path` is relative to the output."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Commit:
    """The fact that a shard is done: what it made, the hashes of the files that hold it, and which worker made it."""

    shard: int
    worker: str
    num_images: int
    num_failed: int
    files: tuple[StoredFile, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardResult:
    """What a worker tells the driver of one shard: a hint only, the commit in storage is the fact."""

    shard: int
    worker: str = ""
    num_images: int = 0
    num_failed: int = 0
    num_bytes: int = 0
    is_new: bool = False  # rendered now; not met as committed by another attempt
    device_s: float = 0.0  # time the pipeline was working
    wall_s: float = 0.0
    error: str | None = None  # set when the shard could not be committed
