"""The files of models that read image prompts, detected by their keys: Redux, IP-Adapter and their vision towers.

Sources: black-forest-labs/flux 802fb47, src/flux/modules/image_embedders.py; XLabs-AI/x-flux 4749542,
src/flux/xflux_pipeline.py; diffusers 0.42.1, loaders/ip_adapter.py; transformers 5.23 for the towers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from flux_batch.model.checkpoint.checkpoint import Checkpoint, open_checkpoint, weight_files
from flux_batch.model.checkpoint.files import is_pickle, is_weight

PromptPart = Literal["redux", "ip_adapter", "siglip", "clip_vision"]
PROMPT_PART_TITLES: dict[PromptPart, str] = {
    "redux": "FLUX.1-Redux",
    "ip_adapter": "an IP-Adapter",
    "siglip": "the vision tower of a SigLIP",
    "clip_vision": "the vision tower of a CLIP",
}

# Folders of a Redux and of a vision tower in the repositories of diffusers.
_EMBEDDER, _TOWER = "image_embedder", "image_encoder"
# The prefix of a vision tower's keys, and the prefixes of unused keys in its file: the text half of a CLIP or SigLIP,
# and SigLIP's pooling head, since Redux reads the states of all patches.
TOWER_PREFIX = "vision_model."
_NOT_OF_TOWER = ("text_model.", "text_projection.", "logit_", "head.", "embeddings.position_ids")
# A part of a key of XLabs' IP-Adapter, and prefixes of keys of IP-Adapters, those of diffusers and InstantX included.
_ADAPTER_KEY = "ip_adapter_double_stream_k_proj.weight"
_ADAPTER_PREFIXES = ("ip_adapter_proj_model.", "image_proj.")


def prompt_part(checkpoint: Checkpoint) -> PromptPart | None:
    """Return the kind of image-prompt model that a checkpoint holds; None for any other checkpoint."""
    names = checkpoint.tensors
    if "redux_up.weight" in names:
        return "redux"
    if any(name.startswith(_ADAPTER_PREFIXES) or _ADAPTER_KEY in name for name in names):
        return "ip_adapter"
    tower = {name.removeprefix(TOWER_PREFIX) for name in names}
    if "embeddings.patch_embedding.weight" in tower:
        return "clip_vision" if "embeddings.class_embedding" in tower else "siglip"
    return None


def embedder_in(source: Path) -> Path:
    """Return the folder of a Redux in a diffusers repository; return any other path unchanged."""
    return source / _EMBEDDER if (source / _EMBEDDER).is_dir() else source


def redux_files(source: Path, tower: Path | None = None) -> tuple[Path, Path]:
    """Return the paths of a Redux and its vision tower, each a file or folder.

    source: the file, or a folder that holds it directly or in `image_embedder`. tower: None stands for the folder
    `image_encoder` beside it. Raises: ValueError if one of the two is missing.
    """
    home = source if source.is_dir() else source.parent
    home = home.parent if home.name == _EMBEDDER else home
    found = embedder_in(source)
    if found == source:
        found = _one_file(source, "redux_up.weight", "FLUX.1-Redux", "flux1-redux-dev")
    return found, _existing_tower(tower or home / _TOWER, "FLUX.1-Redux", "SigLIP so400m")


def ip_adapter_files(source: Path, tower: Path | None = None) -> tuple[Path, Path]:
    """Return the file of an IP-Adapter, and the file or folder of its vision tower.

    source, tower: as in `redux_files`. Raises: ValueError if one of the two is missing, or if the file is a pickle.
    """
    names = [path.name for path in source.iterdir()] if source.is_dir() else [source.name]
    if any(map(is_pickle, names)) and not any(map(is_weight, names)):
        raise ValueError(
            f"{source} is a pickle, as InstantX's IP-Adapter is, which can run any code when read: use one of XLabs, a "
            "safetensors file"
        )
    found = _one_file(source, _ADAPTER_KEY, "an IP-Adapter", "ip_adapter.safetensors")
    home = source if source.is_dir() else source.parent
    return found, _existing_tower(tower or home / _TOWER, "an IP-Adapter", "openai/clip-vit-large-patch14")


def tower_of(checkpoint: Checkpoint) -> Checkpoint:
    """Return only the vision tower of a checkpoint, without the prefix of its keys."""
    names = {name: name.removeprefix(TOWER_PREFIX) for name in checkpoint.tensors}
    return checkpoint.rename({old: new for old, new in names.items() if not new.startswith(_NOT_OF_TOWER)})


def _one_file(source: Path, key: str, title: str, name: str) -> Path:
    """Return the file, or the only file of a folder that has the key. Raises: ValueError for none or several."""
    if not source.is_dir():
        return source
    files = [path for path in weight_files(source) if any(key in each for each in open_checkpoint(path).tensors)]
    if len(files) != 1:
        raise ValueError(f"{source} holds {len(files)} files of {title}: name the file, {name}")
    return files[0]


def _existing_tower(tower: Path, title: str, name: str) -> Path:
    if not tower.exists():
        raise ValueError(
            f"no vision tower for {title}: {tower} is not there; image_encoder names its file or folder, that of {name}"
        )
    return tower
