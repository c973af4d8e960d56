"""The text encoders of a pipeline, CLIP and T5, with a cache of embeddings.

Letters: b texts, l tokens, d width.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, partial

import torch

from flux_batch.errors import InvalidSetting
from flux_batch.model.optimize.dtypes import without_autocast
from flux_batch.model.optimize.memo import Memo
from flux_batch.model.optimize.offload import apply_offload
from flux_batch.model.sampling import normal_tensor
from flux_batch.model.text.clip import ClipEncoder
from flux_batch.model.text.t5 import T5Encoder
from flux_batch.model.transformer import PromptEmbeds
from flux_batch.pipeline.errors import device_errors
from flux_batch.pipeline.loras import LoadedLoras
from flux_batch.pipeline.request import PipelineRequest, as_list, check_texts
from flux_batch.sampling_params import MAX_T5_LENGTH, check_integer

# About 64 prompts of FLUX.1-dev in bfloat16: enough for neighbouring batches and the empty prompt.
_MAX_BYTES = 256 * 2**20
# The number of texts whose truncation is cached: those of a few batches.
_MAX_COUNTED = 256

_Encode = Callable[[str, int], PromptEmbeds]
_OnDevice = Callable[[], AbstractContextManager[None]]


class TextEncoders:
    """CLIP and T5 of a pipeline, with the LoRAs that are fused into them.

    default_length: the default number of T5 tokens. device, dtype: of the embeddings. offload: keep the weights in host
    memory except while texts are encoded, and the embeddings always; nothing changes on the CPU.
    """

    def __init__(
        self,
        clip: ClipEncoder,
        t5: T5Encoder,
        loras: LoadedLoras,
        default_length: int,
        device: torch.device,
        dtype: torch.dtype,
        *,
        offload: bool = False,
    ) -> None:
        self._loras = loras
        self._default_length = default_length
        self.is_offloaded = offload and device.type != "cpu"
        kept_on = torch.device("cpu") if self.is_offloaded else device
        offloaded = apply_offload([clip.model, t5.model] if self.is_offloaded else [], device)
        self.on_device = offloaded.on_device
        # Bound methods would make a cycle: the weights of a deleted pipeline would wait for the garbage collector.
        self._cache = TextCache(partial(_encode_one, clip, t5, kept_on, dtype), on_device=offloaded.on_device)
        # A worker asks before each call, and the call asks again, while the GPU is idle: the cache saves that time.
        self._is_cut = lru_cache(_MAX_COUNTED)(partial(_count_one, clip, t5))

    def encode(self, prompts: Sequence[str], length: int) -> PromptEmbeds:
        """Return the embeddings of each prompt, from the cache if possible."""
        return self._cache(prompts, length, self._loras.version)

    def encode_prompt(self, prompt: str | Sequence[str], length: int | None) -> PromptEmbeds:
        """Return the embeddings of one or several prompts of a caller. Raises: InvalidSetting."""
        prompts = as_list("prompt", prompt)
        check_texts("prompt", prompts)
        if length is not None:
            check_integer("t5_sequence_length", length, 1, MAX_T5_LENGTH)
        if not prompts:
            raise InvalidSetting("prompt = []: must be at least one text", field="prompt")
        with torch.inference_mode(), without_autocast(), device_errors():
            embeds = self.encode(prompts, length or self._default_length)
            return PromptEmbeds(*map(normal_tensor, embeds))

    def truncations(self, prompts: str | Sequence[str], length: int | None = None) -> list[tuple[bool, bool]]:
        """Return for each prompt whether CLIP and whether T5 truncates it. Raises: InvalidSetting."""
        prompts = as_list("prompts", prompts)
        check_texts("prompts", prompts)
        if length is not None:
            check_integer("t5_sequence_length", length, 1, MAX_T5_LENGTH)
        return [self._is_cut(prompt, length or self._default_length) for prompt in prompts]

    def warn_of_cut(self, request: PipelineRequest) -> None:
        """Warn if a text is truncated; Python prints the warning once for each program."""
        both = request.prompts, request.negative_prompts if request.uses_cfg else []
        texts = dict.fromkeys(text for each in both if isinstance(each, list) for text in each)
        truncations = self.truncations(list(texts), request.t5_length(self._default_length))
        for encoder, title in enumerate(("CLIP", "T5")):
            if any(each[encoder] for each in truncations):
                where = f"`truncations` tells which, in a job the column {title.lower()}_truncated"
                warnings.warn(f"a prompt is longer than {title} reads, its end is left out: {where}", stacklevel=3)


def _count_one(clip: ClipEncoder, t5: T5Encoder, text: str, length: int) -> tuple[bool, bool]:
    """Return whether CLIP and whether T5 leaves out the end of one text."""
    return clip.truncated([text])[0], t5.truncated([text], length)[0]


def _encode_one(
    clip: ClipEncoder, t5: T5Encoder, device: torch.device, dtype: torch.dtype, text: str, length: int
) -> PromptEmbeds:
    """Run the text encoders on one text, b = 1."""
    return PromptEmbeds(t5([text], length), clip([text])).to(device, dtype)


class TextCache:
    """An encoder of single texts with a cache of recent results, up to `max_bytes`.

    Texts are encoded alone, since products with more rows may round differently. So neither the rest of a batch nor the
    cache can change a bit of an image. A single text of 512 tokens already keeps a GPU busy.

    encode: runs the encoders on a text, for a T5 length; on_device: the context in which they can be run.
    """

    def __init__(self, encode: _Encode, max_bytes: int = _MAX_BYTES, on_device: _OnDevice = nullcontext) -> None:
        self._encode = encode
        self._on_device = on_device
        self._memo: Memo[PromptEmbeds] = Memo(max_bytes, _num_bytes)

    def __call__(self, texts: Sequence[str], length: int, version: Hashable = None) -> PromptEmbeds:
        """Return the embeddings of texts: (b, l, d) and (b, d).

        length: T5 tokens; version: identifies the encoders' weights, since other weights give other embeddings.
        """
        keys = {text: (text, length, version) for text in texts}
        encoded = {text: kept for text, key in keys.items() if (kept := self._memo.find(key))}
        missing = [text for text in keys if text not in encoded]
        with self._on_device() if missing else nullcontext():
            for text in missing:
                encoded[text] = self._memo.get(keys[text], partial(self._encode, text, length))
        return PromptEmbeds(*(torch.cat(parts) for parts in zip(*(encoded[text] for text in texts), strict=True)))


def _num_bytes(encoded: PromptEmbeds) -> int:
    return sum(part.nbytes for part in encoded)
