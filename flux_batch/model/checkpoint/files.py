"""Which files of a repository make up a FLUX.1 model: knows names, reads nothing."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

WEIGHT_FOLDERS = ("transformer", "vae", "text_encoder", "text_encoder_2")
FOLDERS = (*WEIGHT_FOLDERS, "scheduler", "tokenizer", "tokenizer_2")
WEIGHTS = (".safetensors", ".gguf")
PICKLES = (".ckpt", ".bin", ".pt", ".pth", ".pkl")
# Settings and vocabularies. Pickles, other frameworks' weights and images are not among them.
SETTINGS = (".json", ".txt", ".model")
INDEX = ".safetensors.index.json"
SHARD = re.compile(r"-\d+-of-\d+\.safetensors$")
# diffusers puts other precisions of the same weights beside them under such names.
VARIANT = re.compile(r"\.(fp16|bf16|fp32|fp8|ema|non_ema)([.-])")


def needed_files(names: Iterable[str], *, part: str = "", single_files: bool = False) -> list[str]:
    """Return those of a repository's files that a model needs, in order.

    names: paths relative to the model folder, with forward slashes. part: only the weights of this file or folder, with
    all settings, which are small. single_files: of a repository that has the weights in both layouts, take the
    original single files; without it, the folders of diffusers.
    """
    known = sorted(name for name in names if is_known(name))
    weights = [name for name in known if is_weight(name)]
    settings = [name for name in known if not is_weight(name)]
    if part:
        weights = [name for name in weights if name == part or name.startswith(f"{part}/")]
    else:
        weights = one_layout(weights, single_files=single_files)
    homes = {home_of(name) for name in weights}
    # An index without its shards would look like weights.
    settings = [name for name in settings if not name.endswith(INDEX) or home_of(name) in homes]
    return sorted([*settings, *one_variant(weights, settings)])


def missing_components(names: Iterable[str]) -> list[str]:
    """Return the folders whose weights are neither there nor, as far as names tell, in single files; shards count."""
    known = [name for name in names if is_known(name)]
    weights = [name for name in known if is_weight(name)]
    if any("/" not in name for name in weights):
        return [folder for folder in ("tokenizer", "tokenizer_2") if folder not in map(home_of, known)]
    return [folder for folder in FOLDERS if folder != "scheduler" and not is_complete(folder, known)]


def is_complete(folder: str, names: Sequence[str]) -> bool:
    """Tell whether a component folder has files, and of sharded weights all."""
    files = [name for name in names if home_of(name) == folder]
    if folder not in WEIGHT_FOLDERS:
        return bool(files)
    weights = [name for name in files if is_weight(name)]
    shards = [name for name in weights if SHARD.search(name)]
    return bool(weights) and all(f"-of-{len(shards):05d}." in name for name in shards)


def part_of(uri: str) -> tuple[str, str]:
    """Split the address of a part of a model into that of the model and the part's path in it; "" if it is a model.

    A file lies in the model's folder or in a component's; a folder is a part if it is called like a component.
    """
    parent, _, name = uri.rstrip("/").rpartition("/")
    if not parent or parent.endswith(":/"):
        return uri.rstrip("/"), ""
    if is_weight(name):
        home, component = part_of(parent)
        return (home, f"{component}/{name}") if component else (parent, name)
    return (parent, name) if name in WEIGHT_FOLDERS else (uri.rstrip("/"), "")


def one_layout(weights: list[str], *, single_files: bool) -> list[str]:
    """Return the weights of one layout, if they are there in both."""
    homes = {home_of(name) for name in weights}
    if single_files and "" in homes:
        return [name for name in weights if home_of(name) not in ("transformer", "vae")]
    return [name for name in weights if home_of(name)] if homes.issuperset(WEIGHT_FOLDERS) else weights


def one_variant(weights: Sequence[str], settings: Sequence[str]) -> list[str]:
    """Return the weights without other precisions of the same, and without a whole file beside its shards."""
    by_home = defaultdict(list)
    for name in weights:
        by_home[home_of(name)].append(name)
    kept = []
    for home, files in by_home.items():
        plain = [name for name in files if home and not VARIANT.search(name)] or files
        shards = [name for name in plain if SHARD.search(name)]
        has_index = any(name.endswith(INDEX) and home_of(name) == home for name in settings)
        kept += shards if home and shards and has_index else plain
    return kept


def is_known(name: str) -> bool:
    """Tell whether a file lies where a model's files lie, and is of a kind a model has."""
    home, slash, file = name.rpartition("/")
    is_at_home = home in FOLDERS if slash else True
    return is_at_home and "\\" not in file and file.endswith((*WEIGHTS, *SETTINGS))


def is_weight(name: str) -> bool:
    """Tell whether a file holds tensors."""
    return name.endswith(WEIGHTS)


def is_pickle(name: str) -> bool:
    """Tell whether a file is called like a pickle, in either case."""
    return name.lower().endswith(PICKLES)


def home_of(name: str) -> str:
    """Return the folder of a file in the repository, "" for the top."""
    return name.rpartition("/")[0]
