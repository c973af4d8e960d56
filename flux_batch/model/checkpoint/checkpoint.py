"""A model's tensors on disk: safetensors and GGUF files, sharded or not, opened by header; knows no architecture."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from flux_batch.model.checkpoint.files import is_pickle
from flux_batch.model.checkpoint.gguf_header import GGUF_MAGIC, QUANTISED, read_gguf

FP8 = frozenset({"F8_E4M3", "F8_E5M2"})
READABLE = FP8 | {"F64", "F32", "F16", "BF16"} | QUANTISED
ENDINGS = ("safetensors", "sft", "gguf")
SHARD_NAME = re.compile(r"-(\d+)-of-(\d+)\.\w+$")
FOREIGN_MAGIC = {b"PK": "a pickle (zip)", b"\x80": "a pickle", b"<": "a web page", b"version ": "a pointer of Git LFS"}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor lies and how it is encoded; `key` is its name in that file.

    `dtype`: as safetensors writes it, or a GGUF type (Q4_K); `offset`: its first byte, in a GGUF file; `scale`: what
    the numbers of an fp8 tensor are to be multiplied by, one for all of them or one a row.
    """

    path: Path
    key: str
    shape: tuple[int, ...]
    dtype: str
    offset: int | None = None
    scale: StoredTensor | None = None


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Tensors by name, not read yet. `source` is the file or folder, for messages; `home` the folder they lie in.

    `headers`: what the header of each file says beside the tensors.
    """

    source: str
    home: Path
    tensors: Mapping[str, StoredTensor]
    headers: Sequence[Mapping[str, str]] = ()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def rename(self, names: Mapping[str, str]) -> Checkpoint:
        """Return the tensors that `names`, old name -> new name, lists. Raises: ValueError if two get one name."""
        tensors: dict[str, StoredTensor] = {}
        for old, new in names.items():
            if new in tensors:
                twice = " and ".join(sorted((tensors[new].key, self.tensors[old].key), key=len))
                raise ValueError(f"{self.source} holds {new} twice, as {twice}: keep one")
            tensors[new] = self.tensors[old]
        return replace(self, tensors=tensors)

    def check(self, what: str, expected: Mapping[str, Sequence[int]]) -> None:
        """Raise ValueError unless names and shapes are exactly `expected` and all tensors can be read."""
        complaints = [
            *complain("missing", [name for name in expected if name not in self.tensors]),
            *complain("not part of it", [name for name in self.tensors if name not in expected]),
            *complain(
                "of another shape",
                [
                    f"{name} is {list(tensor.shape)}, should be {list(expected[name])}"
                    for name, tensor in self.tensors.items()
                    if name in expected and tensor.shape != tuple(expected[name])
                ],
            ),
            *complain(
                "quantised, which is not supported",
                [f"{name} ({tensor.dtype})" for name, tensor in self.tensors.items() if tensor.dtype not in READABLE],
            ),
        ]
        if complaints:
            raise ValueError(f"{self.source} does not hold {what}: {'; '.join(complaints)}")


def open_checkpoint(source: Path | Sequence[Path]) -> Checkpoint:
    """Open one model: a file, the files of one model, or a folder with one file or with an index and its shards.

    Reads headers only. Raises: ValueError for what is not there, not whole, or neither safetensors nor GGUF.
    """
    files = files_of(source) if isinstance(source, Path) else list(source)
    if not files:
        raise ValueError("an empty list of files is no model")
    tensors: dict[str, StoredTensor] = {}
    headers: list[dict[str, str]] = []
    for path in files:
        header, words = read_header(path)
        for name, tensor in header.items():
            if name in tensors:
                raise ValueError(f"{name} is both in {tensors[name].path} and in {path}")
            tensors[name] = tensor
        headers.append(words)
    return Checkpoint(str(source if isinstance(source, Path) else files[0]), files[0].parent, tensors, headers)


def files_of(source: Path) -> list[Path]:
    """Return the files of the one model at `source`, itself a file or a folder."""
    if not source.is_dir():
        return [source]
    indexes = sorted(source.glob("*.safetensors.index.json"))
    if len(indexes) > 1:
        raise ValueError(f"{source} holds several models: {listing([path.name for path in indexes])}; keep one")
    if indexes:
        return indexed_files(indexes[0])
    files = weight_files(source)
    shards = [SHARD_NAME.search(path.name) for path in files]
    if len(files) > 1 and not all(shard and int(shard[2]) == len(files) for shard in shards):
        raise ValueError(f"{source} holds several files and no index: {listing([path.name for path in files])}")
    if not files:
        pickles = sorted(path.name for path in source.iterdir() if is_pickle(path.name))
        but = f", only {listing(pickles)}, which can run any code when read" if pickles else ""
        raise ValueError(f"no .safetensors or .gguf file in {source}{but}")
    return files


def weight_files(folder: Path) -> list[Path]:
    """Return the files in a folder that may hold weights."""
    return sorted(path for ending in ENDINGS for path in folder.glob(f"*.{ending}"))


def indexed_files(index: Path) -> list[Path]:
    """Return the shards an index names. Raises: ValueError unless each lies beside it."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(x, str) for x in weight_map.values()):
        raise ValueError(f"{index} has no weight_map: download it again")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name:
            raise ValueError(f"{index} names {name!r}, which is no file beside it")
        if not (index.parent / name).is_file():
            raise ValueError(f"{index} names {name}, and {index.parent / name} is not there: download it again")
    return [index.parent / name for name in names]


