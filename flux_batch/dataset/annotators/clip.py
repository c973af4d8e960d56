"""Annotators with CLIP: the similarity of image and prompt, and an aesthetic score by a head on its embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import torch
from PIL import Image

from flux_batch.config.running import CLIP_MODEL
from flux_batch.dataset.annotators.weights import ImageModel, load_tensors
from flux_batch.errors import CheckpointError
from flux_batch.pipeline.errors import checkpoint_errors, device_errors


class Clip:
    """The similarity of image and prompt, from -1 to 1, and the image's embedding."""

    version = "1"
    execution_options = frozenset({"device"})

    def __init__(self, model: str = CLIP_MODEL, embedding: bool = True, device: str = "auto") -> None:
        """Load a CLIP from a folder or address. embedding: also return the image's embedding, of length 1."""
        import transformers

        self._image_model = ImageModel(model, "AutoModel", device)
        self._has_embedding = embedding
        with checkpoint_errors():
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(self._image_model.folder)
        self.revision = self._image_model.revision
        config = self._image_model.model.config
        self._text_length = config.text_config.max_position_embeddings
        columns = [pa.field("clip", pa.float32())]
        if embedding:
            columns.append(pa.field("embedding", pa.list_(pa.float32(), config.projection_dim)))
        self.columns = pa.schema(columns)

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image], records: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """Return the columns; a prompt that is too long for CLIP is truncated."""
        with device_errors():
            texts = self._tokenizer(
                [record["prompt"] for record in records],
                padding=True,
                truncation=True,
                max_length=self._text_length,
                return_tensors="pt",
            ).to(self._image_model.device)
            found = self._image_model.model(**texts, pixel_values=self._image_model.pixel_values(images))
            image, text = (_unit(embeds.float()).cpu() for embeds in (found.image_embeds, found.text_embeds))
        similarity = {"clip": (image * text).sum(-1).tolist()}
        return similarity | ({"embedding": image.tolist()} if self._has_embedding else {})


class Aesthetic:
    """A score, about 1 to 10, by linear layers on CLIP's embedding, such as LAION's."""

    version = "1"
    columns = pa.schema([("aesthetic", pa.float32())])
    execution_options = frozenset({"device"})

    def __init__(self, head: str, model: str = CLIP_MODEL, device: str = "auto") -> None:
        """Load the head, a file of tensors, and the CLIP that it was trained with.

        The layers are applied in the order of their numbers without activations, as in
        christophschuhmann/improved-aesthetic-predictor (simple_inference.py); LAION-AI/aesthetic-predictor has one.
        """
        self._image_model = ImageModel(model, "AutoModel", device)
        self._layers = [
            (weight.to(self._image_model.device), bias.to(self._image_model.device))
            for weight, bias in _linear_layers(load_tensors(head), head)
        ]
        width, sizes = self._image_model.model.config.projection_dim, [tuple(layer[0].shape) for layer in self._layers]
        if sizes[0][1] != width or sizes[-1][0] != 1:
            raise CheckpointError(f"{head}: its layers are {sizes}; they must go from the {width} of {model} to 1")
        self.revision = self._image_model.revision

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image], records: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """Return the scores."""
        with device_errors():
            found = self._image_model.model.get_image_features(pixel_values=self._image_model.pixel_values(images))
            values = _unit(getattr(found, "pooler_output", found).float())
            for weight, bias in self._layers:
                values = torch.nn.functional.linear(values, weight, bias)
            return {"aesthetic": values[:, 0].tolist()}


def _unit(embeds: torch.Tensor) -> torch.Tensor:
    """Return embeddings [b, d], normalized to length 1."""
    return torch.nn.functional.normalize(embeds, dim=-1)


def _linear_layers(tensors: Mapping[str, torch.Tensor], origin: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return weight and bias of each layer, by the numbers in their names. Raises: CheckpointError."""
    names = [name.removesuffix("weight") for name in tensors if name.endswith("weight")]
    names.sort(key=lambda name: [int(part) for part in name.split(".") if part.isdecimal()])
    try:
        return [(tensors[f"{name}weight"].float(), tensors[f"{name}bias"].float()) for name in names] or _none(origin)
    except KeyError as error:
        raise CheckpointError(f"{origin}: has a layer without {error.args[0]}; it must hold linear layers") from None


def _none(origin: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    raise CheckpointError(f"{origin}: holds no linear layer")
