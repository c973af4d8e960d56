"""The reader of the image prompts of a call: a FLUX.1-Redux or an IP-Adapter, or neither."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from flux_batch.download.models import PathOrFolder
from flux_batch.errors import CheckpointError, InvalidSetting
from flux_batch.model.checkpoint.checkpoint import Checkpoint, open_checkpoint
from flux_batch.model.checkpoint.image_prompts import PROMPT_PART_TITLES, PromptPart, ip_adapter_files, redux_files
from flux_batch.model.params import FluxParams
from flux_batch.model.transformer import ImagePrompt, PromptEmbeds
from flux_batch.pipeline.errors import checkpoint_errors
from flux_batch.pipeline.images.inputs import ImageInputs
from flux_batch.pipeline.images.ip_adapter import IPAdapterPrompts, ip_adapter_prompts, load_ip_adapter_prompts
from flux_batch.pipeline.images.redux import ReduxPrompts, load_redux_prompts, redux_prompts

# The guidance of BFL's own program: black-forest-labs/flux 802fb47, src/flux/cli_redux.py.
REDUX_GUIDANCE = 2.5
# The vision tower of each reader.
_TOWERS: dict[PromptPart, PromptPart] = {"redux": "siglip", "ip_adapter": "clip_vision"}


class ImagePrompts:
    """The reader of a pipeline's image prompts, loaded for a transformer of these parameters.

    dtype, device: of the transformer; storage_options: of the addresses to load from.
    """

    def __init__(
        self, base: FluxParams, dtype: torch.dtype, device: torch.device, storage_options: Mapping[str, Any]
    ) -> None:
        self._base: dict[str, Any] = {"base": base, "dtype": dtype, "device": device}
        self._options = self._base | {"storage_options": storage_options}
        self.redux: ReduxPrompts | None = None
        self.ip_adapter: IPAdapterPrompts | None = None

    def load_redux(self, uri: PathOrFolder, image_encoder: PathOrFolder | None, scale: float) -> None:
        """Load a FLUX.1-Redux. Raises: the errors of `load_redux_prompts`; InvalidSetting beside an IP-Adapter."""
        _check_one_reader(self.ip_adapter)
        self.redux = load_redux_prompts(uri, image_encoder, scale, **self._options)

    def load_ip_adapter(
        self, uri: PathOrFolder, image_encoder: PathOrFolder | None, scale: float | Sequence[float]
    ) -> None:
        """Load an IP-Adapter. Raises: the errors of `load_ip_adapter_prompts`; InvalidSetting beside a Redux."""
        _check_one_reader(self.redux)
        self.ip_adapter = load_ip_adapter_prompts(uri, image_encoder, scale, **self._options)

    def load_found(self, found: Mapping[PromptPart, Checkpoint]) -> None:
        """Load the readers among the files of a ModelManager, with their vision towers.

        A tower that is not among them is in the folder beside its reader. Raises: CheckpointError, for a tower that
        nothing reads too; InvalidSetting for two readers.
        """
        for part, own in _TOWERS.items():
            if own in found and part not in found:
                raise CheckpointError(
                    f"{found[own].source} is {PROMPT_PART_TITLES[own]}, which is read for "
                    f"{PROMPT_PART_TITLES[part]}: add the file of that to load_models([...])"
                )
        if redux := found.get("redux"):
            self.redux = redux_prompts(redux, _tower(found.get("siglip"), redux, redux_files), **self._base)
        if adapter := found.get("ip_adapter"):
            _check_one_reader(self.redux)
            tower = _tower(found.get("clip_vision"), adapter, ip_adapter_files)
            self.ip_adapter = ip_adapter_prompts(adapter, tower, **self._base)

    def set_scale(self, scale: float | Sequence[float]) -> None:
        """Set the strength of the IP-Adapter. Raises: InvalidSetting, also if there is none."""
        if self.ip_adapter is None:
            raise InvalidSetting("scale: there is no IP-Adapter; load_ip_adapter loads one", field="scale")
        self.ip_adapter.set_scale(scale)

    def check(self, images: ImageInputs) -> None:
        """Raise InvalidSetting for image prompts that nothing reads."""
        if images.image_prompt and not (self.redux or self.ip_adapter):
            raise InvalidSetting(
                "image_prompt: FLUX.1 reads none by itself: load a FLUX.1-Redux or an IP-Adapter beside it, "
                "model.redux or model.ip_adapter in a job",
                field="image_prompt",
            )

    def beside(self, texts: PromptEmbeds, images: ImageInputs) -> PromptEmbeds:
        """Return the embeddings of a call's texts, with the tokens of a Redux behind them."""
        if self.redux is None or not images.image_prompt:
            return texts
        return self.redux.beside(texts, images.image_prompt, images.prompt_scales)

    def attended(self, images: ImageInputs, *, is_negative: bool = False) -> ImagePrompt | None:
        """Return what an IP-Adapter makes of image prompts, beside prompts or negative prompts."""
        if self.ip_adapter is None or not images.image_prompt:
            return None
        if is_negative:
            return self.ip_adapter.negative_prompt(images.prompt_scales)
        return self.ip_adapter.prompt(images.image_prompt, images.prompt_scales)


def _tower(found: Checkpoint | None, reader: Checkpoint, files: Callable[[Path], tuple[Path, Path]]) -> Checkpoint:
    """Return the vision tower of a reader: the one that was found, or that in the folder beside it."""
    with checkpoint_errors():
        return found or open_checkpoint(files(Path(reader.source))[1])


def _check_one_reader(other: object | None) -> None:
    if other is not None:
        raise InvalidSetting(
            "image_prompt: a FLUX.1-Redux and an IP-Adapter would both read it; load one of the two",
            field="image_prompt",
        )
