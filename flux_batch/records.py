"""The records passed between files and code, driver and worker, worker and storage.

They are frozen dataclasses with small pickles. This module knows no file, tensor or cluster.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from flux_batch.sampling_params import Quantization, SamplingParams

# The separator of several images in one metadata column.
_SEPARATOR = ", "
# The start of a text that is a JSON list of names.
_LIST = '["'
# Values of the column `lora` that mean no LoRA. CSV needs "none": its empty fields are missing values.
NO_LORA = ("", "none")


def image_seed(run_seed: int, row_id: str, image_index: int) -> int:
    """Return the seed of an image whose row has none; it depends on the input only.

    Returns: an integer of 53 bits, exact in JSON and in columns of doubles.
    """
    digest = hashlib.blake2b(f"{run_seed}\x1f{row_id}\x1f{image_index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 11


def retry_seed(seed: int, retry: int) -> int:
    """Return the seed of a further try of an image, derived from the first seed; retry 0 is the first try.

    Returns: an integer of 53 bits, as `image_seed`.
    """
    if retry == 0:
        return seed
    digest = hashlib.blake2b(f"retry\x1f{seed}\x1f{retry}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 11


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRange:
    """A range of rows of one prompts file.

    `start` is the number of the first row in the file. `offset` is the byte where it begins in text formats; see
    RowRange for others. `line` is its line, from 1; 0 if rows have no lines. `name` is the file's path relative to the
    data set; row ids are made from it.
    """

    uri: str
    name: str
    start: int
    num_rows: int
    offset: int = 0
    line: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """The unit of work, retry and commit: the rows of one range of a prompts file, or of several small files.

    Its pickle has about 200 bytes per file.
    """

    index: int
    parts: tuple[FileRange, ...]

    @property
    def num_rows(self) -> int:
        """The number of rows of all parts."""
        return sum(part.num_rows for part in self.parts)


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """One attempt at a shard, with the engine's knowledge of earlier attempts.

    `number` counts the attempts, from 1. `lost` counts the workers that were lost while they made the shard, `reason`
    says how the last one was lost. `reverse_order` makes the last images first, while another worker makes the first.
    """

    number: int = 1
    lost: int = 0
    reason: str = ""
    reverse_order: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class InputImage:
    """An image that a row names: its location, or its bytes.

    `name` is its name in the metadata: the address as given, or the hash of the bytes. `scale` is the weight of a
    control image or an image prompt, 1 for other images. One of the local folders `allowed_roots` must contain it;
    None for an image of the job file, which is trusted. `column` is the field that names it, for messages.
    """

    name: str
    uri: str = ""
    data: bytes = b""
    allowed_roots: tuple[str, ...] | None = None
    column: str = "input_image"
    scale: float = 1.0


def _written(scale: float) -> str:
    """Return a weight as text that parses to exactly the same number."""
    return text if float(text := f"{scale:g}") == scale else repr(scale)


def _joined(names: Sequence[str]) -> str:
    """Return the names of images as one text: separated by commas, or as JSON if a name contains a comma."""
    is_plain = not any(_SEPARATOR in name or name.startswith(_LIST) for name in names)
    return _SEPARATOR.join(names) if is_plain else json.dumps(names, ensure_ascii=False)


def split_names(text: str) -> list[str]:
    """Return the names of images from their text in the metadata; see `RowImages.names`."""
    return [str(name) for name in json.loads(text)] if text.startswith(_LIST) else text.split(_SEPARATOR)


@dataclass(frozen=True, kw_only=True, slots=True)
class RowImages:
    """The images that a row names, by column; a column that may name several images has a tuple."""

    input_image: InputImage | None = None
    mask_image: InputImage | None = None
    control_image: tuple[InputImage, ...] = ()
    reference_image: tuple[InputImage, ...] = ()
    image_prompt: tuple[InputImage, ...] = ()

    @property
    def scales(self) -> dict[str, str | None]:
        """The weights of control images and image prompts, as text for the metadata; None without such images."""
        return {
            f"{column}_scale": ", ".join(_written(image.scale) for image in getattr(self, column)) or None
            for column in WEIGHTED_COLUMNS
        }

    @property
    def by_column(self) -> dict[str, tuple[InputImage, ...]]:
        """The images of each column that has any."""
        values = {column: getattr(self, column) for column in IMAGE_COLUMNS}
        several = {column: each if isinstance(each, tuple) else (each,) for column, each in values.items()}
        return {column: images for column, images in several.items() if images not in ((), (None,))}

    @property
    def counts(self) -> tuple[tuple[str, int], ...]:
        """The number of images in each column that has any; it is the same for all rows of a pipeline call."""
        return tuple((column, len(images)) for column, images in self.by_column.items())

    @property
    def sources(self) -> tuple[InputImage, ...]:
        """The images before an edit: the reference images; without any, the input image."""
        return self.reference_image or ((self.input_image,) if self.input_image else ())

    @property
    def names(self) -> dict[str, str | None]:
        """The names of the images of each column, as text for the metadata."""
        found: dict[str, str | None] = dict.fromkeys(IMAGE_COLUMNS)
        for column, images in self.by_column.items():
            takes_several = isinstance(getattr(self, column), tuple)
            found[column] = _joined([image.name for image in images]) if takes_several else images[0].name
        return found

    def map(self, change: Callable[[InputImage], InputImage]) -> RowImages:
        """Return these images, each replaced by the result of `change`."""
        changed: dict[str, Any] = {
            column: tuple(map(change, images)) if isinstance(getattr(self, column), tuple) else change(images[0])
            for column, images in self.by_column.items()
        }
        return RowImages(**changed)


# The columns of rows and of the metadata that name images.
IMAGE_COLUMNS = tuple(field.name for field in fields(RowImages))
# The columns whose images have weights, in another column with the suffix `_scale`.
WEIGHTED_COLUMNS = ("control_image", "image_prompt")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraUse:
    """A LoRA of an image: its name in the job or the row, its address, its strength."""

    name: str
    uri: str
    scale: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageRequest:
    """A validated prompt row; `seeds` has one entry for each image.

    `size_from_reference`: width and height come from the first reference image, and are unknown until it is read.
    `guidance_from_model`: the embedded guidance comes from the model with the row's LoRAs, which differ from the job's.
    It is unknown until they are set.
    """

    row: int  # within the shard
    id: str
    prompt: str
    sampling: SamplingParams
    seeds: tuple[int, ...]
    images: RowImages = RowImages()
    size_from_reference: bool = False
    guidance_from_model: bool = False
    loras: tuple[LoraUse, ...] = ()
    passthrough: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class FailedRow:
    """An invalid prompt row, with the reason and the values that could be read."""

    row: int  # within the shard
    id: str
    prompt: str
    error_type: str
    error_message: str
    passthrough: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageRecord:
    """One row of the metadata: a requested image, made or failed.

    `seed` and `sampling` are None only when the row was too broken to read them.
    """

    key: str
    id: str
    image_index: int
    prompt: str
    seed: int | None = None
    sampling: SamplingParams | None = None
    input_image: str | None = None
    mask_image: str | None = None
    control_image: str | None = None
    reference_image: str | None = None
    image_prompt: str | None = None
    control_image_scale: str | None = None
    image_prompt_scale: str | None = None
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
    """A file of a run that a commit lists; `path` is relative to the output."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardWork:
    """The work on a shard; the fields are those of Commit."""

    device_s: float = 0.0
    started_unix_time: float = 0.0
    stage_s: Mapping[str, float] = field(default_factory=dict)
    attempt: int = 1
    num_lost: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Commit:
    """The record that a shard is done: its counts, the hashes of its files, and the worker that made it.

    `failures` counts the failed images by error type. `device_s` is the computing time of the worker's pipeline,
    `stage_s` the seconds in each stage of the work; some stages run in parallel. `attempt` counts from 1. `num_lost`
    counts the workers that were lost at this shard before. Times are 0 in commits of versions that did not record them.
    """

    shard: int
    worker: str
    num_images: int
    num_failed: int
    files: tuple[StoredFile, ...]
    failures: dict[str, int] = field(default_factory=dict)
    device_s: float = 0.0
    started_unix_time: float = 0.0
    finished_unix_time: float = 0.0
    stage_s: dict[str, float] = field(default_factory=dict)
    attempt: int = 1
    num_lost: int = 0

    @property
    def num_bytes(self) -> int:
        """The bytes of all its files."""
        return sum(file.bytes for file in self.files)


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernels:
    """The device, settings and libraries that compute images; others may change the last bits.

    `attention` names the kernels that attention tries first, `torch` for torch's own order. `compile` is True if the
    blocks are compiled. `cuda` and `cudnn` are None on other devices.
    """

    device: str
    attention: str
    compile: bool
    torch: str
    cuda: str | None = None
    cudnn: int | None = None

    def __str__(self) -> str:
        names = [self.device, f"attention {self.attention}", "compiled" if self.compile else "not compiled"]
        names += [f"torch {self.torch}"]
        names += [f"CUDA {self.cuda}"] if self.cuda else []
        names += [f"cuDNN {self.cudnn}"] if self.cudnn else []
        return ", ".join(names)

    @classmethod
    def of_record(cls, record: object) -> Kernels | None:
        """Return the kernels in the record of a run; None in records of older versions."""
        try:
            return cls(**record["kernels"])  # type: ignore[index]
        except (KeyError, TypeError):
            return None


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardResult:
    """A worker's answer about one shard; only a hint: the commit in storage decides."""

    shard: int
    worker: str = ""
    num_images: int = 0
    num_failed: int = 0
    num_bytes: int = 0
    failures: dict[str, int] = field(default_factory=dict)  # of the failed images, by error type
    is_new: bool = False  # rendered now; False if another attempt had committed it
    device_s: float = 0.0  # time the pipeline was working
    wall_s: float = 0.0
    error: str | None = None  # set when the shard could not be committed
