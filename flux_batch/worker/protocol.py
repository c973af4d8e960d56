"""The protocol between a worker and what computes images: FluxImagePipeline is one.

A job may bring its own by `model.pipeline`, which is an `OwnPipeline`: it says less of itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

from flux_batch.images import Pixels
from flux_batch.records import Kernels


class CompileCache(Protocol):
    """The compiled code of a pipeline, as bytes for another process."""

    @property
    def name(self) -> str:
        """A file name, the same for all pipelines that can use the cache."""
        ...

    def save(self) -> bytes | None:
        """Return the code compiled so far, None if there is none."""
        ...

    def load(self, data: bytes) -> None:
        """Load what another process has saved, which may run code in it. Raises: ValueError if it is damaged."""
        ...


class Scorer(Protocol):
    """A judge of images, which gives each a score; an annotator is behind it."""

    def __call__(self, images: Sequence[Pixels], records: Sequence[Mapping[str, Any]]) -> Sequence[float | None]:
        """Return the score of each image, None for one that cannot be judged; `records` are those to be written."""
        ...


class ImagePipeline(Protocol):
    """A model that computes images: prompts in, uint8 (h w 3) arrays out.

    A worker passes arguments that have a default only to a batch that needs them, and so the fields of SamplingParams
    that are marked _IF_SET.
    """

    @property
    def default_t5_sequence_length(self) -> int | None:
        """The T5 sequence length of images that ask for none, in tokens; None for a model without T5."""
        ...

    @property
    def default_guidance(self) -> float:
        """The embedded guidance of images whose job and row ask for none."""
        ...

    @property
    def needed_images(self) -> tuple[str, ...]:
        """The arguments of images without which the model makes nothing; one that needs several comes as often."""
        ...

    @property
    def compile_cache(self) -> CompileCache | None:
        """The compile cache, None for a pipeline that compiles nothing."""
        ...

    @property
    def precision(self) -> Mapping[str, str]:
        """The `dtype` and `quantization` in use, spelled as in the `model` section of a job."""
        ...

    @property
    def kernels(self) -> Kernels:
        """The device, attention and libraries in use, and whether blocks are compiled."""
        ...

    @property
    def native_dtype(self) -> str:
        """The dtype that its device computes natively, by name."""
        ...

    @property
    def offloads_text_encoders(self) -> bool:
        """True if the text encoders wait in host memory. The texts of a shard are best encoded together then."""
        ...

    def __call__(
        self,
        prompt: Sequence[str] | None,
        *,
        seed: Sequence[int],
        output_type: Literal["np"],
        input_image: Sequence[Any] | None = None,
        mask_image: Sequence[Any] | None = None,
        control_image: Sequence[Any] | None = None,
        reference_image: Sequence[Any] | None = None,
        image_prompt: Sequence[Any] | None = None,
        control_image_scale: Sequence[Sequence[float]] = (),
        image_prompt_scale: Sequence[Sequence[float]] = (),
        controlnet_conditioning_scale: Sequence[float] = (),
        control_guidance_start: Sequence[float] = (),
        control_guidance_end: Sequence[float] = (),
        control_mode: Sequence[int | None] = (),
        paste_back: bool = True,
        resize_references: bool = True,
        tiled: bool = False,
        tile_size: int = 128,
        tile_stride: int = 64,
        prompt_embeds: Any = None,
        pooled_prompt_embeds: Any = None,
        negative_prompt_embeds: Any = None,
        negative_pooled_prompt_embeds: Any = None,
        **sampling: Any,
    ) -> Sequence[Pixels | Exception]:
        """Make one image for each prompt, or for each row of embeddings; an exception in place of one fails its row.

        `sampling` has the fields of SamplingParams, as `call_arguments` spells them.
        """
        ...

    def set_loras(self, loras: Sequence[tuple[str, float]]) -> None:
        """Use only these LoRAs from now on, as (uri, scale); called only if a job has any."""
        ...

    def encode_prompt(self, prompt: Sequence[str], t5_sequence_length: int | None = None) -> tuple[Any, Any]:
        """Return prompt_embeds and pooled_prompt_embeds, a row for each prompt, with the current LoRAs.

        Called only if `offloads_text_encoders`.
        """
        ...

    def truncations(
        self, prompts: Sequence[str], t5_sequence_length: int | None = None
    ) -> Sequence[tuple[bool | None, bool | None]]:
        """Return for each prompt whether the tokenizers of CLIP and of T5 cut it; None where there is none."""
        ...


class OwnPipeline(Protocol):
    """A pipeline of another model, which a job names: a class, or a function that returns one.

        import numpy as np

        class Noise:
            settings = frozenset({"num_inference_steps"})

            def __init__(self, model, *, device, grain=255):
                self.grain = grain

            def __call__(self, prompt, *, seed, width, height, num_inference_steps):
                draws = [np.random.default_rng(each) for each in seed]
                return [draw.integers(0, self.grain, (height, width, 3), dtype=np.uint8) for draw in draws]

    >>> Noise(None, device="cpu")(["a cat"], seed=[7], width=32, height=16, num_inference_steps=1)[0].shape
    (16, 32, 3)

    With `model.pipeline: my_module:Noise` and `model.pipeline_options: {grain: 100}` each worker opens
    `Noise(model, device="cuda", grain=100)` once. `model` is the section of the job, of which `uri` is the pipeline's
    own to read; `device` is `cpu` or `cuda`. An image must depend on its own prompt, seed and settings alone, not on
    the others of the call: then a resumed run makes the same.

    If a call raises, it is tried again with half of the images, down to single ones: an image that fails alone is a
    failed row, with the error as its reason. torch's own error for a lack of memory counts as one. An exception in the
    place of an image fails that row alone.
    """

    settings: frozenset[str]
    """The settings that it knows, of those of `sampling` (`num_inference_steps`, `embedded_guidance`, `cfg_scale`,
    `negative_prompt`, ...), the columns of images (`input_image`, ...), `tiled`, and of `model` (`loras`, `compile`,
    ...). It is given no other. A job that sets another ends before a row is rendered; a row that does fails. An
    attribute of the class is read before the model is loaded."""

    def __call__(
        self, prompt: Sequence[str], *, seed: Sequence[int], width: int, height: int, **settings: Any
    ) -> Sequence[Any]:
        """Return an image for each prompt: uint8 (height, width, 3), a PIL image, or an exception.

        settings: those that it declares; `embedded_guidance`, `cfg_scale`, `negative_prompt` and images are lists with
        a value for each image, all others are one value. Those that have their default may be left out.
        """
        ...


class _DetailedPipeline(OwnPipeline, Protocol):
    """A pipeline that says more of itself; each of these attributes may be left out."""

    default_guidance: float
    """The `embedded_guidance` of images that ask for none; 0 if left out."""
    default_t5_sequence_length: int | None
    """The `t5_sequence_length` of images that ask for none."""
    needed_images: tuple[str, ...]
    """The columns of images without which it makes nothing."""
    precision: Mapping[str, str]
    """`dtype` and `quantization`, as the section `model` spells them. The run keeps to those of its first worker."""
    is_compiled: bool
    """True if it compiles, which rounds otherwise."""

    def set_loras(self, loras: Sequence[tuple[str, float]]) -> None:
        """Use only these LoRAs from now on, as (uri, scale); called only if it declares `loras`."""
        ...

    def truncations(
        self, prompts: Sequence[str], t5_sequence_length: int | None
    ) -> Sequence[tuple[bool | None, bool | None]]:
        """Return for each prompt whether its tokenizers of CLIP and of T5 cut it."""
        ...
