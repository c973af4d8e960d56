"""The files of a repository that make up a FLUX.1 model, chosen by name; no file is read here."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

_WEIGHT_FOLDERS = ("transformer", "vae", "text_encoder", "text_encoder_2")
COMPONENT_FOLDERS = (*_WEIGHT_FOLDERS, "scheduler", "tokenizer", "tokenizer_2")
# Component folders of models that are loaded beside FLUX.1: FLUX.1-Redux and its vision tower.
_SIDE_FOLDERS = ("image_embedder", "image_encoder")
LISTED_FOLDERS = (*COMPONENT_FOLDERS, *_SIDE_FOLDERS)
WEIGHT_SUFFIXES = (".safetensors", ".gguf")
_PICKLE_SUFFIXES = (".ckpt", ".bin", ".pt", ".pth", ".pkl")
# Suffixes of settings and vocabularies. Pickles, weights of other frameworks and images are not downloaded.
_SETTINGS_SUFFIXES = (".json", ".txt", ".model")
_INDEX_SUFFIX = ".safetensors.index.json"
_SHARD_NAME = re.compile(r"-\d+-of-\d+\.safetensors$")
# diffusers marks other precisions of the same weights by these parts of a file name.
_PRECISION_VARIANT = re.compile(r"\.(fp16|bf16|fp32|fp8|ema|non_ema)([.-])")


def needed_files(names: Iterable[str], *, part: str = "", single_files: bool = False) -> list[str]:
    """Return the files of a repository that a model needs, sorted.

    names: paths relative to the model folder, with forward slashes. part: a file or folder; weights outside it are left
    out, but all settings are kept, since they are small. single_files: prefer the original single files to the folders
    of diffusers where a repository has both.
    """
    known = sorted(name for name in names if _is_known(name))
    weights = [name for name in known if is_weight(name)]
    settings = [name for name in known if not is_weight(name)]
    if part:
        weights = [name for name in weights if name == part or name.startswith(f"{part}/")]
    else:
        weights = _one_layout(weights, single_files=single_files)
    folders = {_folder_of(name) for name in weights}
    # An index without its shards would look like a set of weights.
    settings = [name for name in settings if not name.endswith(_INDEX_SUFFIX) or _folder_of(name) in folders]
    return sorted([*settings, *_one_variant(weights, settings)])


def missing_components(names: Iterable[str]) -> list[str]:
    """Return the component folders that are missing or lack shards.

    Single files at the top replace the folders of weights.
    """
    known = [name for name in names if _is_known(name)]
    weights = [name for name in known if is_weight(name)]
    if any("/" not in name for name in weights):
        return [folder for folder in ("tokenizer", "tokenizer_2") if folder not in map(_folder_of, known)]
    return [folder for folder in COMPONENT_FOLDERS if folder != "scheduler" and not _is_complete(folder, known)]


def _is_complete(folder: str, names: Sequence[str]) -> bool:
    """Return whether a component folder has files, and if its weights are sharded, all shards."""
    files = [name for name in names if _folder_of(name) == folder]
    if folder not in _WEIGHT_FOLDERS:
        return bool(files)
    weights = [name for name in files if is_weight(name)]
    shards = [name for name in weights if is_shard(name)]
    return bool(weights) and all(f"-of-{len(shards):05d}." in name for name in shards)


def part_of(uri: str) -> tuple[str, str]:
    """Split an address into the model's address and the part's path.

    The path is "" for a whole model.
    A file is a part of the folder that holds it, or of the folder that holds its component folder. A folder is a part
    if it has the name of a component.
    """
    parent, _, name = uri.rstrip("/").rpartition("/")
    if not parent or parent.endswith(":/"):
        return uri.rstrip("/"), ""
    if is_weight(name):
        folder, component = part_of(parent)
        return (folder, f"{component}/{name}") if component else (parent, name)
    return (parent, name) if name in _WEIGHT_FOLDERS else (uri.rstrip("/"), "")


def _one_layout(weights: list[str], *, single_files: bool) -> list[str]:
    """Return the weights of one layout if a repository has both."""
    folders = {_folder_of(name) for name in weights}
    if single_files and "" in folders:
        return [name for name in weights if _folder_of(name) not in ("transformer", "vae")]
    return [name for name in weights if _folder_of(name)] if folders.issuperset(_WEIGHT_FOLDERS) else weights


def _one_variant(weights: Sequence[str], settings: Sequence[str]) -> list[str]:
    """Return the weights in one precision. Shards are preferred to a single file with the same weights."""
    by_folder = defaultdict(list)
    for name in weights:
        by_folder[_folder_of(name)].append(name)
    kept = []
    for folder, files in by_folder.items():
        plain = [name for name in files if folder and not _PRECISION_VARIANT.search(name)] or files
        shards = [name for name in plain if is_shard(name)]
        has_index = any(name.endswith(_INDEX_SUFFIX) and _folder_of(name) == folder for name in settings)
        kept += shards if folder and shards and has_index else plain
    return kept


def _is_known(name: str) -> bool:
    """Return whether a model needs a file, by its folder and suffix."""
    folder, slash, file = name.rpartition("/")
    is_in_place = folder in LISTED_FOLDERS if slash else True
    return is_in_place and "\\" not in file and file.endswith((*WEIGHT_SUFFIXES, *_SETTINGS_SUFFIXES))


def is_weight(name: str) -> bool:
    """Return whether a file holds tensors, by its name."""
    return name.endswith(WEIGHT_SUFFIXES)


def is_shard(name: str) -> bool:
    """Return whether a file is a shard of a model in several files, by name."""
    return _SHARD_NAME.search(name) is not None


def is_pickle(name: str) -> bool:
    """Return whether a file is a pickle, by its suffix in upper or lower case."""
    return name.lower().endswith(_PICKLE_SUFFIXES)


def _folder_of(name: str) -> str:
    """Return the folder of a file in the repository, "" for the top."""
    return name.rpartition("/")[0]
