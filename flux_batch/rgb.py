"""A picture of any mode in RGB, the same for a job and for a call of the pipeline."""

from __future__ import annotations

import numpy as np
from PIL import Image

from flux_batch.errors import RowError


def to_rgb(picture: Image.Image) -> Image.Image:
    """Return a picture of any mode in RGB, 8 bits a channel, on white. Raises: RowError for samples without a range."""
    if picture.mode in ("I", "F"):
        raise RowError("has samples of 32 bits, of which nobody says what is white")
    if picture.mode.startswith("I;16"):  # Pillow's own conversion would clip to white whatever is above 255
        samples = np.asarray(picture, dtype=np.uint32)
        picture = Image.fromarray(((samples * 255 + 32767) // 65535).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")
