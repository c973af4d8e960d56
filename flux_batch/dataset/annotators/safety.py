"""The annotator of unsafe images: an image classifier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import torch
from PIL import Image

from flux_batch.config.running import SAFETY_MODEL
from flux_batch.dataset.annotators.weights import ImageModel
from flux_batch.errors import InvalidSetting
from flux_batch.pipeline.errors import device_errors

# Names of unsafe classes in classifiers on Hugging Face.
_UNSAFE = {"nsfw", "unsafe", "porn", "hentai", "sexy", "explicit", "sexual", "gore", "violence"}


class Safety:
    """The probability, from 0 to 1, of unsafe classes, and the most probable class."""

    version = "1"
    columns = pa.schema([("unsafe", pa.float32()), ("label", pa.string())])
    execution_options = frozenset({"device"})

    def __init__(
        self,
        model: str = SAFETY_MODEL,
        unsafe_labels: Sequence[str] | None = None,
        device: str = "auto",
    ) -> None:
        """Load a classifier. unsafe_labels: the unsafe classes; by default those whose names are in `_UNSAFE`."""
        self._image_model = ImageModel(model, "AutoModelForImageClassification", device)
        self.revision = self._image_model.revision
        self._labels = [str(label) for _, label in sorted(self._image_model.model.config.id2label.items())]
        wanted = _UNSAFE if unsafe_labels is None else set(unsafe_labels)
        lower = unsafe_labels is None
        self._unsafe = [
            number for number, label in enumerate(self._labels) if (label.lower() if lower else label) in wanted
        ]
        if not self._unsafe or (unsafe_labels is not None and len(self._unsafe) != len(wanted)):
            raise InvalidSetting(
                f"unsafe_labels: must name classes of {model}: {', '.join(self._labels)}", field="unsafe_labels"
            )

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image], records: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """Return the columns."""
        with device_errors():
            logits = self._image_model.model(pixel_values=self._image_model.pixel_values(images)).logits
            shares = logits.float().softmax(-1).cpu()
        return {
            "unsafe": shares[:, self._unsafe].sum(-1).tolist(),
            "label": [self._labels[number] for number in shares.argmax(-1).tolist()],
        }
