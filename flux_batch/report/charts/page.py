"""The report page of a run: one HTML file with plots as SVG, without scripts and without external resources."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flux_batch.errors import bytes_text
from flux_batch.output.paths import REPORT_PAGE
from flux_batch.report.charts.drawing import WIDTH, bars, histogram, lanes, throughput
from flux_batch.report.charts.figures import Figures, read_figures
from flux_batch.report.gallery.chunks import write_file
from flux_batch.report.gallery.page import plain
from flux_batch.report.progress.snapshot import duration
from flux_batch.report.template import load_template
from flux_batch.storage.store import Store


def write_report_page(store: Store) -> str:
    """Write the page into the output of a run. Returns: its address.

    Raises: JobError if there is no run, StoreError.
    """
    write_file(store, REPORT_PAGE, _render(read_figures(store)).encode())
    return store.url(REPORT_PAGE)


def _render(figures: Figures) -> str:
    timed = [each for each in figures.shards if each.started]
    again = [each for each in figures.shards if each.attempt > 1]
    return load_template("charts", "page.html", plain=plain).render(
        figures=figures,
        facts=_facts(figures),
        timed=timed,
        throughput=throughput(timed) if timed else None,
        lanes=lanes(timed) if timed else [],
        num_workers=len({each.worker for each in timed}),
        stages=bars(figures.stage_s, " s"),
        failures=bars(figures.failures),
        again=again,
        num_lost=sum(each.num_lost for each in figures.shards),
        sizes=bars(figures.sizes),
        steps=bars(figures.steps),
        measures={name: histogram(values) for name, values in sorted(figures.measures.items()) if len(set(values)) > 1},
        width=WIDTH,
    )


def _facts(figures: Figures) -> list[tuple[str, Any]]:
    """Return the facts above the plots: names and values."""
    times = [each for each in figures.shards if each.started]
    took_s = max(each.finished for each in times) - min(each.started for each in times) if times else 0.0
    num_failed = sum(each.num_failed for each in figures.shards)
    facts: list[tuple[str, Any]] = [
        ("images", f"{figures.num_images:,}"),
        ("failed", f"{num_failed:,}"),
        ("shards", f"{len(figures.shards):,} of {figures.num_shards:,} committed"),
        ("state", "complete" if figures.is_complete else "not complete"),
        ("data", bytes_text(figures.num_bytes)),
        ("from first to last shard", duration(took_s) if times else ""),
        ("pipelines at work", duration(figures.device_s)),
        ("GPU time", duration(figures.device_s * gpus) if (gpus := figures.report.get("num_gpus")) else ""),
        ("model", _model(figures.report.get("model", {}))),
        ("versions", ", ".join(f"{name} {value}" for name, value in figures.report.get("versions", {}).items())),
    ]
    return [(name, value) for name, value in facts if value]


def _model(settings: Mapping[str, Any]) -> str:
    """Return the address of the model, and its settings that are not defaults."""
    said = {name: value for name, value in settings.items() if value and value not in ("auto", "none")}
    return ", ".join([str(said.pop("uri", "")), *(f"{name} {value}" for name, value in said.items())])
