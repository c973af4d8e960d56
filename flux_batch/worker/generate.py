"""The step from a batch to its images: LoRAs, one call of the pipeline, and smaller ones if that fails.

Knows the pipeline and its memory; does not know files, records or shards.
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
    """Size and stride of the tiles that the autoencoder works in, in latents when decoding."""

    size: int
    stride: int

    @classmethod
    def of(cls, sampling: SamplingConfig) -> Tiles | None:
        """Return the tiles that a job asks for, None if it decodes whole images."""
        return cls(sampling.tile_size, sampling.tile_stride) if sampling.tiled else None


def image_options(config: JobConfig) -> dict[str, dict[str, Any]]:
    """Return the arguments that a job adds to a call with images, by their column.

    Those that have their default are left out.
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


# Texts whose embeddings a worker keeps in host memory: those of FLUX.1-dev take 4 MB each in bfloat16.
MAX_TEXTS_AT_ONCE = 512
# The last resort: a quarter of the pixels of a 1024 x 1024 image at a time.
SMALL_TILES = Tiles(64, 32)


@dataclass(frozen=True, slots=True)
class ImageOutcome:
    """The result of a task: an image (uint8, h w 3) or the error in its place, and how it was made.

    truncated: whether the tokenizers of CLIP and of T5 cut the prompt or the negative prompt. score: that of `quality`.
    """

    task: ImageTask
    result: Pixels | Exception
    tiles: Tiles | None = None
    truncated: tuple[bool | None, bool | None] | None = None
    score: float | None = None


@dataclass(frozen=True, slots=True)
class _MemoryFit:
    """The memory limit learned for one image shape: a batch size below `too_many` (None: not met yet), in `tiles`."""

    tiles: Tiles | None
    too_many: int | None = None


class LoraSwitch:
    """The LoRAs that a pipeline uses now, exchanged only for a batch that needs others."""

    def __init__(self, pipeline: ImagePipeline, defaults: Sequence[LoraUse]) -> None:
        """Set the LoRAs of the job. Raises: any error of setting them."""
        self._pipeline = pipeline
        # None after a failure, which may have left anything.
        self._current: tuple[LoraUse, ...] | None = ()
        if defaults:
            self._set(tuple(defaults))

    def use(self, loras: tuple[LoraUse, ...]) -> Exception | None:
        """Set the LoRAs of the next batch. Returns: the error of its rows if these cannot be used, else None.

        Raises: DeviceFatal; StoreError while a storage is unavailable, after which the same rows may succeed.
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
    """The texts of a shard, encoded together. Offloaded text encoders come to the device once for all.

    Texts with other LoRAs or another T5 length are encoded apart, and no more than MAX_TEXTS_AT_ONCE at a time.
    """

    def __init__(self, pipeline: ImagePipeline, tasks: Sequence[ImageTask]) -> None:
        self._pipeline = pipeline
        self._tasks = tasks
        self._group: tuple[Any, ...] | None = None
        self._rows: dict[str, int] = {}
        self._embeds: tuple[Any, Any] = (None, None)

    def arguments(self, batch: Sequence[ImageTask]) -> dict[str, Any]:
        """Return the arguments of a call that stand in for the texts of a batch."""
        texts = [text for task in batch for text in _texts_of(task)]
        if _text_group(batch[0]) != self._group or any(text not in self._rows for text in texts):
            self._encode(batch[0], texts)
        arguments = {"prompt": None, "negative_prompt": "", **self._select("", [task.request.prompt for task in batch])}
        if batch[0].request.sampling.uses_cfg:
            arguments |= self._select("negative_", [task.request.sampling.negative_prompt for task in batch])
        return arguments

    def _encode(self, first: ImageTask, texts: Sequence[str]) -> None:
        """Encode these texts, and with them the fitting ones of tasks after `first`."""
        group = _text_group(first)
        same = [task for task in self._tasks if _text_group(task) == group]
        start = next((index for index, task in enumerate(same) if task.position == first.position), len(same))
        following = [text for task in same[start:] for text in _texts_of(task)]
        distinct = list(dict.fromkeys([*texts, *following]))[: max(MAX_TEXTS_AT_ONCE, len(texts))]
        self._group, self._rows, self._embeds = None, {}, (None, None)  # leave memory for the new ones
        self._embeds = self._pipeline.encode_prompt(distinct, first.request.sampling.t5_sequence_length)
        self._group, self._rows = group, {text: row for row, text in enumerate(distinct)}

    def _select(self, prefix: str, texts: Sequence[str]) -> dict[str, Any]:
        rows = [self._rows[text] for text in texts]
        prompt_embeds, pooled_prompt_embeds = (embeds[rows] for embeds in self._embeds)
        return {f"{prefix}prompt_embeds": prompt_embeds, f"{prefix}pooled_prompt_embeds": pooled_prompt_embeds}


class BatchMaker:
    """Makes the images of one batch after the other; remembers per image shape which batch size was too large.

    What it remembers only skips calls that would fail again, so that an image does not depend on whether the worker is
    new. `device_s` is the time in seconds that calls of the pipeline took.
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

        image_options: further arguments of a call with images of a column.
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
        """Start a shard whose images will be made in the order of `tasks`."""
        self._texts = _ShardTexts(self._pipeline, tasks) if self._pipeline.offloads_text_encoders else None

    def make(self, batch: Sequence[ImageTask]) -> list[ImageOutcome]:
        """Make the images of a batch whose images and LoRAs can be read.

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
        """Return a task; one that asks for no guidance gets that of the model with its LoRAs."""
        from_model = task.request.guidance_from_model and not task.error
        return task.guided(self._pipeline.default_guidance) if from_model else task

    def _make_parts(self, batch: Sequence[ImageTask], fit: _MemoryFit) -> list[tuple[Pixels | Exception, Tiles | None]]:
        """Make the images of a batch; after an error those of its halves, down to single images.

        A single image that does not fit into memory is tried once more with the autoencoder in small tiles, unless the
        pipeline makes none: then it fails alone, and the next one is tried again.
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
        """Return for each image whether CLIP and whether T5 cut one of its prompts."""
        params = batch[0].request.sampling
        cut = self._pipeline.truncations([task.request.prompt for task in batch], params.t5_sequence_length)
        if not params.uses_cfg:
            return cut
        negative_prompts = [task.request.sampling.negative_prompt for task in batch]
        negative = self._pipeline.truncations(negative_prompts, params.t5_sequence_length)
        return [(a or c, b or d) for (a, b), (c, d) in zip(cut, negative, strict=True)]


def _clear_frames(error: BaseException) -> None:
    """Drop the locals of the calls that raised an error: tensors, whose memory the next batch needs."""
    waiting: list[BaseException | None] = [error]
    seen: set[int] = set()
    while waiting:
        if (one := waiting.pop()) is not None and id(one) not in seen:
            seen.add(id(one))
            traceback.clear_frames(one.__traceback__)
            waiting += [one.__cause__, one.__context__]


def _text_group(task: ImageTask) -> tuple[Any, ...]:
    """Return the settings that the texts of images must share to be encoded together."""
    return task.request.loras, task.request.sampling.t5_sequence_length


def _texts_of(task: ImageTask) -> list[str]:
    """Return the texts that are encoded for an image."""
    params = task.request.sampling
    return [task.request.prompt, params.negative_prompt] if params.uses_cfg else [task.request.prompt]


def _is_larger(tiles: Tiles | None, others: Tiles) -> bool:
    """Return whether decoding in `tiles` (None: the whole image at once) takes more memory than in `others`."""
    return tiles is None or tiles.size > others.size
