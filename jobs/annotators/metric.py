"""A custom annotator: any class with `compute(prompt, image)`, such as the metrics of DiffSynth-Studio.

    flux-batch annotate OUTPUT_URI --with pickscore=metric:Metric --set metric=package.module:Class

Run it in this folder, or with this folder on PYTHONPATH. Other options go to the class's `from_pretrained`, or to the
class itself if it has none.
"""

from __future__ import annotations

from pydoc import locate
from typing import Any

import pyarrow as pa


class Metric:
    """One number for each image, computed by the given class."""

    columns = pa.schema([("score", pa.float32())])

    def __init__(self, metric: str, **options: Any) -> None:
        found: Any = locate(metric.replace(":", "."))
        self.metric = getattr(found, "from_pretrained", found)(**options)

    def __call__(self, images: Any, records: Any) -> dict[str, list[float]]:
        """Return one number for each image."""
        pairs = zip(images, records, strict=True)
        return {"score": [float(self.metric.compute(record["prompt"], image)) for image, record in pairs]}
