"""FluxImagePipeline: prompts in, pictures out.

The one translator between public words (those of DiffSynth-Studio and diffusers) and the model's. Knows no file, job
or storage.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flux_batch.errors import CheckpointError, InvalidSetting, RowError
from flux_batch.model.autoencoder import AutoEncoder
from flux_batch.model.params import ScheduleParams
from flux_batch.model.sampling import (
    Conditioning,
    Progress,
    add_noise,
    denoise,
    first_step,
    make_generators,
    make_noise,
    make_sigmas,
    pack,
    position_ids,
    unpack,
)
from flux_batch.model.text import ClipEncoder, T5Encoder
from flux_batch.model.transformer import Flux
from flux_batch.model_manager import TITLES, ModelManager, PathOrFolder, device_errors, find_parts
from flux_batch.records import ALIASES, MAX_SEED, MAX_STEPS, PIXELS_PER_TOKEN, check_integer, check_scale, check_side

OutputType = Literal["pil", "np", "pt", "latent"]
Value = TypeVar("Value")

# Source: black-forest-labs/flux 802fb47, src/flux/cli.py: 256 for schnell, 512 for all others.
T5_SEQUENCE_LENGTH = {True: 512, False: 256}  # by: is guidance embedded?


class FluxImagePipeline:
    """Text (and optionally a picture) to pictures. Call it; see `__call__`."""

    def __init__(
        self,
        transformer: Flux,
        autoencoder: AutoEncoder,
        clip: ClipEncoder,
        t5: T5Encoder,
        schedule: ScheduleParams,
    ) -> None:
        self.transformer = transformer
        self.autoencoder = autoencoder
        self.clip = clip
        self.t5 = t5
        self.schedule = schedule
        check_parts_fit(transformer, autoencoder, clip, t5)
        weight = transformer.img_in.weight
        self.device = weight.device
        self.torch_dtype = weight.dtype

    @classmethod
    def from_model_manager(cls, model_manager: ModelManager) -> FluxImagePipeline:
        """Assemble the loaded parts. Raises: CheckpointError naming the parts that were not loaded."""
        missing = [title for part, title in TITLES.items() if getattr(model_manager, part) is None]
        if missing:
            raise CheckpointError(f"not loaded: {', '.join(missing)}; add their files to load_models([...])")
        manager: Any = model_manager  # every part is there, see above
        return cls(manager.transformer, manager.autoencoder, manager.clip, manager.t5, manager.schedule)

    @classmethod
    def from_pretrained(
        cls,
        uri: PathOrFolder,
        torch_dtype: torch.dtype | str = torch.bfloat16,
        device: str | torch.device | None = None,
    ) -> FluxImagePipeline:
        """Load a model folder in the layout of diffusers or the original one, or the word `demo`.

        uri: a path or file:// address; torch_dtype: a dtype or its name; device: `cuda` if there is one, else `cpu`.
        Raises: CheckpointError saying what was looked for.
        """
        parts = find_parts(uri)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = getattr(torch, torch_dtype, None) if isinstance(torch_dtype, str) else torch_dtype
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise InvalidSetting(
                f"torch_dtype = {torch_dtype}: must be bfloat16, float16 or float32", field="torch_dtype"
            )
        return cls.from_model_manager(ModelManager(dtype, device, parts))

    @property
    def default_t5_sequence_length(self) -> int:
        """The T5 length the model was made for: 512 for dev, 256 for schnell, less if its tokenizer says less."""
        return min(T5_SEQUENCE_LENGTH[self.transformer.params.guidance_embed], self.t5.max_length)

    def truncations(self, prompts: Sequence[str], t5_sequence_length: int | None = None) -> list[tuple[bool, bool]]:
        """Return of each prompt whether CLIP and whether T5 does not read its end."""
        if not prompts:
            return []
        length = t5_sequence_length or self.default_t5_sequence_length
        return list(zip(self.clip.truncated(prompts), self.t5.truncated(prompts, length), strict=True))

    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] = "",
        height: int = 1024,
        width: int = 1024,
        num_inference_steps: int = 30,
        embedded_guidance: float | Sequence[float] = 3.5,
        cfg_scale: float | Sequence[float] = 1.0,
        seed: int | Sequence[int | None] | None = None,
        t5_sequence_length: int | None = None,
        input_image: Image.Image | Sequence[Image.Image] | None = None,
        denoising_strength: float = 1.0,
        sigma_shift: float | None = None,
        output_type: OutputType = "pil",
        progress_bar: Progress | None = None,
        **aliases: Any,
    ) -> Any:
        """Make one picture of a prompt, or a list of pictures of a list of prompts.

        negative_prompt, embedded_guidance, cfg_scale, seed and input_image are one value for all or a list as long
        as the prompts. A second pass with the negative prompt runs if any cfg_scale is not 1; an image whose scale
        is exactly 1 does not feel it. seed None draws from torch's global generator. sigma_shift replaces the
        model's own schedule by the static one of DiffSynth-Studio. progress_bar wraps the steps, e.g. tqdm.
        guidance_scale, true_cfg_scale and max_sequence_length, as diffusers calls them, are accepted.

        Returns, by output_type: `pil`; `np` uint8 (height, width, 3); `pt` fp32 (b, 3, height, width) in [-1, 1];
        `latent` scaled (b, c, height/8, width/8). The last two keep the batch axis for a single prompt too.
        Raises: InvalidSetting naming the argument and what would be right; RowError for a picture with numbers that
        are not finite; OutOfMemory; DeviceFatal.
        """
        named = resolve_aliases(aliases)
        check_choice("output_type", output_type, get_args(OutputType))
        if not isinstance(prompt, (str, Sequence)):
            raise InvalidSetting(f"prompt = {prompt!r}: must be a string or a list of strings", field="prompt")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        guidance = named.get("embedded_guidance", embedded_guidance)
        request = PictureRequest(
            prompts=prompts,
            negative_prompts=one_each("negative_prompt", negative_prompt, len(prompts)),
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            embedded_guidance=one_each("embedded_guidance", guidance, len(prompts)),
            cfg_scale=one_each("cfg_scale", named.get("cfg_scale", cfg_scale), len(prompts)),
            seeds=one_each("seed", seed, len(prompts)),
            t5_sequence_length=named.get("t5_sequence_length", t5_sequence_length),
            input_images=None if input_image is None else one_each("input_image", input_image, len(prompts)),
            denoising_strength=denoising_strength,
            sigma_shift=sigma_shift,
        )
        if not prompts:
            return []
        with torch.inference_mode(), device_errors():
            latents = self.make_latents(request, progress_bar)
            if output_type == "latent":
                return latents
            pixels = self.decode(latents)
            check_finite(pixels)
            if output_type == "pt":
                return pixels.float().clamp(-1.0, 1.0)
            pictures: list[Any] = list(to_uint8(pixels))
        if output_type == "pil":
            pictures = [Image.fromarray(picture) for picture in pictures]
        return pictures[0] if isinstance(prompt, str) else pictures

    def make_latents(self, request: PictureRequest, progress_bar: Progress | None = None) -> Tensor:
        """Encode the texts and denoise: scaled latents (b, c, height/8, width/8)."""
        p = request
        downscale = self.autoencoder.params.downscale
        height, width = p.height // downscale, p.width // downscale
        length = p.t5_sequence_length or self.default_t5_sequence_length
        positive = self.encode(p.prompts, length)
        negative = self.encode(p.negative_prompts, length) if p.uses_cfg else None
        sigmas = make_sigmas(p.num_inference_steps, height // 2 * (width // 2), self.schedule, p.sigma_shift)
        sigmas = sigmas[first_step(p.num_inference_steps, p.denoising_strength) :]
        tokens = denoise(
            self.transformer,
            pack(self.first_latents(p, height, width, sigmas[0])),
            positive,
            self.transformer.position_table(position_ids(length, height, width).to(self.device)),
            sigmas,
            guidance=torch.tensor(p.embedded_guidance, device=self.device, dtype=self.torch_dtype),
            negative=negative,
            cfg_scale=torch.tensor(p.cfg_scale, device=self.device, dtype=torch.float32),
            progress=progress_bar,
        )
        return unpack(tokens, height, width)

    def first_latents(self, request: PictureRequest, height: int, width: int, sigma: Tensor) -> Tensor:
        """Return where denoising starts: noise, or the input pictures at noise level `sigma`."""
        shape = (self.autoencoder.params.z_channels, height, width)
        generators = make_generators(request.seeds)
        if request.input_images is None:
            return make_noise(shape, generators).to(self.device, self.torch_dtype)
        pixels = [to_pixels(image, request.width, request.height) for image in request.input_images]
        # The posterior draws before the noise from the same generator, as in diffusers.
        posterior = make_noise(shape, generators)
        noise = make_noise(shape, generators)
        weight = self.autoencoder.encoder.conv_in.weight
        latents = self.autoencoder.encode(torch.stack(pixels).to(weight), posterior.to(weight))
        return add_noise(latents.to(self.torch_dtype), noise.to(self.device, self.torch_dtype), sigma)

    def encode(self, prompts: Sequence[str], t5_sequence_length: int) -> Conditioning:
        """Encode each different text once: what the text encoders say of each prompt."""
        rows = {text: row for row, text in enumerate(dict.fromkeys(prompts))}
        index = torch.tensor([rows[text] for text in prompts], device=self.device)
        return Conditioning(
            txt=self.t5(list(rows), t5_sequence_length)[index].to(self.torch_dtype),
            y=self.clip(list(rows))[index].to(self.torch_dtype),
        )

    def decode(self, latents: Tensor) -> Tensor:
        """Return pixels, about [-1, 1], in the autoencoder's dtype: (b, c, h, w) -> (b, 3, 8h, 8w)."""
        return self.autoencoder.decode(latents.to(self.autoencoder.decoder.conv_in.weight))


