"""What is wrong with one committed shard: everything that its commit, its metadata and its images say of each other.

Reads all of it again and changes nothing. An outage of the storage is no finding: it is raised.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from flux_batch.errors import NotFound, one_line
from flux_batch.images import check_image
from flux_batch.output.commits import parse_commit
from flux_batch.output.formats import DECODE_ERRORS
from flux_batch.output.metadata import pack_failures, unpack_metadata
from flux_batch.output.paths import TRAIN, failed_file, image_key, metadata_file
from flux_batch.records import Commit, StoredFile
from flux_batch.report.saved_run import SavedRun

# Files of a shard that are fetched at once; all formats but one have two.
FETCHERS = 8

# The checks, in the order in which they are made.
Check = Literal["commit", "files", "rows", "images", "failed rows", "leftovers"]


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is wrong; `shard` is None if it is not about one."""

    check: Check
    text: str
    shard: int | None = None


@dataclass(slots=True)
class ShardFindings:
    """What was read of a shard, and what is wrong with it."""

    shard: int
    num_files: int = 0
    num_rows: int = 0
    num_images: int = 0
    num_failed: int = 0
    num_bytes: int = 0
    problems: list[Problem] = field(default_factory=list)


class ShardCheck:
    """One look at one shard; `sizes` has those of the objects directly in `train`, `quick` reads no image."""

    def __init__(self, run: SavedRun, shard: int, scratch: Path, sizes: Mapping[str, int | None], quick: bool) -> None:
        self._run = run
        self._name = run.name(shard)
        self._scratch = scratch
        self._sizes = sizes
        self._quick = quick
        self.found = ShardFindings(shard)

    def __call__(self) -> ShardFindings | None:
        """Check it. Returns: None if the shard is not committed (any more). Raises: StoreError."""
        try:
            data = self._run.store.read(self._run.commits.key(self.found.shard))
        except NotFound:
            return None
        try:
            commit = parse_commit(data)
        except ValueError as error:
            self._add("commit", str(error))
            return self.found
        if commit.shard != self.found.shard:
            self._add("commit", f"is that of shard {commit.shard}")
            return self.found
        self._check_contents(commit)
        return self.found

    def _check_contents(self, commit: Commit) -> None:
        files = {file.path: file for file in commit.files}
        self.found.num_files = len(files)
        self.found.num_bytes = sum(file.bytes for file in files.values())
        local = self._check_files(files)
        metadata = local.get(metadata_file(self._name))
        rows = None if metadata is None else self._rows(metadata.read_bytes())
        if rows is None or metadata is None:
            return
        self._check_rows(rows, commit)
        if any(problem.check == "rows" for problem in self.found.problems):
            return  # what follows would only say it again
        self._check_named(rows, files)
        self._check_failed(rows, metadata.read_bytes())
        if not self._quick and not any(problem.check == "files" for problem in self.found.problems):
            self._check_images(rows, local)

    def _check_files(self, files: Mapping[str, StoredFile]) -> dict[str, Path]:
        """Compare each file with what the commit says of it. Returns: a local copy of each that is as it should be."""
        wanted = [file for file in files.values() if not self._quick or file.path == metadata_file(self._name)]
        with ThreadPoolExecutor(FETCHERS) as pool:
            fetched = dict(zip((file.path for file in wanted), pool.map(self._fetch, wanted), strict=True))
        if self._quick:
            sizes = self._listed_sizes()
            for file in files.values():
                if file not in wanted:
                    self._check_size(file, sizes.get(file.path))
        return {path: copy for path, copy in fetched.items() if copy is not None}

    def _fetch(self, file: StoredFile) -> Path | None:
        try:
            copy = self._run.store.local_file(file.path, self._scratch)
        except NotFound:
            self._add("files", f"{file.path}: is gone")
            return None
        if not self._check_size(file, copy.stat().st_size):
            return None
        with copy.open("rb") as data:
            digest = hashlib.file_digest(data, "sha256").hexdigest()
        if digest != file.sha256:
            self._add("files", f"{file.path}: other bytes than were committed (sha256)")
            return None
        return copy

    def _check_size(self, file: StoredFile, size: int | None) -> bool:
        if size is None:
            self._add("files", f"{file.path}: is gone")
        elif size != file.bytes:
            self._add("files", f"{file.path}: {size} bytes where {file.bytes} were committed")
        return size == file.bytes

    def _listed_sizes(self) -> Mapping[str, int | None]:
        if self._name in self._sizes:  # a folder
            folder = f"{TRAIN}/{self._name}"
            return {f"{folder}/{name}": size for name, size in self._run.store.children(folder).items()}
        return {f"{TRAIN}/{name}": size for name, size in self._sizes.items()}

    def _rows(self, metadata: bytes) -> list[dict[str, Any]] | None:
        try:
            return unpack_metadata(metadata)
        except DECODE_ERRORS as error:
            self._add("rows", f"{metadata_file(self._name)}: cannot be read: {error}")
            return None

    def _check_rows(self, rows: Sequence[Mapping[str, Any]], commit: Commit) -> None:
        """Compare the metadata with the plan and the commit: every row of the shard, every image of it, each once."""
        self.found.num_rows = len(rows)
        self.found.num_failed = sum(row.get("status") == "failed" for row in rows)
        self.found.num_images = len(rows) - self.found.num_failed
        planned = self._run.outline.num_rows[self.found.shard]
        row, index, row_id = -1, 0, None
        for at in rows:
            row, index, row_id = (row + 1, 0, at.get("id")) if at.get("image_index") == 0 else (row, index + 1, row_id)
            key = image_key(self._name, max(row, 0), index)
            if (at.get("key"), at.get("image_index"), at.get("id")) != (key, index, row_id):
                self._add("rows", f"holds {at.get('key')!r} of row {at.get('id')!r} where {key} is due")
                return
            if wrong := self._wrong_of(at):
                self._add("rows", f"{key}: {wrong}")
        if row + 1 != planned:
            self._add("rows", f"{row + 1} prompts where the plan has {planned}")
        if (len(rows), self.found.num_failed) != (commit.num_images, commit.num_failed):
            self._add(
                "rows",
                f"{len(rows)} images, {self.found.num_failed} failed, "
                f"where the commit has {commit.num_images}, {commit.num_failed} failed",
            )

    def _wrong_of(self, row: Mapping[str, Any]) -> str:
        """Say what is wrong within a row of the metadata; empty if nothing is."""
        place = self._run.output_format.file_name(self._name, row["key"])
        if row.get("status") == "success":
            is_whole = row.get("sha256") and row.get("bytes") and row.get("file_name") == place
            return "" if is_whole else f"made, but it is not said that it lies in {place}, with size and sha256"
        if row.get("status") == "failed":
            return "" if row.get("error_type") and not row.get("sha256") else "failed, but there is no reason"
        return f"status {row.get('status')!r}"

    def _check_named(self, rows: Sequence[Mapping[str, Any]], files: Mapping[str, StoredFile]) -> None:
        """Compare the files of the commit with those that the rows need."""
        made = [str(row["key"]) for row in rows if row["status"] == "success"]
        due = {metadata_file(self._name)} | self._run.output_format.files(self._name, made)
        for path in sorted(due - files.keys()):
            self._add("files", f"{path}: is not named by the commit")
        for path in sorted(files.keys() - due):
            self._add("files", f"{path}: is named by the commit, and holds nothing of the metadata")

    def _check_failed(self, rows: Sequence[Mapping[str, Any]], metadata: bytes) -> None:
        """Compare the copy of the failed rows with the metadata."""
        path = failed_file(self._name)
        try:
            copy = self._run.store.read(path)
        except NotFound:
            copy = None
        if copy is None and self.found.num_failed:
            self._add("failed rows", f"{path}: is gone")
        elif copy is not None and not self.found.num_failed:
            self._add("failed rows", f"{path}: nothing failed")
        elif copy is not None and not _says(copy, [row for row in rows if row["status"] == "failed"]):
            self._add("failed rows", f"{path}: does not hold the failed rows of the metadata")

    def _check_images(self, rows: Sequence[Mapping[str, Any]], local: Mapping[str, Path]) -> None:
        """Look at every image: there once, of the recorded bytes, decodable; and at what else lies beside them."""
        output_format = self._run.output_format
        made = {f"{row['key']}.{output_format.suffix}": row for row in rows if row["status"] == "success"}
        due = Counter(output_format.entry_names(str(row["key"]) for row in made.values()))
        data_files = {path: copy for path, copy in local.items() if path != metadata_file(self._name)}
        found: Counter[str] = Counter()
        try:
            for name, data in output_format.entries(self._name, data_files) if made else ():
                found[name] += 1
                if (row := made.get(name)) and (wrong := self._wrong_with(row, data)):
                    self._add("images", f"{name}: {wrong}")
        except DECODE_ERRORS as error:
            self._add("images", f"the data cannot be read: {one_line(error)}")
            return
        for name in sorted((due - found).keys()):
            self._add("images", f"{name}: is missing")
        for name in sorted((found - due).keys()):
            self._add("images", f"{name}: is there {found[name]} times, {due[name]} are due")

    def _wrong_with(self, row: Mapping[str, Any], data: bytes) -> str:
        if (len(data), hashlib.sha256(data).hexdigest()) != (row["bytes"], row["sha256"]):
            return "other bytes than the metadata has (size or sha256)"
        try:
            check_image(data, self._run.config.output.image.type, row["width"], row["height"])
        except ValueError as error:
            return str(error)
        return ""

    def _add(self, check: Check, text: str) -> None:
        self.found.problems.append(Problem(check, text, self.found.shard))


def mended_failures(run: SavedRun, shard: int) -> bytes | None:
    """Make the copy of the failed rows of a shard anew, from its metadata; None if there is none to be."""
    return pack_failures(run.store.read(metadata_file(run.name(shard))))


def _says(copy: bytes, rows: list[Mapping[str, Any]]) -> bool:
    try:
        return repr(unpack_metadata(copy)) == repr(rows)  # a NaN equals none, not even itself
    except DECODE_ERRORS:
        return False
