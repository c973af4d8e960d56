"""Uploads that race, are held up or killed, on stores that honour conditions always, never or sometimes.

A driver in these tests sends every put-if-absent in parts; two writers send objects as large as real ones.
"""

from __future__ import annotations

import hashlib
import random
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from chaos.figures import Figures
from chaos.outputs import assert_verified, read_back, store_of
from chaos.test_two_drivers import BATCH, Scene
from flux_batch import cli
from flux_batch.config.schema import JobConfig
from flux_batch.engine.local import LocalEngine
from flux_batch.errors import AlreadyExists
from flux_batch.images import encode
from flux_batch.job import run
from flux_batch.output.commits import Commits, Publisher
from flux_batch.output.formats import format_for
from flux_batch.output.paths import RUN, RunFolder
from flux_batch.records import Commit, ImageRecord
from flux_batch.resume import open_run
from flux_batch.sampling_params import SamplingParams
from flux_batch.storage.store import Store
from helpers.counting_proxy import HABITS, Proxy, counting_proxy
from helpers.fakes import fake_image, make_fake_pipeline
from helpers.job_files import make_job
from helpers.s3 import S3Server
from helpers.waiting import wait_until

MEBIBYTE = 1 << 20


@pytest.fixture
def proxy(request: pytest.FixtureRequest, moto: S3Server) -> Iterator[Proxy]:
    with counting_proxy(moto.endpoint_url) as proxy:
        proxy.ignores_conditions_of = HABITS[request.param]
        yield proxy


class Upload:
    """The upload of a tar, held up in the middle by the proxy until `let_go`."""

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
    driver.process.kill()
    driver.process.wait()
    upload.let_go()
    assert [scene.store.key_of(one).partition("/")[0] for one in scene.store.unfinished_uploads()] == ["train"]
    options = [f"--storage-option={key}={value}" for key, value in scene.config.output.storage_options.items()]
    assert cli.main(["gc", scene.output, *options]) == 0
    assert " removed" in capsys.readouterr().out
    assert list(scene.store.unfinished_uploads()) == []
    code, said = scene.start("in-parts").end()
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
    paused = scene.start("in-parts")
    upload.wait_for()
    paused.send(signal.SIGSTOP)
    upload.let_go()
    code, said = scene.start("in-parts").end()
    assert code == 0, said
    after = scene.everything()
    paused.send(signal.SIGCONT)
    code, said = paused.end()
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
    options = moto.storage_options | {"endpoint_url": proxy.endpoint_url}
    store = Store(f"{moto.make_bucket()}/run", options)
    files = [large_file(tmp_path / str(number), size, number) for number in range(2)]
    store.put_if_absent("late", files[0])
    for file in files:  # the same bytes, and others
        with pytest.raises(AlreadyExists):
            store.put_if_absent("late", file)
    assert store.read_range("late", 0, 1) == b"0"
    (first,) = race(store, "race", files)
    assert store.read_range("race", 0, 1) == b"%d" % first
    assert len(race(store, "same", [files[0], files[0]])) == 1
    assert (store.list(RUN), list(store.unfinished_uploads())) == ([], [])
    for key in store.list(""):
        store.delete(key)
    habit = request.node.callspec.params["proxy"]
    figures.add(experiment="two writers of one object", store=f"conditions honoured {habit}", faults=4)


@pytest.mark.long
@pytest.mark.s3
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("size", [5, 99, 101, 300])
@pytest.mark.parametrize("proxy", HABITS, indirect=True)
def test_of_two_workers_that_publish_at_once_the_commit_names_what_stands(
    moto: S3Server, proxy: Proxy, tmp_path: Path, size: int, figures: Figures, request: pytest.FixtureRequest
) -> None:
    options = moto.storage_options | {"endpoint_url": proxy.endpoint_url}
    output = {"uri": f"{moto.make_bucket()}/run", "storage_options": options}
    config = make_job(tmp_path, [{"id": "a", "prompt": "a"}], output=output)
    store = store_of(config)
    open_run(config, store)
    publishers = [Publishing(config, tmp_path / str(number), size, number) for number in range(2)]
    with ThreadPoolExecutor() as pool:
        commits = list(pool.map(Publishing.publish, publishers))
    assert commits[0].files == commits[1].files
    run(config, engine=LocalEngine(), make_pipeline=make_fake_pipeline)
    found = read_back(config, Counter(["a"]), tmp_path / "scratch")
    habit = request.node.callspec.params["proxy"]
    figures.add(
        experiment="two writers at once",
        store=f"conditions honoured {habit}",
        images=1,
        faults=1,
        lost=found.lost,
        doubled=found.doubled,
    )
    assert (found.lost, found.doubled, found.failed) == (0, 0, {})
    assert list(store.unfinished_uploads()) == []
    assert_verified(config)


class Publishing:
    """A worker that has made the only image of a shard, `size` MiB large and different for each `number`."""

    def __init__(self, config: JobConfig, scratch: Path, size: int, number: int) -> None:
        self._scratch = scratch
        self._image = scratch / "000000000"
        scratch.mkdir()
        data = encode(fake_image("a", seed=number, width=16, height=16), config.output.image, {})
        large_file(self._image, size, number, data)  # readers ignore bytes after the end of a PNG
        layout = format_for(config.output, pa.schema([]))
        self._record = ImageRecord(
            key=self._image.name,
            id="a",
            image_index=0,
            prompt="a",
            seed=number,
            sampling=SamplingParams(width=16, height=16),
            model=config.model.uri,
            status="success",
            file_name=layout.file_name("00000", self._image.name),
            sha256=hashlib.sha256(self._image.read_bytes()).hexdigest(),
            bytes=self._image.stat().st_size,
        )
        self._publisher = Publisher(Commits(RunFolder(store_of(config), 1)), layout, pa.schema([]), f"host:{number}")

    def publish(self) -> Commit:
        return self._publisher.publish(0, [self._record], {self._record.key: self._image}, self._scratch)


def large_file(path: Path, size: int, number: int, head: bytes = b"") -> Path:
    """Write a file of `head` and `size` MiB, which differs for each `number` from the first byte of a block."""
    block = b"%d" % number + random.Random(number).randbytes(MEBIBYTE - 1)
    with path.open("wb") as file:
        file.write(head)
        for _ in range(size):
            file.write(block)
    return path


def race(store: Store, key: str, files: list[Path]) -> list[int]:
    """Put all files at once under one key. Returns: the numbers of the files that were written."""
    start, won = threading.Barrier(len(files)), list[int]()

    def put(number: int) -> None:
        start.wait()
        try:
            store.put_if_absent(key, files[number])
        except AlreadyExists:
            return
        won.append(number)

    threads = [threading.Thread(target=put, args=[number]) for number in range(len(files))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return won
