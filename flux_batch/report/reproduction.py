"""The comparison of an image of a run with its reproduction: their difference, and what differs around them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from flux_batch.errors import JobError
from flux_batch.images import Difference, Pixels, decode, difference, encode, read_provenance
from flux_batch.output.paths import PRECISION, REPORT, metadata_file
from flux_batch.records import Kernels
from flux_batch.report.gallery.rows import read_table
from flux_batch.report.saved_run import SavedRun, read_json
from flux_batch.report.summary import installed_versions
from flux_batch.storage.store import Store

# The name of the model's revision among the surroundings.
_REVISION = "model revision"


@dataclass(frozen=True)
class Original:
    """An image of a run: its metadata row and its encoded bytes."""

    run: SavedRun
    row: Mapping[str, Any]
    data: bytes

    @classmethod
    def find(cls, store: Store, key: str) -> Original:
        """Read an image by its key. Raises: JobError if there is none, StoreError."""
        run = SavedRun.open(store)
        shard = run.folder.shard_of(key.partition("_")[0][:-4])
        if shard is not None and run.commits.find(shard) is None:
            raise JobError(f"{key}: is not there yet: shard {run.name(shard)} is not committed")
        rows, problem = ([], "") if shard is None else read_table(run.commits, metadata_file(run.name(shard)))
        if problem:
            raise JobError(f"{key}: {problem}; `flux-batch verify` looks at the whole run")
        row = next((row for row in rows if row["key"] == key), None)
        if row is None:
            raise JobError(f"{store.uri}: has no image {key!r}; keys are in the column `key` of metadata/")
        if row["status"] != "success":
            raise JobError(f"{key}: has no image, since it failed: {row['error_type']}: {row['error_message']}")
        data = run.image(row)
        if data is None:
            raise JobError(f"{key}: its file is missing or damaged; `flux-batch verify` looks at the whole run")
        return cls(run, row, data)

    def compared(self, pixels: Pixels, now: Mapping[str, Any]) -> Reproduction:
        """Return the comparison with the image made again.

        pixels: the new image, uint8 (h w 3), encoded as in the run, so that images in a lossy format can be equal, too.
        now: the surroundings in which it was made.
        """
        data = encode(pixels, self.run.config.output.image, read_provenance(self.data))
        before = {**surroundings_of_run(self.run.store), "tile_size": self.row.get("tile_size")}
        both = {name: (value, now.get(name)) for name, value in before.items()}
        if None in both.get(_REVISION, ()):
            del both[_REVISION]  # it could not be determined
        return Reproduction(
            key=str(self.row["key"]),
            is_same_file=data == self.data,
            difference=difference(decode(self.data), decode(data)),
            differs={name: pair for name, pair in both.items() if pair[0] != pair[1]},
            data=data,
        )


@dataclass(frozen=True, kw_only=True)
class Reproduction:
    """An image made again.

    is_same_file: whether it has the bytes of the original. difference: of its pixels; None for another size. differs:
    by name, differing surroundings (in the run, here). data: the new image, encoded as in the run.
    """

    key: str
    is_same_file: bool
    difference: Difference | None
    differs: Mapping[str, tuple[Any, Any]]
    data: bytes

    @property
    def is_equal(self) -> bool:
        """True if every pixel is the same."""
        return self.difference is not None and self.difference.max_levels == 0

    def to_json(self) -> dict[str, Any]:
        """Return all but the image as plain values."""
        return {
            "key": self.key,
            "is_equal": self.is_equal,
            "is_same_file": self.is_same_file,
            "difference": self.difference and self.difference._asdict(),
            "differs": {name: list(pair) for name, pair in self.differs.items()},
        }

    @property
    def text(self) -> str:
        """The result as lines for people."""
        equal = "equal, byte for byte" if self.is_same_file else str(self.difference or "is of another size")
        lines = [f"{self.key}: {equal}"]
        if not self.is_equal:
            lines.append("it was made alone; in a batch, as in the run, the last digits can differ")
        lines += [f"{name:<15}{_word(one)} in the run, {_word(now)} here" for name, (one, now) in self.differs.items()]
        return "\n".join(lines)


def surroundings(kernels: Kernels, revision: str | None, tile_size: int | None) -> dict[str, Any]:
    """Return by name what affects the bits of an image made here, besides its settings."""
    return {**installed_versions(), **asdict(kernels), _REVISION: revision, "tile_size": tile_size}


def surroundings_of_run(store: Store) -> dict[str, Any]:
    """Return the same for a run, as far as its files have it."""
    report = read_json(store, REPORT) or {}
    kernels = Kernels.of_record(read_json(store, PRECISION))
    revision = (report.get("model") or {}).get("revision")
    known = {} if revision is None else {_REVISION: revision}
    return {**report.get("versions", {}), **(asdict(kernels) if kernels else {}), **known}


def _word(value: Any) -> str:
    return "none" if value is None else str(value)
