"""The report page of a run."""

import re
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from flux_batch.engine.local import LocalEngine
from flux_batch.errors import JobError
from flux_batch.job import run
from flux_batch.output.gc import find_leftovers
from flux_batch.output.metadata import parquet_bytes
from flux_batch.records import Commit
from flux_batch.report.charts.drawing import WIDTH, bars, histogram, lanes, throughput
from flux_batch.report.charts.figures import Figures, ShardTime, read_figures
from flux_batch.report.charts.page import write_report_page
from flux_batch.report.saved_run import SavedRun
from flux_batch.storage.store import Store
from helpers.browser import browser, opened, violations
from helpers.fakes import make_fake_pipeline
from helpers.job_files import make_job


def shard(
    number: int, worker: str, started: float, finished: float, num_images: int = 10, attempt: int = 1
) -> ShardTime:
    return ShardTime(number, worker, num_images, 0, started, finished, attempt, attempt - 1)


def test_a_clock_that_is_set_back_costs_no_image() -> None:
    commits = [
        Commit(shard=0, worker="w", num_images=6, num_failed=0, files=(), started_unix_time=0, finished_unix_time=60),
        Commit(shard=1, worker="w", num_images=6, num_failed=0, files=(), started_unix_time=30, finished_unix_time=20),
    ]
    figures = Figures(name="r", num_shards=2, is_complete=True, report={})
    for commit in commits:
        figures.add(commit)

    (lane,) = lanes(figures.shards)
    assert [box.words for box in lane.boxes] == ["shard 0, 6 images, 1 min 0 s", "shard 1, 6 images, 0 s"]
    assert throughput(figures.shards).top == "6.1 images/s"  # all of the shard's images were made in one second


