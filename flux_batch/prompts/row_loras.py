"""Which LoRAs the images of a row are made with: those of the job, or one that the row names.

The job file is trusted, rows are not: a row names LoRAs of the job, files and objects in buckets, and nothing else on a
network. Knows names; opens no file.
"""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from typing import Any

from flux_batch.config.schema import LoraConfig
from flux_batch.errors import RowError
from flux_batch.prompts.access import S3, scheme_of, shortened
from flux_batch.records import NO_LORA, LoraUse

# What a row may name besides paths: stores that answer with objects, or say no.
STORES = (*S3, "gs", "gcs", "az", "abfs", "abfss", "hf")
SUFFIX = ".safetensors"
LONGEST = 2048


class RowLoras:
    """The LoRAs that the rows of one prompts file can be made with."""

    def __init__(self, loras: Sequence[LoraConfig], file: str) -> None:
        self.of_job = tuple(LoraUse(name=lora.name, uri=lora.uri, scale=lora.scale) for lora in loras)
        self._by_name = {lora.uri: lora for lora in self.of_job} | {lora.name: lora for lora in self.of_job}
        self._file = file

    def choose(self, name: Any, scale: float | None) -> tuple[LoraUse, ...]:
        """Return what a row uses, by its `lora` and `lora_scale` columns, None if it has none.

        Raises: RowError saying what a row may name.
        """
        if name is None:
            return self.of_job if scale is None else (scaled(self._only_one(scale), scale),)
        if not isinstance(name, str):
            raise RowError(f"column 'lora' holds {type(name).__name__}: must be a name or an address")
        if name.strip() in NO_LORA:
            return ()
        return (scaled(self._by_name.get(name) or self._addressed(name), scale),)

    def _only_one(self, scale: float) -> LoraUse:
        if len(self.of_job) != 1:
            count = len(self.of_job) or "no"
            raise RowError(
                f"lora_scale = {scale}: the job has {count} LoRAs, so the row must name one in column 'lora'"
            )
        return self.of_job[0]

    def _addressed(self, name: str) -> LoraUse:
        """Return a LoRA that the job does not know, by its path or address."""
        if len(name) > LONGEST or "\0" in name:
            raise RowError(f"column 'lora' holds {len(name)} characters that are no path and no address")
        if not name.endswith(SUFFIX) and scheme_of(name) != "hf":
            known = ", ".join(lora.name for lora in self.of_job) or "none"
            raise RowError(f"lora {shortened(name)}: neither a LoRA of the job (which has {known}) nor a {SUFFIX} file")
        is_relative = not scheme_of(name) and not posixpath.isabs(name)
        uri = posixpath.join(posixpath.dirname(self._file), name) if is_relative else name
        scheme = scheme_of(uri)
        is_plain = "::" not in uri and ("://" not in uri or bool(scheme)) and not (scheme and ".." in uri.split("/"))
        if not is_plain or scheme not in ("", "file", *STORES):
            raise RowError(f"lora {shortened(name)}: only model.loras of the job may name such an address")
        return LoraUse(name=name, uri=uri, scale=1.0)


def scaled(lora: LoraUse, scale: float | None) -> LoraUse:
    """Return a LoRA at another scale, if there is one."""
    return lora if scale is None else LoraUse(name=lora.name, uri=lora.uri, scale=scale)
