"""The interface of an annotator: images and their records in, columns out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

import pyarrow as pa
from PIL import Image


class Annotator(Protocol):
    """An annotator of images: a class, or a function that returns an instance, called once on each worker.

        import numpy as np
        import pyarrow as pa

        class Brightness:
            columns = pa.schema([("mean", pa.float32())])

            def __init__(self, scale: float = 1.0) -> None:
                self.scale = scale

            def __call__(self, images, records):
                return {"mean": [self.scale * np.asarray(image).mean() for image in images]}

    >>> Brightness(scale=2.0)([Image.new("L", (16, 16), 100)], [{}])
    {'mean': [np.float64(200.0)]}

    `flux-batch annotate OUTPUT_URI --with my_module:Brightness --set scale=2` opens `Brightness(scale=2)` and calls it
    with several images at a time. Its results must depend on its arguments only, not on earlier images.

    If a call raises, or returns columns that are missing, too short or of another type, the images are tried again in
    halves, down to single ones; an image that fails alone gets nulls and the error as the reason. To avoid the repeated
    calls, put an exception in the place of a value: only that image then fails, with the exception as the reason.
    """

    columns: pa.Schema
    """The columns that a call returns: names and Arrow types, all nullable. Known once the annotator is open; not
    `key`, `error_type` or `error_message`, which are added."""

    def __call__(self, images: Sequence[Image.Image], records: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """Return a value for each image, by column: a list, or an array of NumPy or Arrow, in the order of `images`.

        images: one or more RGB images, possibly of different sizes; they may be modified. records: their rows of the
        metadata, with `key`, `prompt`, `seed` and so on, and the passthrough columns of the job.
        """
        ...


class _IdentifiedAnnotator(Annotator, Protocol):
    """An annotator with optional attributes for its identity."""

    version: str
    """Changes when results change. A pass is not resumed with another one. "1" if left out."""
    revision: str | None
    """The version of its model's weights. A pass is not resumed with another one. None if left out."""
    execution_options: ClassVar[frozenset[str]]
    """The names of options that do not change results, such as `device`."""
