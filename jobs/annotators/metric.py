"""An annotator of one's own: any class with `compute(prompt, image)`, as the metrics of DiffSynth-Studio have it.

    flux-batch annotate OUTPUT_URI --with pickscore=metric:Metric --set metric=package.module:Class

in this folder, or with it on PYTHONPATH. Other options go to its `from_pretrained`, or to the class where it has none.
"""

from __future__ import annotations

from pydoc import locate
from typing import Any

import pyarrow as pa


class Metric:
    """One number for each image, by a class that has `compute`."""

    columns = pa.schema([("score", pa.float32())])

    def __init__(self, metric: str, **options: Any) -> None:
        found: Any = locate(metric.replace(":", "."))
        self.metric = getattr(found, "from_pretrained", found)(**options)

    def __call__(self, images: Any, records: Any) -> dict[str, list[float]]:
        """Return the numbers."""
        pairs = zip(images, records, strict=True)
        return {"score": [float(self.metric.compute(record["prompt"], image)) for image, record in pairs]}
