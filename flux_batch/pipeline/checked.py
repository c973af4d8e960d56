"""A wrapper that adapts a third-party pipeline to a worker.

It fills in the optional parts of the interface `OwnPipeline` of worker/protocol.py, and checks results.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from flux_batch.config.factory import check_options, imported
from flux_batch.config.known_settings import declared_settings
from flux_batch.config.schema import ModelConfig
from flux_batch.errors import DeviceFatal, FluxBatchError, JobError, RowError, one_line
from flux_batch.images import Pixels
from flux_batch.model.optimize.compile import cuda_versions, device_kind
from flux_batch.model.optimize.dtypes import dtype_name, native_dtype
from flux_batch.pipeline.errors import device_errors
from flux_batch.records import Kernels

# Arguments that every pipeline gets in addition to its declared settings.
_ALWAYS = ("width", "height")


def open_pipeline(model: ModelConfig, device: str) -> CheckedPipeline:
    """Import and open the pipeline that a job names.

    Raises: JobError if that is not possible. Errors of this package that the pipeline raises pass through.
    """
    name = str(model.pipeline)
    factory = imported(name, os.getcwd(), "a pipeline")
    options = model.pipeline_options
    check_options(factory, options, name, "model.pipeline_options", "model", device=device)
    try:
        with device_errors():
            pipeline = factory(model, device=device, **options)
    except FluxBatchError:
        raise
    except Exception as error:  # third-party code raises anything
        raise JobError(f"{name}: cannot be opened: {type(error).__name__}: {one_line(error)}") from error
    return CheckedPipeline(pipeline, model, device)


class CheckedPipeline:
    """An ImagePipeline around a third-party pipeline, which gets only the settings that it declares."""

    compile_cache = None
    offloads_text_encoders = False

    def __init__(self, pipeline: Any, model: ModelConfig, device: str) -> None:
        """Read what the pipeline declares. Raises: JobError if it declares no settings, or unknown ones."""
        self._pipeline = pipeline
        self._name = str(model.pipeline)
        self._device = torch.device(device)
        settings = declared_settings(pipeline)
        if settings is None:
            raise JobError(
                f"{self._name}: declares no settings: give it an attribute `settings`, a set of the names that it knows"
            )
        self.settings = settings
        self.default_guidance = float(getattr(pipeline, "default_guidance", 0.0))
        self.default_t5_sequence_length: int | None = getattr(pipeline, "default_t5_sequence_length", None)
        self.needed_images: tuple[str, ...] = tuple(getattr(pipeline, "needed_images", ()))
        own: Mapping[str, str] = getattr(pipeline, "precision", {})
        dtype = "float32" if model.dtype == "auto" else model.dtype
        self.precision = {"dtype": dtype, "quantization": model.quantization} | dict(own)

    @property
    def native_dtype(self) -> str:
        """The dtype that its device computes natively, by name."""
        return dtype_name(native_dtype(self._device))

    @property
    def kernels(self) -> Kernels:
        """The device and libraries in use."""
        cuda, cudnn = cuda_versions() if self._device.type == "cuda" else (None, None)
        return Kernels(
            device=device_kind(self._device),
            attention="torch",
            compile=bool(getattr(self._pipeline, "is_compiled", False)),
            torch=str(torch.__version__),
            cuda=cuda,
            cudnn=cudnn,
        )

    def __call__(
        self, prompt: Sequence[str] | None, *, seed: Sequence[int], output_type: str, tiled: bool = False, **given: Any
    ) -> Sequence[Pixels | Exception]:
        """Make an image for each prompt.

        tiled: only for a pipeline that declares it.
        Raises: OutOfMemory; DeviceFatal; RowError for a wrong result; the errors of the pipeline.
        """
        prompt = list(prompt or ())
        known = {name: value for name, value in given.items() if name in self.settings or name in _ALWAYS}
        if tiled:
            known["tiled"] = True
        with torch.inference_mode(), device_errors():
            made = self._pipeline(prompt, seed=list(seed), **known)
        return self._checked(made, len(prompt), (given["height"], given["width"], 3))

    def set_loras(self, loras: Sequence[tuple[str, float]]) -> None:
        """Pass the LoRAs to the pipeline if it declares `loras`."""
        self._pipeline.set_loras(loras)

    def encode_prompt(self, prompt: Sequence[str], t5_sequence_length: int | None = None) -> tuple[Any, Any]:
        """Raise JobError: the pipeline encodes texts itself."""
        raise JobError(f"{self._name}: encodes texts itself")

    def truncations(
        self, prompts: Sequence[str], t5_sequence_length: int | None = None
    ) -> list[tuple[bool | None, bool | None]]:
        """Return the pipeline's own truncations; None for each encoder if it reports none."""
        own = getattr(self._pipeline, "truncations", None)
        return list(own(prompts, t5_sequence_length)) if own else [(None, None)] * len(prompts)

    def _checked(self, made: Any, count: int, shape: tuple[int, int, int]) -> list[Pixels | Exception]:
        """Return the results, each an image of the right shape or an exception. Raises: RowError for anything else."""
        if not isinstance(made, Iterable):
            raise RowError(f"the pipeline {self._name} returned a {type(made).__name__}: must be a list of images")
        images: list[Pixels | Exception] = [
            each if isinstance(each, Exception) else np.asarray(each.convert("RGB") if _is_pil(each) else each)
            for each in made
        ]
        if len(images) != count:
            raise RowError(f"the pipeline {self._name} returned {len(images)} images for {count} prompts")
        for each in images:
            if isinstance(each, DeviceFatal):
                raise each
            if not isinstance(each, Exception) and (each.dtype != np.uint8 or each.shape != shape):
                raise RowError(
                    f"the pipeline {self._name} returned {each.dtype} {list(each.shape)}: must be uint8 {list(shape)}"
                )
        return images


def _is_pil(image: Any) -> bool:
    return isinstance(image, Image.Image)
