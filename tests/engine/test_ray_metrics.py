"""The metrics of a run, scraped from a node as by Prometheus, and their use in dashboard and alerts."""

from __future__ import annotations

import json
import re
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from flux_batch.engine.ray_metrics import POOL_GAUGES, WORKER_COUNTERS, WORKER_GAUGES
from flux_batch.job import run
from helpers.driver import Hold
from helpers.fakes import SLOW_S, make_fake_pipeline
from helpers.job_files import make_job
from helpers.raylets import no_dashboard
from helpers.waiting import wait_until, when

pytestmark = pytest.mark.ray

MONITORING = Path(__file__).parents[2] / "cluster/monitoring"
# Ray's own metrics, exported only by nodes with a GPU: ray.io, "System metrics".
GPU_ONLY = {"ray_node_gpus_utilization"}
SAMPLE = re.compile(r"^(\w+)\{(.*)\} (\S+)$", re.MULTILINE)

# Four shards; two workers are held in the last two of them.
ROWS: list[dict[str, Any]] = [{"prompt": f"image {number} [slow]"} for number in range(4)]
ROWS += [{"prompt": "[raise]"}, {"prompt": "[raise] again"}, {"prompt": None}, {"prompt": "image 7"}]
ROWS += [{"prompt": f"image {number} [hold]"} for number in range(8, 16)]
NUM_IMAGES, NUM_RAISED, NUM_BAD_ROWS = 5, 2, 1  # in the first two shards


class Scraped:
    """The last value of every series of a node, by name and our labels; `kept` is a copy of them."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}/metrics"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._scrape)
        self.series: dict[tuple[str, ...], dict[str, float]] = {}
        self.kept: dict[tuple[str, ...], dict[str, float]] = {}
        self._thread.start()

    def total(self, name: str, *labels: str, kept: bool = False) -> float:
        """Return the sum of a series over the processes."""
        return sum((self.kept if kept else self.series).get((name, 'run="nightly"', *labels), {}).values())

    def has_all(self) -> bool:
        """Return whether the series include the first two shards and both workers."""
        return (
            self.total("ray_flux_batch_shards_total") == 2
            and self.total("ray_flux_batch_workers_up") == 2
            and self.total("ray_flux_batch_shards_in_hand") == 2
        )

    def keep(self) -> None:
        """Copy the current values to `kept`."""
        self.kept = {name: dict(values) for name, values in list(self.series.items())}

    def end(self) -> None:
        self._stop.set()
        self._thread.join()

    def _scrape(self) -> None:
        while not self._stop.wait(0.2):
            try:
                text = urllib.request.urlopen(self._url, timeout=5).read().decode()
            except OSError:
                continue  # the node is not up yet
            for name, labels, value in SAMPLE.findall(text):
                if "flux_batch" not in name:
                    continue
                ours = re.findall(r'(?:run|stage|error_type)="[^"]*"', labels)
                worker = re.findall(r'WorkerId="[^"]*"', labels)[0]
                self.series.setdefault((name, *sorted(ours, key=lambda label: label[:3] != "run")), {})[worker] = float(
                    value
                )


@pytest.fixture(scope="module")
def scraped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scraped]:
    """The metrics of a run: `kept` while its last two shards are held, `series` after its end."""
    import ray

    folder = tmp_path_factory.mktemp("run")
    hold = Hold(folder / "hold")
    config = make_job(folder, ROWS, failures={"max_ratio": 0.5}).model_copy(update={"name": "nightly"})
    with pytest.MonkeyPatch.context() as patch:
        for name, value in hold.environment.items():
            patch.setenv(name, value)
        # Without "local", it would join a cluster that another test has started with `ray start`.
        often = {"metrics_report_interval_ms": 300}
        with no_dashboard():
            ray.init(address="local", num_cpus=2, num_gpus=2, include_dashboard=False, _system_config=often)
        exported = Scraped(ray.nodes()[0]["MetricsExportPort"])
        try:
            release = when(exported.has_all, lambda: (exported.keep(), hold.release()))
            assert run(config, make_pipeline=make_fake_pipeline).exit_code == 0
            release.join()
            wait_until(lambda: not any(exported.total(f"ray_flux_batch_{name}") for name in POOL_GAUGES))
            yield exported
        finally:
            exported.end()
            ray.shutdown()


def test_every_figure_is_exported_under_its_name(scraped: Scraped) -> None:
    names = {f"ray_flux_batch_{name}_total" for name in WORKER_COUNTERS}
    names |= {f"ray_flux_batch_{name}" for name in (*WORKER_GAUGES, *POOL_GAUGES)}
    assert {series[0] for series in scraped.series} == names


def test_sums_are_those_of_the_run(scraped: Scraped) -> None:
    # A worker is killed after its last shard, before it exports that shard's counts, so compare the kept values.
    assert scraped.total("ray_flux_batch_images_total", kept=True) == NUM_IMAGES
    assert scraped.total("ray_flux_batch_failures_total", 'error_type="RuntimeError"', kept=True) == NUM_RAISED
    assert scraped.total("ray_flux_batch_failures_total", 'error_type="RowError"', kept=True) == NUM_BAD_ROWS
    stages = {series[2] for series in scraped.kept if series[0] == "ray_flux_batch_stage_seconds_total"}
    assert stages == {f'stage="{name}"' for name in ("read", "input", "make", "wait", "encode", "stage", "publish")}
    assert scraped.total("ray_flux_batch_stage_seconds_total", 'stage="make"', kept=True) >= 4 * SLOW_S


def test_levels_fall_to_nothing_when_the_run_is_over(scraped: Scraped) -> None:
    assert [scraped.total(f"ray_flux_batch_{name}") for name in POOL_GAUGES] == [0] * len(POOL_GAUGES)
    assert [scraped.total(f"ray_flux_batch_{name}", kept=True) for name in WORKER_GAUGES] == [0] * len(WORKER_GAUGES)


def names_in(queries: list[str]) -> set[str]:
    return {name for query in queries for name in re.findall(r"\bray_\w+", query)}


def test_the_dashboard_asks_only_for_what_is_exported(scraped: Scraped) -> None:
    dashboard = json.loads((MONITORING / "dashboard.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    queries.append(dashboard["templating"]["list"][1]["query"]["query"])
    asked = names_in(queries)
    exported = {series[0] for series in scraped.series}
    assert asked - exported == GPU_ONLY
    assert exported - asked == set()  # the dashboard shows all of them
    stages = re.findall(r'stage="\w+"', " ".join(queries))
    assert {("ray_flux_batch_stage_seconds_total", 'run="nightly"', stage) for stage in stages} <= set(scraped.series)


def test_the_alerts_ask_only_for_what_is_exported(scraped: Scraped) -> None:
    groups = yaml.safe_load((MONITORING / "rules.yaml").read_text())["groups"]
    asked = names_in([rule["expr"] for group in groups for rule in group["rules"]])
    assert len(asked) >= 5
    assert asked <= {series[0] for series in scraped.series}
