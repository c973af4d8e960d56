"""The check of a committed shard: commit, metadata and images are compared with each other.

Everything is read again, and nothing is changed. A storage outage is raised, not reported as a problem of the shard.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from flux_batch.errors import NotFound, one_line
from flux_batch.images import check_image
from flux_batch.output.commits import parse_commit
from flux_batch.output.formats import DECODE_ERRORS
from flux_batch.output.metadata import pack_failures, source_digests, unpack_metadata
from flux_batch.output.paths import TRAIN, ShardFiles, failed_file, image_key, metadata_file
from flux_batch.records import Commit, StoredFile
from flux_batch.report.saved_run import SavedRun

# The number of files of a shard to fetch at once; most formats have two.
_FILES_AT_ONCE = 8

# The checks, in the order of their execution.
Check = Literal["commit", "files", "rows", "images", "failed rows", "annotations", "leftovers"]


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem of a run; `shard` is None if it does not concern a single shard."""

    check: Check
    text: str
    shard: int | None = None


@dataclass(slots=True)
class ShardFindings:
    """The counts of a checked shard, and its problems."""

    shard: int
    num_files: int = 0
    num_rows: int = 0
    num_images: int = 0
    num_failed: int = 0
    num_bytes: int = 0
    problems: list[Problem] = field(default_factory=list)


def check_shard(run: SavedRun, shard: int, scratch: Path, listed: ShardFiles | None = None) -> ShardFindings | None:
    """Check a shard; return None if it is not committed. A shard that is made again meanwhile is checked again.

    scratch: a folder for copies of its files. listed: the files in `train`; if given, only their sizes are compared and
    no image is read. Raises: StoreError.
    """
    key = run.commits.key(shard)
    data = run.store.find(key)
    while data is not None:
        check = _ShardCheck(run, shard, scratch, listed)
        check.check_commit(data)
        if not check.findings.problems or (now := run.store.find(key)) == data:
            return check.findings
        data = now
    return None


