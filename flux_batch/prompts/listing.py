"""The files of a prompts data set: those that are read, and those that are left out with a reason."""

from __future__ import annotations

import hashlib
import posixpath
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from flux_batch.errors import SourceError, count_of
from flux_batch.prompts.formats.open import INSTEAD, TABLE_FORMATS, format_of_name
from flux_batch.prompts.hub_dataset import HubDataset
from flux_batch.redaction import public_uri
from flux_batch.storage.errors import translated
from flux_batch.storage.filesystem import open_filesystem

# The version of the rules for leaving out files and naming rows. A run uses the version in its plan. Changes since:
#   2  hidden folders are left out, there are more formats, and folders such as `year=2026` are columns;
#   3  the id of the only row of a file is `a.txt` instead of `a.txt:0`, and a text file may contain blocks;
#   4  that id is `a.txt:0` again for every file that `prompts.uri` names itself, however its path is spelled;
#   5  the outputs of runs are left out.
LISTING_RULES = 5
PARTITION_RULES = 2
ONE_PROMPT_RULES = BLOCK_RULES = 3
NAMED_FILE_RULES = 4
_OUTPUT_RULES = 5
_FORMATS_OF_RULES_1 = ("parquet", "jsonl", "csv", "txt")
# Bytes at both ends of a file that are hashed if its store has no checksum, to notice edits.
_SAMPLED_BYTES = 64 * 1024
_READER_THREADS = 16
_FILES_AT_ONCE = 1000
# The file by which the output of a run is recognised.
_PLAN_OF_RUN = "_run/plan.parquet"
# Files in every repository of Hugging Face.
_FILES_OF_HUB = (".gitattributes", "README.md")
# Names, without suffix, of files beside the data that contain no prompts.
_DOCUMENTS = re.compile(
    r"(licen[cs]e|copying|readme|requirements)([-_.].*)?|notice|constraints|changelog|authors|contributors|contributing"
    r"|code_of_conduct|citation|dataset_infos?|dataset_dict|package(-lock)?|manifest|config|model_index|tsconfig",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class PromptFile:
    """One file of the data set; `name` is relative to it, `version` changes with the contents."""

    uri: str
    name: str
    size: int
    version: str


@dataclass(frozen=True, slots=True)
class Listing:
    """The files of a data set in a fixed order; `skipped` are others, by reason."""

    files: tuple[PromptFile, ...]
    skipped: Mapping[str, Sequence[str]]


def list_prompts(
    uris: Sequence[str],
    storage_options: Mapping[str, Any],
    rules: int = LISTING_RULES,
    formats: Collection[str] = TABLE_FORMATS,
) -> Listing:
    """Return the prompt files of files, folders and globs. Raises: SourceError if one is missing or none is found.

    formats: the formats that are read from folders.
    """
    expanded = [_expand(uri, storage_options, rules, formats) for uri in uris]
    found = {path: each.fs for each in expanded for path in each.paths}
    skipped: dict[str, list[str]] = {}
    for each in expanded:
        for path, reason in each.skipped.items():
            if path not in found:
                skipped.setdefault(reason, []).append(posixpath.relpath(path, each.folder or "/"))
    if not found:
        known = ", ".join(f".{suffix}" for suffix in formats)
        raise SourceError(
            f"{', '.join(uris)}: no prompts found; expected files with suffix {known}"
            + "".join(f"; {note}" for note in skipped_notes(skipped))
        )
    base = _common_folder([each.folder for each in expanded])
    paths, files = sorted(found), list[PromptFile]()
    with ThreadPoolExecutor(_READER_THREADS) as pool:
        for first in range(0, len(paths), _FILES_AT_ONCE):
            some = paths[first : first + _FILES_AT_ONCE]
            files += pool.map(lambda path: _describe(found[path], path, base), some)
    return Listing(tuple(files), skipped)


def address_of(uri: str, storage_options: Mapping[str, Any]) -> str:
    """Return the address of the file `uri` as a listing spells it."""
    return uri if HubDataset.of(uri) else _address(*open_filesystem(uri, storage_options))


def skipped_notes(skipped: Mapping[str, Sequence[str]]) -> list[str]:
    """Return a sentence for each reason to leave out files."""
    return [
        f"{count_of(len(names), 'file')} left out, {reason}: {', '.join(sorted(names)[:3])}"
        f"{', ...' if len(names) > 3 else ''}"
        for reason, names in sorted(skipped.items())
    ]


@dataclass(frozen=True, slots=True)
class _Expanded:
    """The files of one entry of `prompts.uri`; names are relative to `folder`."""

    fs: fsspec.AbstractFileSystem
    folder: str
    paths: Sequence[str]
    skipped: Mapping[str, str]


def _expand(uri: str, storage_options: Mapping[str, Any], rules: int, formats: Collection[str]) -> _Expanded:
    """Return the prompt files of a file, folder, glob or Hugging Face data set."""
    if dataset := HubDataset.of(uri):
        return _expand_dataset(uri, dataset, storage_options, rules)
    fs, path = open_filesystem(uri, storage_options)
    reason_for: Callable[[str], str] = partial(_reason, formats=formats) if rules > 1 else _reason_by_rules_1
    with translated(uri, "list prompts"):
        # For a web address, fsspec's isdir would read the whole file and look for links in it.
        if (not uri.startswith(("http://", "https://")) or uri.endswith("/")) and fs.isdir(path):
            return _sifted(fs, path.rstrip("/"), fs.find(path), reason_for, rules)
        if fs.exists(path):
            return _Expanded(fs, posixpath.dirname(public_uri(path)), [path], {})
        if magic := re.search(r"[*?[]", path):
            folder = posixpath.dirname(path[: magic.start()])
            names_hidden = re.search(r"(^|/)[._]", path[len(folder) :]) is not None
            paths = fs.glob(path) if rules == 1 else _with_tables(fs, fs.glob(path, detail=True))
            by_format = partial(_format_reason, formats=formats)
            return _sifted(fs, folder, paths, by_format if names_hidden and rules > 1 else reason_for, rules)
        if uri.startswith("hf://"):  # its `exists` is False after any error, e.g. if the hub does not answer
            with suppress(FileNotFoundError):
                fs.info(path)
    raise SourceError(f"{uri}: no such prompts file or folder")


def _expand_dataset(uri: str, dataset: HubDataset, storage_options: Mapping[str, Any], rules: int) -> _Expanded:
    """Return the prompt files of one split of a data set."""
    fs, folder = open_filesystem(dataset.root, storage_options)
    with translated(uri, "list prompts"):
        try:
            paths = [path for path in fs.find(folder) if posixpath.basename(path) not in _FILES_OF_HUB]
            card = fs.cat_file(f"{folder}/README.md").decode() if fs.exists(f"{folder}/README.md") else ""
        except FileNotFoundError as error:
            raise SourceError(
                f"{uri}: there is no such data set or revision, or it is private and the token (HF_TOKEN, or "
                "prompts.storage_options.token) has no access"
            ) from error
    found = _sifted(fs, folder, paths, _reason, rules)
    names = {path[len(folder) :].lstrip("/"): path for path in found.paths}
    chosen = [names[name] for name in sorted(dataset.choose(list(names), card))]
    others = dict.fromkeys(sorted(set(found.paths) - set(chosen)), "of another split or configuration")
    return _Expanded(fs, folder, chosen, {**found.skipped, **others})


def _with_tables(fs: fsspec.AbstractFileSystem, found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the paths of a glob, with the files in folders named like tables (Spark).

    A folder is left out silently if the glob, such as `**`, also matches something in it.
    """
    paths: list[str] = []
    entered = {posixpath.dirname(path) for path in found}
    for path, info in found.items():
        is_folder = info["type"] == "directory"
        if is_folder and format_of_name(path) in TABLE_FORMATS:
            paths += fs.find(path)
        elif not (is_folder and path.rstrip("/") in entered):
            paths.append(path)
    return paths


def _sifted(
    fs: fsspec.AbstractFileSystem,
    folder: str,
    paths: Sequence[str],
    reason_for: Callable[[str], str],
    rules: int,
) -> _Expanded:
    names = {path: path[len(folder) :].lstrip("/") for path in paths}
    outputs = _of_runs(names.values()) if rules >= _OUTPUT_RULES else ()
    reasons = {
        path: "in the output of a run" if name.startswith(outputs) else reason_for(name) for path, name in names.items()
    }
    kept = [path for path, reason in reasons.items() if not reason]
    return _Expanded(fs, folder, kept, {path: reason for path, reason in reasons.items() if reason})


def _of_runs(names: Iterable[str]) -> tuple[str, ...]:
    """Return the folders that hold the output of a run, such as `out/`.

    Often it is that of this very job, whose captions and metadata would become its prompts. The folder that
    `prompts.uri` names is not among them.
    """
    return tuple(name.removesuffix(_PLAN_OF_RUN) for name in names if name.endswith(f"/{_PLAN_OF_RUN}"))


def _reason(name: str, formats: Collection[str] = TABLE_FORMATS) -> str:
    """Return why a file below a named folder is left out; empty if it holds prompts.

    Hidden files and markers can be anywhere: `.ipynb_checkpoints`, `..data` of a ConfigMap, `_delta_log`, `_temporary`.
    A folder such as `_year=2026` is a partition.
    """
    *folders, last = name.split("/")
    is_marker = [folder.startswith(".") or (folder.startswith("_") and "=" not in folder) for folder in folders]
    if any(is_marker) or last.startswith((".", "_")):
        return "hidden by a name that begins with . or _"
    return _format_reason(name, formats)


def _format_reason(name: str, formats: Collection[str]) -> str:
    name = posixpath.basename(name)
    kind = format_of_name(name)
    if kind in formats:
        is_document = kind in ("txt", "json") and _DOCUMENTS.fullmatch(_stem(name))
        return "named like a document, not like prompts" if is_document else ""
    return f".{kind} is not read: {INSTEAD[kind]}" if kind in INSTEAD else "of a format that is not read"


def _stem(name: str) -> str:
    return name[: name.lower().rindex(f".{format_of_name(name)}")]


def _reason_by_rules_1(name: str) -> str:
    last = posixpath.basename(name)
    is_read = last.rpartition(".")[2].lower() in _FORMATS_OF_RULES_1 and not last.startswith((".", "_"))
    return "" if is_read else "of a format that is not read"


def _common_folder(folders: Sequence[str]) -> str:
    """Return the folder that names are relative to; empty for a mix of disk and bucket."""
    try:
        return posixpath.commonpath(folders)
    except ValueError:
        return ""


def _address(fs: fsspec.AbstractFileSystem, path: str) -> str:
    return path if isinstance(fs, LocalFileSystem) else str(fs.unstrip_protocol(path))


def _describe(fs: fsspec.AbstractFileSystem, path: str, base: str) -> PromptFile:
    uri = _address(fs, path)
    with translated(uri, "read"):
        info = fs.info(path)
        version = str(info.get("ETag") or info.get("etag") or info.get("blob_id") or "").strip('"')
        if info["size"] is None:  # a web server that does not send the length
            data = fs.cat_file(path)
            size, version = len(data), version or hashlib.blake2b(data, digest_size=12).hexdigest()
        else:
            size = int(info["size"])
            version = version or _sample_hash(fs, path, size)
    name = public_uri(path)  # without a signature, which changes every day: ids contain the name
    return PromptFile(uri=uri, name=posixpath.relpath(name, base) if base else name, size=size, version=version)


def _sample_hash(fs: fsspec.AbstractFileSystem, path: str, size: int) -> str:
    digest = hashlib.blake2b(digest_size=12)
    digest.update(fs.cat_file(path, start=0, end=min(size, _SAMPLED_BYTES)))
    if size > _SAMPLED_BYTES:
        digest.update(fs.cat_file(path, start=max(_SAMPLED_BYTES, size - _SAMPLED_BYTES), end=size))
    return digest.hexdigest()
