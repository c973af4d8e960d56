import numpy as np
import pytest
import torch

from flux_batch.bench.machine import PeakMemory, describe_machine


def test_a_secret_of_an_address_is_not_written_down() -> None:
    described = describe_machine(["bench", "load", "--model", "https://me:hunter2@example.org/flux"])

    assert "hunter2" not in str(described)
    assert "example.org" in described["command"]


def test_a_peak_rises_with_what_is_used_and_stays_when_it_is_freed() -> None:
    memory = PeakMemory(torch.device("cpu"))
    before = memory.bytes()

    block = np.ones(200_000_000, dtype=np.uint8)
    del block

    assert memory.bytes() - before == pytest.approx(200e6, rel=0.2)
