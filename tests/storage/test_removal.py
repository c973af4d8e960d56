"""The removal of many objects at once, on each kind of store."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from flux_batch.errors import LeaseLost
from flux_batch.storage.store import Store
from helpers.counting_proxy import counting_proxy
from helpers.s3 import S3Server


def test_many_objects_are_removed_side_by_side_where_each_takes_a_request(tmp_path: Path) -> None:
    class SlowStore(Store):
        """A store whose deletions wait for each other."""

        meeting = threading.Barrier(16, timeout=10)

        def delete(self, key: str) -> None:
            self.meeting.wait()
            super().delete(key)

    store = SlowStore(str(tmp_path))
    for number in range(16):
        store.write(f"deep/{number}", b"x")

    store.delete_many(store.list("deep"))

    assert store.list("deep") == []
    store.delete_many([])


@pytest.mark.s3
@pytest.mark.parametrize("status", [403, 501])
def test_a_store_that_does_not_know_how_to_remove_many_is_asked_for_each(moto: S3Server, status: int) -> None:
    with counting_proxy(moto.endpoint_url) as proxy:
        proxy.fault = lambda method, path: status if "?delete" in path else None
        store = Store(f"{moto.make_bucket()}/run", {**moto.storage_options, "endpoint_url": proxy.endpoint_url})
        for number in range(4):
            store.write(f"deep/{number}", b"x")
        proxy.requests.clear()

        for keys in (store.list("deep")[:2], store.list("deep")):
            store.delete_many(keys)

        assert store.list("deep") == []
        assert sum("?delete" in path for _, path, _ in proxy.requests) == 1


@pytest.mark.s3
def test_nothing_is_removed_at_once_without_the_lease(moto: S3Server) -> None:
    store = Store(f"{moto.make_bucket()}/run", moto.storage_options)
    keys = [f"deep/{number}" for number in range(4)]
    for key in keys:
        store.write(key, b"x")

    def lost() -> None:
        raise LeaseLost("another driver has it")

    with pytest.raises(LeaseLost):
        store.guarded(lost).delete_many(keys)
    assert store.list("deep") == keys
