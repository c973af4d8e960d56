"""FluxImagePipeline: prompts in, images out.

It translates between the public names (those of DiffSynth-Studio and diffusers) and the model's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from inspect import signature
from itertools import chain, zip_longest
from typing import Any, get_args

import torch
from PIL import Image
from torch import Tensor

from flux_batch.download.models import PathOrFolder
from flux_batch.errors import CheckpointError, OutOfMemory
from flux_batch.model.autoencoder import AutoEncoder
from flux_batch.model.checkpoint.detect import PART_TITLES
from flux_batch.model.conditions.controlnet import ControlNet
from flux_batch.model.conditions.variant import TEXT_TO_IMAGE, Variant, VariantName, names_in, variant_of
from flux_batch.model.optimize.attention import AttentionKernels, choose_attention
from flux_batch.model.optimize.compile import CompileCache, is_compiled, set_compile_options
from flux_batch.model.optimize.cuda_graphs import CudaGraphs
from flux_batch.model.optimize.dtypes import dtype_name, native_dtype, without_autocast
from flux_batch.model.optimize.tiling import Tiling
from flux_batch.model.params import T5_SEQUENCE_LENGTH, ScheduleParams
from flux_batch.model.sampling import Progress, normal_tensor
from flux_batch.model.text.clip import ClipEncoder
from flux_batch.model.text.t5 import T5Encoder
from flux_batch.model.transformer import Flux, PromptEmbeds, position_tables
from flux_batch.pipeline.compiled import apply_speed_ups, kernels_of
from flux_batch.pipeline.denoising import denoised
from flux_batch.pipeline.errors import device_errors
from flux_batch.pipeline.images.controls import CONTROL_ARGUMENTS, ControlNets
from flux_batch.pipeline.images.inputs import image_inputs
from flux_batch.pipeline.images.latents import ImageLatents, StepCallback
from flux_batch.pipeline.images.loaders import ImagePromptLoaders
from flux_batch.pipeline.images.pixels import OutputType, as_output
from flux_batch.pipeline.images.prompts import REDUX_GUIDANCE, ImagePrompts
from flux_batch.pipeline.images.words import as_read
from flux_batch.pipeline.loras import LoadedLoras
from flux_batch.pipeline.model_manager import ModelManager, check_parts_fit, locate_parts
from flux_batch.pipeline.precision import AUTO, default_device, must_be_narrow, to_device
from flux_batch.pipeline.request import (
    PipelineRequest,
    as_list,
    check_embeds,
    check_functions,
    embeds_of,
    num_texts,
    one_each,
    resolve_aliases,
    sampling_of_call,
)
from flux_batch.pipeline.texts import TextEncoders
from flux_batch.records import Kernels
from flux_batch.sampling_params import (
    Quantization,
    check_choice,
    check_cuda_graphs,
    check_step_cache,
)


class FluxImagePipeline(ImagePromptLoaders):
    """Text (and optionally an image) to images. Call it; see `__call__`."""

    def __init__(
        self,
        transformer: Flux,
        autoencoder: AutoEncoder,
        clip: ClipEncoder,
        t5: T5Encoder,
        schedule: ScheduleParams,
        *,
        quantization: Quantization = "none",
        step_cache: float = 0.0,
        loras: LoadedLoras | None = None,
        attention: AttentionKernels | None = None,
        compile_cache: CompileCache | None = None,
        offload_text_encoders: bool = False,
        graphs: CudaGraphs | None = None,
        variant: Variant | None = None,
        controlnets: Sequence[ControlNet] = (),
    ) -> None:
        self.transformer = transformer
        self.autoencoder = autoencoder
        self._variant = variant or variant_of(transformer.params)
        self.clip = clip
        self.t5 = t5
        self.schedule = schedule
        self.controlnets = ControlNets(controlnets)
        self.quantization = quantization
        self.step_cache = step_cache
        self.compile_cache = compile_cache
        self.graphs = graphs
        self.loras = loras or LoadedLoras({"transformer": transformer, "clip": clip.model, "t5": t5.model})
        check_parts_fit(transformer, autoencoder, clip, t5, controlnets)
        weight = transformer.img_in.weight
        self.device = weight.device
        self.torch_dtype = weight.dtype
        self.latents = ImageLatents(autoencoder, self.device, self.torch_dtype)
        options = self.torch_dtype, self.device, self.loras.storage_options
        self.image_prompts = ImagePrompts(transformer.params, *options)
        self.attention = attention or choose_attention(self.device)
        self.position_tables = position_tables(transformer, self.device)
        self.texts = TextEncoders(
            clip,
            t5,
            self.loras,
            self.default_t5_sequence_length,
            self.device,
            self.torch_dtype,
            offload=offload_text_encoders,
        )
        self.offloads_text_encoders = self.texts.is_offloaded

    def __repr__(self) -> str:
        precision = self.precision
        return f"FluxImagePipeline({precision['dtype']}, quantization {precision['quantization']}, {self.kernels})"

    @classmethod
    def from_model_manager(
        cls,
        model_manager: ModelManager,
        *,
        step_cache: float = 0.0,
        compile: bool | None = None,
        cuda_graphs: bool = False,
        offload_text_encoders: bool = False,
    ) -> FluxImagePipeline:
        """Build a pipeline from the loaded parts.

        compile: compile the transformer's blocks by torch.compile, and on a GPU also the decoder's. The first image of
        the first and of the second size then takes longer, all others take less time. None compiles on a GPU, with a
        warning if torch.compile does not work there. cuda_graphs: launch each step of the transformer in one piece,
        except the first of each size; not with a step_cache. offload_text_encoders: keep CLIP and T5 in host memory,
        except while they encode texts; nothing changes on the CPU.
        Raises: CheckpointError with the parts that are not loaded, or for a Redux or IP-Adapter that does not fit;
        InvalidSetting if compile is True and torch.compile does not work here, or if cuda_graphs is True without CUDA;
        OutOfMemory; DeviceFatal.
        """
        check_step_cache(step_cache)
        has_ip_adapter = "ip_adapter" in model_manager.image_prompts
        check_cuda_graphs(cuda_graphs, step_cache, len(model_manager.controlnets), has_ip_adapter=has_ip_adapter)
        missing = [title for part, title in PART_TITLES.items() if getattr(model_manager, part) is None]
        if missing:
            raise CheckpointError(f"not loaded: {', '.join(missing)}; add their files to load_models([...])")
        manager: Any = model_manager  # every part is loaded, see above
        nets = manager.controlnets
        parts = manager.transformer, manager.autoencoder, manager.clip, manager.t5, manager.schedule
        with device_errors():
            speed_ups = apply_speed_ups(manager.transformer, manager.autoencoder, compile, cuda_graphs, nets)
            pipeline = cls(
                *parts,
                quantization=manager.quantization,
                step_cache=step_cache,
                loras=manager.loras,
                offload_text_encoders=offload_text_encoders,
                variant=manager.variant,
                controlnets=nets,
                **speed_ups._asdict(),
            )
        pipeline.image_prompts.load_found(manager.image_prompts)
        return pipeline

    @classmethod
    def from_pretrained(
        cls,
        uri: PathOrFolder,
        torch_dtype: torch.dtype | str | None = None,
        device: str | torch.device | None = None,
        *,
        quantization: Quantization = "none",
        step_cache: float = 0.0,
        compile: bool | None = None,
        cuda_graphs: bool = False,
        offload_text_encoders: bool = False,
        storage_options: Mapping[str, Any] | None = None,
        refresh: bool = False,
        variant: VariantName = "auto",
        controlnets: Sequence[PathOrFolder] = (),
    ) -> FluxImagePipeline:
        """Load a model: a folder of either layout (diffusers' or the original), one file with all parts, or `demo`.

        uri: a path, an address that fsspec supports (s3://bucket/flux, with `storage_options`), or a repository of
        Hugging Face (hf://owner/name, owner/name). Remote models and ControlNets are fetched once for each machine and
        then used without a request, unless `refresh` is true. device: None is `cuda` or `mps` if there is one, else
        `cpu`. torch_dtype: a dtype or its name; None or `auto` is the device's native dtype, and on a CPU with too
        little memory also quantization `bfloat16`. quantization, variant: see ModelManager. step_cache: the default of
        calls; compile, cuda_graphs, offload_text_encoders: see from_model_manager. controlnets: files, folders or
        addresses of ControlNets, in the order of a call's control images.
        Raises: CheckpointError with the files that were looked for; StoreError for a remote that fails; InvalidSetting.
        """
        device = to_device(device or default_device())
        manager = ModelManager(
            torch_dtype, device, quantization=quantization, storage_options=storage_options, variant=variant
        )
        paths = locate_parts(uri, storage_options, refresh=refresh)
        if torch_dtype in AUTO and quantization == "none" and must_be_narrow(device, manager.torch_dtype, paths):
            manager.quantization = "bfloat16"
        manager.load_models(paths, names=[str(uri)])
        manager.load_controlnets(controlnets, refresh=refresh)
        return cls.from_model_manager(
            manager,
            step_cache=step_cache,
            compile=compile,
            cuda_graphs=cuda_graphs,
            offload_text_encoders=offload_text_encoders,
        )

    @property
    def default_t5_sequence_length(self) -> int:
        """The T5 length of the model: 512 for dev, 256 for schnell, or the tokenizer's maximum if that is less."""
        return min(T5_SEQUENCE_LENGTH[self.transformer.params.guidance_embed], self.t5.max_length)

    @property
    def variant(self) -> Variant:
        """The variant of FLUX.1. A control LoRA makes it Canny or Depth, by the name of its file or folder."""
        width, p = self.transformer.img_in.weight.shape[1], self.transformer.params
        if width == p.in_channels:
            return self._variant
        # With several control LoRAs, the names of all files come before those of folders.
        nearest_first = zip_longest(*map(names_in, self.loras.with_columns(width)), fillvalue="")
        return variant_of(replace(p, in_channels=width), hints=chain.from_iterable(nearest_first))

    @property
    def default_guidance(self) -> float:
        """The default embedded guidance: that of the variant's authors, or with a Redux on text-to-image 2.5."""
        return REDUX_GUIDANCE if self.image_prompts.redux and self.variant is TEXT_TO_IMAGE else self.variant.guidance

    @property
    def needed_images(self) -> tuple[str, ...]:
        """The image arguments that each call needs; control_image appears once for each ControlNet."""
        return (*self.variant.needs, *("control_image" for _ in self.controlnets.nets))

    @property
    def precision(self) -> dict[str, str]:
        """The dtype and quantization in use, as a job's `model` section spells them."""
        return {"dtype": dtype_name(self.torch_dtype), "quantization": self.quantization}

    @property
    def native_dtype(self) -> str:
        """The dtype that its device computes natively, by name."""
        return dtype_name(native_dtype(self.device))

    @property
    def kernels(self) -> Kernels:
        """The device, attention and libraries in use, and whether blocks are compiled."""
        return kernels_of(self.transformer, self.attention)

    def load_lora(self, uri: PathOrFolder, scale: float = 1.0) -> None:
        """Merge one more LoRA into the weights. Raises: the errors of `set_loras`."""
        with device_errors(), self.texts.on_device(may_change=True):
            self.loras.add(uri, scale)

    def set_loras(self, loras: Sequence[tuple[PathOrFolder, float]]) -> None:
        """Merge exactly these LoRAs, each with its scale, into the weights; [] removes all.

        loras: pairs (uri, scale); uri is a path or an address, as for a model. The formats of PEFT and diffusers,
        sd-scripts, ComfyUI, XLabs, OneTrainer, LyCORIS (LoHa, LoKr) and DiffSynth-Studio are recognised by their keys,
        for the transformer, CLIP and T5. Removing LoRAs restores the weights bit for bit.
        Raises: CheckpointError for a file that is not a LoRA, or has keys that match nothing; StoreError.
        """
        with device_errors(), self.texts.on_device(may_change=True):
            self.loras.set(loras)

    def unload_loras(self) -> None:
        """Remove all LoRAs, which restores the weights bit for bit."""
        self.set_loras([])

    def encode_prompt(self, prompt: str | Sequence[str], t5_sequence_length: int | None = None) -> PromptEmbeds:
        """Return the embeddings of prompts, for calls with `prompt_embeds` and `pooled_prompt_embeds`.

        Their shapes for b prompts are (b, t5_sequence_length, context) and (b, vec), in the dtype of the pipeline.
        They depend on the LoRAs that are fused now. Offloaded text encoders move to the device once for all prompts,
        and the embeddings are then in host memory, else on the device. Negative prompts are encoded in the same way.
        Raises: InvalidSetting; OutOfMemory; DeviceFatal.
        """
        return self.texts.encode_prompt(prompt, t5_sequence_length)

    def truncations(
        self, prompts: str | Sequence[str], t5_sequence_length: int | None = None
    ) -> list[tuple[bool, bool]]:
        """Return for each prompt whether CLIP and whether T5 truncates it. Raises: InvalidSetting."""
        return self.texts.truncations(prompts, t5_sequence_length)

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] = "",
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 30,
        embedded_guidance: float | Sequence[float] | None = None,
        cfg_scale: float | Sequence[float] = 1.0,
        seed: int | Sequence[int | None] | None = None,
        t5_sequence_length: int | None = None,
        input_image: Image.Image | Sequence[Image.Image] | None = None,
        mask_image: Image.Image | Sequence[Image.Image] | None = None,
        control_image: Image.Image | Sequence[Image.Image | Sequence[Image.Image]] | None = None,
        reference_image: Image.Image | Sequence[Image.Image | Sequence[Image.Image]] | None = None,
        image_prompt: Image.Image | Sequence[Image.Image | Sequence[Image.Image]] | None = None,
        control_image_scale: float | Sequence[float | Sequence[float]] = 1.0,
        image_prompt_scale: float | Sequence[float | Sequence[float]] = 1.0,
        controlnet_conditioning_scale: float | Sequence[float] = 1.0,
        control_guidance_start: float | Sequence[float] = 0.0,
        control_guidance_end: float | Sequence[float] = 1.0,
        control_mode: int | Sequence[int | None] | None = None,
        paste_back: bool = True,
        resize_references: bool = True,
        denoising_strength: float = 1.0,
        sigma_shift: float | None = None,
        output_type: OutputType = "pil",
        progress_bar: Progress | None = None,
        callback_on_step_end: StepCallback | None = None,
        tiled: bool = False,
        tile_size: int = 128,
        tile_stride: int = 64,
        step_cache: float | None = None,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        **aliases: Any,
    ) -> Any:
        """Make an image of a prompt, or a list of images of prompts or embeddings.

        prompt: a text or b texts. A text that is too long for a text encoder is truncated, with a warning.
        negative_prompt, embedded_guidance, cfg_scale, seed and images are one value for all prompts, or a list with a
        value for each; a list with a single image is for all, too.

        negative_prompt: read by a second pass, which runs if any cfg_scale is not 1. It does not affect an image whose
            scale is 1.
        height, width: by default those of the first reference, else 1024.
        num_inference_steps: 30, as in DiffSynth-Studio, whose calls work here. A job's default is 28, as in diffusers,
            so the same seed gives another image there.
        embedded_guidance: by default that of the model: 3.5; 30 for Fill and Canny, 10 for Depth, 2.5 for Kontext, 4.5
            for Krea, 2.5 with a Redux. ControlNets do not change it; FluxControlNetPipeline of diffusers has 7.
        seed: None draws from torch's global generator.
        input_image: the image to start from. Transparent pixels become white, and it is resized to width x height by
            Lanczos, ignoring its proportions. A job does the same, and also applies the EXIF orientation.
        denoising_strength: the share of the steps that run on input_image, in (0, 1]. As in diffusers, the first
            int(steps - steps x strength) steps are skipped, and the noise has the level of the next step; 1 starts from
            pure noise. The image's latents are sampled from the posterior, before the noise and with the same
            generator; on a Kontext they are the mean.
        sigma_shift: use DiffSynth-Studio's static schedule with this shift, e.g. 3.0, instead of the model's. With an
            input_image it runs all steps, from a lower noise level, and takes the posterior's mean.
        mask_image: white where input_image is repainted, with the same proportions. Fill reads the mask; for any other
            model the rest of the image is restored after each step, as in diffusers. paste_back: give the pixels
            outside the mask the exact values of the resized image.
        control_image: the image that Canny, Depth and ControlNets read. Pass a list for several nets, one for each; a
            flat list of images is for every prompt. A single net reads every image of a list. control_image_scale:
            weights, for each prompt.
        controlnet_conditioning_scale, control_guidance_start, control_guidance_end, control_mode: see ControlSetting;
            each one value for all, or one for each control image.
        reference_image: one or several images that Kontext edits, resized to the nearest size that it was trained with
            unless resize_references is false.
        image_prompt: one or several images as prompts, with weights in image_prompt_scale; ip_adapter_image in
            diffusers. A Redux turns them into tokens after those of the text; the tokens of several are concatenated,
            while FluxPriorReduxPipeline sums them, and a negative prompt has none. With an IP-Adapter the image tokens
            attend to them, and a negative prompt has black images. Each of several IP-Adapters has its own image or
            list of images, in their order; an ip_adapter_image with an entry for each adapter is for every prompt, as
            in diffusers. ip_adapter_image_embeds: (1, k, e) or (b, k, e) for each adapter, as
            prepare_ip_adapter_image_embeds returns them.
        progress_bar: wraps the steps, e.g. tqdm.
        callback_on_step_end: called after each step, as in diffusers, with the pipeline, the step, its timestep in
            [0, 1000] and {"latents": (b, n, 4c)}; latents that it returns under that name replace the current ones.
        tiled: run the autoencoder (only) in tiles of tile_size every tile_stride, in latents when decoding and in
            pixels when encoding. It takes less memory; an image that does not fit into a tile differs a little.
        step_cache: trades quality for speed; 0 is off, about 0.1 is a start. At a step where the first block changes an
            image by less than this share since the last computed step, the later blocks are skipped and their last
            changes are added again. This is decided for each image alone; the first and the last step are always
            computed. A pipeline with cuda_graphs cannot use it.
        prompt_embeds, pooled_prompt_embeds: (b, l, context) and (b, vec), in place of the prompt, also with the prefix
            negative_; `encode_prompt` returns them for b texts of T5 length l.

        Accepted names of diffusers: guidance_scale, true_cfg_scale, max_sequence_length, image and strength; of
        DiffSynth-Studio: kontext_images, flux_fill_image, flux_fill_mask, flux_redux_image, ipadapter_images and
        ipadapter_scale. On a Kontext, `image` is a reference, as in diffusers, where its default size is 1024 x 1024.
        With a mask_image it is the image to repaint, and without an image_reference also the reference. Latents of
        conditions are the posterior's mean; diffusers samples them. So an image depends on its own arguments alone.

        Returns, by output_type: `pil`; `np` uint8 (height, width, 3); `pt` fp32 (b, 3, height, width) in [-1, 1];
        `latent` scaled (b, c, height/8, width/8). The last two keep the batch axis for a single prompt too.
        Raises: InvalidSetting with the argument and the right values; RowError for an image with NaN or infinity;
        OutOfMemory; DeviceFatal.
        """
        given = {
            "input_image": input_image,
            "mask_image": mask_image,
            "control_image": control_image,
            "reference_image": reference_image,
            "image_prompt": image_prompt,
            "image_prompt_embeds": None,
            "control_image_scale": control_image_scale,
            "image_prompt_scale": image_prompt_scale,
        }
        sampling: dict[str, Any] = {
            "negative_prompt": negative_prompt,
            "num_inference_steps": num_inference_steps,
            "embedded_guidance": embedded_guidance,
            "cfg_scale": cfg_scale,
            "t5_sequence_length": t5_sequence_length,
            "denoising_strength": denoising_strength,
            "sigma_shift": sigma_shift,
        }
        of_nets = controlnet_conditioning_scale, control_guidance_start, control_guidance_end, control_mode
        ours = given | sampling | dict(zip(CONTROL_ARGUMENTS, of_nets, strict=True))
        named = resolve_aliases(aliases, ours, signature(FluxImagePipeline.__call__).parameters)
        check_choice("output_type", output_type, get_args(OutputType))
        check_functions(progress_bar=progress_bar, callback_on_step_end=callback_on_step_end)
        embeds = embeds_of("prompt", prompt, prompt_embeds, pooled_prompt_embeds)
        prompts = as_list("prompt", prompt) if embeds is None else embeds
        count = num_texts(prompts)
        given = as_read(given, named, aliases, self.variant, self.controlnets, self.image_prompts)
        images = image_inputs(count, given, resize_references, is_single=isinstance(prompt, str))
        width, height = images.size_of(width, height)
        settings = named.pop("controls", of_nets)
        sampling |= named | {"height": height, "width": width}
        if sampling["embedded_guidance"] is None:
            sampling["embedded_guidance"] = self.default_guidance
        request = PipelineRequest(
            prompts=prompts,
            negative_embeds=embeds_of(
                "negative_prompt", negative_prompt, negative_prompt_embeds, negative_pooled_prompt_embeds
            ),
            sampling=sampling_of_call(count, **sampling),
            seeds=one_each("seed", seed, count),
            images=images,
            tiling=Tiling(tile_size, tile_stride) if tiled else None,
            step_cache=self.step_cache if step_cache is None else step_cache,
            controls=self.controlnets.settings(images.num_controls, *settings),
        )
        check_cuda_graphs(self.graphs is not None, request.step_cache)
        if not count:
            return []
        self._check(request)
        self.texts.warn_of_cut(request)
        made = self._make(request, output_type, progress_bar, callback_on_step_end, paste_back=paste_back)
        return made[0] if isinstance(prompt, str) and output_type in ("pil", "np") else made

    def _check(self, request: PipelineRequest) -> None:
        """Raise InvalidSetting for a call that this model cannot make."""
        check_embeds(request, request.t5_length(self.default_t5_sequence_length), self.transformer.params)
        self.controlnets.check(request, self.variant)
        self.image_prompts.check(request.images)

    def _make(
        self,
        request: PipelineRequest,
        output_type: OutputType,
        progress_bar: Progress | None,
        callback: StepCallback | None,
        *,
        paste_back: bool,
    ) -> Any:
        """Return the images of a call in its output type. Raises: RowError; OutOfMemory; DeviceFatal."""
        if is_compiled(self.transformer):  # options are per thread, and another thread may have compiled it
            set_compile_options(self.attention)
        try:
            with torch.inference_mode(), without_autocast(), device_errors():
                latents = self.make_latents(request, progress_bar, callback)
                if output_type == "latent":
                    return normal_tensor(latents)
                decoded = self.latents.decode(latents, request.tiling)
                pixels = self.latents.paste_back(decoded, request) if paste_back else decoded
                return as_output(pixels, output_type, decoded, self.torch_dtype)
        except OutOfMemory:
            if self.graphs:
                self.graphs.clear()  # a smaller call needs the memory
            raise

    def make_latents(
        self, request: PipelineRequest, progress_bar: Progress | None = None, callback: StepCallback | None = None
    ) -> Tensor:
        """Return the scaled latents of a call, after encoding and denoising: (b, c, height/8, width/8)."""
        return denoised(self, request, progress_bar, callback)
