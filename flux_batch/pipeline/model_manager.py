"""ModelManager: files in, the parts of a model out, each recognised by its keys."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from flux_batch.download.models import PathOrFolder, local_model, local_path
from flux_batch.errors import CheckpointError, InvalidSetting
from flux_batch.model.autoencoder import AutoEncoder
from flux_batch.model.checkpoint.checkpoint import Checkpoint, open_checkpoint, read_config, read_json
from flux_batch.model.checkpoint.detect import LOADING_ORDER, CheckpointKind, find_parts, parts_of
from flux_batch.model.checkpoint.image_prompts import PromptPart, embedder_in, prompt_part
from flux_batch.model.checkpoint.loading import Prepare, load_autoencoder, load_controlnet, load_transformer
from flux_batch.model.conditions.controlnet import ControlNet, check_controlnet_fits
from flux_batch.model.conditions.variant import (
    UNTOLD,
    VARIANT_NAMES,
    Variant,
    VariantName,
    names_in,
    variant_of,
)
from flux_batch.model.optimize.dtypes import dtype_name
from flux_batch.model.optimize.quantize import (
    apply_fp8,
    apply_fp8_to_t5,
    apply_narrow_weights,
    apply_narrow_weights_to_t5,
    fp8_matmul_obstacle,
)
from flux_batch.model.params import ScheduleParams, schedule_params
from flux_batch.model.text.clip import ClipEncoder, load_clip
from flux_batch.model.text.t5 import T5Encoder, load_t5
from flux_batch.model.transformer import Flux
from flux_batch.pipeline.errors import checkpoint_errors, device_errors
from flux_batch.pipeline.loras import LoadedLoras
from flux_batch.pipeline.precision import to_device, to_dtype
from flux_batch.sampling_params import TOKEN_SIDE_PX, Quantization, check_choice, check_quantization

# The changes to a model before its weights are loaded.
PREPARE_TRANSFORMER: Mapping[Quantization, Prepare | None] = {
    "none": None,
    "bfloat16": apply_narrow_weights,
    "fp8": apply_fp8,
    "fp8_matmul": partial(apply_fp8, matmul=True),
}
PREPARE_T5: Mapping[Quantization, Prepare | None] = {
    "none": None,
    "bfloat16": apply_narrow_weights_to_t5,
    "fp8": apply_fp8_to_t5,
    "fp8_matmul": apply_fp8_to_t5,
}


log = logging.getLogger(__name__)


class ModelManager:
    """The loader of a model's parts, recognised by their keys, not by file names.

    torch_dtype: None is the device's native dtype, see native_dtype. quantization: `bfloat16` keeps the matrices of
    transformer and T5 in bfloat16 and multiplies in float32; `fp8` keeps them in fp8 (with the same bits, if the file
    holds fp8) and multiplies in `torch_dtype`; `fp8_matmul` also multiplies the transformer's matrices in fp8, with
    torch_dtype bfloat16 only, on an NVIDIA GPU of Ada, Hopper or later, or slowly but with the same numbers on the CPU.
    variant: needed if neither the transformer's channels nor the names of its file and folders show it.
    Raises: CheckpointError for a file that is missing, damaged, incomplete or of a layout that is not supported;
    InvalidSetting for a device that does not exist, or cannot multiply in fp8; OutOfMemory, DeviceFatal.
    """

    def __init__(
        self,
        torch_dtype: torch.dtype | str | None = None,
        device: str | torch.device = "cuda",
        file_path_list: Sequence[PathOrFolder | Sequence[PathOrFolder]] = (),
        *,
        quantization: Quantization = "none",
        storage_options: Mapping[str, Any] | None = None,
        variant: VariantName = "auto",
    ) -> None:
        check_choice("variant", variant, VARIANT_NAMES)
        self.variant_name = variant
        self.variant: Variant | None = None
        self.storage_options = storage_options or {}
        self.device = to_device(device)
        self.quantization = quantization
        with device_errors():
            self.torch_dtype = to_dtype(torch_dtype, self.device, quantization)
            check_quantization(quantization, dtype_name(self.torch_dtype))
            obstacle = fp8_matmul_obstacle(self.device) if quantization == "fp8_matmul" else ""
        if obstacle:
            raise InvalidSetting(
                f"quantization = {quantization}: {obstacle}; use quantization fp8", field="quantization"
            )
        self.transformer: Flux | None = None
        self.schedule: ScheduleParams | None = None
        self.autoencoder: AutoEncoder | None = None
        self.clip: ClipEncoder | None = None
        self.t5: T5Encoder | None = None
        self.controlnets: list[ControlNet] = []
        self.image_prompts: dict[PromptPart, list[Checkpoint]] = {}
        self.loras = LoadedLoras(storage_options=self.storage_options)
        self.load_models(file_path_list)

    def load_models(
        self,
        file_path_list: Sequence[PathOrFolder | Sequence[PathOrFolder]],
        torch_dtype: torch.dtype | None = None,
        *,
        names: Sequence[str] = (),
    ) -> None:
        """Load each entry: a file, a folder that holds one part, or the list of files that make up one part.

        If a file holds several parts (ComfyUI's all-in-one), all are loaded. ControlNets are added to the loaded ones,
        in the order of their entries, after all parts of the model. A FLUX.1-Redux or an IP-Adapter is loaded with the
        pipeline, in the dtype of the transformer; its vision tower is another entry or the folder `image_encoder`
        beside it. torch_dtype: the dtype of the other parts, None for that of the manager; torch.float8_e4m3fn, as in
        scripts for DiffSynth-Studio, means `quantization` fp8. Files in a bucket or on a hub are fetched once for each
        machine, with `storage_options` (see local_model). names: further names of the model, such as its address,
        which can show its variant like the names of its files.
        """
        dtype, quantization = self.torch_dtype, self.quantization
        if torch_dtype == torch.float8_e4m3fn:
            quantization = "fp8" if quantization == "none" else quantization
        elif torch_dtype is not None:
            dtype = to_dtype(torch_dtype, self.device)
        check_quantization(quantization, dtype_name(dtype))
        nets = []
        for source in _as_paths("file_path_list", file_path_list):
            with checkpoint_errors(), device_errors():
                checkpoint = open_checkpoint(_to_path(source, self.storage_options))
                if part := prompt_part(checkpoint):
                    self.image_prompts.setdefault(part, []).append(checkpoint)
                    continue
                parts = parts_of(checkpoint)
                nets += [parts.pop(CheckpointKind.CONTROLNET)] if CheckpointKind.CONTROLNET in parts else []
                for kind in sorted(parts, key=lambda kind: LOADING_ORDER.index(kind.part)):
                    self._load(kind, parts[kind], dtype, quantization, names)
        for net in nets:
            with checkpoint_errors(), device_errors():
                self.controlnets.append(self._load_controlnet(net, dtype, quantization))

    def load_controlnets(self, uris: Sequence[PathOrFolder], *, refresh: bool = False) -> None:
        """Load ControlNets from files, folders or addresses; a net that is named twice is loaded once.

        refresh: check first whether remote files have changed.
        Raises: CheckpointError for a file that is not a ControlNet, or is for another model; StoreError.
        """
        loaded: dict[str, ControlNet] = {}
        for uri in map(str, _as_paths("controlnets", uris)):
            if uri not in loaded:
                with checkpoint_errors(), device_errors():
                    checkpoint = open_checkpoint(local_path(uri, self.storage_options, refresh=refresh))
                    parts = parts_of(checkpoint)
                    if list(parts) != [CheckpointKind.CONTROLNET]:
                        held = " and ".join(kind.part for kind in parts)
                        raise ValueError(f"{checkpoint.source} is no ControlNet: it holds the {held} of a model")
                    net = parts[CheckpointKind.CONTROLNET]
                    loaded[uri] = self._load_controlnet(net, self.torch_dtype, self.quantization)
            self.controlnets.append(loaded[uri])

    def load_lora(self, file_path: PathOrFolder | Sequence[PathOrFolder], lora_alpha: float = 1.0) -> None:
        """Merge one or several LoRAs with the same scale into the loaded parts; see LoadedLoras.

        `lora_alpha` is DiffSynth-Studio's name for the scale. The alphas in the file apply as well.
        """
        for path in _as_paths("file_path", file_path):
            self.loras.add(path, lora_alpha)

    def _load(
        self,
        kind: CheckpointKind,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        quantization: Quantization,
        names: Sequence[str],
    ) -> None:
        home = checkpoint.folder
        if kind in (CheckpointKind.TRANSFORMER, CheckpointKind.TRANSFORMER_DIFFUSERS):
            config = read_config(home, "transformer")
            prepare = PREPARE_TRANSFORMER[quantization]
            self.transformer = load_transformer(
                checkpoint, kind, config, dtype=dtype, device=self.device, prepare=prepare
            )
            self.variant = self._variant_of(self.transformer, checkpoint, names)
            self.loras.add_part("transformer", self.transformer)
            guidance_embed = self.transformer.params.guidance_embed
            self.schedule = schedule_params(_read_scheduler_config(home), guidance_embed=guidance_embed)
        elif kind in (CheckpointKind.AUTOENCODER, CheckpointKind.AUTOENCODER_DIFFUSERS):
            config = read_config(home, "vae")
            self.autoencoder = load_autoencoder(checkpoint, kind, config, dtype=dtype, device=self.device)
        elif kind is CheckpointKind.CLIP:
            self.clip = load_clip(checkpoint, dtype=dtype, device=self.device)
            self.loras.add_part("clip", self.clip.model)
        else:
            prepare = PREPARE_T5[quantization]
            self.t5 = load_t5(checkpoint, dtype=dtype, device=self.device, prepare=prepare)
            self.loras.add_part("t5", self.t5.model)

    def _load_controlnet(self, checkpoint: Checkpoint, dtype: torch.dtype, quantization: Quantization) -> ControlNet:
        """Load a ControlNet; parameters that its weights and config.json lack are those of the transformer."""
        of_base = {"axes_dims_rope": self.transformer.params.axes_dim} if self.transformer else {}
        config = of_base | read_config(checkpoint.folder, "controlnet")
        prepare = PREPARE_TRANSFORMER[quantization]
        net = load_controlnet(checkpoint, config, dtype=dtype, device=self.device, prepare=prepare)
        if self.transformer:
            try:
                check_controlnet_fits(net.params, self.transformer.params)
            except ValueError as error:
                raise ValueError(f"{checkpoint.source}: {error}") from error
        return net

    def _variant_of(self, transformer: Flux, checkpoint: Checkpoint, names: Sequence[str]) -> Variant:
        """Return a transformer's variant, by channels and by names of file, folders and address."""
        hints = [part for path in (checkpoint.source, *names) for part in names_in(path)]
        hints += [str(read_json(path).get("_class_name")) for path in _model_indexes(checkpoint.folder)]
        try:
            variant = variant_of(transformer.params, self.variant_name, hints)
        except ValueError as error:
            raise ValueError(f"{checkpoint.source}: {error}") from error
        if variant is UNTOLD:
            log.warning(
                "%s: neither its weights nor its name show whether it is FLUX.1-Canny or -Depth: the default guidance "
                "is that of Canny, %g; set variant to choose",
                checkpoint.source,
                variant.guidance,
            )
        elif self.variant_name == "auto" and variant is not variant_of(transformer.params):
            log.info("%s: %s, by its name", checkpoint.source, variant.title)
        return variant


def _model_indexes(folder: Path) -> list[Path]:
    """Return diffusers' model_index.json, in the folder of a part or of its model."""
    return [path for path in (folder / "model_index.json", folder.parent / "model_index.json") if path.is_file()]


def locate_parts(
    uri: PathOrFolder, storage_options: Mapping[str, Any] | None = None, *, refresh: bool = False
) -> list[Path]:
    """Return the local files of a model's parts, after fetching remote ones (see local_model).

    Raises: CheckpointError with the files that were looked for; StoreError.
    """
    model = local_model(uri, storage_options, refresh=refresh)
    with checkpoint_errors():
        return find_parts(model)


def check_parts_fit(
    transformer: Flux,
    autoencoder: AutoEncoder,
    clip: ClipEncoder,
    t5: T5Encoder,
    controlnets: Sequence[ControlNet] = (),
) -> None:
    """Raise CheckpointError unless the parts belong to one model."""
    for number, net in enumerate(controlnets, start=1):
        try:
            check_controlnet_fits(net.params, transformer.params)
        except ValueError as error:
            raise CheckpointError(f"ControlNet {number}: {error}") from error
    p, a = transformer.params, autoencoder.params
    facts = [
        ("channels of a latent patch (autoencoder)", 4 * a.z_channels, p.out_channels),
        ("pixels along a token (autoencoder)", 2 * a.downscale, TOKEN_SIDE_PX),
        ("width of the CLIP text encoder", clip.width, p.vec_in_dim),
        ("width of the T5 text encoder", t5.width, p.context_in_dim),
    ]
    for what, value, wanted in facts:
        if value != wanted:
            raise CheckpointError(f"the parts are not of one model: {what} is {value}, the transformer takes {wanted}")
    for what, tokenizer, vocab_size in (
        ("CLIP", clip.tokenizer, clip.model.params.vocab_size),
        ("T5", t5.tokenizer, t5.model.params.vocab_size),
    ):
        count = len(tokenizer)
        if count > vocab_size:
            raise CheckpointError(f"the tokenizer of {what} has {count} tokens, its text encoder knows {vocab_size}")


def _as_paths(name: str, paths: Any) -> list[Any]:
    """Return the entries of an argument; a single path is one entry. Raises: InvalidSetting for anything else."""
    if isinstance(paths, (str, PathLike)):
        return [paths]
    if not isinstance(paths, (list, tuple)):
        raise InvalidSetting(f"{name} = {paths!r}: must be a list of paths or addresses", field=name)
    return list(paths)


def _to_path(
    source: PathOrFolder | Sequence[PathOrFolder], storage_options: Mapping[str, Any] | None = None
) -> Path | list[Path]:
    """Return the local path or paths of one part, after fetching remote ones."""
    if isinstance(source, (str, PathLike)):
        return embedder_in(local_path(source, storage_options))
    return [local_path(path, storage_options) for path in source]


def _read_scheduler_config(home: Path) -> dict[str, Any]:
    """Read the scheduler's configuration from the folder of the weights or its parent; {} if there is none."""
    for folder in (home, home.parent):
        path = folder / "scheduler" / "scheduler_config.json"
        if path.is_file():
            return read_json(path)
    return {}
