"""The sections of the job file for what a model reads beside texts: its side networks and adapters."""

from __future__ import annotations

from pydantic import Field, model_validator

from flux_batch.config.section import Section, check_no_secret
from flux_batch.errors import InvalidSetting


class ImagePromptConfig(Section):
    """A reader of the image prompts of each row, with its vision tower."""

    uri: str = Field(min_length=1)
    """Its safetensors file, or the folder or repository that holds it: a path, or an address like that of a model."""
    image_encoder: str | None = Field(default=None, min_length=1)
    """The file or folder of its vision tower; the folder `image_encoder` beside it if null."""
    scale: float = 1.0
    """The weight of every image, beside the row's own."""

    @model_validator(mode="after")
    def _without_secrets(self) -> ImagePromptConfig:
        check_no_secret(self.uri, "uri", "model")
        check_no_secret(self.image_encoder or "", "image_encoder", "model")
        return self


class ControlNetConfig(Section):
    """A ControlNet, which reads a control image of each row."""

    uri: str = Field(min_length=1)
    """A safetensors or GGUF file, or its folder or repository: a path, or an address like that of a model."""
    scale: float = 1.0
    """Strength of the net: its residuals are multiplied with it; 0 is none."""
    start: float = Field(default=0.0, ge=0, lt=1)
    """Share of the steps after which the net counts."""
    end: float = Field(default=1.0, gt=0, le=1)
    """Share of the steps until which it counts."""
    mode: int | None = Field(default=None, ge=0)
    """The kind of control image, of a union net alone: 0 canny, 1 tile, 2 depth, 3 blur, 4 pose, 5 grey, 6 low
    quality."""

    @model_validator(mode="after")
    def _in_order(self) -> ControlNetConfig:
        check_no_secret(self.uri, "uri", "model")
        if self.start >= self.end:
            raise InvalidSetting(f"start = {self.start}: must be less than end = {self.end}", field="start")
        return self
