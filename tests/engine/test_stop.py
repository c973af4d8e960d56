import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from flux_batch.engine.local import LocalEngine
from flux_batch.engine.protocol import Worker
from flux_batch.engine.stop import Stop, stopped_by_signals
from flux_batch.errors import Interrupted
from helpers.toil import FOREVER_S, BrokenStart, ToilFactory, make_shards


def test_the_first_reason_stays() -> None:
    stop = Stop()
    assert (stop.is_requested, stop.reason) == (False, "")
    stop.check()
    stop.request("stopped by SIGTERM")
    stop.request("stopped by SIGINT")
    assert (stop.is_requested, stop.reason) == (True, "stopped by SIGTERM")
    with pytest.raises(Interrupted, match="stopped by SIGTERM; run the same command again"):
        stop.check()


def test_a_wait_ends_when_somebody_asks_to_stop() -> None:
    stop = Stop()
    began = time.monotonic()
    stop.sleep(0.05)
    assert time.monotonic() - began >= 0.05
    threading.Timer(0.1, stop.request, ["stopped by hand"]).start()
    with pytest.raises(Interrupted, match="stopped by hand"):
        stop.sleep(FOREVER_S)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_asks_to_stop_and_handlers_are_put_back(number: int, capfd: pytest.CaptureFixture[str]) -> None:
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
    stop = Stop()
    with stopped_by_signals(stop):
        os.kill(os.getpid(), number)
        name = signal.Signals(number).name
        assert stop.reason == f"stopped by {name}"
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)] == before
    assert f"{name}: finishing or putting aside" in capfd.readouterr().err


def test_a_program_reads_an_object_of_a_signal_too(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_LOGGING_CONFIG_ENCODING", "JSON")
    with stopped_by_signals(Stop()):
        os.kill(os.getpid(), signal.SIGTERM)
    assert json.loads(capfd.readouterr().err)["message"].startswith("SIGTERM: finishing or putting aside")


def test_a_signal_is_heard_though_nobody_reads_what_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the terminal is gone, an error in the signal handler must not prevent the stop."""

    def write(handle: int, data: bytes) -> int:
        raise BrokenPipeError(handle)

    stop = Stop()
    with stopped_by_signals(stop):
        monkeypatch.setattr(os, "write", write)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.reason == "stopped by SIGTERM"


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        stop = Stop()
        with stopped_by_signals(stop):
            os.kill(os.getpid(), signal.SIGINT)
        assert not stop.is_requested
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


STUBBORN = """
import time
from flux_batch.engine.stop import Stop, stopped_by_signals
with stopped_by_signals(Stop()):
    print("up", flush=True)
    while True:
        time.sleep(0.1)
"""


def test_a_second_signal_leaves_at_once() -> None:
    with subprocess.Popen([sys.executable, "-c", STUBBORN], stdout=-1, stderr=-1, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        said = process.stderr.readline()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
    assert "a second signal exits at once" in said
    assert process.returncode == 75
    assert "SIGINT after SIGTERM: exiting at once" in err


def test_the_local_engine_stops_between_shards(tmp_path: Path) -> None:
    stop = Stop()
    results = LocalEngine().run(ToilFactory(tmp_path), make_shards(5), stop)
    assert [next(results).shard, next(results).shard] == [0, 1]
    stop.request("enough")
    assert [result.shard for result in results] == [2]  # it was made while the previous shard was finished
    assert not (tmp_path / "3").exists()


def test_the_local_engine_does_not_wait_for_a_worker_that_loads() -> None:
    stop, loaded = Stop(), threading.Event()

    class Slow:
        def open(self) -> Worker:
            stop.request("stopped by SIGTERM")
            loaded.wait()
            raise AssertionError

    assert list(LocalEngine().run(Slow(), make_shards(1), stop)) == []
    loaded.set()


def test_the_local_engine_opens_no_worker_after_a_stop() -> None:
    stop = Stop()
    stop.request("enough")
    assert list(LocalEngine().run(BrokenStart("checkpoint"), make_shards(1), stop)) == []
