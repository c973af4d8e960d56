"""The sampling fields with their defaults, ranges and texts, and the ranges of other settings.

The job file, prompt rows, the pipeline's call, batches and the metadata all take their fields from SamplingParams.
This module knows names and ranges, but no file, tensor or cluster.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from numbers import Integral, Real
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_type_hints

from flux_batch.errors import InvalidSetting, did_you_mean

# The spellings of diffusers. The call, the job file and the columns of rows accept them beside ours.
ALIASES = {
    "guidance_scale": "embedded_guidance",
    "true_cfg_scale": "cfg_scale",
    "max_sequence_length": "t5_sequence_length",
}

# How matrices are stored. none: in the model's dtype. bfloat16, fp8: converted to that dtype for each product.
# fp8_matmul: multiplied in fp8.
Quantization = Literal["none", "bfloat16", "fp8", "fp8_matmul"]

# The side of the square that a packed latent token covers: 8 pixels of the autoencoder, 2 latents of a patch.
TOKEN_SIDE_PX = 16
# Position ids of a longer side are not exact in bfloat16 pipelines, and FLUX.1 was trained on far smaller images.
MAX_SIDE = 8192
_MAX_STEPS = 1000
MAX_T5_LENGTH = 4096
# Seeds are less than this: torch.Generator takes 64 bits.
MAX_SEED = 2**64
# Written seeds are less than this, since data sets are read into signed columns. A larger seed is written modulo it,
# and gives the same noise: torch's CPU generator uses the lowest 32 bits (pytorch, ATen/core/MT19937RNGEngine.h).
WRITTEN_SEEDS = 2**63
# The smallest side of a tile, in latents: smaller tiles would see too little of the image.
_MIN_TILE = 16


def num_image_tokens(width: int, height: int) -> int:
    """Return the number of latent tokens of an image of `width` x `height` pixels."""
    return (width // TOKEN_SIDE_PX) * (height // TOKEN_SIDE_PX)


# Width and height of FLUX.1-Kontext's training images, about a megapixel each.
# Source: black-forest-labs/flux 802fb47, src/flux/util.py, PREFERED_KONTEXT_RESOLUTIONS.
_UPRIGHT = ((672, 1568), (688, 1504), (720, 1456), (752, 1392), (800, 1328), (832, 1248), (880, 1184), (944, 1104))
_KONTEXT_SIZES = (*_UPRIGHT, (1024, 1024), *((height, width) for width, height in reversed(_UPRIGHT)))


def preferred_size(width: int, height: int) -> tuple[int, int]:
    """Return the (width, height) with the nearest proportions among Kontext's training sizes."""
    return min(_KONTEXT_SIZES, key=lambda size: (abs(width / height - size[0] / size[1]), *size))


def own_size(width: int, height: int) -> tuple[int, int]:
    """Return the (width, height) of an image rounded down to whole tokens, at least one."""
    return tuple(max(TOKEN_SIDE_PX, side - side % TOKEN_SIDE_PX) for side in (width, height))  # type: ignore[return-value]


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raise InvalidSetting, with the nearest choice, unless `value` is one of `choices`."""
    if value not in choices:
        hint = did_you_mean(str(value), choices)
        raise InvalidSetting(f"{name} = {value!r}: must be one of {', '.join(choices)}{hint}", field=name)


def check_integer(name: str, value: int, low: int, high: int) -> None:
    """Raise InvalidSetting unless `value` is a whole number in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, Integral) or not low <= value <= high:
        raise InvalidSetting(f"{name} = {value!r}: must be a whole number from {low} to {high}", field=name)


def _check_side(name: str, value: int) -> None:
    """Raise InvalidSetting unless `value` is an image side in pixels that FLUX can make."""
    check_integer(name, value, TOKEN_SIDE_PX, MAX_SIDE)
    if value % TOKEN_SIDE_PX:
        below = value - value % TOKEN_SIDE_PX
        nearest = f"the nearest are {below} and {below + TOKEN_SIDE_PX}"
        raise InvalidSetting(f"{name} = {value}: must be a multiple of {TOKEN_SIDE_PX}; {nearest}", field=name)


