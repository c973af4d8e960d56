"""The sections of the job file for what a model reads beside texts: its side networks and adapters."""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import Field, model_validator

from flux_batch.config.section import Section, check_no_secret
from flux_batch.config.values import Scales, Uris
from flux_batch.errors import InvalidSetting


class ReduxConfig(Section):
    """Redux with its vision tower; it reads the image prompts of each row."""

    uri: str = Field(min_length=1)
    """Its safetensors file, or the folder or repository that holds it: a path, or an address like that of a model."""
    image_encoder: str | None = Field(default=None, min_length=1)
    """The file or folder of its vision tower; the folder `image_encoder` beside it if null."""
    scale: float = 1.0
    """The weight of every image, beside the row's own."""

    @property
    def uris(self) -> tuple[str, ...]:
        """Its address."""
        return (self.uri,)

    @model_validator(mode="after")
    def _without_secrets(self) -> ReduxConfig:
        _check_no_secrets(self.uris, self.image_encoder)
        return self


class IPAdapterConfig(Section):
    """IP-Adapters with their vision tower; each reads an image prompt of a row."""

    uri: Uris
    """Its safetensors file, or the folder or repository that holds it: a path, or an address like that of a model; a
    list for several, whose changes add up, and each row then has an image for each, in this order."""
    image_encoder: str | None = Field(default=None, min_length=1)
    """The file or folder of its vision tower; the folder `image_encoder` beside it if null."""
    scale: Scales = 1.0
    """The weight of every image, beside the row's own; a list has one for each of several."""

    @property
    def uris(self) -> tuple[str, ...]:
        """The address of each."""
        return (self.uri,) if isinstance(self.uri, str) else self.uri

    @model_validator(mode="after")
    def _one_scale_each(self) -> IPAdapterConfig:
        _check_no_secrets(self.uris, self.image_encoder)
        if isinstance(self.scale, tuple) and len(self.scale) != len(self.uris):
            raise InvalidSetting(
                f"scale: {len(self.scale)} values for {len(self.uris)} IP-Adapters; give one, or one for each",
                field="scale",
            )
        return self


def _check_no_secrets(uris: Iterable[str], image_encoder: str | None) -> None:
    for uri in uris:
        check_no_secret(uri, "uri", "model")
    check_no_secret(image_encoder or "", "image_encoder", "model")


class ControlNetConfig(Section):
    """A ControlNet, which reads a control image of each row."""

    uri: str = Field(min_length=1)
    """A safetensors or GGUF file, or its folder or repository: a path, or an address like that of a model."""
    scale: float = 1.0
    """Strength of the net: its residuals are multiplied with it; 0 is none."""
    start: float = Field(default=0.0, ge=0, lt=1)
    """Share of the steps after which the net counts; less than `end`."""
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
