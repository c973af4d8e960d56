"""A model's tensors on disk: headers of safetensors and GGUF files, sharded or not, of any architecture."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from flux_batch.model.checkpoint.files import is_pickle
from flux_batch.model.checkpoint.gguf_header import GGUF_MAGIC, QUANTIZED_DTYPES, read_gguf

FP8_DTYPES = frozenset({"F8_E4M3", "F8_E5M2"})
READABLE_DTYPES = FP8_DTYPES | {"F64", "F32", "F16", "BF16"} | QUANTIZED_DTYPES
_WEIGHT_SUFFIXES = ("safetensors", "sft", "gguf")
_SHARD_NAME = re.compile(r"-(\d+)-of-(\d+)\.\w+$")
_OTHER_MAGIC = {b"PK": "a pickle (zip)", b"\x80": "a pickle", b"<": "a web page", b"version ": "a pointer of Git LFS"}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file, not read yet; `key` is its name in the file.

    `dtype`: as safetensors spells it, or a GGUF type (Q4_K). `offset`: the position of its first byte in a GGUF file.
    `scale`: the factor of an fp8 tensor, one for the whole tensor or one for each row.
    """

    path: Path
    key: str
    shape: tuple[int, ...]
    dtype: str
    offset: int | None = None
    scale: StoredTensor | None = None


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Tensors by name, not read yet. `source` is the file or folder, for messages; `folder` holds the files.

    `headers`: the metadata in the header of each file.
    """

    source: str
    folder: Path
    tensors: Mapping[str, StoredTensor]
    headers: Sequence[Mapping[str, str]] = ()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def rename(self, names: Mapping[str, str]) -> Checkpoint:
        """Return the tensors of `names` (old name -> new name). Raises: ValueError if two get one name."""
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
            *_clause("missing", [name for name in expected if name not in self.tensors]),
            *_clause("not part of it", [name for name in self.tensors if name not in expected]),
            *_clause(
                "of another shape",
                [
                    f"{name} is {list(tensor.shape)}, should be {list(expected[name])}"
                    for name, tensor in self.tensors.items()
                    if name in expected and tensor.shape != tuple(expected[name])
                ],
            ),
            *_clause(
                "quantised, which is not supported",
                [
                    f"{name} ({tensor.dtype})"
                    for name, tensor in self.tensors.items()
                    if tensor.dtype not in READABLE_DTYPES
                ],
            ),
        ]
        if complaints:
            raise ValueError(f"{self.source} does not hold {what}: {'; '.join(complaints)}")


def open_checkpoint(source: Path | Sequence[Path]) -> Checkpoint:
    """Read the headers of a model: a file, its files, or a folder with one file or an index and its shards.

    Raises: ValueError for a file that is missing, incomplete, or neither safetensors nor GGUF.
    """
    files = model_files(source) if isinstance(source, Path) else list(source)
    if not files:
        raise ValueError("an empty list of files is not a model")
    tensors: dict[str, StoredTensor] = {}
    headers: list[dict[str, str]] = []
    for path in files:
        header, metadata = _read_header(path)
        for name, tensor in header.items():
            if name in tensors:
                raise ValueError(f"{name} is both in {tensors[name].path} and in {path}")
            tensors[name] = tensor
        headers.append(metadata)
    return Checkpoint(str(source if isinstance(source, Path) else files[0]), files[0].parent, tensors, headers)


def model_files(source: Path) -> list[Path]:
    """Return the files of the model at `source`, a file or a folder. Raises: ValueError unless it holds one model."""
    if not source.is_dir():
        return [source]
    indexes = sorted(source.glob("*.safetensors.index.json"))
    if len(indexes) > 1:
        raise ValueError(f"{source} holds several models: {first_names([path.name for path in indexes])}; keep one")
    if indexes:
        return _indexed_files(indexes[0])
    files = weight_files(source)
    shards = [_SHARD_NAME.search(path.name) for path in files]
    if len(files) > 1 and not all(shard and int(shard[2]) == len(files) for shard in shards):
        raise ValueError(f"{source} holds several files and no index: {first_names([path.name for path in files])}")
    if not files:
        pickles = sorted(path.name for path in source.iterdir() if is_pickle(path.name))
        but = f", only {first_names(pickles)}, which can run any code when read" if pickles else ""
        raise ValueError(f"no .safetensors or .gguf file in {source}{but}")
    return files


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files of a folder, by their suffixes."""
    return sorted(path for ending in _WEIGHT_SUFFIXES for path in folder.glob(f"*.{ending}"))


def _indexed_files(index: Path) -> list[Path]:
    """Return the shards that an index names. Raises: ValueError unless each of them lies beside the index."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(x, str) for x in weight_map.values()):
        raise ValueError(f"{index} has no weight_map: download it again")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name:
            raise ValueError(f"{index} names {name!r}, which is not a file beside it")
        if not (index.parent / name).is_file():
            raise ValueError(f"{index} names {name}, and {index.parent / name} is not there: download it again")
    return [index.parent / name for name in names]


def _read_header(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Read the header of a file. Returns: its tensors by name, and its metadata."""
    if _is_gguf(path):
        entries, metadata = read_gguf(path)
        tensors = {x.name: StoredTensor(path, x.name, x.shape, x.dtype, offset=x.offset) for x in entries}
        return tensors, metadata
    file = open_safetensors(path, framework="np")  # a header needs no torch, which takes a second to import
    tensors = {}
    for key in file.keys():  # noqa: SIM118 (a safetensors file is no mapping)
        view = file.get_slice(key)
        tensors[key] = StoredTensor(path, key, tuple(view.get_shape()), view.get_dtype())
    return tensors, file.metadata() or {}


def _is_gguf(path: Path) -> bool:
    """Return whether a file begins with the magic bytes of GGUF, whatever its suffix."""
    if not path.is_file() or is_pickle(path.name):
        return False
    with path.open("rb") as file:
        return file.read(len(GGUF_MAGIC)) == GGUF_MAGIC


def open_safetensors(path: Path, framework: str = "pt") -> Any:
    """Map a safetensors file. Raises: ValueError for any other file, with its format if that is recognised."""
    if not path.is_file():
        raise ValueError(f"{path} is not there")
    if is_pickle(path.name):
        raise ValueError(f"{path} is a pickle, which can run any code when read: use the .safetensors file instead")
    try:
        return safe_open(path, framework=framework)
    except (SafetensorError, OSError) as error:
        with path.open("rb") as file:
            start = file.read(9)
        kind = next((kind for magic, kind in _OTHER_MAGIC.items() if start.startswith(magic)), None)
        # A safetensors header is 8 bytes of length and then JSON; the length can look like another format's magic.
        if kind and start[8:] != b"{":
            raise ValueError(f"{path} is {kind}, not safetensors: download or convert it again") from error
        raise ValueError(f"{path} is cut short or damaged ({error}): download it again") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file. Raises: ValueError with the file's name if it holds none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not a JSON object")
    return value


def read_config(folder: Path, component: str) -> dict[str, Any]:
    """Read config.json from the component's folder, else from `folder` itself; {} without one."""
    for path in (folder / component / "config.json", folder / "config.json"):
        if path.is_file():
            return read_json(path)
    return {}


def _clause(what: str, names: Sequence[str]) -> list[str]:
    """Return one clause with the count and the first of `names`; an empty list if there are no names."""
    return [f"{len(names)} {what} ({first_names(names)})"] if names else []


def first_names(names: Sequence[str], limit: int = 3) -> str:
    """Return the first names as text, with the number of the remaining ones."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
