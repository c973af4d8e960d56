"""Reverts while a worker of a driver that has lost the run still finishes its shard."""

from __future__ import annotations

from pathlib import Path

import pytest

from flux_batch.output.paths import REVERTING
from flux_batch.output.revert import revert
from flux_batch.report.saved_run import SavedRun
from flux_batch.report.verify import verify
from flux_batch.storage.store import Store
from helpers.finished_runs import DATA, LAYOUTS, finish, make_run

METADATA, COMMIT = "metadata/00001.parquet", "_run/commits/00001.json"


class LateStore(Store):
    """A store in which another worker writes files again right after the first removal of one."""

    after = ""
    late: dict[str, bytes]

    def delete(self, key: str) -> None:
        super().delete(key)
        if key == self.after:
            self.after = ""
            for name, data in self.late.items():
                self.write(name, data)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("after", [METADATA, "data"])
def test_a_commit_that_comes_while_its_files_are_removed_does_not_stay(tmp_path: Path, layout: str, after: str) -> None:
    config = make_run(tmp_path, layout)
    store = LateStore(config.output.uri)
    data = DATA[layout]
    store.late = {
        key: store.read(key) for key in ([METADATA, COMMIT] if after == METADATA else [data, METADATA, COMMIT])
    }
    store.after = METADATA if after == METADATA else data
    saved = SavedRun.open(store)

    revert(saved.folder, saved.output_format, [1])

    assert saved.commits.done() == {0, 2}
    assert store.children(REVERTING) == {}
    assert not store.exists(METADATA)
    assert not store.exists(data)
    finish(config)
    assert verify(store).problems == []
