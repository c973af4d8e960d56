"""The step from a batch to its images: LoRAs, one call of the pipeline, and smaller calls if that fails.

This module knows the pipeline and its memory, but no files, records or shards.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from flux_batch.config.schema import JobConfig, SamplingConfig
from flux_batch.errors import (
    CheckpointError,
    DeviceFatal,
    InvalidSetting,
    NotFound,
    OutOfMemory,
    RowError,
    StoreError,
    StoreRefused,
)
from flux_batch.images import Pixels
from flux_batch.records import WEIGHTED_COLUMNS, LoraUse
from flux_batch.sampling_params import call_arguments
from flux_batch.worker.batches import ImageTask, grouped
from flux_batch.worker.protocol import ImagePipeline


class Tiles(NamedTuple):
    """Size and stride of the autoencoder's tiles; in latents when decoding."""

    size: int
    stride: int

    @classmethod
    def of(cls, sampling: SamplingConfig) -> Tiles | None:
        """Return the tiles that a job sets; None if it decodes whole images."""
        return cls(sampling.tile_size, sampling.tile_stride) if sampling.tiled else None


def image_options(config: JobConfig) -> dict[str, dict[str, Any]]:
    """Return the arguments that a job adds to calls with images, by column.

    Arguments at their default are left out.
    """
    sampling, nets = config.sampling, config.model.controlnets
    options: dict[str, dict[str, tuple[Any, Any]]] = {
        "mask_image": {"paste_back": (sampling.paste_back, True)},
        "reference_image": {"resize_references": (sampling.resize_references, True)},
        "control_image": {
            "controlnet_conditioning_scale": ([net.scale for net in nets], [1.0] * len(nets)),
            "control_guidance_start": ([net.start for net in nets], [0.0] * len(nets)),
            "control_guidance_end": ([net.end for net in nets], [1.0] * len(nets)),
            "control_mode": ([net.mode for net in nets], [None] * len(nets)),
        },
    }
    changed = {
        column: {name: value for name, (value, default) in values.items() if value != default}
        for column, values in options.items()
    }
    return {column: values for column, values in changed.items() if values}


# The number of texts whose embeddings a worker keeps in host memory; with FLUX.1-dev each takes 4 MB in bfloat16.
MAX_TEXTS_AT_ONCE = 512
# Tiles for an image that does not fit into memory: a quarter of the pixels of a 1024 x 1024 image at a time.
SMALL_TILES = Tiles(64, 32)


@dataclass(frozen=True, slots=True)
class ImageOutcome:
    """The result of a task: an image (uint8, h w 3) or an error in its place, and how it was made.

    truncated: True if the tokenizers of CLIP and T5 truncated the prompt or the negative prompt. score: the score for
    `quality`.
    """

    task: ImageTask
    result: Pixels | Exception
    tiles: Tiles | None = None
    truncated: tuple[bool | None, bool | None] | None = None
    score: float | None = None


@dataclass(frozen=True, slots=True)
class _MemoryFit:
    """The memory limit of one image shape: batches smaller than `too_many` (None: no limit yet), in `tiles`."""

    tiles: Tiles | None
    too_many: int | None = None


class LoraSwitch:
    """The LoRAs that a pipeline uses now; they are switched only for a batch that needs others."""

    def __init__(self, pipeline: ImagePipeline, defaults: Sequence[LoraUse]) -> None:
        """Set the LoRAs of the job. Raises: any error of setting them."""
        self._pipeline = pipeline
        # None after a failure, when the pipeline's LoRAs are not known.
        self._current: tuple[LoraUse, ...] | None = ()
        if defaults:
            self._set(tuple(defaults))

    def use(self, loras: tuple[LoraUse, ...]) -> Exception | None:
        """Set the LoRAs of the next batch. Returns: the error of its rows if they cannot be used, else None.

        Raises: DeviceFatal; StoreError if a storage is unavailable, since the same rows may succeed later.
        """
        if loras == self._current:
            return None
        try:
            self._set(loras)
            return None
        except (CheckpointError, InvalidSetting, NotFound, StoreRefused) as error:
            return RowError(f"lora {', '.join(lora.name for lora in loras)}: {error}")
        except (DeviceFatal, StoreError):
            raise
        except Exception as error:  # the rows of a batch end here
            _clear_frames(error)
            return error

    def _set(self, loras: tuple[LoraUse, ...]) -> None:
        self._current = None
        self._pipeline.set_loras([(lora.uri, lora.scale) for lora in loras])
        self._current = loras


