"""A model's tensors on disk: safetensors files, sharded or not, opened by header; knows no architecture."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

FLOATS = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})
SHARD_NAME = re.compile(r"-(\d+)-of-(\d+)\.safetensors$")
FOREIGN_MAGIC = {b"PK": "a pickle (zip)", b"\x80": "a pickle", b"GGUF": "a GGUF file", b"<": "a web page"}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor lies: `key` is its name in that file."""

    path: Path
    key: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Tensors by name, not read yet. `source` is the file or folder, for messages; `home` the folder they lie in."""

    source: str
    home: Path
    tensors: Mapping[str, StoredTensor]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def rename(self, names: Mapping[str, str]) -> Checkpoint:
        """Return the same tensors with other names: `names` is old name -> new name, for every tensor."""
        return Checkpoint(self.source, self.home, {names[name]: tensor for name, tensor in self.tensors.items()})

    def check(self, what: str, expected: Mapping[str, Sequence[int]]) -> None:
        """Raise ValueError unless names and shapes are exactly `expected` and all tensors are floats."""
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
                [f"{name} ({tensor.dtype})" for name, tensor in self.tensors.items() if tensor.dtype not in FLOATS],
            ),
        ]
        if complaints:
            raise ValueError(f"{self.source} does not hold {what}: {'; '.join(complaints)}")


class StoredState(Mapping[str, Tensor]):
    """A checkpoint as a state dict that reads a tensor when it is asked for, so that no second copy piles up."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
        self._tensors = checkpoint.tensors
        self._files = {path: open_file(path) for path in {tensor.path for tensor in checkpoint.tensors.values()}}
        self._dtype = dtype
        self._device = device

    def __getitem__(self, name: str) -> Tensor:
        stored = self._tensors[name]
        tensor: Tensor = self._files[stored.path].get_tensor(stored.key)
        return tensor.to(device=self._device, dtype=self._dtype)

    def __contains__(self, name: object) -> bool:
        # Mapping's own would read the tensor to find out.
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def open_checkpoint(source: Path | Sequence[Path]) -> Checkpoint:
    """Open one model: a file, the files of one model, or a folder with one file or with an index and its shards.

    Reads headers only. Raises: ValueError for what is not there, not whole, or not safetensors.
    """
    files = files_of(source) if isinstance(source, Path) else list(source)
    if not files:
        raise ValueError("an empty list of files is no model")
    tensors: dict[str, StoredTensor] = {}
    for path in files:
        for name, tensor in read_header(path).items():
            if name in tensors:
                raise ValueError(f"{name} is both in {tensors[name].path} and in {path}")
            tensors[name] = tensor
    return Checkpoint(str(source if isinstance(source, Path) else files[0]), files[0].parent, tensors)


def files_of(source: Path) -> list[Path]:
    """Return the files of the one model at `source`, itself a file or a folder."""
    if not source.is_dir():
        return [source]
    indexes = sorted(source.glob("*.safetensors.index.json"))
    if len(indexes) > 1:
        raise ValueError(f"{source} holds several models: {listing([path.name for path in indexes])}; keep one")
    if indexes:
        weight_map = read_json(indexes[0]).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{indexes[0]} has no weight_map: download it again")
        return [source / str(name) for name in sorted(set(weight_map.values()))]
    files = sorted(source.glob("*.safetensors"))
    shards = [SHARD_NAME.search(path.name) for path in files]
    if len(files) > 1 and not all(shard and int(shard[2]) == len(files) for shard in shards):
        raise ValueError(f"{source} holds several files and no index: {listing([path.name for path in files])}")
    if not files:
        raise ValueError(f"no .safetensors file in {source}")
    return files


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Return what a safetensors file holds, without reading tensors."""
    file = open_file(path)
    tensors = {}
    for key in file.keys():  # noqa: SIM118 (a safetensors file is no mapping)
        view = file.get_slice(key)
        tensors[key] = StoredTensor(path, key, tuple(view.get_shape()), view.get_dtype())
    return tensors


def open_file(path: Path) -> Any:
    """Open a safetensors file. Raises: ValueError that says what the file is instead, as far as one can tell."""
    if not path.is_file():
        raise ValueError(f"{path} is not there")
    if path.suffix in {".ckpt", ".bin", ".pt", ".pth"}:
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
    except ValueError as error:
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
