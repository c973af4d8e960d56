"""The edges of an image, as a control image shows them: white on black."""

from __future__ import annotations

import numpy as np
from PIL import Image

# Neighbouring pixels this far apart in RGB are an edge: two colours of the world are 58 apart or more, a gradient's
# neighbours 4 at most.
_LEAST_STEP = 32.0


def edges(image: Image.Image) -> Image.Image:
    """Return an image of the same size, white where neighbouring pixels differ."""
    pixels = np.asarray(image.convert("RGB"), np.float32)
    is_edge = np.zeros(pixels.shape[:2], bool)
    beside = np.linalg.norm(pixels[:, 1:] - pixels[:, :-1], axis=2) >= _LEAST_STEP
    below = np.linalg.norm(pixels[1:] - pixels[:-1], axis=2) >= _LEAST_STEP
    is_edge[:, 1:] |= beside
    is_edge[:, :-1] |= beside
    is_edge[1:] |= below
    is_edge[:-1] |= below
    return Image.fromarray(is_edge.astype(np.uint8) * 255).convert("RGB")