class _ShardTexts:
    """The texts of a shard, encoded together: offloaded text encoders are moved to the device once.

    Texts with other LoRAs or another T5 length are encoded separately, and at most MAX_TEXTS_AT_ONCE at a time.
    """

    def __init__(self, pipeline: ImagePipeline, tasks: Sequence[ImageTask]) -> None:
        self._pipeline = pipeline
        self._tasks = tasks
        self._group: tuple[Any, ...] | None = None
        self._rows: dict[str, int] = {}
        self._embeds: tuple[Any, Any] = (None, None)

    def arguments(self, batch: Sequence[ImageTask]) -> dict[str, Any]:
        """Return the arguments that replace the texts of a batch in a call."""
        texts = [text for task in batch for text in _texts_of(task)]
        if _text_group(batch[0]) != self._group or any(text not in self._rows for text in texts):
            self._encode(batch[0], texts)
        arguments = {"prompt": None, "negative_prompt": "", **self._select("", [task.request.prompt for task in batch])}
        if batch[0].request.sampling.uses_cfg:
            arguments |= self._select("negative_", [task.request.sampling.negative_prompt for task in batch])
        return arguments

    def _encode(self, first: ImageTask, texts: Sequence[str]) -> None:
        """Encode these texts, together with those of later tasks that have the same settings."""
        group = _text_group(first)
        same = [task for task in self._tasks if _text_group(task) == group]
        start = next((index for index, task in enumerate(same) if task.position == first.position), len(same))
        following = [text for task in same[start:] for text in _texts_of(task)]
        distinct = list(dict.fromkeys([*texts, *following]))[: max(MAX_TEXTS_AT_ONCE, len(texts))]
        self._group, self._rows, self._embeds = None, {}, (None, None)  # free the memory of the old ones first
        self._embeds = self._pipeline.encode_prompt(distinct, first.request.sampling.t5_sequence_length)
        self._group, self._rows = group, {text: row for row, text in enumerate(distinct)}

    def _select(self, prefix: str, texts: Sequence[str]) -> dict[str, Any]:
        rows = [self._rows[text] for text in texts]
        prompt_embeds, pooled_prompt_embeds = (embeds[rows] for embeds in self._embeds)
        return {f"{prefix}prompt_embeds": prompt_embeds, f"{prefix}pooled_prompt_embeds": pooled_prompt_embeds}


