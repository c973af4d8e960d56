"""A fake pipeline without FLUX: its image is a cheap function of the request.

Marks in a prompt make it misbehave: `[raise]` fails the whole call, `[oom]` runs out of memory in a batch of more than
one image, `[oom whole]` in a call that is not tiled, `[die]` ends the process, `[die once]` ends only the first process
(a file in the folder `model.uri` records it), `[hang]` never returns, `[slow]` takes SLOW_S. `[hold]` waits while the
folder named by the environment variable HOLD has a file `hold`, and writes a file with the waiting process there.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flux_batch.config.schema import ModelConfig
from flux_batch.errors import CheckpointError, DeviceFatal, OutOfMemory, StoreError
from flux_batch.images import Pixels
from flux_batch.records import Kernels

SLOW_S = 0.2
DEATH_EXIT = 66
HOLD = "FAKE_PIPELINE_HOLD"
CONDITIONS = ("mask_image", "control_image", "reference_image", "image_prompt")
CLIP_CHARACTERS, T5_CHARACTERS = 77, 512


def fake_image(
    prompt: str,
    *,
    negative_prompt: str = "",
    seed: int = 0,
    width: int = 64,
    height: int = 64,
    num_inference_steps: int = 28,
    embedded_guidance: float = 3.5,
    cfg_scale: float = 1.0,
    input_image: Any = None,
    **others: Any,
) -> Pixels:
    """Return the image of a request: uint8, (h, w, 3)."""
    request = (prompt, negative_prompt, seed, width, height, num_inference_steps, embedded_guidance, cfg_scale)
    if input_image is not None or others:
        start = None if input_image is None else np.asarray(input_image).tobytes()
        request = (*request, start, *sorted(others.items()))
    digest = hashlib.blake2b(repr(request).encode(), digest_size=8).digest()
    return np.random.default_rng(int.from_bytes(digest)).integers(0, 256, (height, width, 3), dtype=np.uint8)


def _bytes_of(image: Any) -> Any:
    return [_bytes_of(each) for each in image] if isinstance(image, list) else np.asarray(image).tobytes()


class FakePipeline:
    """An ImagePipeline; `calls` has the prompts of each call, `options` its further arguments."""

    default_t5_sequence_length = 512
    default_guidance = 3.5
    needed_images: tuple[str, ...] = ()
    compile_cache: Any = None
    precision = {"dtype": "float32", "quantization": "none"}  # noqa: RUF012
    kernels = Kernels(device="cpu AVX2", attention="torch", compile=False, torch="2.13.0")
    native_dtype = "float32"
    offloads_text_encoders = False

    def __init__(self, memory: Path | None = None) -> None:
        self.calls: list[list[str]] = []
        self.options: list[dict[str, Any]] = []
        self.input_images: list[Any] = []
        self.conditions: list[dict[str, Any]] = []
        self.lora_calls: list[list[tuple[str, float]]] = []
        self.encoded: list[list[str]] = []
        self._memory = memory

    @property
    def num_calls(self) -> int:
        return len(self.calls)

    def __call__(
        self,
        prompt: Sequence[str] | None,
        *,
        negative_prompt: Sequence[str],
        width: int,
        height: int,
        num_inference_steps: int,
        embedded_guidance: Sequence[float],
        cfg_scale: Sequence[float],
        t5_sequence_length: int | None,
        seed: Sequence[int],
        output_type: str,
        input_image: Sequence[Any] | None = None,
        prompt_embeds: Any = None,
        pooled_prompt_embeds: Any = None,
        negative_prompt_embeds: Any = None,
        negative_pooled_prompt_embeds: Any = None,
        **others: Any,
    ) -> list[Pixels]:
        assert output_type == "np"
        if prompt is None:
            prompt = list(prompt_embeds)
            assert prompt == list(pooled_prompt_embeds)
            negative_prompt = [""] * len(prompt) if negative_prompt_embeds is None else list(negative_prompt_embeds)
        self.calls.append(list(prompt))
        self.options.append(others)
        if self.lora_calls and self.lora_calls[-1]:
            others = {**others, "loras": self.lora_calls[-1]}
        self.input_images += input_image or []
        conditions = {name: others.pop(name) for name in CONDITIONS if name in others}
        self.conditions.append(conditions)
        per_image = [{name: _bytes_of(values[at]) for name, values in conditions.items()} for at in range(len(prompt))]
        for text in prompt:
            self._misbehave(text, len(prompt), is_tiled=others.get("tiled", False))
        return [
            fake_image(
                text,
                negative_prompt=negative,
                seed=number,
                width=width,
                height=height,
                num_inference_steps=num_inference_steps,
                embedded_guidance=guidance,
                cfg_scale=cfg,
                input_image=start,
                **others,
                **images,
            )
            for text, negative, number, guidance, cfg, start, images in zip(
                prompt,
                negative_prompt,
                seed,
                embedded_guidance,
                cfg_scale,
                input_image or [None] * len(prompt),
                per_image,
                strict=True,
            )
        ]

    def set_loras(self, loras: Sequence[tuple[str, float]]) -> None:
        """Use these LoRAs; raise the errors of a real pipeline for names with `missing`, `away` or `broken`."""
        for uri, _ in loras:
            if "missing" in uri:
                raise CheckpointError(f"{uri} is not there")
            if "away" in uri:
                raise StoreError(f"{uri}: the store is away")
            if "broken" in uri:
                raise RuntimeError("broken by the device")
        self.lora_calls.append(list(loras))

    def encode_prompt(self, prompt: Sequence[str], t5_sequence_length: int | None = None) -> tuple[Any, Any]:
        """Return the texts themselves as embeddings, and record them in `encoded`."""
        self.encoded.append(list(prompt))
        return np.array(prompt, dtype=object), np.array(prompt, dtype=object)

    def truncations(self, prompts: Sequence[str], t5_sequence_length: int | None = None) -> list[tuple[bool, bool]]:
        longest = t5_sequence_length or T5_CHARACTERS
        return [(len(text) > CLIP_CHARACTERS, len(text) > longest) for text in prompts]

    def _misbehave(self, prompt: str, batch_size: int, *, is_tiled: bool) -> None:
        if "[raise]" in prompt:
            raise RuntimeError("asked to fail")
        if "[oom]" in prompt and batch_size > 1:
            raise OutOfMemory(f"{batch_size} images do not fit")
        if "[oom whole]" in prompt and not is_tiled:
            raise OutOfMemory("a whole image does not fit")
        if "[die once]" in prompt and self._is_first_to_die():
            os._exit(DEATH_EXIT)
        if "[die]" in prompt:
            os._exit(DEATH_EXIT)
        if "[slow]" in prompt:
            time.sleep(SLOW_S)
        if "[hold]" in prompt:
            self._hold()
        while "[hang]" in prompt:
            time.sleep(1)

    def _hold(self) -> None:
        mark = Path(os.environ.get(HOLD, ""), "hold")
        if mark.exists():
            mark.with_name(f"held-{os.getpid()}").touch()
        while mark.exists():
            time.sleep(0.01)

    def _is_first_to_die(self) -> bool:
        assert self._memory is not None, "[die once] needs a folder as model.uri"
        try:
            (self._memory / "died").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


class ControlledPipeline(FakePipeline):
    """A fake pipeline that a LoRA with `canny` in its name turns into another model.

    `guidances` records the guidance of each image. Its device fails after `max_calls`.
    """

    def __init__(self, max_calls: int = 1000) -> None:
        super().__init__()
        self.guidances: list[float] = []
        self._max_calls = max_calls

    @property
    def default_guidance(self) -> float:  # type: ignore[override]
        return 30.0 if any("canny" in uri for uri, _ in (self.lora_calls or [[]])[-1]) else 3.5

    def __call__(self, *arguments: Any, embedded_guidance: Sequence[float], **others: Any) -> list[Pixels]:  # type: ignore[override]
        if self.num_calls == self._max_calls:
            raise DeviceFatal("broken")
        self.guidances += embedded_guidance
        return super().__call__(*arguments, embedded_guidance=embedded_guidance, **others)


def make_fake_pipeline(model: ModelConfig) -> FakePipeline:
    """Make a fake pipeline for the `model` section of a job; picklable, for WorkerFactory.make_pipeline."""
    folder = Path(model.uri)
    return FakePipeline(folder if folder.is_dir() else None)
