"""The input images and LoRAs that a row may name, and how names are resolved.

The job file is trusted, rows are not. A row may name images beside its prompts, images under
`prompts.input_image_root` and, if the job file allows it, images on the public web. It may name LoRAs of the job, in
files and in buckets, but not at other network addresses. This module knows names and opens no file.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from fsspec.implementations.local import LocalFileSystem

from flux_batch.config.schema import LoraConfig, PromptsConfig
from flux_batch.errors import RowError
from flux_batch.prompts.hub_dataset import HubDataset
from flux_batch.prompts.safe_http import check_url
from flux_batch.records import NO_LORA, InputImage, LoraUse
from flux_batch.redaction import public_uri
from flux_batch.storage.filesystem import open_filesystem

WEB = ("http", "https")
_MAX_NAME_LENGTH = 2048
_S3 = ("s3", "s3a", "s3n")
# The stores in which a row may name a LoRA, besides paths: they serve objects only.
_LORA_STORES = (*_S3, "gs", "gcs", "az", "abfs", "abfss", "hf")
_LORA_SUFFIX = ".safetensors"


class ImageAccess:
    """The images that the rows of one prompts file may name.

    folders: a function that returns the folders of the data set. A caller that reads many files can cache them, since
    each look-up costs a request.
    """

    def __init__(self, config: PromptsConfig, file: str, folders: Callable[[], Sequence[str]] | None = None) -> None:
        self._config = config
        self._file = file
        self._folders = folders or partial(folders_of, config)
        self._scheme = scheme_of(file)
        root = local_name(config.input_image_root or "")
        self._root = os.path.abspath(root) if root and not scheme_of(root) else root

    def find(self, name: str, column: str = "input_image") -> InputImage:
        """Return the image that a row names. Raises: RowError with the reason if it may not name it."""
        if len(name) > _MAX_NAME_LENGTH or "\0" in name:
            raise RowError(f"{column}: holds {len(name)} characters, not a path or an address")
        try:
            return replace(self._find(name), column=column)
        except RowError as error:
            raise RowError(f"{column} {shortened(public_uri(name))}: {error}") from error

    def _find(self, name: str) -> InputImage:
        scheme = scheme_of(name)
        if scheme == "file" or (not scheme and name.startswith("/")):
            return self._absolute(name)
        return self._remote(name, name) if scheme else self._beside(name)

    def _absolute(self, name: str) -> InputImage:
        path = os.path.normpath(local_name(name))
        if not self._root or not os.path.isabs(path) or not is_inside(path, self._root):
            raise RowError(
                "a row may name an absolute path only under prompts.input_image_root, which is "
                + (self._root or "not set")
            )
        return InputImage(name=name, uri=path, allowed_roots=(self._root,))

    def _beside(self, name: str) -> InputImage:
        """Resolve a path relative to the prompts file; it may not leave the data set's folder."""
        file, folder = self._file_and_folder
        path = _joined(file, name)
        allowed = [folder, self._root] if self._root else [folder]
        if not any(is_inside(path, folder) for folder in allowed):
            raise RowError(f"leads out of {' and '.join(allowed)}")
        if self._scheme:
            return self._remote(name, path)
        return InputImage(
            name=name, uri=path, allowed_roots=tuple(folder for folder in allowed if not scheme_of(folder))
        )

    def _remote(self, name: str, uri: str) -> InputImage:
        scheme = scheme_of(uri)
        if scheme in WEB:
            if not self._config.allow_http:
                raise RowError("rows may name addresses on the web only if prompts.allow_http is true")
            check_url(uri)
            return InputImage(name=public_uri(name), uri=uri)
        elif "::" in uri or ".." in uri.split("/"):
            raise RowError("not a plain address")
        elif not self._is_of_data(scheme) and not (self._root and is_inside(uri, self._root)):
            raise RowError(
                f"a row may name {scheme}:// only if its prompts, or prompts.input_image_root, lie in such a store"
            )
        return InputImage(name=name, uri=uri)

    def _is_of_data(self, scheme: str) -> bool:
        """Return whether the data set and its storage options are for this kind of store."""
        return bool(self._scheme) and (scheme == self._scheme or {scheme, self._scheme} <= set(_S3))

    @cached_property
    def _file_and_folder(self) -> tuple[str, str]:
        """The prompts file and its folder in the job file's `prompts.uri`, both as full addresses."""
        fs, file = open_filesystem(self._file, self._config.storage_options)
        own = [folder for folder in self._folders() if is_inside(file, folder)]
        folder = min(own, key=len, default=posixpath.dirname(file))
        if isinstance(fs, LocalFileSystem):
            return file, folder
        return str(fs.unstrip_protocol(file)), str(fs.unstrip_protocol(folder))


