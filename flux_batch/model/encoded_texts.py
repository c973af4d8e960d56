"""What the text encoders said of the last texts, so that a prompt of several images is encoded once; knows no picture.

Letters: b texts, l tokens, d width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence

import torch

from flux_batch.model.conditioned import Conditioning

# About 64 prompts of FLUX.1-dev in bfloat16: those of the batches near each other, and the empty one.
MAX_BYTES = 256 * 2**20

Encode = Callable[[str, int], Conditioning]


class EncodedTexts:
    """Encodes each text by itself, and remembers the last ones, up to `max_bytes` on the device of the encoders.

    By itself, so that neither its neighbours in a batch nor what is remembered can change a bit of a picture: a sum
    over more rows may be rounded in another order. A text of 512 tokens keeps a GPU busy alone.
    """

    def __init__(self, encode: Encode, max_bytes: int = MAX_BYTES) -> None:
        self._encode = encode
        self._max_bytes = max_bytes
        self._bytes = 0
        self._known: OrderedDict[Hashable, Conditioning] = OrderedDict()

    def __call__(self, texts: Sequence[str], length: int, version: Hashable = None) -> Conditioning:
        """Return what the encoders say of each text: txt (b, l, d), y (b, d).

        length: T5 tokens; version: of the encoders' weights, what another one said is not used.
        """
        said = {text: self._one(text, length, version) for text in dict.fromkeys(texts)}
        return Conditioning(*(torch.cat(parts) for parts in zip(*(said[text] for text in texts), strict=True)))

    def _one(self, text: str, length: int, version: Hashable) -> Conditioning:
        key = text, length, version
        if key not in self._known:
            self._known[key] = self._encode(text, length)
            self._bytes += num_bytes(self._known[key])
        self._known.move_to_end(key)
        said = self._known[key]
        while self._bytes > self._max_bytes:
            _, dropped = self._known.popitem(last=False)
            self._bytes -= num_bytes(dropped)
        return said


def num_bytes(said: Conditioning) -> int:
    return said.txt.nbytes + said.y.nbytes
