"""Images as bytes: encoding with embedded provenance, reading it back, conversion to RGB.

This module knows pixels and file formats, not where the bytes go. The same image and record give the same bytes: they
contain no time stamps and no machine names.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeAlias
from xml.sax.saxutils import quoteattr

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, PngImagePlugin

from flux_batch.config.schema import ImageConfig
from flux_batch.errors import RowError, one_line

Pixels: TypeAlias = NDArray[np.uint8]
_ImageType: TypeAlias = Literal["png", "jpeg", "webp"]

SUFFIXES: Mapping[str, str] = {"png": "png", "jpeg": "jpg", "webp": "webp"}
_SOFTWARE = "flux-batch (AI generated)"
# IPTC's term for images that a model made from a prompt; image libraries and search engines read it.
# https://cv.iptc.org/newscodes/digitalsourcetype/
AI_SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
_EXIF_IMAGE_DESCRIPTION, _EXIF_SOFTWARE, _EXIF_USER_COMMENT = 0x010E, 0x0131, 0x9286
_EXIF_IFD = 0x8769
# zlib level of PNG: level 6 takes longer (bench/README.md) and saves 3 % of the bytes of 1/f noise.
_PNG_LEVEL = 1
# A JPEG segment holds 65,533 bytes. EXIF needs room for settings and description, XMP for the escapes in its text.
_MAX_EXIF_SETTINGS_BYTES = 60_000
_MAX_EXIF_DESCRIPTION_LENGTH = 2_000
_MAX_XMP_PROMPT_LENGTH = 10_000


def encode(pixels: Pixels, config: ImageConfig, provenance: Mapping[str, Any]) -> bytes:
    """Return `pixels` (uint8, h w 3) encoded, with the settings and an AI label embedded.

    PNG has the settings in text chunks, JPEG and WebP in an EXIF block, in which too long texts are cut. All have XMP.
    """
    if config.type == "png":
        return _encoded(Image.fromarray(pixels), config, pnginfo=_png_chunks(provenance))
    return _encoded(Image.fromarray(pixels), config, exif=_exif(provenance), xmp=_xmp(provenance))


def encode_source(image: Image.Image, config: ImageConfig) -> bytes:
    """Return a source image in the same encoding as images, without settings and AI label."""
    return _encoded(image.convert("RGB"), config)


def _encoded(image: Image.Image, config: ImageConfig, **inside: Any) -> bytes:
    buffer = io.BytesIO()
    if config.type == "png":
        image.save(buffer, "PNG", compress_level=_PNG_LEVEL, **inside)
    elif config.type == "jpeg":
        image.save(buffer, "JPEG", quality=config.quality, subsampling=0, **inside)
    else:
        image.save(buffer, "WEBP", quality=config.quality, **inside)
    return buffer.getvalue()


def read_provenance(data: bytes) -> dict[str, Any]:
    """Read the settings that `encode` wrote into an image; empty for images of other programs."""
    with Image.open(io.BytesIO(data)) as image:
        if isinstance(image, PngImagePlugin.PngImageFile):
            settings = image.text.get("flux_batch", "{}")
        else:
            settings = image.getexif().get_ifd(_EXIF_IFD).get(_EXIF_USER_COMMENT, b"")
            settings = settings[8:].decode() or "{}"
    return dict(json.loads(settings))


def check_image(data: bytes, image_type: _ImageType, width: int, height: int) -> None:
    """Check that all of `data` decodes to an image of that type and size. Raises: ValueError."""
    try:
        with Image.open(io.BytesIO(data), formats=[image_type.upper()]) as image:
            if image.size != (width, height):  # checked first: a damaged header must not cause a huge decode
                raise ValueError(f"{image.width} x {image.height} pixels where {width} x {height} are recorded")
            image.verify()
        with Image.open(io.BytesIO(data), formats=[image_type.upper()]) as image:
            image.load()
    except Exception as error:  # Pillow raises anything on damaged data
        raise ValueError(f"cannot be decoded: {one_line(error)}") from error


def decode(data: bytes) -> Pixels:
    """Return the pixels (uint8, h w 3) of an image that `encode` wrote. Raises: ValueError, OSError."""
    with Image.open(io.BytesIO(data), formats=[name.upper() for name in SUFFIXES]) as image:
        return np.asarray(image.convert("RGB"))


class Difference(NamedTuple):
    """The difference of two images, in levels from 0 to 255; `psnr_db` is None for equal images."""

    max_levels: int
    mean_levels: float
    psnr_db: float | None

    def __str__(self) -> str:
        if self.psnr_db is None:
            return "equal pixels"
        return (
            f"differs by at most {self.max_levels} of 255 levels, on average by {self.mean_levels:.3g} "
            f"(PSNR {self.psnr_db:.1f} dB)"
        )


def difference(one: Pixels, other: Pixels) -> Difference | None:
    """Return the difference of two images (uint8, h w 3); None if their sizes differ."""
    if one.shape != other.shape:
        return None
    apart = np.abs(one.astype(np.int16) - other)
    mean_square = float(np.mean(np.square(apart, dtype=np.float32), dtype=np.float64))
    psnr_db = 20 * math.log10(255) - 10 * math.log10(mean_square) if mean_square else None
    return Difference(int(apart.max(initial=0)), float(apart.mean()), psnr_db)


def _png_chunks(provenance: Mapping[str, Any]) -> PngImagePlugin.PngInfo:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_itxt("Description", str(provenance.get("prompt", "")))
    chunks.add_text("Software", _SOFTWARE)
    chunks.add_itxt("flux_batch", json.dumps(provenance, ensure_ascii=False, sort_keys=True))
    chunks.add_itxt("XML:com.adobe.xmp", _xmp(provenance).decode())
    return chunks


def _exif(provenance: Mapping[str, Any]) -> Image.Exif:
    exif = Image.Exif()
    exif[_EXIF_IMAGE_DESCRIPTION] = _ascii(str(provenance.get("prompt", ""))[:_MAX_EXIF_DESCRIPTION_LENGTH])
    exif[_EXIF_SOFTWARE] = _SOFTWARE
    # EXIF 2.3, UserComment: eight bytes name the character set; JSON escapes characters outside ASCII.
    settings = _settings_json(provenance, _MAX_EXIF_SETTINGS_BYTES)
    exif.get_ifd(_EXIF_IFD)[_EXIF_USER_COMMENT] = b"ASCII\0\0\0" + settings.encode()
    return exif


def _settings_json(provenance: Mapping[str, Any], max_bytes: int) -> str:
    """Return the settings as ASCII JSON of at most `max_bytes`; the longest value is halved until they fit."""
    fields = dict(provenance)
    while len(settings := json.dumps(fields, sort_keys=True)) > max_bytes:
        name = max(fields, key=lambda name: len(str(fields[name])))
        fields[name] = str(fields[name])[: len(str(fields[name])) // 2]
    return settings


def _xmp(provenance: Mapping[str, Any]) -> bytes:
    """Return the smallest XMP packet that holds the IPTC label and the prompt."""
    prompt = quoteattr(_xml_text(str(provenance.get("prompt", ""))[:_MAX_XMP_PROMPT_LENGTH]))
    return (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" '
        f'Iptc4xmpExt:DigitalSourceType="{AI_SOURCE_TYPE}" Iptc4xmpExt:AIPromptInformation={prompt}/>'
        "</rdf:RDF></x:xmpmeta>"
    ).encode()


def _xml_text(text: str) -> str:
    """Return a text without the characters that XML 1.0 forbids."""
    return "".join(char for char in text if (char >= " " or char in "\t\n\r") and char not in "\ufffe\uffff")


def _ascii(text: str) -> str:
    """Return a text in ASCII, as ImageDescription of EXIF must be; UserComment and XMP hold the full prompt."""
    return text.encode("ascii", errors="replace").decode()


def blank_image(width: int, height: int) -> Image.Image:
    """Return a white image for measurements; as a mask it repaints everything."""
    return Image.new("RGB", (width, height), "white")


def to_mask(image: Image.Image) -> Image.Image:
    """Return a mask of any mode as 8-bit grey: white is repainted. Raises: RowError for 32-bit samples.

    In a mask with transparency, the transparent pixels are repainted, whatever their colours: image editors make masks
    this way.
    """
    if image.has_transparency_data:
        alpha = image.convert("RGBA").getchannel("A")
        if alpha.getextrema() != (255, 255):
            return ImageChops.invert(alpha)
    return to_rgb(image).convert("L")


def check_proportions(mask: tuple[int, int], image: tuple[int, int]) -> None:
    """Raise RowError unless a mask has its image's proportions, within a pixel. Both are (width, height)."""
    if abs(mask[0] * image[1] - mask[1] * image[0]) > max(*mask, *image):
        raise RowError(
            f"is {mask[0]} x {mask[1]} pixels, its image {image[0]} x {image[1]}: must have the same proportions"
        )


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image of any mode as 8-bit RGB, on white. Raises: RowError for 32-bit samples."""
    if image.mode in ("I", "F"):
        raise RowError("has 32-bit samples, whose white level is unknown")
    if image.mode.startswith("I;16"):  # Pillow's own conversion would clip samples above 255 to white
        samples = np.asarray(image, dtype=np.uint32)
        image = Image.fromarray(((samples * 255 + 32767) // 65535).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
