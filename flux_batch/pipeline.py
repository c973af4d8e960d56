"""FluxImagePipeline and ModelManager: prompts in, pictures out.

The one translator between public words (those of DiffSynth-Studio and diffusers) and the model's, and between the
model's exceptions and ours. Knows no job, shard or storage.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, get_args
from urllib.parse import urlsplit
from urllib.request import url2pathname

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flux_batch.errors import CheckpointError, DeviceFatal, FluxBatchError, InvalidSetting, OutOfMemory
from flux_batch.model.autoencoder import AutoEncoder
from flux_batch.model.checkpoint import open_checkpoint, read_config, read_json
from flux_batch.model.params import ScheduleParams, schedule_params
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
from flux_batch.model.text import ClipEncoder, T5Encoder, load_clip, load_t5
from flux_batch.model.transformer import Flux
from flux_batch.model.weights import Layout, load_autoencoder, load_transformer, recognise
from flux_batch.records import ALIASES, MAX_SEED, MAX_STEPS, PIXELS_PER_TOKEN, check_integer, check_scale, check_side

PathOrFolder = str | PathLike[str]
OutputType = Literal["pil", "np", "pt", "latent"]
Value = TypeVar("Value")

# Source: black-forest-labs/flux 802fb47, src/flux/cli.py: 256 for schnell, 512 for all others.
T5_SEQUENCE_LENGTH = {True: 512, False: 256}  # by: is guidance embedded?
# Where a part may lie in a model folder: the sub folder of diffusers; original files are found in the folder itself.
FOLDERS = {"transformer": "transformer", "autoencoder": "vae", "clip": "text_encoder", "t5": "text_encoder_2"}
TITLES = {
    "transformer": "transformer",
    "autoencoder": "autoencoder",
    "clip": "CLIP text encoder",
    "t5": "T5 text encoder",
}
# What torch says, in errors that have no class of their own.
OUT_OF_MEMORY_SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
DEVICE_FATAL_SIGNS = ("CUDA error", "CUBLAS_STATUS", "CUDNN_STATUS", "cuDNN error", "NCCL error")


class ModelManager:
    """Loads the parts of a model, each recognised by its keys, whatever its file is called.

    Raises: CheckpointError for a file that is missing, damaged, incomplete or of a layout that is not supported;
    InvalidSetting for a device that is not there.
    """

    def __init__(
        self,
        torch_dtype: torch.dtype = torch.bfloat16,
        device: str | torch.device = "cuda",
        file_path_list: Sequence[PathOrFolder | Sequence[PathOrFolder]] = (),
    ) -> None:
        self.torch_dtype = torch_dtype
        self.device = torch.device(device)
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise InvalidSetting(f"device = {device}: there is no CUDA device here; use cpu", field="device")
        self.transformer: Flux | None = None
        self.schedule: ScheduleParams | None = None
        self.autoencoder: AutoEncoder | None = None
        self.clip: ClipEncoder | None = None
        self.t5: T5Encoder | None = None
        self.load_models(file_path_list)

    def load_models(
        self,
        file_path_list: Sequence[PathOrFolder | Sequence[PathOrFolder]],
        torch_dtype: torch.dtype | None = None,
    ) -> None:
        """Load each entry: a file, a folder that holds one part, or the list of files that make up one part."""
        for source in file_path_list:
            with checkpoint_errors(), device_errors():
                self._load(to_path(source), torch_dtype or self.torch_dtype)

    def _load(self, source: Path | list[Path], dtype: torch.dtype) -> None:
        layout, checkpoint = recognise(open_checkpoint(source))
        home = checkpoint.home
        if layout in (Layout.TRANSFORMER, Layout.TRANSFORMER_DIFFUSERS):
            config = read_config(home, "transformer")
            self.transformer = load_transformer(checkpoint, layout, config, dtype=dtype, device=self.device)
            guidance_embed = self.transformer.params.guidance_embed
            self.schedule = schedule_params(read_scheduler_config(home), guidance_embed=guidance_embed)
        elif layout in (Layout.AUTOENCODER, Layout.AUTOENCODER_DIFFUSERS):
            config = read_config(home, "vae")
            self.autoencoder = load_autoencoder(checkpoint, layout, config, dtype=dtype, device=self.device)
        elif layout is Layout.CLIP:
            self.clip = load_clip(checkpoint, dtype=dtype, device=self.device)
        else:
            self.t5 = load_t5(checkpoint, dtype=dtype, device=self.device)


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
        folder = local_folder(uri)
        with checkpoint_errors():
            parts = [find_part(folder, part) for part in TITLES]
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
        Raises: InvalidSetting naming the argument and what would be right; OutOfMemory; DeviceFatal.
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


def download_models(model_id_list: Sequence[str]) -> NoReturn:
    """Fetch models by name: not yet. Raises: FluxBatchError that says what to do instead."""
    names = ", ".join(model_id_list)
    raise FluxBatchError(
        f"download_models is not yet in this version: download {names} with the Hub's own client (hf download) "
        "and pass the folder to from_pretrained or its files to load_models"
    )


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


def local_folder(uri: PathOrFolder) -> Path:
    """Return the model folder a uri names. Raises: CheckpointError if it is not there or not local."""
    if uri == "demo":
        from flux_batch.demo.model import demo_model_folder

        return demo_model_folder()
    folder = local_path(uri)
    if folder.is_file():
        raise CheckpointError(f"{folder} is a file: pass the folder with all parts of the model")
    if not folder.is_dir():
        raise CheckpointError(
            f"no model folder {folder}: download the model with the Hub's own client (hf download) and pass its folder"
        )
    return folder


def local_path(uri: PathOrFolder) -> Path:
    """Return the path of a local uri. Raises: CheckpointError for a remote one."""
    text = str(uri)
    if "://" not in text:
        return Path(text).expanduser()
    parts = urlsplit(text)
    if parts.scheme != "file":
        raise CheckpointError(f"{text}: models are read from local folders only: copy the folder to this machine first")
    return Path(url2pathname(parts.path))


def to_path(source: PathOrFolder | Sequence[PathOrFolder]) -> Path | list[Path]:
    """Return the path, or the paths, of one part."""
    if isinstance(source, (str, PathLike)):
        return local_path(source)
    return [local_path(path) for path in source]


def find_part(folder: Path, part: str) -> Path:
    """Return where a part lies in a model folder: its sub folder, else the one file of that kind in the folder."""
    sub_folder = folder / FOLDERS[part]
    if any(sub_folder.glob("*.safetensors*")):
        return sub_folder
    found, others = [], []
    for path in sorted(folder.glob("*.safetensors")):
        try:
            layout, _ = recognise(open_checkpoint(path))
        except ValueError as error:
            others.append(str(error))
            continue
        if layout.name.lower().startswith(part):
            found.append(path)
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise CheckpointError(f"{folder} holds several files for the {TITLES[part]}: {names}; keep one")
    if not found:
        looked = f"looked for {sub_folder}/*.safetensors and for such a file in {folder}"
        raise CheckpointError("; ".join([f"no {TITLES[part]}: {looked}", *others]))
    return found[0]


def read_scheduler_config(home: Path) -> dict[str, Any]:
    """Return the scheduler's configuration, which lies in the model folder, of weights in or one below it; else {}."""
    for folder in (home, home.parent):
        path = folder / "scheduler" / "scheduler_config.json"
        if path.is_file():
            return read_json(path)
    return {}


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


@contextmanager
def checkpoint_errors() -> Iterator[None]:
    """Turn what reading weights raises into CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except (ValueError, OSError, KeyError) as error:
        raise CheckpointError(str(error)) from error


@contextmanager
def device_errors() -> Iterator[None]:
    """Turn what a device raises into OutOfMemory (this batch) or DeviceFatal (this process)."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(str(error)) from error
    except RuntimeError as error:
        message = str(error)
        if any(sign in message for sign in OUT_OF_MEMORY_SIGNS):
            raise OutOfMemory(message) from error
        if isinstance(error, torch.AcceleratorError) or any(sign in message for sign in DEVICE_FATAL_SIGNS):
            raise DeviceFatal(message) from error
        raise
