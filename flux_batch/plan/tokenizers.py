"""The tokenizers of a job's model: the prompts that they cut, and the text left out; loads no weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flux_batch.config.schema import JobConfig
from flux_batch.download.models import find_local_model
from flux_batch.errors import FluxBatchError
from flux_batch.model.checkpoint.detect import find_parts, read_shapes
from flux_batch.model.params import T5_SEQUENCE_LENGTH
from flux_batch.records import ImageRequest

_CLIP_LEFT_OUT, _T5_LEFT_OUT = "not read by CLIP", "not read by T5"


class Tokenizers:
    """The tokenizers of CLIP and T5; `missing` says why there are none, e.g. a model not on this machine."""

    def __init__(self, config: JobConfig) -> None:
        self.missing = ""
        if config.model.pipeline:
            self.missing = f"the pipeline {config.model.pipeline} has its own tokenizers"
            return
        try:
            home = find_local_model(config.model.uri, config.model.storage_options)
            if home is None:
                self.missing = f"{config.model.uri} is not on this machine"
                return
            from flux_batch.model.text.tokenizers import load_tokenizers  # takes seconds to import

            embeds_guidance = any(
                key.startswith("guidance_in.") for key in read_shapes(find_parts(home))["transformer"]
            )
            self._clip, self._t5 = load_tokenizers(home)
            self._length = min(T5_SEQUENCE_LENGTH[embeds_guidance], self._t5.model_max_length)
        except (FluxBatchError, ValueError, KeyError, OSError) as error:
            self.missing = str(error)

    def count(self, requests: Sequence[ImageRequest]) -> tuple[int, int]:
        """Return the number of prompts that CLIP and T5 cut."""
        from flux_batch.model.text.tokenizers import count_tokens

        if not requests:
            return 0, 0
        texts = [request.prompt for request in requests]
        longest = [request.sampling.t5_sequence_length or self._length for request in requests]
        clip = sum(count > self._clip.model_max_length for count in count_tokens(self._clip, texts))
        t5 = sum(count > most for count, most in zip(count_tokens(self._t5, texts), longest, strict=True))
        return clip, t5

    def left_out(self, row: Mapping[str, Any]) -> dict[str, str]:
        """Return the end of a row's prompt that each text encoder does not read; empty if it reads all."""
        from flux_batch.model.text.tokenizers import left_out

        if self.missing:
            return {}
        prompt, length = row.get("prompt"), row.get("t5_sequence_length")
        if not isinstance(prompt, str):
            return {_CLIP_LEFT_OUT: "", _T5_LEFT_OUT: ""}
        return {
            _CLIP_LEFT_OUT: left_out(self._clip, prompt, self._clip.model_max_length),
            _T5_LEFT_OUT: left_out(self._t5, prompt, int(length or self._length)),
        }
