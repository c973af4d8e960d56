from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from flux_batch.demo.train import progress
from flux_batch.demo.train.progress import Meter, Stage


class Stopped(Exception):
    pass


def train(folder: Path, stop_at: int | None = None) -> torch.Tensor:
    torch.manual_seed(0)
    model = nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    stage = Stage(folder, "linear", 6, seed=1)
    for step in stage.steps({"model": model, "optimizer": optimizer}):
        if step == stop_at:
            raise Stopped
        x = torch.randn(4, 3, generator=stage.generator(step)) * stage.rng(step).random()
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    return model.weight.detach()


def test_a_stopped_stage_goes_on_as_if_it_had_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SAVE_EVERY_S", -1.0)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = train(tmp_path / "a")
    with pytest.raises(Stopped):
        train(tmp_path / "b", stop_at=4)

    assert torch.equal(train(tmp_path / "b"), whole)


def test_a_finished_stage_is_done_and_takes_no_step(tmp_path: Path) -> None:
    weight = train(tmp_path)

    assert Stage(tmp_path, "linear", 6, seed=1).is_done
    assert not Stage(tmp_path, "other", 6, seed=1).is_done
    assert torch.equal(train(tmp_path, stop_at=0), weight)


def test_steps_draw_different_numbers(tmp_path: Path) -> None:
    stage, other = Stage(tmp_path, "a", 9, seed=1), Stage(tmp_path, "b", 9, seed=1)

    numbers = {stage.number(0), stage.number(1), other.number(0), Stage(tmp_path, "a", 9, seed=2).number(0)}
    assert len(numbers) == 4


def test_the_learning_rate_rises_stays_and_falls(tmp_path: Path) -> None:
    stage = Stage(tmp_path, "a", 1000, seed=0)

    assert stage.share_of_rate(0, 0.5) == pytest.approx(1 / progress.WARM_UP)
    assert stage.share_of_rate(400, 0.5) == 1.0
    assert stage.share_of_rate(750, 0.5) == pytest.approx(0.5)
    assert stage.share_of_rate(1000) == 0.0


def test_the_last_step_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    meter = Meter(Stage(tmp_path, "a", 2, seed=0))
    meter.add(0, loss=2.0)
    meter.add(1, loss=1.0)

    assert capsys.readouterr().out.startswith("a 2/2  loss 1.9700")
