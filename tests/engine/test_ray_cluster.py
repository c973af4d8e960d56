import time

import pytest

from flux_batch.engine import ray_cluster
from flux_batch.engine.ray_cluster import await_cluster, check_reachable, connect
from flux_batch.errors import Interrupted
from helpers.s3 import free_port


def test_an_address_where_no_cluster_answers_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(Interrupted, match=f"RAY_ADDRESS = {address}: no Ray cluster answers there") as caught:
        connect(max_workers=1, num_gpus=1)
    assert caught.value.exit_code == 75


@pytest.mark.parametrize("address", ["auto", "local", "ray://127.0.0.1:1"])
def test_addresses_of_other_kinds_are_left_to_ray(address: str) -> None:
    check_reachable(address)


def test_a_cluster_that_stays_away_ends_the_run_with_75(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "CLUSTER_LOST_S", 0.0)
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(Interrupted, match=f"the Ray cluster at {address} is gone") as caught:
        await_cluster(address)
    assert caught.value.exit_code == 75


def test_a_cluster_that_comes_back_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter(["connection refused", "connection refused", None])
    monkeypatch.setattr(ray_cluster, "why_unreachable", lambda address: next(answers))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    await_cluster("")
    assert next(answers, "all asked") == "all asked"
