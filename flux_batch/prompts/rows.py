"""One row of a prompts file -> an image request: its columns, their types and ranges, the job's defaults.

This module knows the sections `prompts` and `sampling` of the job file, but not files or their formats.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from decimal import Decimal
from typing import Any, SupportsIndex

import pyarrow as pa

from flux_batch.config.known_settings import known_words
from flux_batch.config.schema import PROMPT_FIELDS, LoraConfig, PromptsConfig, SamplingConfig
from flux_batch.errors import InvalidSetting, RowError, count_of
from flux_batch.prompts.access import ImageAccess, RowLoras, shortened
from flux_batch.prompts.formats.table import BadRow, Row, check_whole_characters
from flux_batch.prompts.input_images import image_of_bytes
from flux_batch.records import FailedRow, ImageRequest, InputImage, LoraUse, RowImages, image_seed
from flux_batch.redaction import public_uri
from flux_batch.sampling_params import (
    ALIASES,
    MAX_SEED,
    SAMPLING_FIELDS,
    WRITTEN_SEEDS,
    SamplingParams,
    check_integer,
)

# Smaller whole numbers are exact as floats; from here on, different ones may become the same float.
_EXACT_FLOATS = 2**53
# More digits than the largest whole number of any field has.
_MAX_DIGITS = 40
# The most images in one column of a row.
_MAX_IMAGES = 16


class RowParser:
    """A parser of rows: values by column -> a validated ImageRequest, or a FailedRow with the reason."""

    def __init__(
        self,
        config: PromptsConfig,
        sampling: SamplingConfig,
        uri: str = "",
        loras: Sequence[LoraConfig] = (),
        known: Collection[str] | None = None,
        guidance: float | None = None,
        folders: Callable[[], Sequence[str]] | None = None,
    ) -> None:
        """Parse rows of the prompts file `uri`; known: the settings that the pipeline knows, None for all.

        guidance: the guidance of the model with the job's LoRAs; None if no images are made. folders: see ImageAccess.
        """
        self._known = known
        self._guidance_from_model = sampling.embedded_guidance is None and guidance is not None
        sampling = sampling if guidance is None else sampling.for_model(guidance)
        self._passthrough = config.metadata_columns
        self._images = ImageAccess(config, uri, folders)
        self._loras = RowLoras(loras, uri)
        image = sampling.input_image
        self._input_image = InputImage(name=public_uri(image), uri=image) if image else None
        self._defaults = sampling.params()
        self._size_from_reference = sampling.size_from_reference
        self._num_images = sampling.num_images_per_prompt
        self._run_seed = sampling.seed
        spellings = {field: [field] for field in PROMPT_FIELDS}
        for other, field in ALIASES.items():
            spellings[field].append(other)
        self._columns = spellings | {field: [column] for field, column in config.columns.items()}

    @property
    def columns(self) -> set[str]:
        """The names of all columns that are read from a row."""
        return {name for names in self._columns.values() for name in names} | set(self._passthrough)

    def parse(
        self, values: Row | BadRow, *, row: int, default_id: str, line: Callable[[], int] = lambda: 0
    ) -> ImageRequest | FailedRow:
        """Validate one row.

        row: its number in the shard. line: returns its line in the file, 0 without one; called only if the row fails.
        """
        if isinstance(values, BadRow):
            place = _place(default_id, line())
            return FailedRow(
                row=row, id=default_id, prompt="", error_type="RowError", error_message=f"{place}: {values.reason}"
            )
        values, broken = _with_whole_characters(values)
        row_id = text_of(self._cell(values, "id")) or default_id
        passthrough = {name: values.get(name) for name in self._passthrough}
        try:
            if broken:
                raise RowError(f"column {broken!r} is not valid Unicode: it holds half of a surrogate pair")
            prompt = self._prompt(values)
            params = self._sampling(values)
            images = self._row_images(values)
            if images.input_image is None and params.denoising_strength < 1:
                raise RowError(
                    f"denoising_strength = {params.denoising_strength}: needs an input_image, and there is none"
                )
            loras = self._loras_of(values)
            self._check_known(params, images, loras)
            seeds = self._seeds(values, row_id)
        except (RowError, InvalidSetting) as error:
            return FailedRow(
                row=row,
                id=row_id,
                prompt=text_of(self._cell(values, "prompt")),
                error_type=type(error).__name__,
                error_message=f"{_place(default_id, line())}: {error}",
                passthrough=passthrough,
            )
        return ImageRequest(
            row=row,
            id=row_id,
            prompt=prompt,
            sampling=params,
            seeds=seeds,
            images=images,
            size_from_reference=self._takes_size(values, images),
            guidance_from_model=self._takes_guidance(values, loras),
            loras=loras,
            passthrough=passthrough,
        )

    def _cell(self, values: Row, field: str) -> Any:
        return next((values[name] for name in self._columns[field] if values.get(name) is not None), None)

    def _prompt(self, values: Row) -> str:
        prompt = self._cell(values, "prompt")
        column = self._columns["prompt"][0]
        if prompt in (None, "") and self._cell(values, "image_prompt") not in (None, "", []):
            return ""  # Redux makes images from image prompts alone
        if prompt is None:
            raise RowError(f"column {column!r} is null: a prompt is needed")
        if not isinstance(prompt, str):
            raise RowError(f"column {column!r} holds {type(prompt).__name__}: a prompt must be text")
        if not prompt.strip():
            raise RowError(f"column {column!r} is empty: a prompt is needed")
        if "\0" in prompt:
            raise RowError(f"column {column!r} holds the character NUL: save its file as UTF-8")
        return prompt

    def _sampling(self, values: Row) -> SamplingParams:
        """Return the settings of a row. Raises: InvalidSetting; RowError if two columns of one setting differ."""
        overrides: dict[str, Any] = {}
        for field in SAMPLING_FIELDS:
            names = [name for name in self._columns[field] if values.get(name) is not None]
            for name in names:
                value = _convert(field, values[name])
                if overrides.setdefault(field, value) != value:
                    raise RowError(
                        f"columns {' and '.join(names)}: two different values of one setting; leave one of them empty"
                    )
        return replace(self._defaults, **overrides) if overrides else self._defaults

    def _row_images(self, values: Row) -> RowImages:
        """Return the images of a row. Raises: RowError for an invalid one, or a mask without its image."""
        start = self._image_cell(values, "input_image")
        images = RowImages(
            input_image=self._input_image if start is None else self._image("input_image", start),
            mask_image=self._image("mask_image", self._image_cell(values, "mask_image")),
            control_image=self._weighted_images(values, "control_image"),
            reference_image=self._several_images(values, "reference_image"),
            image_prompt=self._weighted_images(values, "image_prompt"),
        )
        if images.mask_image and not images.input_image and not images.control_image:
            raise RowError(f"mask_image {shortened(images.mask_image.name)}: needs an input_image, and there is none")
        return images

    def _check_known(self, params: SamplingParams, images: RowImages, loras: tuple[LoraUse, ...]) -> None:
        """Raise RowError for a setting of the row that the pipeline does not know."""
        if self._known is None:
            return
        changed = [name for name in SAMPLING_FIELDS if getattr(params, name) != getattr(self._defaults, name)]
        given = [name for name in (*changed, *images.by_column) if name not in ("width", "height")]
        for name in (*given, *(["loras"] if loras else [])):
            if name not in self._known:
                raise RowError(f"{name}: the pipeline of the job does not know it{known_words(self._known)}")

    def _takes_size(self, values: Row, images: RowImages) -> bool:
        has_own = any(self._cell(values, side) is not None for side in ("width", "height"))
        return self._size_from_reference and bool(images.reference_image) and not has_own

    def _takes_guidance(self, values: Row, loras: tuple[LoraUse, ...]) -> bool:
        has_own = self._cell(values, "embedded_guidance") is not None
        return self._guidance_from_model and not has_own and loras != self._loras.defaults

    def _image_cell(self, values: Row, field: str) -> Any:
        """Return the cell of an image; for a struct, its bytes, or its path without bytes."""
        return _image_value(self._cell(values, field))

    def _several_images(self, values: Row, field: str) -> tuple[InputImage, ...]:
        """Return the images of a cell that holds one or a list of them."""
        value, column = _listed(self._cell(values, field)), self._columns[field][0]
        cells = value if isinstance(value, list) else [value]
        if len(cells) > _MAX_IMAGES:
            raise RowError(f"column {column!r} holds {len(cells)} images, more than {_MAX_IMAGES}")
        found = [self._image(field, _image_value(cell)) for cell in cells]
        images = tuple(image for image in found if image)
        if len(images) < len(cells) > 1:
            raise RowError(f"column {column!r}: image {found.index(None) + 1} of {len(cells)} is empty")
        return images

    def _weighted_images(self, values: Row, field: str) -> tuple[InputImage, ...]:
        """Return the images of a cell with their weights: one weight for all, or one for each."""
        name = f"{field}_scale"
        images, cell = self._several_images(values, field), _listed(self._cell(values, name))
        if cell is None:
            return images
        if not images:
            raise RowError(f"{name}: needs {field}, and there is none")
        scales = [_number(name, each) for each in (cell if isinstance(cell, list) else [cell])]
        scales = scales * len(images) if len(scales) == 1 else scales
        if len(scales) != len(images):
            raise RowError(f"{name}: {len(scales)} weights for {count_of(len(images), 'image')} in {field}")
        return tuple(replace(image, scale=scale) for image, scale in zip(images, scales, strict=True))

    def _image(self, field: str, value: Any) -> InputImage | None:
        """Return the image of a path, an address or bytes; None for an empty text."""
        if value is None or value == "":
            return None
        if isinstance(value, bytes):
            return image_of_bytes(value, field)
        if isinstance(value, str):
            return self._images.find(value, field)
        raise RowError(
            f"column {self._columns[field][0]!r} holds {type(value).__name__}: "
            "must be a path, an address, bytes, or a struct of bytes and path"
        )

    def _loras_of(self, values: Row) -> tuple[LoraUse, ...]:
        scale = self._cell(values, "lora_scale")
        return self._loras.choose(self._cell(values, "lora"), None if scale is None else _number("lora_scale", scale))

    def _seeds(self, values: Row, row_id: str) -> tuple[int, ...]:
        count = self._cell(values, "num_images_per_prompt")
        count = self._num_images if count is None else _integer("num_images_per_prompt", count)
        check_integer("num_images_per_prompt", count, 1, 1000)
        seed = self._cell(values, "seed")
        if seed is None:
            return tuple(image_seed(self._run_seed, row_id, index) for index in range(count))
        seed = _integer("seed", seed)
        check_integer("seed", seed, 0, MAX_SEED - count)  # the last image's seed must be valid too
        return tuple((seed + index) % WRITTEN_SEEDS for index in range(count))


def _with_whole_characters(values: Row) -> tuple[Row, str]:
    """Return the values with `?` for lone surrogates, and the first column with one; empty if none."""
    whole, broken = {}, ""
    for name, value in values.items():
        try:
            check_whole_characters(value)
            whole[name] = value
        except ValueError:
            broken = broken or name
            whole[name] = str(value).encode(errors="replace").decode()
    return (whole, broken) if broken else (values, "")


def _place(row_id: str, line: int) -> str:
    """Return the place of a row, for messages."""
    return f"{row_id} (line {line})" if line else row_id


def _image_value(cell: Any) -> Any:
    """Return the value of a cell; for a struct of Hugging Face, its bytes, or its path without bytes."""
    if isinstance(cell, Mapping):
        return cell.get("path") if cell.get("bytes") is None else cell["bytes"]
    return cell


def _listed(cell: Any) -> Any:
    """Return the list that a text cell contains as JSON, since CSV has no lists; other cells unchanged."""
    if isinstance(cell, str) and cell.startswith("["):
        with suppress(ValueError, RecursionError):
            return json.loads(cell)
    return cell


def _convert(field: str, value: Any) -> Any:
    """Return the value of a cell, converted to the type of a sampling field. Raises: InvalidSetting."""
    kind = SAMPLING_FIELDS[field].type
    if kind is int:
        return _integer(field, value)
    if kind is float:
        return _number(field, value)
    if not isinstance(value, str):
        raise InvalidSetting(f"{field} = {_shown(value)}: must be text", field=field)
    return value


def _integer(field: str, value: Any) -> int:
    """Return a whole number exactly, also from text, decimals and floats.

    Raises: InvalidSetting for a float so large that it may have been rounded from another number.
    """
    if isinstance(value, SupportsIndex) and not isinstance(value, bool):
        return value.__index__()
    if isinstance(value, (str, Decimal)):
        return _integer_of_decimal(field, value)
    number = _number(field, value)
    if not number.is_integer():
        raise InvalidSetting(f"{field} = {_shown(value)}: must be a whole number", field=field)
    if abs(number) >= _EXACT_FLOATS:
        raise InvalidSetting(
            f"{field} = {_shown(value)}: is a float, which is not exact from 2^53 on; store whole numbers", field=field
        )
    return int(number)


def _integer_of_decimal(field: str, value: str | Decimal) -> int:
    """Return the whole number in a text or decimal, without conversion to a float."""
    try:
        number = Decimal(value.strip()) if isinstance(value, str) else value
    except ArithmeticError as error:
        raise InvalidSetting(f"{field} = {_shown(value)}: must be a number", field=field) from error
    if not number.is_finite():
        raise InvalidSetting(f"{field} = {_shown(value)}: must be a finite number", field=field)
    if number.adjusted() > _MAX_DIGITS or number != number.to_integral_value():
        raise InvalidSetting(f"{field} = {_shown(value)}: must be a whole number", field=field)
    return int(number)


def _number(field: str, value: Any) -> float:
    try:
        if isinstance(value, bool):
            raise TypeError("true and false are not numbers")
        number = float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidSetting(f"{field} = {_shown(value)}: must be a number", field=field) from error
    if not math.isfinite(number):
        raise InvalidSetting(f"{field} = {_shown(value)}: must be a finite number", field=field)
    return number


def _shown(value: Any) -> str:
    """Return a value as text for messages, cut if it is long."""
    text = _spelled(value, repr)
    return text if len(text) <= 100 else f"{text[:100]}..."


def text_of(value: Any) -> str:
    """Return the text of a cell, the same for 7, 7.0 and Decimal("7.00").

    Other cells decide which of them it is: a column of whole numbers is read as floats if one is null. NaN gives an
    empty text, like null.
    """
    if isinstance(value, (float, Decimal)):
        if not math.isfinite(value):
            return "" if math.isnan(value) else str(value)
        return str(int(value)) if value == int(value) else str(value)
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="backslashreplace")
    return "" if value is None else _spelled(value, str)


def _spelled(value: Any, spell: Callable[[Any], str]) -> str:
    """Return the text of a value; Arrow formats times that Python's types cannot hold."""
    try:
        return spell(value)
    except (ValueError, OverflowError):
        if not isinstance(value, pa.Scalar):
            raise
        return str(value.cast(pa.string()).as_py())