def scheme_of(uri: str) -> str:
    """Return the protocol of an address in lower case; empty for a path."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", uri)
    return match[1].lower() if match else ""


def local_name(uri: str) -> str:
    """Return the path of a file:// address, other names unchanged. Raises: RowError for a file of another host."""
    if scheme_of(uri) != "file":
        return uri
    parts = urlsplit(uri)
    if parts.netloc not in ("", "localhost"):
        raise RowError("a file:// address must name a file of this machine, e.g. file:///folder/image.png")
    return url2pathname(parts.path)


def is_inside(path: str, folder: str) -> bool:
    """Return whether a path lies under a folder, judged by the names only."""
    return path.startswith(folder.rstrip("/") + "/")


def shortened(name: str) -> str:
    """Return a name cut to a length for messages."""
    return name if len(name) <= 200 else f"{name[:200]}..."


def folders_of(config: PromptsConfig) -> list[str]:
    """Return the folders of the entries of `prompts.uri`."""
    return list(filter(None, (_folder_of(uri, config) for uri in config.uri)))


def _folder_of(uri: str, config: PromptsConfig) -> str:
    """Return the folder that an entry of `prompts.uri` is or globs in; empty for a file."""
    dataset = HubDataset.of(uri)
    fs, path = open_filesystem(dataset.root if dataset else uri, config.storage_options)
    path = str(path).rstrip("/")
    if fs.isdir(path):
        return path
    magic = re.search(r"[*?[]", path)
    return posixpath.dirname(path[: magic.start()]) if magic and not fs.exists(path) else ""


def _joined(file: str, name: str) -> str:
    """Resolve a relative path against the folder of a file; `..` is resolved too."""
    scheme = scheme_of(file)
    prefix = f"{scheme}://" if scheme else ""
    return prefix + posixpath.normpath(posixpath.join(posixpath.dirname(file[len(prefix) :]), name))


class RowLoras:
    """The LoRAs that the rows of one prompts file may use; `defaults` are those of the job."""

    def __init__(self, loras: Sequence[LoraConfig], file: str) -> None:
        self.defaults = tuple(LoraUse(name=lora.name, uri=lora.uri, scale=lora.scale) for lora in loras)
        self._by_name = {lora.uri: lora for lora in self.defaults} | {lora.name: lora for lora in self.defaults}
        self._file = file

    def choose(self, name: Any, scale: float | None) -> tuple[LoraUse, ...]:
        """Return the LoRAs of a row from its columns `lora` and `lora_scale`; None is an empty cell.

        Raises: RowError with what a row may name.
        """
        if name is None:
            return self.defaults if scale is None else (_scaled(self._only_default(scale), scale),)
        if not isinstance(name, str):
            raise RowError(f"column 'lora' holds {type(name).__name__}: must be a name or an address")
        if name.strip() in NO_LORA:
            return ()
        return (_scaled(self._by_name.get(name) or self._addressed(name), scale),)

    def _only_default(self, scale: float) -> LoraUse:
        if len(self.defaults) != 1:
            count = len(self.defaults) or "no"
            raise RowError(
                f"lora_scale = {scale}: the job has {count} LoRAs, so the row must name one in column 'lora'"
            )
        return self.defaults[0]

    def _addressed(self, name: str) -> LoraUse:
        """Return a LoRA that is not in the job file, from its path or address."""
        if len(name) > _MAX_NAME_LENGTH or "\0" in name:
            raise RowError(f"column 'lora' holds {len(name)} characters, not a path or an address")
        if not name.endswith(_LORA_SUFFIX) and scheme_of(name) != "hf":
            known = ", ".join(lora.name for lora in self.defaults) or "none"
            raise RowError(
                f"lora {shortened(name)}: neither a LoRA of the job (which has {known}) nor a {_LORA_SUFFIX} file"
            )
        is_relative = not scheme_of(name) and not posixpath.isabs(name)
        uri = posixpath.join(posixpath.dirname(self._file), name) if is_relative else name
        scheme = scheme_of(uri)
        is_plain = "::" not in uri and ("://" not in uri or bool(scheme)) and not (scheme and ".." in uri.split("/"))
        if not is_plain or scheme not in ("", "file", *_LORA_STORES):
            raise RowError(f"lora {shortened(name)}: only model.loras of the job may name such an address")
        return LoraUse(name=name, uri=uri, scale=1.0)


def _scaled(lora: LoraUse, scale: float | None) -> LoraUse:
    """Return a LoRA with another scale; None keeps its own."""
    return lora if scale is None else LoraUse(name=lora.name, uri=lora.uri, scale=scale)
