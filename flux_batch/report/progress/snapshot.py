"""The figures of a run at one moment.

The log, progress.json, report.json and `status` share this object, so that they show the same numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from flux_batch.errors import count_of, number_text, work_text

# The number of failure reasons to list.
_MAX_REASONS = 3
# Images per second below which two decimals are too few.
_SLOW = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class SlowestWorker:
    """The worker with the longest time on its shard: its process, the shard and the seconds."""

    name: str
    shard: int
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """The figures of a run at one moment, over all invocations unless stated otherwise.

    num_images: requested images of committed shards; num_failed of them failed. num_staged: finished images of other
    shards, failed ones included. num_expected: images of the whole run, as far as known. failures: by error type,
    staged images included. images_per_s, elapsed_s, workers_...: of this invocation. device_hours: hours for which
    workers had their GPUs, or for which workers without GPU existed. waiting_for: what the run waits for, "" while it
    works. stopped_by: why the run is ending and how to continue, as a sentence; "" while it goes on.
    """

    num_shards: int
    num_committed: int
    num_images: int
    num_failed: int
    num_staged: int = 0
    num_expected: int | None = None
    failures: Mapping[str, int] = field(default_factory=dict)
    images_per_s: float = 0.0
    eta_s: float | None = None
    elapsed_s: float = 0.0
    device_hours: float = 0.0
    device: str = "GPU"
    workers_up: int = 0
    workers_starting: int = 0
    busy_share: float | None = None
    last_shard: int | None = None
    slowest: SlowestWorker | None = None
    waiting_for: str = ""
    stopped_by: str = ""
    unix_time: float = 0.0

    @property
    def num_done(self) -> int:
        """The finished images, failed ones included, committed or not."""
        return self.num_images + self.num_staged

    @property
    def num_total(self) -> int:
        """The images of the whole run, or the finished ones if that is unknown."""
        return max(self.num_done, self.num_expected or 0)

    def to_json(self) -> dict[str, Any]:
        """Return the figures as plain values, rounded."""
        values = asdict(self)
        for name, digits in (("images_per_s", 4), ("elapsed_s", 1), ("device_hours", 5), ("busy_share", 3)):
            if values[name] is not None:
                values[name] = round(values[name], digits)
        values["eta_s"] = None if self.eta_s is None else round(self.eta_s)
        values["unix_time"] = round(self.unix_time)
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Snapshot:
        """Return the figures that `to_json` wrote, possibly in another version of this program."""
        known = {name: value for name, value in values.items() if name in cls.__dataclass_fields__}
        slowest = known.get("slowest")
        return cls(**{**known, "slowest": SlowestWorker(**slowest) if slowest else None})

    def line(self, price: float | None = None) -> str:
        """Return the figures as a log line. price: of an hour of a device."""
        if self.waiting_for:
            so_far = f", {duration(self.elapsed_s)} so far" if self.elapsed_s >= 1 else ""
            return f"{self.images_text}; waiting for {self.waiting_for}{so_far}"
        shards = f"{self.num_committed} of {count_of(self.num_shards, 'shard')} committed"
        parts = [self.images_text, self.speed_text, shards, self.workers_text]
        return "; ".join([*parts, self.compute_text(price)] if self.device_hours else parts)

    def rows(self, price: float | None = None) -> list[tuple[str, str]]:
        """Return the figures as a table of two columns, without empty ones."""
        last = "" if self.last_shard is None else f", the last: {self.last_shard}"
        slowest = self.slowest
        rows = [
            ("images", self.images_text),
            ("speed", f"{self.speed_text}, {duration(self.elapsed_s)} so far"),
            ("shards", f"{self.num_committed} of {self.num_shards} committed{last}"),
            ("workers", self.workers_text),
            ("compute", self.compute_text(price)),
            ("failed", self.failures_text),
            ("slowest", slowest and f"{slowest.name}: shard {slowest.shard} for {duration(slowest.seconds)}"),
            ("waiting", self.waiting_for and f"for {self.waiting_for}"),
        ]
        return [(name, text) for name, text in rows if text]

    @property
    def images_text(self) -> str:
        """The finished images and all images, as text."""
        num_failed = max(self.num_failed, sum(self.failures.values()))
        return f"{self.num_done} of {self.num_total} images" + (f" ({num_failed} failed)" if num_failed else "")

    @property
    def speed_text(self) -> str:
        """The speed of this invocation and the time left, as text."""
        left = f", {duration(self.eta_s)} left" if self.eta_s and self.images_per_s else ""
        speed = f"{self.images_per_s:.2f}" if self.images_per_s >= _SLOW else number_text(self.images_per_s)
        return f"{speed} images/s{left}"

    @property
    def workers_text(self) -> str:
        """The workers and how busy they are, as text."""
        starting = f", {self.workers_starting} starting" if self.workers_starting else ""
        busy = f", {100 * self.busy_share:.0f} % busy" if self.busy_share is not None else ""
        return f"{count_of(self.workers_up, 'worker')} up{starting}{busy}"

    def compute_text(self, price: float | None = None) -> str:
        """Return the hours of devices, and their cost, as text."""
        cost = f", {self.device_hours * price:.2f} at {price:g} an hour" if price else ""
        return f"{work_text(self.device_hours, self.device)}{cost}"

    @property
    def failures_text(self) -> str:
        """The failures by reason as text, the most frequent first."""
        return ", ".join(f"{number} {kind}" for kind, number in Counter(self.failures).most_common(_MAX_REASONS))


def duration(seconds: float) -> str:
    """Return a time span in its two largest units.

    >>> duration(59.6), duration(5025)
    ('1 min 0 s', '1 h 23 min')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    units = [(days, "d"), (hours, "h"), (minutes, "min"), (rest, "s")]
    while len(units) > 1 and not units[0][0]:
        units.pop(0)
    return " ".join(f"{value} {unit}" for value, unit in units[:2])
