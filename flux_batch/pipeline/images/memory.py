"""A cache of image encodings: an image that many rows name is encoded once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from flux_batch.model.optimize.memo import Memo

# In bfloat16, enough for the latents of about 128 images of a megapixel, or for the tokens of 22 image prompts.
_MAX_BYTES = 128 * 2**20


class ImageMemory:
    """An encoder of single images with a cache of recent results, up to `max_bytes`.

    Since each image is encoded alone, neither the rest of its batch nor the cache can change a bit of the result.
    """

    def __init__(self, max_bytes: int = _MAX_BYTES) -> None:
        self._memo: Memo[Tensor] = Memo(max_bytes, lambda encoded: encoded.nbytes)

    def encoded(self, pixels: Tensor, encode: Callable[[Tensor], Tensor], *settings: Hashable) -> Tensor:
        """Return the encodings of images, each encoded alone or taken from the cache: (b, ...) -> (b, ...).

        settings: everything else that the result of `encode` depends on.
        """
        return torch.cat([self._one(each, encode, settings) for each in pixels.split(1)])

    def _one(self, pixels: Tensor, encode: Callable[[Tensor], Tensor], settings: tuple[Hashable, ...]) -> Tensor:
        digest = hashlib.blake2b(pixels.contiguous().numpy().data, digest_size=16).digest()
        return self._memo.get((digest, tuple(pixels.shape), settings), lambda: encode(pixels))
