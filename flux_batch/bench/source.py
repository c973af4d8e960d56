"""The model of a benchmark: a stored one, or a random one of a known size. Its pickle is small."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from flux_batch.errors import JobError
from flux_batch.sampling_params import Quantization

if TYPE_CHECKING:
    import torch

    from flux_batch.pipeline.model_manager import ModelManager
    from flux_batch.pipeline.pipeline import FluxImagePipeline

SizeName: TypeAlias = Literal["dev", "schnell", "small", "tiny"]


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model to be loaded in the process that runs it. options: arguments of the pipeline."""

    uri: str = "demo"
    random_weights: SizeName | None = None
    device: str | None = None
    dtype: str = "auto"
    quantization: Quantization = "none"
    options: Mapping[str, Any] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """Return the description of the model for the figures."""
        return {
            "model": f"random weights, size {self.random_weights}" if self.random_weights else self.uri,
            "dtype": self.dtype_name,
            "quantization": self.quantization,
            "pipeline_options": dict(self.options),
        }

    @property
    def torch_device(self) -> torch.device:
        """The device; by default `cuda` if there is one, else `cpu`."""
        import torch

        return torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))

    @property
    def dtype_name(self) -> str:
        """The name of the dtype; for `auto`, the native dtype of the device."""
        from flux_batch.model.optimize.dtypes import dtype_name
        from flux_batch.pipeline.precision import to_dtype

        return dtype_name(to_dtype(self.dtype, self.torch_device, self.quantization))

    def load(self) -> ModelManager:
        """Return the parts of the model, loaded or random. Raises: CheckpointError, InvalidSetting, StoreError."""
        from flux_batch.pipeline.model_manager import ModelManager, locate_parts

        device = self.torch_device
        if self.random_weights:
            from flux_batch.bench.pipeline.random_model import random_manager

            return random_manager(self.random_weights, self.dtype, device, self.quantization)
        manager = ModelManager(self.dtype, device, quantization=self.quantization)
        manager.load_models(locate_parts(self.uri))
        return manager

    def assemble(self, manager: ModelManager) -> FluxImagePipeline:
        """Return the pipeline of loaded parts. Raises: JobError for an option that it lacks."""
        from flux_batch.pipeline.pipeline import FluxImagePipeline

        try:
            return FluxImagePipeline.from_model_manager(manager, **self.options)
        except TypeError as error:
            raise JobError(f"--option: the pipeline has no such option: {error}") from error

    def open(self) -> FluxImagePipeline:
        """Return the pipeline of the model."""
        return self.assemble(self.load())