def _check_scale(name: str, value: float) -> None:
    """Raise InvalidSetting unless `value` is a finite number of at least 0."""
    if isinstance(value, bool) or not isinstance(value, Real) or not (math.isfinite(value) and value >= 0):
        raise InvalidSetting(f"{name} = {value!r}: must be a finite number of at least 0", field=name)


def check_number(name: str, value: float) -> None:
    """Raise InvalidSetting unless `value` is a finite number."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise InvalidSetting(f"{name} = {value!r}: must be a finite number", field=name)


def _check_shift(name: str, value: float) -> None:
    """Raise InvalidSetting unless `value` is a finite number of more than 0."""
    _check_scale(name, value)
    if value == 0:
        raise InvalidSetting(f"{name} = {value}: must be more than 0", field=name)


def _check_strength(name: str, value: float) -> None:
    """Raise InvalidSetting unless `value` is a share of the noise: more than 0, at most 1."""
    _check_scale(name, value)
    if not 0 < value <= 1:
        raise InvalidSetting(f"{name} = {value}: must be more than 0 and at most 1", field=name)


def _check_text(name: str, value: str) -> None:
    """Raise InvalidSetting unless `value` is text without lone surrogates, which YAML and JSON can spell."""
    if not isinstance(value, str):
        raise InvalidSetting(f"{name} = {value!r}: must be a string", field=name)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidSetting(f"{name} = {value!r}: must be valid Unicode", field=name) from error


def check_tiles(tile_size: int, tile_stride: int) -> None:
    """Raise InvalidSetting unless tiles cover an image without gaps; size and stride are in latents."""
    check_integer("tile_size", tile_size, _MIN_TILE, MAX_SIDE)
    check_integer("tile_stride", tile_stride, 1, tile_size)


def check_quantization(value: str, dtype: str) -> None:
    """Raise InvalidSetting unless `value` is a quantization for a model of `dtype`."""
    check_choice("quantization", value, get_args(Quantization))
    if value == "fp8_matmul" and dtype not in ("bfloat16", "auto"):
        raise InvalidSetting(
            f"quantization = fp8_matmul: products in fp8 give bfloat16, not {dtype}; use dtype bfloat16, "
            "or quantization fp8",
            field="quantization",
        )
    if value == "bfloat16" and dtype not in ("float32", "auto"):
        raise InvalidSetting(
            f"quantization = bfloat16: saves nothing in a model of {dtype}; use dtype float32, or quantization none",
            field="quantization",
        )


def check_step_cache(value: float) -> None:
    """Raise InvalidSetting unless `value` is a step cache threshold from 0 (off) to 1."""
    _check_scale("step_cache", value)
    if value > 1:
        raise InvalidSetting(f"step_cache = {value}: must be from 0, which is off, to 1", field="step_cache")


def check_cuda_graphs(
    value: bool, step_cache: float, num_controlnets: int = 0, *, has_ip_adapter: bool = False
) -> None:
    """Raise InvalidSetting for CUDA graphs beside a step cache, ControlNets or an IP-Adapter.

    A step cache decides at each step which kernels run, and the tensors of the others are not inputs of a graph.
    """
    if value and step_cache:
        raise InvalidSetting(
            f"cuda_graphs = {value}: a step cache decides at each step which kernels run, and a graph is fixed; "
            f"leave it out, or set step_cache = {step_cache} to 0",
            field="cuda_graphs",
        )
    if value and has_ip_adapter:
        raise InvalidSetting(
            f"cuda_graphs = {value}: a graph does not take the keys and values of an IP-Adapter; leave one of them out",
            field="cuda_graphs",
        )
    if value and num_controlnets:
        raise InvalidSetting(
            f"cuda_graphs = {value}: a graph does not take the residuals of ControlNets; leave one of them out",
            field="cuda_graphs",
        )


class _Mark(NamedTuple):
    """A marker in the annotation of a sampling field."""

    word: str


# Each image of a call may have its own value; the other fields have one value for all images of a call.
_PER_IMAGE = _Mark("per image")
# Not passed to a pipeline at its default, so that other pipelines need not have this argument.
_IF_SET = _Mark("if set")


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """The settings of one image. Raises: InvalidSetting for a value out of range.

    Each field has a type, a check, markers, a default and a docstring; SAMPLING_FIELDS is built from them. The class
    has no slots, since the job file's section `sampling` inherits from it.
    """

    width: Annotated[int, _check_side] = 1024
    """Pixels: a multiple of 16, from 16 to 8192."""
    height: Annotated[int, _check_side] = 1024
    """Pixels: a multiple of 16, from 16 to 8192."""
    num_inference_steps: Annotated[int, partial(check_integer, low=1, high=_MAX_STEPS)] = 28
    """Denoising steps, from 1 to 1000."""
    embedded_guidance: Annotated[float, _check_scale, _PER_IMAGE] = 3.5
    """The guidance that the model was distilled with; at least 0."""
    cfg_scale: Annotated[float, _check_scale, _PER_IMAGE] = 1.0
    """True classifier-free guidance; other than 1, each step runs twice, the second time with the negative prompt."""
    negative_prompt: Annotated[str, _check_text, _PER_IMAGE] = ""
    """What the image must not show; read if `cfg_scale` is not 1."""
    t5_sequence_length: Annotated[int | None, partial(check_integer, low=1, high=MAX_T5_LENGTH)] = None
    """Text tokens, from 1 to 4096; the model's own number if null: 512 for dev, 256 for schnell."""
    sigma_shift: Annotated[float | None, _check_shift, _IF_SET] = None
    """The shift of DiffSynth-Studio's static schedule, which uses 3; the model's own schedule if null."""
    denoising_strength: Annotated[float, _check_strength, _IF_SET] = 1.0
    """Share of the noise that is put over the input image, more than 0; 1 leaves nothing of it."""

    def __post_init__(self) -> None:
        for name, field in SAMPLING_FIELDS.items():
            value = getattr(self, name)
            if value is not None or field.default is not None:
                field.check(name, value)

    @property
    def uses_cfg(self) -> bool:
        """True if a second forward pass with the negative prompt is needed."""
        return self.cfg_scale != 1.0

    @property
    def shared(self) -> tuple[Any, ...]:
        """The values that must be the same for all images of one call."""
        return tuple(getattr(self, name) for name, field in SAMPLING_FIELDS.items() if not field.is_per_image)


class _SamplingField(NamedTuple):
    """One field of SamplingParams; `type` is int, float or str, even if the field may also be None."""

    type: type
    default: Any
    check: Callable[[str, Any], None]
    is_per_image: bool
    is_given_if_set: bool


def _read_fields() -> Iterator[tuple[str, _SamplingField]]:
    hints = get_type_hints(SamplingParams, include_extras=True)
    for field in fields(SamplingParams):
        annotation, check, *marks = get_args(hints[field.name])
        kind = next(iter(get_args(annotation)), annotation)
        yield field.name, _SamplingField(kind, field.default, check, _PER_IMAGE in marks, _IF_SET in marks)


SAMPLING_FIELDS: Mapping[str, _SamplingField] = dict(_read_fields())


def call_arguments(images: Sequence[SamplingParams]) -> dict[str, Any]:
    """Return the pipeline's arguments for images with the same `shared` values.

    A _PER_IMAGE field is a list, every other field one value. An _IF_SET field is left out at its default.
    """
    arguments = {}
    for name, field in SAMPLING_FIELDS.items():
        values = [getattr(image, name) for image in images]
        if not (field.is_given_if_set and values[0] == field.default):
            arguments[name] = values if field.is_per_image else values[0]
    return arguments
