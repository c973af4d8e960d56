"""The sections of the job file for ControlNets, Redux and IP-Adapters."""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import Field, model_validator

from flux_batch.config.section import Section, check_no_secret
from flux_batch.config.values import Scales, Uris
from flux_batch.errors import InvalidSetting


class ReduxConfig(Section):
    """Redux with its image encoder; it reads the image prompts of each row."""

    uri: str = Field(min_length=1)
    """Its safetensors file, or the folder or repository that holds it: a path, or an address like that of a model."""
    image_encoder: str | None = Field(default=None, min_length=1)
    """The file or folder of its image encoder; the folder `image_encoder` beside it if null."""
    scale: float = 1.0
    """The weight of every image; it is multiplied with the row's own."""

    @property
    def uris(self) -> tuple[str, ...]:
        """Its address, as a tuple of one."""
        return (self.uri,)

    @model_validator(mode="after")
    def _without_secrets(self) -> ReduxConfig:
        _check_no_secrets(self.uris, self.image_encoder)
        return self


class IPAdapterConfig(Section):
    """IP-Adapters with their image encoder; each reads one image prompt of a row."""

    uri: Uris
    """Its safetensors file, or the folder or repository that holds it: a path, or an address like that of a model. A
    list loads several adapters, whose effects add up; each row then has one image for each, in this order."""
    image_encoder: str | None = Field(default=None, min_length=1)
    """The file or folder of its image encoder; the folder `image_encoder` beside it if null."""
    scale: Scales = 1.0
    """The weight of every image; it is multiplied with the row's own. A list has one weight for each adapter."""

    @property
    def uris(self) -> tuple[str, ...]:
        """The address of each adapter."""
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
    """A ControlNet, which reads one control image of each row."""

    uri: str = Field(min_length=1)
    """A safetensors or GGUF file, or its folder or repository: a path, or an address like that of a model."""
    scale: float = 1.0
    """Strength of the net: its residuals are multiplied with it; 0 turns it off."""
    start: float = Field(default=0.0, ge=0, lt=1)
    """The net is used from this share of the steps on; less than `end`."""
    end: float = Field(default=1.0, gt=0, le=1)
    """The net is used up to this share of the steps."""
    mode: int | None = Field(default=None, ge=0)
    """The kind of control image, for a union net only: 0 canny, 1 tile, 2 depth, 3 blur, 4 pose, 5 grey, 6 low
    quality."""

    @model_validator(mode="after")
    def _in_order(self) -> ControlNetConfig:
        check_no_secret(self.uri, "uri", "model")
        if self.start >= self.end:
            raise InvalidSetting(f"start = {self.start}: must be less than end = {self.end}", field="start")
        return self