class _ShardCheck:
    """The state of a check, shared by its steps."""

    def __init__(self, run: SavedRun, shard: int, scratch: Path, listed: ShardFiles | None) -> None:
        self._run = run
        self._name = run.name(shard)
        self._scratch = scratch
        self._listed = listed
        self.findings = ShardFindings(shard)

    def check_commit(self, data: bytes) -> None:
        """Check a commit and, if it can be read, its shard."""
        try:
            commit = parse_commit(data)
        except ValueError as error:
            self._add("commit", str(error))
            return
        if commit.shard != self.findings.shard:
            self._add("commit", f"belongs to shard {commit.shard}")
            return
        self._check_contents(commit)

    def _check_contents(self, commit: Commit) -> None:
        files = {file.path: file for file in commit.files}
        self.findings.num_files = len(files)
        self.findings.num_bytes = sum(file.bytes for file in files.values())
        local = self._check_files(files)
        metadata = local.get(metadata_file(self._name))
        rows = None if metadata is None else self._rows(metadata.read_bytes())
        if rows is None or metadata is None:
            return
        self._check_rows(rows, commit)
        if any(problem.check == "rows" for problem in self.findings.problems):
            return  # the other checks would only repeat this problem
        self._check_named(rows, files)
        self._check_failed(metadata.read_bytes())
        if self._listed is None and not any(problem.check == "files" for problem in self.findings.problems):
            self._check_images(rows, local)

    def _check_files(self, files: Mapping[str, StoredFile]) -> dict[str, Path]:
        """Compare each file with its size and hash in the commit. Returns: local copies of the intact ones."""
        wanted = [file for file in files.values() if self._listed is None or file.path == metadata_file(self._name)]
        with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
            fetched = dict(zip((file.path for file in wanted), pool.map(self._fetch, wanted), strict=True))
        if self._listed is not None:
            size_of = self._size_by_path(self._listed)
            for file in files.values():
                if file not in wanted:
                    self._check_size(file, size_of(file.path))
        return {path: copy for path, copy in fetched.items() if copy is not None}

    def _fetch(self, file: StoredFile) -> Path | None:
        try:
            copy = self._run.store.local_file(file.path, self._scratch)
        except NotFound:
            self._add("files", f"{file.path}: is missing")
            return None
        if not self._check_size(file, copy.stat().st_size):
            return None
        with copy.open("rb") as data:
            digest = hashlib.file_digest(data, "sha256").hexdigest()
        if digest != file.sha256:
            self._add("files", f"{file.path}: the bytes differ from those that were committed (sha256)")
            return None
        return copy

    def _check_size(self, file: StoredFile, size: int | None) -> bool:
        if size is None:
            self._add("files", f"{file.path}: is missing")
        elif size != file.bytes:
            self._add("files", f"{file.path}: has {size} bytes; {file.bytes} were committed")
        return size == file.bytes

    def _size_by_path(self, listed: ShardFiles) -> Callable[[str], int | None]:
        """Return a function that returns the listed size of a path; None if it is missing."""
        if self._name in listed.others:  # a folder of single files
            folder = f"{TRAIN}/{self._name}"
            inside = self._run.store.children(folder)
            return lambda path: inside.get(path.removeprefix(f"{folder}/"))
        return lambda path: listed.size(path.removeprefix(f"{TRAIN}/"))

    def _rows(self, metadata: bytes) -> list[dict[str, Any]] | None:
        try:
            return unpack_metadata(metadata)
        except DECODE_ERRORS as error:
            self._add("rows", f"{metadata_file(self._name)}: cannot be read: {error}")
            return None

    def _check_rows(self, rows: Sequence[Mapping[str, Any]], commit: Commit) -> None:
        """Compare the metadata with the plan and the commit: each image of each row must appear once, in order."""
        self.findings.num_rows = len(rows)
        self.findings.num_failed = sum(row.get("status") == "failed" for row in rows)
        self.findings.num_images = len(rows) - self.findings.num_failed
        planned = self._run.outline.num_rows[self.findings.shard]
        row, index, row_id = -1, 0, None
        for each in rows:
            row, index, row_id = (
                (row + 1, 0, each.get("id")) if each.get("image_index") == 0 else (row, index + 1, row_id)
            )
            key = image_key(self._name, max(row, 0), index)
            if (each.get("key"), each.get("image_index"), each.get("id")) != (key, index, row_id):
                self._add("rows", f"has {each.get('key')!r} of row {each.get('id')!r} in place of {key}")
                return
            if problem := self._row_problem(each):
                self._add("rows", f"{key}: {problem}")
        if row + 1 != planned:
            self._add("rows", f"has {row + 1} prompts; the plan has {planned}")
        if (len(rows), self.findings.num_failed) != (commit.num_images, commit.num_failed):
            self._add(
                "rows",
                f"has {len(rows)} images, {self.findings.num_failed} failed; "
                f"the commit has {commit.num_images}, {commit.num_failed} failed",
            )

    def _row_problem(self, row: Mapping[str, Any]) -> str:
        """Return the problem of a row of the metadata; "" if there is none."""
        file_name = self._run.output_format.file_name(self._name, row["key"])
        if row.get("status") == "success":
            is_whole = row.get("sha256") and row.get("bytes") and row.get("file_name") == file_name
            if not is_whole:
                return f"is a success, but the row lacks file_name {file_name}, bytes or sha256"
            sources = self._run.output_format.sources
            has_sources = not sources or tuple(source_digests(row)) == sources
            return "" if has_sources else "is a success, but the row lacks the hashes of its source images"
        if row.get("status") == "failed":
            return "" if row.get("error_type") and not row.get("sha256") else "failed, but the row has no error_type"
        return f"has status {row.get('status')!r}, which must be success or failed"

    def _check_named(self, rows: Sequence[Mapping[str, Any]], files: Mapping[str, StoredFile]) -> None:
        """Compare the files that the commit names with those that the rows need."""
        keys = [str(row["key"]) for row in rows if row["status"] == "success"]
        due = {metadata_file(self._name)} | self._run.output_format.files(self._name, keys)
        for path in sorted(due - files.keys()):
            self._add("files", f"{path}: is not named by the commit")
        for path in sorted(files.keys() - due):
            self._add("files", f"{path}: is named by the commit, but no row is in it")

    def _check_failed(self, metadata: bytes) -> None:
        """Compare the copy of the failed rows with the metadata."""
        path, failed = failed_file(self._name), pack_failures(metadata)
        try:
            copy = self._run.store.read(path)
        except NotFound:
            copy = None
        if copy is None and failed:
            self._add("failed rows", f"{path}: is missing")
        elif copy is not None and not failed:
            self._add("failed rows", f"{path}: is there, but no row failed")
        elif copy is not None and failed and not _has_same_rows(copy, failed):
            self._add("failed rows", f"{path}: differs from the failed rows of the metadata")

    def _check_images(self, rows: Sequence[Mapping[str, Any]], local: Mapping[str, Path]) -> None:
        """Check that each image exists once, as recorded, and can be decoded; and that nothing else exists."""
        output_format = self._run.output_format
        suffix = output_format.suffix
        made = {f"{row['key']}.{suffix}": row for row in rows if row["status"] == "success"}
        sources = {
            f"{row['key']}.{source}.{suffix}": digest
            for row in made.values()
            for source, digest in source_digests(row).items()
            if source in output_format.sources
        }
        due = Counter(output_format.entry_names(str(row["key"]) for row in made.values()))
        data_files = {path: copy for path, copy in local.items() if path != metadata_file(self._name)}
        found: Counter[str] = Counter()
        try:
            for name, data in output_format.entries(self._name, data_files) if made else ():
                found[name] += 1
                if (row := made.get(name)) and (problem := self._image_problem(row, data)):
                    self._add("images", f"{name}: {problem}")
                if name in sources and sources[name] != hashlib.sha256(data).hexdigest():
                    self._add("images", f"{name}: its bytes differ from the metadata (source_sha256)")
        except DECODE_ERRORS as error:
            self._add("images", f"the data cannot be read: {one_line(error)}")
            return
        for name in sorted((due - found).keys()):
            self._add("images", f"{name}: is missing")
        for name in sorted((found - due).keys()):
            self._add("images", f"{name}: is there {found[name]} times; it should be {due[name]}")

    def _image_problem(self, row: Mapping[str, Any], data: bytes) -> str:
        if (len(data), hashlib.sha256(data).hexdigest()) != (row["bytes"], row["sha256"]):
            return "its bytes differ from the metadata (size or sha256)"
        try:
            check_image(data, self._run.config.output.image.type, row["width"], row["height"])
        except ValueError as error:
            return str(error)
        return ""

    def _add(self, check: Check, text: str) -> None:
        self.findings.problems.append(Problem(check, text, self.findings.shard))


def rebuild_failures(run: SavedRun, shard: int) -> bytes | None:
    """Rebuild `_run/failed/NNNNN.parquet` of a shard from its metadata; None if no row failed."""
    return pack_failures(run.store.read(metadata_file(run.name(shard))))


def _has_same_rows(copy: bytes, failed: bytes) -> bool:
    try:
        return repr(unpack_metadata(copy)) == repr(unpack_metadata(failed))  # a NaN is not equal to itself
    except DECODE_ERRORS:
        return False
