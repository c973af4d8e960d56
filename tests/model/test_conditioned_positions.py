"""Tables of a size are made once, and forgotten oldest first."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flux_batch.model.conditioned import position_tables
from flux_batch.model.sampling import position_ids
from flux_batch.model.transformer import Flux
from helpers.golden import FLUX, filled

CPU = torch.device("cpu")


@pytest.fixture
def model() -> Flux:
    return filled(Flux(FLUX))


def test_a_table_is_that_of_the_model_and_made_once(model: Flux) -> None:
    tables = position_tables(model, CPU)
    for size in ((7, 8, 12), (7, 12, 8), (9, 8, 12)):
        table = tables(*size)
        assert torch.equal(table, model.position_table(position_ids(*size)))
        assert tables(*size) is table


def test_the_size_that_was_used_longest_ago_is_forgotten(model: Flux, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    table = model.position_table

    def counted(ids: Tensor) -> Tensor:
        made.append(len(ids) - 1)
        return table(ids)

    monkeypatch.setattr(model, "position_table", counted)
    tables = position_tables(model, CPU, max_tables=2)
    for length in (1, 2, 1, 3, 1, 2):
        tables(length, 2, 2)
    assert made == [1, 2, 3, 2]
