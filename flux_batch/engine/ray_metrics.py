"""The figures of a run as Ray metrics, exported to Prometheus as `ray_flux_batch_*`.

Counters restart with each process, so use rate() and increase(); exact totals are in the commits. There are few labels,
since each adds a series per worker: the run, and a stage or an error type.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from ray.util.metrics import Counter, Gauge

from flux_batch.telemetry import CounterKey, Metrics

_PREFIX = "flux_batch_"
_EXPORT_INTERVAL_S = 5.0
# The counters of a worker, each with its description and the name of its label, if it has one.
WORKER_COUNTERS = {
    "images": ("images made", None),
    "failures": ("images that failed", "error_type"),
    "bytes": ("bytes committed, of images and metadata", None),
    "shards": ("shards committed by this worker", None),
    "stage_seconds": ("seconds spent in a stage; stages run in parallel", "stage"),
}
WORKER_GAUGES = {
    "encode_queue": "images waiting to be encoded, or being encoded",
    "stage_queue": "batches waiting to be staged, or being staged",
}
# The gauges of the driver for all workers together.
POOL_GAUGES = {
    "shards_waiting": "shards that no worker has begun",
    "shards_in_hand": "shards that workers are making",
    "workers_up": "workers that have loaded the model",
    "workers_wanted": "workers that run or are requested",
}


@dataclass
class WorkerMetrics:
    """Exports the metrics of a worker."""

    metrics: Metrics
    counters: dict[str, Counter] = field(default_factory=dict)
    gauges: dict[str, Gauge] = field(default_factory=dict)
    exported: dict[CounterKey, float] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        for name, (text, label) in WORKER_COUNTERS.items():
            self.counters[name] = Counter(_PREFIX + name, text, ("run", label) if label else ("run",))
        for name, text in WORKER_GAUGES.items():
            self.gauges[name] = Gauge(_PREFIX + name, text, ("run",))

    def start(self) -> None:
        """Export the metrics every few seconds until the process ends."""
        threading.Thread(target=self._keep_exporting, name="metrics", daemon=True).start()

    def export(self) -> None:
        """Export the present values."""
        with self.lock:
            self._export()

    def _export(self) -> None:
        for key, value in self.metrics.counters().items():
            label = WORKER_COUNTERS[key.name][1]
            tags = {"run": self.metrics.run} | ({label: key.label} if label else {})
            if value > self.exported.get(key, 0.0):
                self.counters[key.name].inc(value - self.exported.get(key, 0.0), tags)
                self.exported[key] = value
        for name, gauge in self.gauges.items():
            gauge.set(self.metrics.gauges().get(name, 0), {"run": self.metrics.run})

    def _keep_exporting(self) -> None:
        pause = threading.Event()
        while True:
            self.export()
            pause.wait(_EXPORT_INTERVAL_S)


class PoolMetrics:
    """Exports the numbers of shards and workers that the driver knows."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._gauges = {name: Gauge(_PREFIX + name, text, ("run",)) for name, text in POOL_GAUGES.items()}

    def export(self, **values: float) -> None:
        """Set gauges, by name."""
        for name, value in values.items():
            self._gauges[name].set(value, {"run": self._run})
