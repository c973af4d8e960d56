"""The annotator of the demo's world: the share of a caption's facts that hold in its image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
from PIL import Image

from flux_batch.demo.world.parsing import parse_caption
from flux_batch.demo.world.scorer import score


class Facts:
    """The share of a prompt's facts that hold in its image, and the other facts; for the demo's captions only."""

    version = "2"
    columns = pa.schema([("facts", pa.float64()), ("missing", pa.list_(pa.string()))])

    def __call__(self, images: Sequence[Image.Image], records: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """Return the columns. Raises: ValueError for a prompt that is not a caption of the demo's world."""
        facts = [score(parse_caption(record["prompt"]), image) for image, record in zip(images, records, strict=True)]
        return {
            "facts": [sum(fact.holds for fact in each) / len(each) for each in facts],
            "missing": [[f"{fact.kind}: {fact.said}" for fact in each if not fact.holds] for each in facts],
        }
