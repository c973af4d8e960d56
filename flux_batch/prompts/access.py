"""What the name of an image in a row means, and whether a row may name it.

The job file is trusted, rows are not: a row reaches the images beside its prompts, those under
`prompts.input_image_root`, and, where the job file allows it, the public web. Knows names; opens no image.
"""

from __future__ import annotations

import os
import posixpath
import re
from functools import cached_property
from urllib.parse import urlsplit
from urllib.request import url2pathname

from fsspec.implementations.local import LocalFileSystem

from flux_batch.config.schema import PromptsConfig
from flux_batch.errors import RowError
from flux_batch.prompts.safe_http import check_url
from flux_batch.records import InputImage
from flux_batch.redaction import public_uri
from flux_batch.storage.store import open_filesystem

LONGEST = 2048
WEB = ("http", "https")
S3 = ("s3", "s3a", "s3n")


class Places:
    """Where the rows of one prompts file may take images from."""

    def __init__(self, config: PromptsConfig, file: str) -> None:
        self._config = config
        self._file = file
        self._scheme = scheme_of(file)
        root = local_name(config.input_image_root or "")
        self._root = os.path.abspath(root) if root and not scheme_of(root) else root

    def find(self, name: str) -> InputImage:
        """Return the image that a row names. Raises: RowError that says why it may not, and what it may name."""
        if len(name) > LONGEST or "\0" in name:
            raise RowError(f"column 'input_image' holds {len(name)} characters that are no path and no address")
        try:
            scheme = scheme_of(name)
            if scheme == "file" or (not scheme and name.startswith("/")):
                return self._absolute(name)
            if not scheme:
                return self._beside(name)
            return self._remote(name, name)
        except RowError as error:
            raise RowError(f"input_image {shortened(public_uri(name))}: {error}") from error

    def _absolute(self, name: str) -> InputImage:
        path = os.path.normpath(local_name(name))
        if not self._root or not os.path.isabs(path) or not is_inside(path, self._root):
            raise RowError(
                "a row may name an absolute path only under prompts.input_image_root, which is "
                + (self._root or "not set")
            )
        return InputImage(name=name, uri=path, within=(self._root,))

    def _beside(self, name: str) -> InputImage:
        """Find a path relative to the prompts file, which may not leave the data set's folder."""
        file, folder = self._located
        path = _joined(file, name)
        allowed = [folder, self._root] if self._root else [folder]
        if not any(is_inside(path, folder) for folder in allowed):
            raise RowError(f"leads out of {' and '.join(allowed)}")
        if self._scheme:
            return self._remote(name, path)
        return InputImage(name=name, uri=path, within=tuple(folder for folder in allowed if not scheme_of(folder)))

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
        """Whether the data set lies in a store of this kind, for which its storage options are meant."""
        return bool(self._scheme) and (scheme == self._scheme or {scheme, self._scheme} <= set(S3))

    @cached_property
    def _located(self) -> tuple[str, str]:
        """The prompts file, and the folder of the job file's `prompts.uri` that it belongs to, both in full."""
        fs, file = open_filesystem(self._file, self._config.storage_options)
        folders = [_folder_of(uri, self._config) for uri in self._config.uri]
        own = [folder for folder in folders if folder and is_inside(file, folder)]
        folder = min(own, key=len, default=posixpath.dirname(file))
        if isinstance(fs, LocalFileSystem):
            return file, folder
        return str(fs.unstrip_protocol(file)), str(fs.unstrip_protocol(folder))


def scheme_of(uri: str) -> str:
    """Return the protocol of an address in lower case; empty for a path."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", uri)
    return match[1].lower() if match else ""


def local_name(uri: str) -> str:
    """Return the path of a file:// address, anything else as it is. Raises: RowError for one of another machine."""
    if scheme_of(uri) != "file":
        return uri
    parts = urlsplit(uri)
    if parts.netloc not in ("", "localhost"):
        raise RowError("a file:// address names a file of this machine: file:///folder/image.png")
    return url2pathname(parts.path)


def is_inside(path: str, folder: str) -> bool:
    """Whether a path lies under a folder, by its name alone."""
    return path.startswith(folder.rstrip("/") + "/")


def shortened(name: str) -> str:
    """Return a name as a message can hold it."""
    return name if len(name) <= 200 else f"{name[:200]}..."


def _folder_of(uri: str, config: PromptsConfig) -> str:
    """Find the folder that an entry of `prompts.uri` names, itself or by a glob; empty for a file."""
    fs, path = open_filesystem(uri, config.storage_options)
    path = str(path).rstrip("/")
    if fs.isdir(path):
        return path
    magic = re.search(r"[*?[]", path)
    return posixpath.dirname(path[: magic.start()]) if magic and not fs.exists(path) else ""


def _joined(file: str, name: str) -> str:
    """Resolve a relative path against the folder of a file, `..` included."""
    scheme = scheme_of(file)
    prefix = f"{scheme}://" if scheme else ""
    return prefix + posixpath.normpath(posixpath.join(posixpath.dirname(file[len(prefix) :]), name))
