from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.nn.attention import SDPBackend

from flux_batch.model.optimize import kernels as module
from flux_batch.model.optimize.kernels import attention_order

CUDA = torch.device("cuda")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[SDPBackend]]:
    """What kernels were asked for, on a device that this machine need not have."""
    orders: list[list[SDPBackend]] = []

    @contextmanager
    def noted(backends: list[SDPBackend], set_priority: bool) -> Iterator[None]:
        assert set_priority
        orders.append(backends)
        yield

    monkeypatch.setattr(module, "sdpa_kernel", noted)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return orders


def test_a_cpu_has_nothing_to_choose() -> None:
    with attention_order(torch.device("cpu")):
        x = torch.ones(1, 1, 2, 8)
        torch.testing.assert_close(torch.nn.functional.scaled_dot_product_attention(x, x, x), x)


def test_hopper_asks_cudnn_first(asked: list[list[SDPBackend]]) -> None:
    with attention_order(CUDA):
        pass
    assert asked[0][:2] == [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
    assert SDPBackend.MATH in asked[0]


def test_hopper_asks_flash_attention_3_where_it_is_installed(
    asked: list[list[SDPBackend]], monkeypatch: pytest.MonkeyPatch
) -> None:
    activated: list[str] = []
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: name == "flash_attn_interface")
    monkeypatch.setattr(module, "activate_flash_attention_impl", activated.append)
    monkeypatch.setattr(module, "current_flash_attention_impl", lambda: activated[-1] if activated else None)
    for _ in range(2):
        with attention_order(CUDA):
            pass
    assert activated == ["FA3"]
    assert [order[0] for order in asked] == [SDPBackend.FLASH_ATTENTION] * 2


def test_other_devices_keep_their_own_order(asked: list[list[SDPBackend]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    with attention_order(CUDA):
        pass
    assert asked == []
