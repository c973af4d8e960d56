"""The run in an output, opened for writing."""

from __future__ import annotations

from pathlib import Path

import pytest

from flux_batch.engine.local import LocalEngine
from flux_batch.job import run
from flux_batch.output.gc import find_leftovers
from flux_batch.output.lease import Lease
from flux_batch.report.saved_run import opened_run
from flux_batch.storage.store import Store
from helpers.fakes import make_fake_pipeline
from helpers.worker_runs import make_job


def test_a_run_that_was_extended_before_the_lease_is_the_longer_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise `gc` would take commits of new shards for those of no plan, and remove them."""
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    (prompts / "a.txt").write_text("a star\n")
    config = make_job(tmp_path, [], prompts={"uri": str(prompts)})
    run(config, engine=LocalEngine(), make_pipeline=make_fake_pipeline)
    acquire = Lease.acquire

    def acquire_later(lease: Lease) -> None:
        monkeypatch.undo()
        (prompts / "b.txt").write_text("a circle\n")
        run(config, engine=LocalEngine(), make_pipeline=make_fake_pipeline, extend=True)
        acquire(lease)

    monkeypatch.setattr(Lease, "acquire", acquire_later)
    with opened_run(Store(config.output.uri), to_write=True) as saved:
        assert saved.num_shards == 2
        assert list(find_leftovers(saved.folder)) == []
