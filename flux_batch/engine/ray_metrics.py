"""The figures of a run as Ray's own metrics, which every node exports to Prometheus as `ray_flux_batch_*`.

Counters begin anew with each process: use rate() and increase(). What counts in the end are the commits.
Labels are few, since each adds a series a worker: the run, and the kind of a stage, an error or a result.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from ray.util.metrics import Counter, Gauge

from flux_batch.telemetry import CounterKey, Metrics

PREFIX = "flux_batch_"
INTERVAL_S = 5.0
# What each sum and level of a worker is, and the label that tells its kinds apart.
SUMS = {
    "images": ("images made", None),
    "failures": ("images that failed", "error_type"),
    "bytes": ("bytes committed, of images and metadata", None),
    "shards": ("shards committed by this worker", None),
    "stage_seconds": ("seconds spent in a stage; stages run side by side", "stage"),
}
LEVELS = {
    "encode_queue": "images that wait to be encoded, or are",
    "stage_queue": "batches that wait to be staged, or are",
}
# What the driver knows of all workers.
POOL = {
    "shards_waiting": "shards that no worker has begun",
    "shards_in_hand": "shards that workers have in hand",
    "workers_up": "workers that have loaded the model",
    "workers_wanted": "workers that are up or asked for",
}


@dataclass
class WorkerMetrics:
    """Hands on what a worker's metrics have grown by."""

    metrics: Metrics
    counters: dict[str, Counter] = field(default_factory=dict)
    gauges: dict[str, Gauge] = field(default_factory=dict)
    told: dict[CounterKey, float] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        for name, (text, label) in SUMS.items():
            self.counters[name] = Counter(PREFIX + name, text, ("run", label) if label else ("run",))
        for name, text in LEVELS.items():
            self.gauges[name] = Gauge(PREFIX + name, text, ("run",))

    def start(self) -> None:
        """Tell from now on, at every interval, as long as the process lives."""
        threading.Thread(target=self._keep_telling, name="metrics", daemon=True).start()

    def tell(self) -> None:
        """Tell now."""
        with self.lock:
            self._tell()

    def _tell(self) -> None:
        for key, value in self.metrics.counters().items():
            label = SUMS[key.name][1]
            tags = {"run": self.metrics.run} | ({label: key.label} if label else {})
            if value > self.told.get(key, 0.0):
                self.counters[key.name].inc(value - self.told.get(key, 0.0), tags)
                self.told[key] = value
        for name, gauge in self.gauges.items():
            gauge.set(self.metrics.gauges().get(name, 0), {"run": self.metrics.run})

    def _keep_telling(self) -> None:
        pause = threading.Event()
        while True:
            self.tell()
            pause.wait(INTERVAL_S)


class PoolMetrics:
    """Tells what the driver of a run sees: shards and workers."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._gauges = {name: Gauge(PREFIX + name, text, ("run",)) for name, text in POOL.items()}

    def tell(self, **levels: float) -> None:
        """Set levels, by name."""
        for name, level in levels.items():
            self._gauges[name].set(level, {"run": self._run})
