"""Models of transformers for annotators, loaded from any address that this program supports for models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from flux_batch.download.models import local_model
from flux_batch.download.revision import model_revision
from flux_batch.errors import CheckpointError
from flux_batch.pipeline.errors import checkpoint_errors, device_errors


class ImageModel:
    """An image model with its processor, its device and the version of its files."""

    def __init__(self, uri: str, auto_class: str, device: str) -> None:
        """Load a model with the transformers class named by `auto_class`.

        Raises: CheckpointError, StoreError; OutOfMemory, DeviceFatal.
        """
        import transformers

        self.folder = local_model(uri)
        self.revision = model_revision(uri)
        self.device = torch.device(_device() if device == "auto" else device)
        with checkpoint_errors():
            loaded = getattr(transformers, auto_class).from_pretrained(self.folder)
            self.processor = transformers.AutoImageProcessor.from_pretrained(self.folder, backend="pil")
        with device_errors():
            self.model: Any = loaded.to(self.device).eval()

    def pixel_values(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Return images as input of the model: [b, 3, h, w] on its device."""
        pixels: torch.Tensor = self.processor(images=list(images), return_tensors="pt")["pixel_values"]
        return pixels.to(self.device)


def load_tensors(uri: str) -> dict[str, torch.Tensor]:
    """Load a small file of tensors: safetensors, or a local pickle with only tensors. Raises: CheckpointError."""
    from safetensors.torch import load_file

    path = Path(local_model(uri))
    if path.is_dir():
        raise CheckpointError(f"{uri}: must be a file of tensors, not a folder")
    with checkpoint_errors():
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        return dict(torch.load(path, map_location="cpu", weights_only=True))


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
