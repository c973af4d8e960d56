"""What a worker needs of whatever computes images; FluxImagePipeline is one, tests bring their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

from flux_batch.images import Pixels


class CompileCache(Protocol):
    """What a pipeline has compiled, as bytes for another process."""

    @property
    def name(self) -> str:
        """A file name that tells which pipelines can use it."""
        ...

    def save(self) -> bytes | None:
        """Return what was compiled so far, None if that is nothing."""
        ...

    def load(self, data: bytes) -> None:
        """Take what another process has saved; it may run code that is in it. Raises: ValueError if it is damaged."""
        ...


class ImagePipeline(Protocol):
    """What computes images: prompts in, uint8 (h w 3) arrays out.

    Of the arguments with a default, only those that a batch needs are given.
    """

    @property
    def default_t5_sequence_length(self) -> int:
        """The text length used where none is asked for, in tokens."""
        ...

    @property
    def compile_cache(self) -> CompileCache | None:
        """What was compiled; None if nothing is."""
        ...

    @property
    def precision(self) -> Mapping[str, str]:
        """The `dtype` and `quantization` it computes in, as the `model` section of a job spells them."""
        ...

    @property
    def native_dtype(self) -> str:
        """The dtype that its device computes natively, by name."""
        ...

    def __call__(
        self,
        prompt: Sequence[str],
        *,
        negative_prompt: Sequence[str],
        width: int,
        height: int,
        num_inference_steps: int,
        embedded_guidance: Sequence[float],
        cfg_scale: Sequence[float],
        t5_sequence_length: int | None,
        seed: Sequence[int],
        output_type: Literal["np"],
        sigma_shift: float | None = None,
        input_image: Sequence[Any] | None = None,
        denoising_strength: float = 1.0,
        tiled: bool = False,
        tile_size: int = 128,
        tile_stride: int = 64,
    ) -> Sequence[Pixels]:
        """Make one image for each prompt."""
        ...

    def set_loras(self, loras: Sequence[tuple[str, float]]) -> None:
        """Use these LoRAs, address and scale, from now on, and no others; called only if a job has any."""
        ...

    def expect(self, texts: Sequence[tuple[str, int | None]]) -> None:
        """Say which texts, with their `t5_sequence_length`, come next, before the LoRAs are exchanged again."""
        ...

    def truncations(self, prompts: Sequence[str], t5_sequence_length: int | None = None) -> list[tuple[bool, bool]]:
        """Tell for each prompt whether CLIP's and T5's tokenizers cut it."""
        ...