class BatchMaker:
    """Makes the images of batches; remembers per image shape which batch size was too large.

    This memory only skips calls that would fail again, so images do not depend on the history of a worker. `device_s`
    is the total time of pipeline calls, in seconds.
    """

    def __init__(
        self,
        pipeline: ImagePipeline,
        loras: Sequence[LoraUse],
        tiles: Tiles | None,
        on_progress: Callable[[], None] = lambda: None,
        *,
        image_options: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Set the LoRAs of the job, `loras`; `on_progress` is called after each call of the pipeline.

        image_options: further arguments of a call with images, by column.
        """
        self._image_options = image_options or {}
        self._pipeline = pipeline
        self._loras = LoraSwitch(pipeline, loras)
        self._tiles = tiles
        known = getattr(pipeline, "settings", None)  # of a pipeline of somebody else's
        self._makes_tiles = known is None or "tiled" in known
        self._on_progress = on_progress
        self._fits: dict[tuple[Any, ...], _MemoryFit] = {}
        self._texts: _ShardTexts | None = None
        self.device_s = 0.0

    def start_shard(self, tasks: Sequence[ImageTask]) -> None:
        """Begin a shard whose images will be made in the order of `tasks`."""
        self._texts = _ShardTexts(self._pipeline, tasks) if self._pipeline.offloads_text_encoders else None

    def make(self, batch: Sequence[ImageTask]) -> list[ImageOutcome]:
        """Make the images of a batch; return errors for tasks whose input images or LoRAs cannot be read.

        Raises: DeviceFatal; StoreError if the storage of a LoRA is unavailable.
        """
        truncated = self._truncations(batch)
        ready = [task for task in batch if not task.error]
        if ready and (error := self._loras.use(ready[0].request.loras)):
            return [ImageOutcome(task, error, None, cut) for task, cut in zip(batch, truncated, strict=True)]
        batch = [self._with_guidance(task) for task in batch]
        ready = [task for task in batch if not task.error]
        made: dict[int, tuple[Pixels | Exception, Tiles | None]] = {}
        for group in grouped(ready):
            fit = self._fits.get(group[0].read_shape, _MemoryFit(self._tiles))
            results = self._make_parts(group, fit)
            made |= {id(task): result for task, result in zip(group, results, strict=True)}
        return [
            ImageOutcome(task, task.error, None, cut) if task.error else ImageOutcome(task, *made[id(task)], cut)
            for task, cut in zip(batch, truncated, strict=True)
        ]

    def _with_guidance(self, task: ImageTask) -> ImageTask:
        """Return a task; set a missing guidance to that of the model with its LoRAs."""
        from_model = task.request.guidance_from_model and not task.error
        return task.guided(self._pipeline.default_guidance) if from_model else task

    def _make_parts(self, batch: Sequence[ImageTask], fit: _MemoryFit) -> list[tuple[Pixels | Exception, Tiles | None]]:
        """Make the images of a batch; after an error make its halves, down to single images.

        A single image that does not fit into memory is retried once with the autoencoder in small tiles. A pipeline
        without tiles fails this image alone, and later ones are tried as before.
        """
        if fit.too_many is None or len(batch) < max(fit.too_many, 2):
            started = time.monotonic()
            try:
                return [(pixels, fit.tiles) for pixels in self._call_pipeline(batch, fit.tiles)]
            except DeviceFatal:
                raise
            except Exception as error:
                _clear_frames(error)
                is_too_large = isinstance(error, OutOfMemory)
                may_tile = is_too_large and self._makes_tiles and _is_larger(fit.tiles, SMALL_TILES)
                if len(batch) == 1 and not may_tile:
                    return [(error, None)]
                if is_too_large:
                    self._remember(batch, fit.tiles)
            finally:
                self.device_s += time.monotonic() - started
                self._on_progress()
        if len(batch) == 1:
            return self._make_parts(batch, _MemoryFit(SMALL_TILES))
        middle = len(batch) // 2
        return self._make_parts(batch[:middle], fit) + self._make_parts(batch[middle:], fit)

    def _remember(self, batch: Sequence[ImageTask], tiles: Tiles | None) -> None:
        """Lower the memory limit of a shape after a batch that did not fit."""
        shape = batch[0].read_shape
        known = self._fits.get(shape, _MemoryFit(tiles))
        if len(batch) == 1:
            self._fits[shape] = _MemoryFit(SMALL_TILES, 2)
        elif known.too_many is None or len(batch) < known.too_many:
            self._fits[shape] = _MemoryFit(known.tiles, len(batch))

    def _call_pipeline(self, batch: Sequence[ImageTask], tiles: Tiles | None) -> Sequence[Pixels | Exception]:
        options = call_arguments([task.request.sampling for task in batch])
        options |= {name: [task.images[name] for task in batch] for name in batch[0].images}
        for column in WEIGHTED_COLUMNS:
            scales = [[image.scale for image in getattr(task.request.images, column)] for task in batch]
            if any(scale != 1 for each in scales for scale in each):
                options[f"{column}_scale"] = scales
        for name in batch[0].images:
            options |= self._image_options.get(name, {})
        if tiles:
            options |= {"tiled": True, "tile_size": tiles.size, "tile_stride": tiles.stride}
        if self._texts:
            options |= self._texts.arguments(batch)
        else:
            options["prompt"] = [task.request.prompt for task in batch]
        return self._pipeline(
            seed=[task.seed for task in batch],
            output_type="np",
            **options,
        )

    def _truncations(self, batch: Sequence[ImageTask]) -> Sequence[tuple[bool | None, bool | None]]:
        """Return for each image whether CLIP and T5 truncated one of its prompts."""
        params = batch[0].request.sampling
        cut = self._pipeline.truncations([task.request.prompt for task in batch], params.t5_sequence_length)
        if not params.uses_cfg:
            return cut
        negative_prompts = [task.request.sampling.negative_prompt for task in batch]
        negative = self._pipeline.truncations(negative_prompts, params.t5_sequence_length)
        return [(a or c, b or d) for (a, b), (c, d) in zip(cut, negative, strict=True)]


def _clear_frames(error: BaseException) -> None:
    """Clear the local variables of the calls that raised an error: they hold tensors and so memory."""
    waiting: list[BaseException | None] = [error]
    seen: set[int] = set()
    while waiting:
        if (one := waiting.pop()) is not None and id(one) not in seen:
            seen.add(id(one))
            traceback.clear_frames(one.__traceback__)
            waiting += [one.__cause__, one.__context__]


def _text_group(task: ImageTask) -> tuple[Any, ...]:
    """Return the settings that must be equal for texts to be encoded together."""
    return task.request.loras, task.request.sampling.t5_sequence_length


def _texts_of(task: ImageTask) -> list[str]:
    """Return the texts that are encoded for an image."""
    params = task.request.sampling
    return [task.request.prompt, params.negative_prompt] if params.uses_cfg else [task.request.prompt]


def _is_larger(tiles: Tiles | None, others: Tiles) -> bool:
    """Return whether decoding in `tiles` (None: the whole image at once) takes more memory than in `others`."""
    return tiles is None or tiles.size > others.size
