"""What the text encoders said of the last texts, so that a prompt of several images is encoded once; knows no image.

Encoders that are away until they are needed are asked for the texts that come next, too, as long as they are there.

Letters: b texts, l tokens, d width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from flux_batch.model.conditioned import Conditioning

# About 64 prompts of FLUX.1-dev in bfloat16: those of the batches near each other, and the empty one.
MAX_BYTES = 256 * 2**20

# About 1,000 of them: a shard of the usual size and more, in host memory.
MAX_BYTES_AWAY = 4 * 2**30

Encode = Callable[[str, int], Conditioning]
Visit = Callable[[], AbstractContextManager[None]]


class EncodedTexts:
    """Encodes each text by itself, and remembers the last ones, up to `max_bytes` where the encoders leave it.

    By itself, so that neither its neighbours in a batch nor what is remembered can change a bit of an image: a sum
    over more rows may be rounded in another order. A text of 512 tokens keeps a GPU busy alone.

    visit: within it the encoders can be asked; `expected`: texts and their lengths, in the order in which they will be.
    """

    def __init__(self, encode: Encode, max_bytes: int = MAX_BYTES, visit: Visit = nullcontext) -> None:
        self._encode = encode
        self._max_bytes = max_bytes
        self._visit = visit
        self.expected: list[tuple[str, int]] = []
        self._bytes = 0
        self._known: OrderedDict[Hashable, Conditioning] = OrderedDict()

    def __call__(self, texts: Sequence[str], length: int, version: Hashable = None) -> Conditioning:
        """Return what the encoders say of each text: txt (b, l, d), y (b, d).

        length: T5 tokens; version: of the encoders' weights, what another one said is not used.
        """
        asked = list(dict.fromkeys(texts))
        is_known = all((text, length, version) in self._known for text in asked)
        with nullcontext() if is_known else self._visit():
            said = {text: self._one(text, length, version) for text in asked}
            if not is_known:
                self._look_ahead((asked[-1], length), version, sum(map(num_bytes, said.values())))
        return Conditioning(*(torch.cat(parts) for parts in zip(*(said[text] for text in texts), strict=True)))

    def _look_ahead(self, last: tuple[str, int], version: Hashable, used: int) -> None:
        """Encode what is expected after the last text, while there is room for it beside `used` bytes."""
        start = self.expected.index(last) + 1 if last in self.expected else len(self.expected)
        for text, length in self.expected[start:]:
            if used >= self._max_bytes:
                break
            used += num_bytes(self._one(text, length, version))

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
    """Return how many bytes an encoded text takes."""
    return said.txt.nbytes + said.y.nbytes
