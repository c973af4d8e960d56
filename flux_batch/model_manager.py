"""ModelManager: files in, the parts of a model out, each recognised by its keys.

Knows where the parts of a model may lie, and turns what the model raises into our errors; knows no prompt or picture.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import torch

from flux_batch.errors import CheckpointError, DeviceFatal, FluxBatchError, InvalidSetting, OutOfMemory
from flux_batch.model.autoencoder import AutoEncoder
from flux_batch.model.checkpoint import open_checkpoint, read_config, read_json
from flux_batch.model.params import ScheduleParams, schedule_params
from flux_batch.model.text import ClipEncoder, T5Encoder, load_clip, load_t5
from flux_batch.model.transformer import Flux
from flux_batch.model.weights import Layout, load_autoencoder, load_transformer, recognise

PathOrFolder = str | PathLike[str]

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


def download_models(model_id_list: Sequence[str]) -> None:
    """See that the models named lie under models/FLUX, where DiffSynth-Studio puts them; fetching is not there yet.

    Raises: FluxBatchError that says what to do instead.
    """
    for name in model_id_list:
        folder = Path("models/FLUX") / name
        if not folder.is_dir():
            raise FluxBatchError(
                f"download_models is not yet in this version: download {name} with the Hub's own client (hf download) "
                f"into {folder}, or pass its folder to from_pretrained"
            )


def find_parts(uri: PathOrFolder) -> list[Path]:
    """Return where each part of a model folder lies. Raises: CheckpointError saying what was looked for."""
    folder = local_folder(uri)
    with checkpoint_errors():
        return [find_part(folder, part) for part in TITLES]


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
