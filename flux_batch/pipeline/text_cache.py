"""The embeddings of the last texts: a prompt of several images is encoded once; knows no image.

Letters: b texts, l tokens, d width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from flux_batch.model.transformer import PromptEmbeds

# About 64 prompts of FLUX.1-dev in bfloat16: those of the batches near each other, and the empty one.
_MAX_BYTES = 256 * 2**20

_Encode = Callable[[str, int], PromptEmbeds]
_OnDevice = Callable[[], AbstractContextManager[None]]


class TextCache:
    """Encodes each text alone, and remembers the last ones, up to `max_bytes`.

    Neither the other texts of a batch nor what is remembered can thus change a bit of an image: a sum over more rows
    may be rounded in another order. A text of 512 tokens keeps a GPU busy alone.

    encode: runs the encoders on a text, for a T5 length; on_device: a context within which they can be run.
    """

    def __init__(self, encode: _Encode, max_bytes: int = _MAX_BYTES, on_device: _OnDevice = nullcontext) -> None:
        self._encode = encode
        self._max_bytes = max_bytes
        self._on_device = on_device
        self._bytes = 0
        self._known: OrderedDict[Hashable, PromptEmbeds] = OrderedDict()

    def __call__(self, texts: Sequence[str], length: int, version: Hashable = None) -> PromptEmbeds:
        """Return the embeddings of texts: (b, l, d) and (b, d).

        length: T5 tokens; version: of the encoders' weights, since other weights give other embeddings.
        """
        distinct = list(dict.fromkeys(texts))
        is_known = all((text, length, version) in self._known for text in distinct)
        with nullcontext() if is_known else self._on_device():
            encoded = {text: self._one(text, length, version) for text in distinct}
        return PromptEmbeds(*(torch.cat(parts) for parts in zip(*(encoded[text] for text in texts), strict=True)))

    def _one(self, text: str, length: int, version: Hashable) -> PromptEmbeds:
        key = text, length, version
        if key not in self._known:
            self._known[key] = self._encode(text, length)
            self._bytes += _num_bytes(self._known[key])
        self._known.move_to_end(key)
        encoded = self._known[key]
        while self._bytes > self._max_bytes:
            _, dropped = self._known.popitem(last=False)
            self._bytes -= _num_bytes(dropped)
        return encoded


def _num_bytes(encoded: PromptEmbeds) -> int:
    return sum(part.nbytes for part in encoded)
