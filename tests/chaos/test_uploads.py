"""Uploads that are raced, held up or killed, on stores that honour conditions always, never, or of some requests.

A driver in these tests sends all that is put if absent in parts; two writers send objects as large as real ones.
"""

from __future__ import annotations

import signal
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from chaos.figures import Figures
from chaos.test_two_drivers import BATCH, Scene, end_of
from flux_batch import cli
from flux_batch.errors import AlreadyExists
from flux_batch.storage.store import Store
from helpers.counting_proxy import HABITS, Proxy, counting_proxy
from helpers.s3 import S3Server
from helpers.waiting import wait_until

MEBIBYTE = 1 << 20


@pytest.fixture
def proxy(request: pytest.FixtureRequest, moto: S3Server) -> Iterator[Proxy]:
    with counting_proxy(moto.endpoint_url) as proxy:
        proxy.ignores_conditions_of = HABITS[request.param]
        yield proxy


class Upload:
    """The upload of a tar, held up in the middle by the proxy until it is let go."""

    def __init__(self, proxy: Proxy) -> None:
        self._proxy = proxy
        proxy.fault = lambda method, path: "hold" if method == "PUT" and is_part_of_a_tar(path) else None

    def wait_for(self) -> None:
        wait_until(lambda: any(method == "PUT" and is_part_of_a_tar(path) for method, path, _ in self._proxy.requests))

    def let_go(self) -> None:
        self._proxy.fault = lambda method, path: None


def is_part_of_a_tar(path: str) -> bool:
    return "/train/" in path and "partNumber" in path


@pytest.mark.long
@pytest.mark.s3
@pytest.mark.parametrize("proxy", ["never"], indirect=True)
def test_a_driver_killed_in_the_middle_of_an_upload_leaves_what_gc_finds(
    moto: S3Server, proxy: Proxy, tmp_path: Path, figures: Figures, capsys: pytest.CaptureFixture[str]
) -> None:
    scene = Scene("conditions ignored", tmp_path, replace(moto, endpoint_url=proxy.endpoint_url))
    upload = Upload(proxy)
    driver = scene.start("in-parts")
    upload.wait_for()
    driver.kill()
    driver.communicate()
    upload.let_go()
    assert [scene.store.key_of(one).partition("/")[0] for one in scene.store.unfinished_uploads()] == ["train"]
    options = [f"--storage-option={key}={value}" for key, value in scene.config.output.storage_options.items()]
    assert cli.main(["gc", scene.output, *options]) == 0
    assert "objects removed" in capsys.readouterr().out
    assert list(scene.store.unfinished_uploads()) == []
    code, said = end_of(scene.start("in-parts"))
    assert code == 0, said
    scene.judge(figures, "driver killed in the middle of an upload", kills=1, may_redo=2 * BATCH)


@pytest.mark.long
@pytest.mark.s3
@pytest.mark.parametrize("proxy", ["never"], indirect=True)
def test_a_driver_paused_in_the_middle_of_an_upload_changes_nothing_when_it_wakes(
    moto: S3Server, proxy: Proxy, tmp_path: Path, figures: Figures
) -> None:
    scene = Scene("conditions ignored", tmp_path, replace(moto, endpoint_url=proxy.endpoint_url))
    upload = Upload(proxy)
    paused: subprocess.Popen[str] = scene.start("in-parts")
    upload.wait_for()
    paused.send_signal(signal.SIGSTOP)
    upload.let_go()
    code, said = end_of(scene.start("in-parts"))
    assert code == 0, said
    after = scene.everything()
    paused.send_signal(signal.SIGCONT)
    code, said = end_of(paused)
    assert code == 75, said
    assert scene.everything() == after
    assert list(scene.store.unfinished_uploads()) == []
    scene.judge(figures, "driver paused in the middle of an upload", kills=1, may_redo=6 * BATCH)


@pytest.mark.long
@pytest.mark.s3
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("size", [5, 99, 101, 300])
@pytest.mark.parametrize("proxy", HABITS, indirect=True)
def test_of_two_writers_of_one_object_the_first_stands(
    moto: S3Server, proxy: Proxy, tmp_path: Path, size: int, figures: Figures, request: pytest.FixtureRequest
) -> None:
    store = Store(f"{moto.make_bucket()}/run", moto.storage_options | {"endpoint_url": proxy.endpoint_url})
    files = [tmp_path / name for name in ("one", "two")]
    for number, file in enumerate(files):
        with file.open("wb") as out:
            out.truncate(size * MEBIBYTE)
            out.write(b"%d" % number)
    store.put_if_absent("late", files[0])
    for file in files:  # the same bytes, and others
        with pytest.raises(AlreadyExists):
            store.put_if_absent("late", file)
    assert store.read_range("late", 0, 1) == b"0"
    habit = request.node.callspec.params["proxy"]
    if habit != "never":  # else both may look before either has written
        won = race(store, files)
        assert len(won) == 1
        assert store.read_range("race", 0, 1) == b"%d" % won[0]
    assert list(store.unfinished_uploads()) == []
    for key in store.list(""):
        store.delete(key)
    figures.add(experiment="two writers of one object", store=f"conditions honoured {habit}", faults=3)


def race(store: Store, files: list[Path]) -> list[int]:
    """Put all files at once. Returns: the numbers of those that were told that they are the first."""
    start, won = threading.Barrier(len(files)), list[int]()

    def put(number: int) -> None:
        start.wait()
        try:
            store.put_if_absent("race", files[number])
        except AlreadyExists:
            return
        won.append(number)

    threads = [threading.Thread(target=put, args=[number]) for number in range(len(files))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return won
