"""How a batch becomes images: the right LoRAs, one call, and smaller ones when that fails.

Knows the pipeline and its memory; does not know files, records or shards.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from flux_batch.errors import DeviceFatal, OutOfMemory
from flux_batch.images import Pixels
from flux_batch.records import LoraUse
from flux_batch.worker.batches import Item
from flux_batch.worker.lora_switch import LoraSwitch
from flux_batch.worker.protocol import ImagePipeline


class Tiles(NamedTuple):
    """How the autoencoder is cut, in latents when decoding."""

    size: int
    stride: int


# The last resort: a quarter of the pixels of a 1024 x 1024 image at a time.
SMALL_TILES = Tiles(64, 32)


@dataclass(frozen=True, slots=True)
class Made:
    """What became of an item: its image (uint8, h w 3) or why there is none, and how it was made."""

    item: Item
    outcome: Pixels | Exception
    tiles: Tiles | None = None
    truncated: tuple[bool, bool] | None = None  # by the tokenizers of CLIP and T5


@dataclass(frozen=True, slots=True)
class Fit:
    """What fits into memory of images of one shape: fewer than `too_many` at once (None: unknown), in these tiles."""

    tiles: Tiles | None
    too_many: int | None = None


class BatchMaker:
    """Makes the images of one batch after the other; remembers what did not fit, for the next of that shape.

    The memory leads to the calls that trying again would lead to, so that an image does not depend on whether the
    worker is new. `device_s` is the time the pipeline was at work.
    """

    def __init__(
        self, pipeline: ImagePipeline, loras: LoraSwitch, tiles: Tiles | None, on_progress: Callable[[], None]
    ) -> None:
        self._pipeline = pipeline
        self._loras = loras
        self._tiles = tiles
        self._on_progress = on_progress
        self._fits: dict[tuple[Any, ...], Fit] = {}
        self._expected: Sequence[Item] = ()
        self._told: Sequence[LoraUse] | None = None  # for which LoRAs the pipeline knows what is expected
        self.device_s = 0.0

    def expect(self, items: Sequence[Item]) -> None:
        """Take note of the images that will be made, in order, so that their texts may be encoded together."""
        self._expected, self._told = items, None

    def make(self, batch: Sequence[Item]) -> list[Made]:
        """Make the images of a batch, but for those whose input image or LoRA cannot be read.

        Raises: DeviceFatal; StoreError for a LoRA whose storage is away.
        """
        truncated = self._truncations(batch)
        ready = [item for item in batch if not isinstance(item.image, Exception)]
        if ready and (error := self._loras.use(ready[0].request.loras)):
            return [Made(item, error, None, cut) for item, cut in zip(batch, truncated, strict=True)]
        self._tell(batch[0].request.loras)
        fit = self._fits.get(batch[0].shape, Fit(self._tiles))
        made = iter(self._attempt(ready, fit) if ready else [])
        return [
            Made(item, item.image, None, cut) if isinstance(item.image, Exception) else Made(item, *next(made), cut)
            for item, cut in zip(batch, truncated, strict=True)
        ]

    def _tell(self, loras: Sequence[LoraUse]) -> None:
        """Tell the pipeline which texts come next with the LoRAs that it has now."""
        if self._expected and loras != self._told:
            of_these = [item for item in self._expected if item.request.loras == loras]
            self._pipeline.expect(list(dict.fromkeys(text for item in of_these for text in texts_of(item))))
            self._told = loras

    def _attempt(self, batch: Sequence[Item], fit: Fit) -> list[tuple[Pixels | Exception, Tiles | None]]:
        """Make the images of a batch; if that fails, of its halves, until only what cannot be made has failed.

        A single one that does not fit into memory is tried once more with the autoencoder in small tiles.
        """
        if fit.too_many is None or len(batch) < max(fit.too_many, 2):
            started = time.monotonic()
            try:
                return [(pixels, fit.tiles) for pixels in self._call_pipeline(batch, fit.tiles)]
            except DeviceFatal:
                raise
            except Exception as error:
                is_too_large = isinstance(error, OutOfMemory)
                if len(batch) == 1 and not (is_too_large and is_larger(fit.tiles, SMALL_TILES)):
                    return [(error, None)]
                if is_too_large:
                    self._remember(batch, fit.tiles)
            finally:
                self.device_s += time.monotonic() - started
                self._on_progress()
        if len(batch) == 1:
            return self._attempt(batch, Fit(SMALL_TILES))
        middle = len(batch) // 2
        return self._attempt(batch[:middle], fit) + self._attempt(batch[middle:], fit)

    def _remember(self, batch: Sequence[Item], tiles: Tiles | None) -> None:
        """Let the next batch of that shape begin where this one will arrive."""
        known = self._fits.get(batch[0].shape, Fit(tiles))
        if len(batch) == 1:
            self._fits[batch[0].shape] = Fit(SMALL_TILES, 2)
        elif known.too_many is None or len(batch) < known.too_many:
            self._fits[batch[0].shape] = Fit(known.tiles, len(batch))

    def _call_pipeline(self, batch: Sequence[Item], tiles: Tiles | None) -> Sequence[Pixels]:
        params = batch[0].request.sampling
        options: dict[str, Any] = {}
        if params.sigma_shift is not None:
            options["sigma_shift"] = params.sigma_shift
        if batch[0].image is not None:
            options |= {
                "input_image": [item.image for item in batch],
                "denoising_strength": params.denoising_strength,
            }
        if tiles:
            options |= {"tiled": True, "tile_size": tiles.size, "tile_stride": tiles.stride}
        return self._pipeline(
            [item.request.prompt for item in batch],
            negative_prompt=[item.request.sampling.negative_prompt for item in batch],
            width=params.width,
            height=params.height,
            num_inference_steps=params.num_inference_steps,
            embedded_guidance=[item.request.sampling.embedded_guidance for item in batch],
            cfg_scale=[item.request.sampling.cfg_scale for item in batch],
            t5_sequence_length=params.t5_sequence_length,
            seed=[item.request.seeds[item.image_index] for item in batch],
            output_type="np",
            **options,
        )

    def _truncations(self, batch: Sequence[Item]) -> list[tuple[bool, bool]]:
        """Tell of each image whether CLIP and whether T5 leaves out the end of its prompt or negative prompt."""
        params = batch[0].request.sampling
        cut = self._pipeline.truncations([item.request.prompt for item in batch], params.t5_sequence_length)
        if not params.uses_cfg:
            return cut
        negative_prompts = [item.request.sampling.negative_prompt for item in batch]
        negative = self._pipeline.truncations(negative_prompts, params.t5_sequence_length)
        return [(a or c, b or d) for (a, b), (c, d) in zip(cut, negative, strict=True)]


def texts_of(item: Item) -> list[tuple[str, int | None]]:
    """Return the texts that are encoded for an image, each with the length it is asked for in."""
    params = item.request.sampling
    texts = [item.request.prompt, params.negative_prompt] if params.uses_cfg else [item.request.prompt]
    return [(text, params.t5_sequence_length) for text in texts]


def is_larger(tiles: Tiles | None, others: Tiles) -> bool:
    """Whether an image, whole or in tiles, takes more memory than in others."""
    return tiles is None or tiles.size > others.size
