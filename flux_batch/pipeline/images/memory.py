"""The encodings of the last images: an image of many rows is encoded once; knows no encoder."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from flux_batch.model.optimize.memo import Memo

# In bfloat16 the encodings of about 128 images of a megapixel, or 22 image prompts as tokens.
_MAX_BYTES = 128 * 2**20


class ImageMemory:
    """Encodes each image alone, and remembers the last ones, up to `max_bytes`.

    Neither the other images of a batch nor what is remembered can thus change a bit of the result.
    """

    def __init__(self, max_bytes: int = _MAX_BYTES) -> None:
        self._memo: Memo[Tensor] = Memo(max_bytes, lambda encoded: encoded.nbytes)

    def encoded(self, pixels: Tensor, encode: Callable[[Tensor], Tensor], *settings: Hashable) -> Tensor:
        """Return the encodings of images, each encoded alone or remembered: (b, ...) -> (b, ...).

        settings: what its result depends on besides.
        """
        return torch.cat([self._one(each, encode, settings) for each in pixels.split(1)])

    def _one(self, pixels: Tensor, encode: Callable[[Tensor], Tensor], settings: tuple[Hashable, ...]) -> Tensor:
        digest = hashlib.blake2b(pixels.contiguous().numpy().data, digest_size=16).digest()
        return self._memo.get((digest, tuple(pixels.shape), settings), lambda: encode(pixels))
