"""The LoRAs of a loaded model, by address: fetched, fused into its weights and unfused.

Fusing itself is in model/lora/. Its errors are translated into those of this package.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from flux_batch.download.models import PathOrFolder, local_path
from flux_batch.errors import CheckpointError, InvalidSetting
from flux_batch.model.lora.file import Lora, open_lora
from flux_batch.model.lora.fusion import LoraFusion
from flux_batch.model.lora.scale import PEFT_WEIGHTS
from flux_batch.pipeline.errors import checkpoint_errors, device_errors
from flux_batch.sampling_params import check_number


class LoadedLoras:
    """The LoRAs that are currently fused into the parts of a model (transformer, clip, t5).

    An address is a path or any other address that `local_model` takes. A file in a bucket or on a hub is fetched once
    for each machine.
    """

    def __init__(
        self, parts: Mapping[str, nn.Module] | None = None, storage_options: Mapping[str, Any] | None = None
    ) -> None:
        self.storage_options = storage_options or {}
        self._fusion = LoraFusion()
        for part, module in (parts or {}).items():
            self.add_part(part, module)

    @property
    def fused(self) -> list[tuple[str, float]]:
        """The addresses of the fused LoRAs, each with its scale."""
        return [(lora.name, scale) for lora, scale in self._fusion.fused]

    @property
    def version(self) -> Hashable:
        """The fused LoRAs, as told from other files at their addresses."""
        return tuple((lora.name, lora.version, scale) for lora, scale in self._fusion.fused)

    def with_columns(self, num_columns: int) -> list[str]:
        """Return the addresses of the fused LoRAs that change `num_columns` columns of `img_in`."""
        return [lora.name for lora, _ in self._fusion.fused if lora.num_columns == num_columns]

    def add_part(self, part: str, module: nn.Module) -> None:
        """Add or replace a loaded part, and fuse the current LoRAs into it."""
        with checkpoint_errors(), device_errors():
            self._fusion.add_part(part, module)

    def set(self, loras: Sequence[tuple[PathOrFolder, float]]) -> None:
        """Fuse these LoRAs (address, scale), in any order, and unfuse all others.

        All files are opened before a weight changes. Raises: CheckpointError for a LoRA that is missing, damaged, for
        another model or not supported; InvalidSetting for a scale that is not a number; StoreError for a remote that
        fails.
        """
        self._fuse([self._open(uri, scale) for uri, scale in _as_pairs(loras)])

    def add(self, uri: PathOrFolder, scale: float) -> None:
        """Fuse one more LoRA. Raises: the errors of `set`."""
        self._fuse([*self._fusion.fused, self._open(uri, scale)])

    def _open(self, uri: PathOrFolder, scale: float) -> tuple[Lora, float]:
        check_number("scale", scale)
        if not self._fusion.parts:
            raise CheckpointError(f"{uri}: there is no model yet to fuse a LoRA into; load its parts first")
        path = self.fetch(str(uri))
        with checkpoint_errors():
            return open_lora(path, str(uri), self._fusion.shapes()), scale

    def fetch(self, uri: str, *, refresh: bool = False) -> Path:
        """Return the local file, fetched if it is remote; for PEFT's weights the folder with their settings, too.

        refresh: check first whether a remote file has changed.
        """
        folder, _, name = uri.rpartition("/")
        if name == PEFT_WEIGHTS and "://" in uri and not uri.startswith(("http://", "https://")):
            return local_path(folder, self.storage_options, refresh=refresh) / name
        return local_path(uri, self.storage_options, refresh=refresh)

    def _fuse(self, loras: Sequence[tuple[Lora, float]]) -> None:
        with checkpoint_errors(), device_errors():
            self._fusion.fuse(loras)


def _as_pairs(loras: Sequence[tuple[PathOrFolder, float]]) -> list[tuple[PathOrFolder, float]]:
    """Return pairs of address and scale. Raises: InvalidSetting for anything else."""
    try:
        return [(uri, scale) for uri, scale in loras]
    except (TypeError, ValueError) as error:
        raise InvalidSetting("loras must be pairs of an address and a scale: [(path, 1.0)]", field="loras") from error
