import pytest

from flux_batch.engine.ray_pool import check_reachable, connect
from flux_batch.errors import Interrupted
from s3 import free_port


def test_an_address_where_no_cluster_answers_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(Interrupted, match=f"RAY_ADDRESS = {address}: no Ray cluster answers there") as caught:
        connect(max_workers=1, num_gpus=1)
    assert caught.value.exit_code == 75


@pytest.mark.parametrize("address", ["auto", "local", "ray://127.0.0.1:1"])
def test_addresses_of_other_kinds_are_left_to_ray(address: str) -> None:
    check_reachable(address)