@dataclass(frozen=True, kw_only=True, slots=True)
class PictureRequest:
    """One call, checked: lists have one entry a picture. Raises: InvalidSetting naming the argument."""

    prompts: list[str]
    negative_prompts: list[str]
    height: int
    width: int
    num_inference_steps: int
    embedded_guidance: list[float]
    cfg_scale: list[float]
    seeds: list[int | None]
    t5_sequence_length: int | None
    input_images: list[Image.Image] | None
    denoising_strength: float
    sigma_shift: float | None

    def __post_init__(self) -> None:
        for name, texts in (("prompt", self.prompts), ("negative_prompt", self.negative_prompts)):
            for text in texts:
                if not isinstance(text, str):
                    raise InvalidSetting(f"{name} = {text!r}: must be a string or a list of strings", field=name)
        check_side("height", self.height)
        check_side("width", self.width)
        check_integer("num_inference_steps", self.num_inference_steps, 1, MAX_STEPS)
        for guidance in self.embedded_guidance:
            check_scale("embedded_guidance", guidance)
        for scale in self.cfg_scale:
            check_scale("cfg_scale", scale)
        for seed in self.seeds:
            if seed is not None:
                check_integer("seed", seed, 0, MAX_SEED)
        if self.t5_sequence_length is not None:
            check_integer("t5_sequence_length", self.t5_sequence_length, 1, 4096)
        check_scale("denoising_strength", self.denoising_strength)
        if self.denoising_strength > 1.0 or self.num_steps_left < 1:
            raise InvalidSetting(
                f"denoising_strength = {self.denoising_strength}: must be at most 1 and leave at least one of "
                f"{self.num_inference_steps} steps to run",
                field="denoising_strength",
            )
        if self.denoising_strength < 1.0 and self.input_images is None:
            raise InvalidSetting(
                f"denoising_strength = {self.denoising_strength}: must be 1 without an input_image",
                field="denoising_strength",
            )
        if self.sigma_shift is not None:
            check_scale("sigma_shift", self.sigma_shift)
            if self.sigma_shift == 0.0:
                raise InvalidSetting("sigma_shift = 0: must be more than 0", field="sigma_shift")

    @property
    def uses_cfg(self) -> bool:
        """Whether a second pass with the negative prompts is needed."""
        return any(scale != 1.0 for scale in self.cfg_scale)

    @property
    def num_steps_left(self) -> int:
        """Steps that remain after those that an input picture skips."""
        return self.num_inference_steps - first_step(self.num_inference_steps, self.denoising_strength)


