"""A custom annotator: OWLv2 finds boxes of the things that a column of each record names.

    flux-batch annotate OUTPUT_URI --with boxes=boxes:Boxes --set column=nouns

Run it in this folder, or with this folder on PYTHONPATH. `column` is a passthrough column: a list of names, or text
with commas.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from transformers import AutoTokenizer, Owlv2ForObjectDetection
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from flux_batch.download.models import local_model
from flux_batch.download.revision import model_revision

BOX = pa.struct([("name", pa.string()), ("score", pa.float32()), ("box", pa.list_(pa.float32(), 4))])


class Boxes:
    """The boxes of each image: name, score, and left, top, right, bottom in pixels."""

    columns = pa.schema([("boxes", pa.list_(BOX))])
    version = "1"
    execution_options = frozenset({"device"})

    def __init__(
        self,
        column: str,
        model: str = "google/owlv2-base-patch16-ensemble",
        at_least: float = 0.2,
        device: str = "cpu",
    ) -> None:
        """Load the model: a folder, or an address like that of every model."""
        folder = local_model(model)
        self.revision = model_revision(model)
        self.column, self.at_least, self.device = column, at_least, device
        self.model = Owlv2ForObjectDetection.from_pretrained(folder).to(device).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image], records: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """Return the boxes, image by image, since each image has its own list of things."""
        return {"boxes": [self.boxes(image, record) for image, record in zip(images, records, strict=True)]}

    def boxes(self, image: Image.Image, record: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the boxes of one image. Raises: KeyError if its record has no such column."""
        named = record[self.column] or []
        names = [name.strip() for name in (named.split(",") if isinstance(named, str) else named) if name.strip()]
        if not names:
            return []
        length = self.model.config.text_config.max_position_embeddings
        texts = self.tokenizer(names, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        found = self.model(**texts.to(self.device), pixel_values=self.pixels(image).to(self.device))
        scores, labels = found.logits[0].sigmoid().max(-1)
        side = max(image.size)
        return [
            {"name": names[label], "score": score, "box": _corners(box, side)}
            for score, label, box in zip(scores.tolist(), labels.tolist(), found.pred_boxes[0].tolist(), strict=True)
            if score >= self.at_least
        ]

    def pixels(self, image: Image.Image) -> torch.Tensor:
        """Return an image as OWLv2 sees it, [1, 3, s, s]: at the top left of a grey square, normalised as for CLIP."""
        side, size = max(image.size), self.model.config.vision_config.image_size
        square = Image.new("RGB", (side, side), (128, 128, 128))
        square.paste(image)
        values = np.asarray(square.resize((size, size), Image.Resampling.BILINEAR), dtype=np.float32) / 255
        values = (values - np.float32(OPENAI_CLIP_MEAN)) / np.float32(OPENAI_CLIP_STD)
        return torch.from_numpy(values).permute(2, 0, 1)[None]


def _corners(box: Sequence[float], side: int) -> list[float]:
    """Return the corners in pixels of a box given by its centre and size, as shares of a square."""
    x, y, width, height = box
    return [side * (x - width / 2), side * (y - height / 2), side * (x + width / 2), side * (y + height / 2)]
