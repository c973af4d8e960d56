import io
import re
import sys
from dataclasses import replace

import pytest
from rich.console import Console

from flux_batch.report.progress.live import LiveDisplay
from flux_batch.report.progress.snapshot import SlowestWorker, Snapshot
from flux_batch.report.progress.table import can_draw, write_table

NOW = Snapshot(
    num_shards=40,
    num_committed=12,
    num_images=1200,
    num_failed=3,
    num_staged=34,
    num_expected=4000,
    failures={"RowError": 3},
    images_per_s=0.84,
    eta_s=3300,
    elapsed_s=1500,
    device_hours=3.2,
    workers_up=7,
    workers_starting=1,
    busy_share=0.94,
    last_shard=11,
    slowest=SlowestWorker(name="a-node-with-a-long-name:4242", shard=17, seconds=182),
    waiting_for="\x1b[31mnothing",
)


def drawn(width: int, display: LiveDisplay) -> list[str]:
    file = io.StringIO()
    Console(file=file, width=width, force_terminal=False).print(display)
    return file.getvalue().splitlines()


@pytest.mark.parametrize("width", [20, 60, 200])
def test_every_figure_is_there_in_a_window_of_any_width(width: int) -> None:
    display = LiveDisplay("cats: reading", price=2.5)
    assert "cats:" in drawn(width, display)[0]
    display.show(NOW)
    lines = drawn(width, display)
    text = " ".join(" ".join(lines).split())
    assert max(map(len, lines)) <= width
    assert "\x1b" not in text
    if width >= 60:
        for words in ("30.9 %", "1234 of 4000 images (3 failed)", "0.84 images/s, 55 min 0 s left", "3 RowError"):
            assert words in text
        assert "3.2 GPU-hours, 8.00 at 2.5 an hour" in text
        assert "a-node-with-a-long-name:4242: shard 17 for 3 min 2 s" in text


def test_few_images_a_second_and_little_work_are_not_rounded_to_nothing() -> None:
    slow = replace(NOW, images_per_s=0.0042, device_hours=1e-5)
    assert slow.speed_text == "0.0042 images/s, 55 min 0 s left"
    assert slow.compute_text() == "0.036 GPU-seconds"


def test_there_is_a_display_only_where_something_can_draw_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    assert not can_draw(sys.stderr)  # a pipe
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert can_draw(sys.stderr)
    for terminal in ("dumb", "unknown", ""):
        monkeypatch.setenv("TERM", terminal)
        assert not can_draw(sys.stderr)


SECTIONS = [
    [("job", "cats"), ("output", "a-long-address/" * 9)],
    [],
    [("failed", "2: too \x1b[31mred"), ("", "1: a sentence that goes on " * 5), ("REFUSED", "two\nlines")],
]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("terminal", "frame"), [("xterm", "│"), ("dumb", "")])
@pytest.mark.parametrize("width", [60, 200])
def test_a_table_fits_into_its_window(monkeypatch: pytest.MonkeyPatch, terminal: str, frame: str, width: int) -> None:
    monkeypatch.setenv("TERM", terminal)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(width))
    file = Terminal()
    write_table(SECTIONS, file)
    text = re.sub("\x1b\\[[0-9;]*m", "", file.getvalue())  # bold text, which NO_COLOR allows
    assert max(map(len, text.splitlines())) <= min(width, 120 if frame else width)
    assert ("│" in text) == bool(frame)
    assert "too \\x1b[31mred" in text
    words = re.sub(r"[\s│]+", " ", text)
    assert "1: a sentence that goes on 1: a sentence that" in words
    assert "REFUSED two lines" in words


def test_a_table_in_a_pipe_is_lines() -> None:
    file = io.StringIO()
    write_table(SECTIONS, file)
    lines = file.getvalue().splitlines()
    assert lines[:3] == ["job       cats", f"output    {'a-long-address/' * 9}", ""]
    assert lines[-2:] == ["REFUSED   two", "          lines"]