def check_parts_fit(transformer: Flux, autoencoder: AutoEncoder, clip: ClipEncoder, t5: T5Encoder) -> None:
    """Raise CheckpointError unless the parts are of one model."""
    p, a = transformer.params, autoencoder.params
    facts = [
        ("channels of a latent patch (autoencoder)", 4 * a.z_channels, p.in_channels),
        ("pixels along a token (autoencoder)", 2 * a.downscale, PIXELS_PER_TOKEN),
        ("width of the CLIP text encoder", clip.width, p.vec_in_dim),
        ("width of the T5 text encoder", t5.width, p.context_in_dim),
    ]
    for what, value, wanted in facts:
        if value != wanted:
            raise CheckpointError(f"the parts are not of one model: {what} is {value}, the transformer takes {wanted}")
    for what, encoder in (("CLIP", clip), ("T5", t5)):
        count, vocab_size = len(encoder.tokenizer), encoder.model.config.vocab_size
        if count > vocab_size:
            raise CheckpointError(f"the tokenizer of {what} has {count} tokens, its text encoder knows {vocab_size}")


def resolve_aliases(aliases: dict[str, Any]) -> dict[str, Any]:
    """Return arguments under our names. Raises: InvalidSetting with the nearest name for one that is unknown."""
    for name in aliases:
        if name not in ALIASES:
            names = [name for name in FluxImagePipeline.__call__.__annotations__ if name not in ("aliases", "return")]
            names += ALIASES
            near = difflib.get_close_matches(name, names, n=1)
            hint = f": did you mean {near[0]}?" if near else f"; there are {', '.join(sorted(names))}"
            raise InvalidSetting(f"{name} is no argument of the pipeline{hint}", field=name)
    return {ALIASES[name]: value for name, value in aliases.items()}


