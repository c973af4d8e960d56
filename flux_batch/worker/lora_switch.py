"""Which LoRAs the pipeline of a worker uses now: exchanged when a batch needs others, and only then."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from flux_batch.errors import CheckpointError, DeviceFatal, InvalidSetting, NotFound, RowError, StoreError, StoreRefused
from flux_batch.records import LoraUse

Loras = tuple[LoraUse, ...]


class TakesLoras(Protocol):
    """A pipeline whose LoRAs can be exchanged."""

    def set_loras(self, loras: Sequence[tuple[str, float]]) -> None:
        """Use these, address and scale, from now on, and no others."""
        ...


class LoraSwitch:
    """Holds the LoRAs of a pipeline against those of the next batch. Raises: what setting those of the job raises."""

    def __init__(self, pipeline: TakesLoras, of_job: Loras) -> None:
        self._pipeline = pipeline
        self._has_some = bool(of_job)
        # None after a failure, which may have left anything.
        self._now: Loras | None = ()
        if of_job:
            self._set(of_job)

    def use(self, loras: Loras) -> Exception | None:
        """Make these the ones in use; return what is wrong with them, if anything is.

        Raises: DeviceFatal; StoreError for a storage that is away and may be better later, when the same rows succeed.
        """
        if loras == self._now:
            return None
        try:
            self._set(loras)
            return None
        except (CheckpointError, InvalidSetting, NotFound, StoreRefused) as error:
            return RowError(f"lora {', '.join(lora.name for lora in loras)}: {error}")
        except (DeviceFatal, StoreError):
            raise
        except Exception as error:  # the rows of a batch end here
            return error

    def words(self, loras: Loras) -> dict[str, Any]:
        """Say what an image was made with; none is "" in a job that has some."""
        if len(loras) == 1:
            return {"lora": loras[0].name, "lora_scale": loras[0].scale}
        if not loras and not self._has_some:
            return {}
        return {"lora": ", ".join(f"{lora.name} ({lora.scale:g})" for lora in loras)}

    def _set(self, loras: Loras) -> None:
        self._now = None
        self._pipeline.set_loras([(lora.uri, lora.scale) for lora in loras])
        self._now = loras
