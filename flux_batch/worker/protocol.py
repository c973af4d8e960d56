"""The protocols of pipelines, which compute a worker's images: FluxImagePipeline is an ImagePipeline.

A job may name its own by `model.pipeline`: an `OwnPipeline`, which needs fewer attributes.
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
        """Load the data that another process saved; this may run code in it. Raises: ValueError if it is damaged."""
        ...


class Scorer(Protocol):
    """A function that scores images; it wraps an annotator."""

    def __call__(self, images: Sequence[Pixels], records: Sequence[Mapping[str, Any]]) -> Sequence[float | None]:
        """Return the score of each image, None if there is none; `records` are their metadata records."""
        ...


class ImagePipeline(Protocol):
    """A model that computes images: prompts in, uint8 (h w 3) arrays out.

    A worker passes an argument that has a default only if a batch needs it. The same holds for the fields of
    SamplingParams that are marked _IF_SET.
    """

    @property
    def default_t5_sequence_length(self) -> int | None:
        """The default T5 sequence length, in tokens; None for a model without T5."""
        ...

    @property
    def default_guidance(self) -> float:
        """The embedded guidance of images whose job and row set none."""
        ...

    @property
    def needed_images(self) -> tuple[str, ...]:
        """The image arguments that the model requires; one that needs several images is repeated."""
        ...

    @property
    def compile_cache(self) -> CompileCache | None:
        """The compile cache; None if the pipeline compiles nothing."""
        ...

    @property
    def precision(self) -> Mapping[str, str]:
        """The `dtype` and `quantization` in use, spelled as in the `model` section of a job."""
        ...

    @property
    def kernels(self) -> Kernels:
        """The device, attention and libraries in use."""
        ...

    @property
    def native_dtype(self) -> str:
        """The name of the dtype that its device computes natively."""
        ...

    @property
    def offloads_text_encoders(self) -> bool:
        """True if the text encoders are kept in host memory; a shard's texts are then encoded together."""
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
        """Make one image for each prompt, or for each row of embeddings.

        An exception in the place of an image fails that image. `sampling` has the fields of SamplingParams, as
        `call_arguments` returns them.
        """
        ...

    def set_loras(self, loras: Sequence[tuple[str, float]]) -> None:
        """Use exactly these LoRAs from now on, as (uri, scale); called only if a job has any."""
        ...

    def encode_prompt(self, prompt: Sequence[str], t5_sequence_length: int | None = None) -> tuple[Any, Any]:
        """Return prompt_embeds and pooled_prompt_embeds, a row for each prompt, with the current LoRAs.

        Called only if `offloads_text_encoders`.
        """
        ...

    def truncations(
        self, prompts: Sequence[str], t5_sequence_length: int | None = None
    ) -> Sequence[tuple[bool | None, bool | None]]:
        """Return for each prompt whether the tokenizers of CLIP and T5 truncate it; None without that tokenizer."""
        ...


class OwnPipeline(Protocol):
    """A pipeline for another model, which a job names: a class, or a function that returns a pipeline.

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

    With `model.pipeline: my_module:Noise` and `model.pipeline_options: {grain: 100}` each worker calls
    `Noise(model, device="cuda", grain=100)` once. `model` is the section `model` of the job; the pipeline decides what
    its `uri` means. `device` is `cpu` or `cuda`. An image must depend only on its own prompt, seed and settings, not on
    the other images of the call: then a resumed run makes the same images.

    If a call raises, it is retried with half of the images, down to single ones. An image that fails alone becomes a
    failed row, with the error as its reason. torch's out-of-memory error is handled in the same way. An exception in
    the place of an image fails only that row.
    """

    settings: frozenset[str]
    """The settings that it knows: keys of `sampling` (`num_inference_steps`, `embedded_guidance`, `cfg_scale`,
    `negative_prompt`, `tiled`, ...), image columns (`input_image`, ...), and keys of `model` (`loras`, `compile`, ...).
    It gets no others. A job that sets another one ends before any row is rendered; a row that sets another one fails.
    If it is an attribute of the class, it is checked before the model is loaded."""

    def __call__(
        self, prompt: Sequence[str], *, seed: Sequence[int], width: int, height: int, **settings: Any
    ) -> Sequence[Any]:
        """Return an image for each prompt: uint8 (height, width, 3), a PIL image, or an exception.

        settings: the declared ones. `embedded_guidance`, `cfg_scale`, `negative_prompt` and images are lists with one
        value per image; every other setting is one value. Settings at their default may be left out.
        """
        ...


class _DetailedPipeline(OwnPipeline, Protocol):
    """A pipeline with optional attributes, each of which may be left out."""

    default_guidance: float
    """The `embedded_guidance` of images that set none; 0 if left out."""
    default_t5_sequence_length: int | None
    """The `t5_sequence_length` of images that set none."""
    needed_images: tuple[str, ...]
    """The image columns that it requires."""
    precision: Mapping[str, str]
    """`dtype` and `quantization`, spelled as in the section `model`. All workers use those of the first one."""
    is_compiled: bool
    """True if it is compiled, which changes rounding."""

    def set_loras(self, loras: Sequence[tuple[str, float]]) -> None:
        """Use exactly these LoRAs from now on, as (uri, scale); called only if it declares `loras`."""
        ...

    def truncations(
        self, prompts: Sequence[str], t5_sequence_length: int | None
    ) -> Sequence[tuple[bool | None, bool | None]]:
        """Return for each prompt whether its tokenizers of CLIP and T5 truncate it."""
        ...