def test_a_run_has_its_figures_and_its_page(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{n}", "price": n / 4, "width": [16, 32][n % 2]} for n in range(10)]
    rows[4]["prompt"] = "[raise] <script>alert(1)</script>"
    config = make_job(tmp_path, rows, prompts={"passthrough": ["price"]}, failures={"max_ratio": 1.0})
    run(config, engine=LocalEngine(), make_pipeline=make_fake_pipeline)
    store = Store(config.output.uri)
    scores = [0.1, float("inf"), 0.3, float("nan")]
    said = pa.table({"key": [f"00000{n:04d}" for n in range(4)], "score": scores})
    store.write("annotations/judge/00000.parquet", parquet_bytes(said))

    figures = read_figures(store)
    assert (figures.num_images, figures.num_rows_read, len(figures.shards)) == (9, 9, 3)
    assert figures.sizes == {"16 x 16": 4, "32 x 16": 5}
    assert figures.failures == {"RuntimeError": 1}
    assert figures.measures["judge.score"] == [0.1, 0.3]
    assert figures.stage_s.keys() >= {"read", "make", "encode", "stage", "publish"}
    assert all(each.started <= each.finished for each in figures.shards)

    assert write_report_page(store) == f"{tmp_path}/out/_run/report.html"
    page = (tmp_path / "out/_run/report.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert {"price", "judge.score", "bytes"} <= set(re.findall(r"<h3><bdi>([^<]+)</bdi>", page))
    assert "Shards that took more than one attempt: 0 of 3." in " ".join(page.split())
    assert list(find_leftovers(SavedRun.open(store).folder)) == []


def test_no_run_has_no_page_and_an_old_one_has_no_times(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="there is no run here"):
        write_report_page(Store(str(tmp_path / "out")))
    config = make_job(tmp_path)
    run(config, engine=LocalEngine(), make_pipeline=make_fake_pipeline)
    for path in (tmp_path / "out/_run/commits").iterdir():
        path.write_text(re.sub(r',\s*"device_s".*\}', "}", path.read_text(), flags=re.DOTALL))
    (tmp_path / "out/_run/report.json").unlink()
    write_report_page(Store(str(tmp_path / "out")))
    assert "No commit of this run has its times" in (tmp_path / "out/_run/report.html").read_text()


def test_throughput_spreads_the_images_of_a_shard_over_its_time() -> None:
    plot = throughput([shard(0, "a", 1000, 1060, 120), shard(1, "a", 1060, 1120, 60)])
    assert plot.top == "2 images/s"
    assert [round(box.height, 6) for box in plot.boxes] == [1.0] * 30 + [0.5] * 30
    assert (plot.boxes[0].left, plot.boxes[-1].left + plot.boxes[-1].width) == (0, pytest.approx(WIDTH))


def test_lanes_show_who_was_at_work_and_what_was_made_again() -> None:
    shown = lanes([shard(2, "b", 50, 100, attempt=2), shard(0, "a", 0, 50), shard(1, "a", 50, 75)])
    assert [(lane.worker, lane.words) for lane in shown] == [("a", "2 shards, 20 images"), ("b", "1 shard, 10 images")]
    assert [(box.left, box.width, box.is_again) for box in shown[0].boxes] == [(0, 500, False), (500, 250, False)]
    assert [(box.left, box.is_again, "attempt 2" in box.words) for box in shown[1].boxes] == [(500, True, True)]
    # Only one of a thousand shards within a pixel is drawn.
    many = [shard(n, "a", n / 1000, n / 1000 + 1) for n in range(1000)]
    assert len(lanes([*many, shard(1000, "a", 9999, 10000)])[0].boxes) == 2


def test_bars_are_the_largest_and_the_rest() -> None:
    shown = bars({f"kind {n}": n for n in range(1, 31)})
    assert (shown[0].name, shown[0].words, shown[-1].name) == ("kind 30", "30 (6.5 %)", "10 others")
    assert (bars({}), bars({"none": 0.0})) == ([], [])


def test_seconds_have_the_digits_that_they_need() -> None:
    shown = bars({"make": 2345.6, "encode": 12.34, "publish": 0.0456, "wait": 0.0}, " s")
    words = ["2,346 s (99.5 %)", "12.3 s (0.5 %)", "0.046 s (0.0 %)", "0 s (0.0 %)"]
    assert [bar.words for bar in shown] == words


def test_a_run_that_made_nothing_has_no_speed() -> None:
    plot = throughput([replace(shard(0, "a", 0, 10), num_failed=10)])
    assert (plot.top, plot.boxes) == ("0 images/s", [])


@pytest.mark.parametrize(("values", "heights"), [([3.0], [1.0]), ([0.0, 0.0, 1.0], [1.0, 0.5]), ([-1, -1], [1.0])])
def test_a_histogram_counts_every_value(values: list[float], heights: list[float]) -> None:
    plot = histogram(values)
    assert [box.height for box in plot.boxes] == heights
    assert all(0 <= box.left < WIDTH for box in plot.boxes)


@pytest.mark.parametrize(
    ("values", "ends", "last"),
    [
        ([1e9, 1e9 + 1], ("1000000000", "1000000001"), "1000000000.98 to 1000000001: 1"),
        ([0.0, 1e9], ("0", "1e+09"), "9.75e+08 to 1e+09: 1"),
        ([-1e308, 1e308], ("-1e+308", "1e+308"), "9.5e+307 to 1e+308: 1"),
    ],
)
def test_a_histogram_tells_its_ranges_apart(values: list[float], ends: tuple[str, str], last: str) -> None:
    plot = histogram(values)
    assert (plot.start, plot.end, plot.boxes[-1].words) == (*ends, last)


@pytest.mark.browser
def test_everybody_can_read_it(tmp_path: Path) -> None:
    rows = [{"prompt": f"[raise] {n}" if n == 3 else f"p{n}", "price": float(n)} for n in range(8)]
    config = make_job(tmp_path, rows, prompts={"passthrough": ["price"]}, failures={"max_ratio": 1.0})
    run(config, engine=LocalEngine(), make_pipeline=make_fake_pipeline)
    commit = tmp_path / "out/_run/commits/00001.json"
    commit.write_text(commit.read_text().replace('"attempt": 1', '"attempt": 2'))
    write_report_page(Store(config.output.uri))
    with browser() as chromium:
        for look in ({}, {"color_scheme": "dark", "viewport": {"width": 375, "height": 700}}):
            with opened(chromium, tmp_path / "out/_run/report.html", **look, bypass_csp=True) as page:
                assert violations(page) == []
                assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
                assert page.locator(".lanes rect.again").count() == 1
