"""Data sets of Hugging Face: the files of a split of a configuration, by the card or by file names.

The rules are those of huggingface/datasets for data sets without a script (data_files.py, utils/metadata.py). This
module knows addresses and file names, and reads nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

from fsspec.utils import glob_translate

from flux_batch.config.text import load_yaml
from flux_batch.errors import JobError, SourceError, did_you_mean

_ADDRESS = re.compile(r"hf://datasets/[^/?@]+/[^/?@]+(@(?:refs/(?:convert|pr)/[^/?]+|[^/?]+))?/?(?:\?(?P<query>.*))?")
# Addresses of repositories of any type.
_OF_HUB = re.compile(
    r"hf://(?:(?:datasets|spaces|buckets)/)?(?!(?:datasets|spaces|buckets)/)[\w.-]+/[\w.-]+(?:[@/?].*)?"
)
# The branch with a data set converted to Parquet, CONFIGURATION/SPLIT/0000.parquet, and DuckDB's short name for it.
_CONVERTED, _CONVERTED_SHORT = "@refs/convert/parquet", "@~parquet"
# Words that name a split, between characters that are neither letters nor digits.
_SPLITS = {
    "train": re.compile(r"(?:^|[^A-Za-z0-9])(?:train|training)(?:$|[^A-Za-z0-9])"),
    "validation": re.compile(r"(?:^|[^A-Za-z0-9])(?:validation|valid|dev|val)(?:$|[^A-Za-z0-9])"),
    "test": re.compile(r"(?:^|[^A-Za-z0-9])(?:test|testing|eval|evaluation)(?:$|[^A-Za-z0-9])"),
}
_SHARDED = re.compile(r"data/([\w.-]+)-\d{5}-of-\d{5}[^/]*\.[^/]*")
_MAX_SHOWN = 20

_Splits = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class HubDataset:
    """`hf://datasets/owner/name[@revision][?config=NAME&split=NAME]`; `root` is its address without the query."""

    root: str
    config: str
    split: str

    @classmethod
    def of(cls, uri: str) -> HubDataset | None:
        """Return the data set if an address names a whole one; None for other addresses. Raises: SourceError."""
        if uri.startswith("hf://") and not _OF_HUB.fullmatch(uri):
            raise SourceError(
                f"{uri}: must be hf://datasets/owner/name, optionally with ?split=NAME or a path after it"
            )
        found = _ADDRESS.fullmatch(uri)
        if not found:
            return None
        query = dict(parse_qsl(found["query"] or "", keep_blank_values=True))
        for key in query:
            if key not in ("config", "split"):
                hint = did_you_mean(key, ("config", "split")) or "; there are config and split"
                raise SourceError(f"{uri}: {key!r} is not known after the question mark{hint}")
        root = uri.partition("?")[0].rstrip("/").replace(_CONVERTED_SHORT, _CONVERTED)
        return cls(root, query.get("config", ""), query.get("split", ""))

    def choose(self, names: Sequence[str], card: str) -> set[str]:
        """Return the files of the split; `names` are the files that can hold prompts, relative to the root.

        Raises: SourceError that lists the configurations or splits to choose from.
        """
        if not names:
            return set()
        configs, default = self._configs(names, card)
        config = self.config or default or self._only(configs, "configuration", "config")
        if config not in configs:
            raise SourceError(_unknown(self.root, "configuration", config, configs))
        splits = configs[config]
        if not splits:
            raise SourceError(f"{self.root}: the configuration {config} has no file with prompts")
        # A plus in a query is decoded as a space.
        chosen = re.split("[+ ]", self.split or self._only(splits, "split", "split"))
        for split in chosen:
            if split not in splits:
                raise SourceError(_unknown(self.root, "split", split, splits))
        return {name for split in chosen for name in splits[split]}

    def _configs(self, names: Sequence[str], card: str) -> tuple[Mapping[str, _Splits], str]:
        """Return the files by configuration and split, and the default configuration; "" without one."""
        if self.root.endswith(_CONVERTED):
            return _by_folders(names), ""
        configs, default = _by_card(names, card)
        return (configs, default) if configs else ({"default": _by_names(names)}, "default")

    def _only(self, found: Mapping[str, Any], what: str, key: str) -> str:
        """Return the only entry. Raises: SourceError with the address of the first one if there are several."""
        if len(found) == 1:
            return next(iter(found))
        before = f"?config={self.config}&" if key == "split" and self.config else "?"
        example = f"{self.root}{before}{key}={next(iter(found))}"
        raise SourceError(f"{self.root}: has the {what}s {_listed(found)}; choose one, e.g. {example}")


def _by_card(names: Sequence[str], card: str) -> tuple[dict[str, _Splits], str]:
    """Return the files and the default of the key `configs` of a card; nothing without that key."""
    header = re.match(r"\ufeff?---\s*\n(.*?)\n---\s*(?:\n|$)", card, re.DOTALL)
    try:
        tree = load_yaml(header[1], "the card") if header else None
    except JobError:  # the hub accepts YAML that our loader refuses
        return {}, ""
    entries = tree.get("configs") if isinstance(tree, dict) else None
    configs: dict[str, _Splits] = {}
    default = ""
    for entry in entries if isinstance(entries, list) else []:
        if isinstance(entry, dict):
            name = str(entry.get("config_name", "default"))
            configs[name] = _splits_of(entry, names)
            default = name if entry.get("default") is True or name == "default" else default
    return configs, default


def _splits_of(entry: Mapping[str, Any], names: Sequence[str]) -> _Splits:
    """Return the files of each split of one configuration of a card."""
    folder = str(entry.get("data_dir") or "").strip("/")
    inside = [name for name in names if not folder or name.startswith(f"{folder}/")]
    files = entry.get("data_files")
    if files is None:
        return _by_names(inside)
    if isinstance(files, dict):
        files = [{"split": split, "path": path} for split, path in files.items()]
    elif isinstance(files, str):
        files = [files]
    splits: dict[str, list[str]] = {}
    for each in files if isinstance(files, list) else []:
        split, paths = (str(each.get("split")), each.get("path")) if isinstance(each, dict) else ("train", each)
        patterns = [paths] if isinstance(paths, str) else list(paths or [])
        found = _matching(patterns, names if not folder else inside, folder)
        if found:
            splits.setdefault(split, []).extend(found)
    return splits


def _matching(patterns: Iterable[Any], names: Sequence[str], folder: str) -> list[str]:
    """Return the names that match one of the patterns, which are relative to a folder."""
    prefix = f"{folder}/" if folder else ""
    rules = [re.compile(glob_translate(prefix + str(pattern).removeprefix("./"))) for pattern in patterns]
    return [name for name in names if any(rule.match(name) for rule in rules)]


def _by_names(names: Sequence[str]) -> _Splits:
    """Return the files of each split by their names; all belong to `train` if no name has a split."""
    splits: dict[str, list[str]] = {}
    sharded = {name: found[1] for name in names if (found := _SHARDED.fullmatch(name))}
    for name in sharded or names:
        split = sharded.get(name) or next((split for split, word in _SPLITS.items() if word.search(name)), "")
        if split:
            splits.setdefault(split, []).append(name)
    return splits or {"train": names} if names else {}


def _by_folders(names: Sequence[str]) -> dict[str, _Splits]:
    """Return the files of the converted branch; for a large data set it has only the start, `partial-train`."""
    configs: dict[str, dict[str, list[str]]] = {}
    for name in names:
        config, _, rest = name.partition("/")
        split, slash, _ = rest.partition("/")
        if slash:
            configs.setdefault(config, {}).setdefault(split.removeprefix("partial-"), []).append(name)
    return dict(configs)


def _unknown(root: str, what: str, name: str, known: Iterable[str]) -> str:
    return f"{root}: has no {what} {name!r}{did_you_mean(name, known) or f'; there are {_listed(known)}'}"


def _listed(names: Iterable[str]) -> str:
    shown = list(names)
    return ", ".join(shown[:_MAX_SHOWN]) + (", ..." if len(shown) > _MAX_SHOWN else "")
