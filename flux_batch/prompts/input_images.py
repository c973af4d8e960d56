"""The images that rows name: read with limits, decoded, upright, in RGB or as a mask, resized.

access.py has checked before that a row may name an image. A faulty image is a RowError, which fails its row. Only a
failure of the data set's own storage is a StoreError: its shard is retried later, so that the same rows succeed in
every run.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

from flux_batch.errors import NotFound, RowError, SourceError, StoreError, StoreRefused, one_line
from flux_batch.images import check_proportions, to_mask, to_rgb
from flux_batch.prompts.access import WEB, is_inside, local_name, scheme_of, shortened
from flux_batch.prompts.safe_http import fetch
from flux_batch.records import InputImage, RowImages
from flux_batch.redaction import public_uri
from flux_batch.sampling_params import MAX_SIDE, own_size, preferred_size
from flux_batch.storage.filesystem import open_filesystem
from flux_batch.storage.retry import with_retries

MAX_BYTES = 64 * 2**20
MAX_PIXELS = 64_000_000
# The largest side of an image prompt, of which the model reads few pixels: several large images would fill the memory.
_MAX_PROMPT_SIDE = 2048
# Formats that contain only pixels: no scripts, no fonts, no references to other files.
_IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF")
# Errors of reading a file that are caused by the machine, not by the row.
_HOST_ERRNOS = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE, errno.ENFILE, errno.ENOMEM}


def image_of_bytes(data: bytes, column: str = "input_image") -> InputImage:
    """Return an image from the bytes in a row. Raises: RowError if it is empty or too large."""
    if not data:
        raise RowError(f"{column}: is empty: the bytes of an image are needed")
    if len(data) > MAX_BYTES:
        raise RowError(f"{column}: has more than the {MAX_BYTES} bytes allowed")
    return InputImage(name=f"sha256:{hashlib.sha256(data).hexdigest()}", data=data, column=column)


def spilled(image: InputImage, folder: Path) -> InputImage:
    """Return an image whose bytes are moved from memory to a file in `folder`."""
    if not image.data:
        return image
    path = folder / f"input-{image.name.rpartition(':')[2]}"
    path.write_bytes(image.data)
    return replace(image, data=b"", uri=str(path))


def check_job_image(uri: str, storage_options: Mapping[str, Any]) -> None:
    """Raise SourceError unless the image that the job file names can be used."""
    try:
        load_image(InputImage(name=public_uri(uri), uri=uri), storage_options)
    except RowError as error:
        raise SourceError(f"sampling.{error}") from error


def load_image(
    source: InputImage, storage_options: Mapping[str, Any], size: tuple[int, int] | None = None
) -> Image.Image:
    """Return an image in RGB: upright by its EXIF, transparency on white, colour profiles not applied.

    size: (width, height) to resize it to, by Lanczos and ignoring its proportions, as diffusers does.
    Raises: RowError with the reason; StoreError if the data set's storage is unavailable.
    """
    with _naming(source):
        image = decode(source.data or _read_bytes(source, storage_options))
        return image.resize(size, Image.Resampling.LANCZOS) if size else image


def load_images(
    images: RowImages,
    storage_options: Mapping[str, Any],
    size: tuple[int, int] | None,
    *,
    resize_references: bool = True,
) -> dict[str, Any]:
    """Return the images of a row, resized, by argument of the pipeline's call.

    size: (width, height) of the image to make; None takes the size of the first reference image. Raises: the errors of
    `load_image`; RowError for a mask whose proportions differ from its image's.
    """
    found: dict[str, Any] = {}
    if images.reference_image:
        size_of = preferred_size if resize_references else own_size
        found["reference_image"] = [_load_reference(each, storage_options, size_of) for each in images.reference_image]
        size = size or found["reference_image"][0].size
    assert size is not None  # without a size there is a reference image
    start = load_image(images.input_image, storage_options) if images.input_image else None
    if start:
        found["input_image"] = start.resize(size, Image.Resampling.LANCZOS)
    repainted = start.size if start else None
    for each in images.control_image:  # one by one: several large images would not fit into memory
        control = load_image(each, storage_options)
        repainted = repainted or control.size
        found.setdefault("control_image", []).append(control.resize(size, Image.Resampling.LANCZOS))
    if images.mask_image and repainted:
        with _naming(images.mask_image):
            data = images.mask_image.data or _read_bytes(images.mask_image, storage_options)
            mask = decode(data, to_mask)
            check_proportions(mask.size, repainted)
            found["mask_image"] = mask.resize(size, Image.Resampling.LANCZOS)
    if images.image_prompt:
        found["image_prompt"] = [_made_small(load_image(image, storage_options)) for image in images.image_prompt]
    return found


def _made_small(image: Image.Image) -> Image.Image:
    """Return a smaller image prompt: the image encoder reads only a few hundred pixels per side."""
    image.thumbnail((_MAX_PROMPT_SIDE, _MAX_PROMPT_SIDE), Image.Resampling.LANCZOS)
    return image


def _load_reference(
    source: InputImage, storage_options: Mapping[str, Any], size_of: Callable[[int, int], tuple[int, int]]
) -> Image.Image:
    """Return a reference image at the size that the model reads. Raises: as `load_image`."""
    image = load_image(source, storage_options)
    with _naming(source):
        size = size_of(*image.size)
        if max(size) > MAX_SIDE:
            raise RowError(f"{image.width} x {image.height} pixels: a side of a reference may have at most {MAX_SIDE}")
    return image.resize(size, Image.Resampling.LANCZOS)


@contextmanager
def _naming(source: InputImage) -> Iterator[None]:
    """Run the block, and turn errors of an image into a RowError that names it."""
    try:
        yield
    except (RowError, NotFound, StoreRefused) as error:
        raise RowError(f"{source.column} {shortened(source.name)}: {error}") from error


def _read_bytes(image: InputImage, storage_options: Mapping[str, Any]) -> bytes:
    """Return the bytes of an image file, at most MAX_BYTES. Raises: RowError, StoreError, NotFound."""
    scheme = scheme_of(image.uri)
    if scheme in WEB:
        return fetch(image.uri, MAX_BYTES)
    if scheme in ("", "file"):
        return _read_file(local_name(image.uri), image.allowed_roots)
    return with_retries(image.uri, "read", lambda: read_object(image.uri, storage_options))


def decode(data: bytes, convert: Callable[[Image.Image], Image.Image] = to_rgb) -> Image.Image:
    """Return the first image of a file, upright, and converted by `convert`. Raises: RowError."""
    try:
        with Image.open(io.BytesIO(data), formats=_IMAGE_FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise RowError(f"{width} x {height} pixels, more than the {MAX_PIXELS} allowed")
            image.load()
            return convert(ImageOps.exif_transpose(image))
    except RowError:
        raise
    except Image.DecompressionBombError as error:
        raise RowError(f"has more than the {MAX_PIXELS} pixels allowed") from error
    except UnidentifiedImageError as error:
        formats = ", ".join(_IMAGE_FORMATS)
        raise RowError(f"not an image in a format that is read: {formats}; or its file is damaged") from error
    except Exception as error:  # Pillow raises anything on a damaged file
        raise RowError(f"cannot be decoded, so its file is damaged: {one_line(error)}") from error


def _read_file(path: str, allowed_roots: tuple[str, ...] | None) -> bytes:
    try:
        real = os.path.realpath(path)
        if allowed_roots is not None and not any(is_inside(real, os.path.realpath(folder)) for folder in allowed_roots):
            raise RowError(f"is a link that leads out of {' and '.join(allowed_roots)}")
        if not stat.S_ISREG(os.stat(real).st_mode):  # a read from a pipe could block, from a device never end
            raise RowError(f"{path} is not a file")
        with open(real, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise RowError(f"there is no file {path}") from error
    except OSError as error:
        if error.errno in _HOST_ERRNOS:
            raise StoreError(f"{path}: cannot read: {error}") from error
        raise RowError(f"{path} cannot be read: {error.strerror}") from error
    _check_length(len(data))
    return data


def read_object(uri: str, storage_options: Mapping[str, Any]) -> bytes:
    """Read a whole image file. Raises: RowError if it is empty or too large."""
    fs, path = open_filesystem(uri, storage_options, num_retries=1)  # `with_retries` retries
    info = fs.info(path)
    if info["type"] != "file" or not info["size"]:
        raise RowError("is empty, or not a file")
    _check_length(info["size"])
    return bytes(fs.cat_file(path, start=0, end=info["size"]))


def _check_length(num_bytes: int) -> None:
    if num_bytes > MAX_BYTES:
        raise RowError(f"has more than the {MAX_BYTES} bytes allowed")
