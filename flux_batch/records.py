"""The nouns that cross a border: between files and code, driver and worker, worker and storage.

Plain frozen dataclasses that pickle small. Knows words and ranges; knows no file, tensor or cluster.
"""

from __future__ import annotations

import difflib
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral
from typing import Any, Literal, get_args

from flux_batch.errors import InvalidSetting

# The spellings of diffusers, accepted wherever ours are: in the call, the job file and as columns.
ALIASES = {
    "guidance_scale": "embedded_guidance",
    "true_cfg_scale": "cfg_scale",
    "max_sequence_length": "t5_sequence_length",
}

# How matrices are kept: as the model's dtype; in bfloat16 or fp8, widened to it for each product; multiplied in fp8.
Quantization = Literal["none", "bfloat16", "fp8", "fp8_matmul"]

# A packed latent token covers 16 x 16 pixels (8x autoencoder, 2x2 patches).
PIXELS_PER_TOKEN = 16
# Position ids of a side longer than this are no longer exact in bfloat16 pipelines, and no FLUX.1 was trained near it.
MAX_SIDE = 8192
MAX_STEPS = 1000
# Latents along a side of a tile: smaller ones would know too little of the image to be worth the name.
MIN_TILE = 16
# What a row's `lora` column says for none: CSV has no empty text, only missing values.
NO_LORA = ("", "none")
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
    sigma_shift: float | None = None
    denoising_strength: float = 1.0

    def __post_init__(self) -> None:
        check_side("width", self.width)
        check_side("height", self.height)
        check_integer("num_inference_steps", self.num_inference_steps, 1, MAX_STEPS)
        check_scale("embedded_guidance", self.embedded_guidance)
        check_scale("cfg_scale", self.cfg_scale)
        check_text("negative_prompt", self.negative_prompt)
        if self.t5_sequence_length is not None:
            check_integer("t5_sequence_length", self.t5_sequence_length, 1, 4096)
        if self.sigma_shift is not None:
            check_shift("sigma_shift", self.sigma_shift)
        check_strength("denoising_strength", self.denoising_strength)

    @property
    def uses_cfg(self) -> bool:
        """Whether a second forward pass with the negative prompt is needed."""
        return self.cfg_scale != 1.0


SAMPLING_FIELDS = tuple(f.name for f in fields(SamplingParams))


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raise InvalidSetting, with the nearest, unless `value` is one of `choices`."""
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise InvalidSetting(f"{name} = {value!r}: must be one of {', '.join(choices)}{hint}", field=name)


def check_quantization(value: str, dtype: str) -> None:
    """Raise InvalidSetting unless weights can be kept that way in a model of `dtype`, by its name."""
    check_choice("quantization", value, get_args(Quantization))
    if value == "fp8_matmul" and dtype not in ("bfloat16", "auto"):
        raise InvalidSetting(
            f"quantization = fp8_matmul: products in fp8 give bfloat16, not {dtype}; take bfloat16, or fp8 alone",
            field="quantization",
        )
    if value == "bfloat16" and dtype not in ("float32", "auto"):
        raise InvalidSetting(
            f"quantization = bfloat16: saves nothing in a model of {dtype}; take dtype float32, or quantization none",
            field="quantization",
        )


def check_step_cache(value: float) -> None:
    """Raise InvalidSetting unless `value` is a threshold for reusing steps: 0, which is off, to 1."""
    check_scale("step_cache", value)
    if value > 1:
        raise InvalidSetting(f"step_cache = {value}: must be from 0, which is off, to 1", field="step_cache")


def check_cuda_graphs(value: bool, step_cache: float) -> None:
    """Raise InvalidSetting for CUDA graphs beside a step cache, which decides at each step what is launched."""
    if value and step_cache:
        raise InvalidSetting(
            f"cuda_graphs = {value}: a step cache decides at each step what is launched, which no graph can; "
            f"leave it out, or set step_cache = {step_cache} to 0",
            field="cuda_graphs",
        )


def check_side(name: str, value: int) -> None:
    """Raise InvalidSetting unless `value` is an image side in pixels that FLUX can make."""
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


def check_number(name: str, value: float) -> None:
    """Raise InvalidSetting unless `value` is a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InvalidSetting(f"{name} = {value!r}: must be a finite number", field=name)


def check_shift(name: str, value: float) -> None:
    """Raise InvalidSetting unless `value` is a finite number of more than 0."""
    check_scale(name, value)
    if value == 0:
        raise InvalidSetting(f"{name} = {value}: must be more than 0", field=name)


def check_strength(name: str, value: float) -> None:
    """Raise InvalidSetting unless `value` is a share of the noise: more than 0, at most 1."""
    check_scale(name, value)
    if not 0 < value <= 1:
        raise InvalidSetting(f"{name} = {value}: must be more than 0 and at most 1", field=name)


def check_tiles(tile_size: int, tile_stride: int) -> None:
    """Raise InvalidSetting unless tiles of that size and distance, in latents, cover an image without gaps."""
    check_integer("tile_size", tile_size, MIN_TILE, MAX_SIDE)
    check_integer("tile_stride", tile_stride, 1, tile_size)


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
class Attempt:
    """One try at a shard: what the engine knows of those before it.

    `number` counts the tries, from 1; `lost` the workers that were lost while they made it, and `reason` says how the
    last one was. `from_end` makes the last images first, since another worker makes the first ones now.
    """

    number: int = 1
    lost: int = 0
    reason: str = ""
    from_end: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class InputImage:
    """The image that an image starts from: where it is, or its bytes.

    `name` is what the metadata says of it: the address as it was given, or the hash of the bytes. `within` are the
    local folders of which one must hold it; None if the job file names it, which is trusted.
    """

    name: str
    uri: str = ""
    data: bytes = b""
    within: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraUse:
    """A LoRA that an image is made with: what the job or the row calls it, where it lies, how much of it."""

    name: str
    uri: str
    scale: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageRequest:
    """One prompt row, validated: `seeds` has one entry for each image wanted."""

    row: int  # within the shard
    id: str
    prompt: str
    sampling: SamplingParams
    seeds: tuple[int, ...]
    input_image: InputImage | None = None
    loras: tuple[LoraUse, ...] = ()
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
    sigma_shift: float | None = None
    denoising_strength: float | None = None
    input_image: str | None = None
    lora: str | None = None
    lora_scale: float | None = None
    tile_size: int | None = None
    clip_truncated: bool | None = None
    t5_truncated: bool | None = None
    model: str
    quantization: Quantization = "none"
    step_cache: float = 0.0
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
    """The fact that a shard is done: what it made, the hashes of the files that hold it, and which worker made it.

    `failures` counts the failed images by error type; `device_s` is how long the pipeline of that worker was at work.
    """

    shard: int
    worker: str
    num_images: int
    num_failed: int
    files: tuple[StoredFile, ...]
    failures: dict[str, int] = field(default_factory=dict)
    device_s: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardResult:
    """What a worker tells the driver of one shard: a hint only, the commit in storage is the fact."""

    shard: int
    worker: str = ""
    num_images: int = 0
    num_failed: int = 0
    num_bytes: int = 0
    failures: dict[str, int] = field(default_factory=dict)  # of the failed images, by error type
    is_new: bool = False  # rendered now; not met as committed by another attempt
    device_s: float = 0.0  # time the pipeline was working
    wall_s: float = 0.0
    error: str | None = None  # set when the shard could not be committed