def one_each(name: str, value: Any, count: int) -> list[Any]:
    """Return one value a picture. Raises: InvalidSetting for a list of another length."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        return [value] * count
    if len(value) != count:
        raise InvalidSetting(f"{name}: {len(value)} values for {count} prompts; give one, or one each", field=name)
    return list(value)


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise InvalidSetting unless `value` is one of `choices`."""
    if value not in choices:
        raise InvalidSetting(f"{name} = {value!r}: must be one of {', '.join(choices)}", field=name)


def check_finite(pixels: Tensor) -> None:
    """Raise RowError if a picture holds NaN or infinity, which uint8 would turn into black."""
    if not torch.isfinite(pixels).all():
        raise RowError(f"the model overflowed in {str(pixels.dtype).removeprefix('torch.')}: take bfloat16 or float32")


def to_pixels(image: Image.Image, width: int, height: int) -> Tensor:
    """Return a picture as the autoencoder takes it: fp32 (3, height, width) in [-1, 1], resized by Lanczos."""
    if not isinstance(image, Image.Image):
        raise InvalidSetting(f"input_image is a {type(image).__name__}: must be a PIL image", field="input_image")
    array = np.asarray(image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS), dtype=np.float32)
    return torch.from_numpy(array / 255.0 * 2.0 - 1.0).permute(2, 0, 1)


def to_uint8(pixels: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return uint8 (b, height, width, 3) of pixels (b, 3, height, width) in [-1, 1], rounded half to even.

    Clamped in the dtype of the pixels, then rounded in fp32, as diffusers does; BFL and DiffSynth truncate.
    """
    unit = (pixels * 0.5 + 0.5).clamp(0.0, 1.0).float()
    return (unit * 255.0).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