def read_header(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Return what a file holds and says about itself, without reading tensors."""
    if is_gguf(path):
        entries, words = read_gguf(path)
        tensors = {x.name: StoredTensor(path, x.name, x.shape, x.dtype, offset=x.offset) for x in entries}
        return tensors, words
    file = open_safetensors(path)
    tensors = {}
    for key in file.keys():  # noqa: SIM118 (a safetensors file is no mapping)
        view = file.get_slice(key)
        tensors[key] = StoredTensor(path, key, tuple(view.get_shape()), view.get_dtype())
    return tensors, file.metadata() or {}


def is_gguf(path: Path) -> bool:
    """Return whether a file begins as GGUF does, whatever it is called."""
    if not path.is_file() or is_pickle(path.name):
        return False
    with path.open("rb") as file:
        return file.read(len(GGUF_MAGIC)) == GGUF_MAGIC


def open_safetensors(path: Path) -> Any:
    """Map a safetensors file. Raises: ValueError that says what the file is instead, as far as one can tell."""
    if not path.is_file():
        raise ValueError(f"{path} is not there")
    if is_pickle(path.name):
        raise ValueError(f"{path} is a pickle, which can run any code when read: use the .safetensors file instead")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        with path.open("rb") as file:
            start = file.read(9)
        kind = next((kind for magic, kind in FOREIGN_MAGIC.items() if start.startswith(magic)), None)
        # Eight bytes of length, which may look like anything, then JSON: safetensors after all.
        if kind and start[8:] != b"{":
            raise ValueError(f"{path} is {kind}, not safetensors: download or convert it again") from error
        raise ValueError(f"{path} is cut short or damaged ({error}): download it again") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file. Raises: ValueError naming it if it holds none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not a JSON object")
    return value


def read_config(home: Path, component: str) -> dict[str, Any]:
    """Return the config.json of weights in `home`: in the folder of that component there, else beside them, else {}."""
    for path in (home / component / "config.json", home / "config.json"):
        if path.is_file():
            return read_json(path)
    return {}


def complain(what: str, names: Sequence[str]) -> list[str]:
    """Return one clause on `names`, or none if there are none."""
    return [f"{len(names)} {what} ({listing(names)})"] if names else []


def listing(names: Sequence[str], limit: int = 3) -> str:
    """Return the first names, and how many more there are."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
