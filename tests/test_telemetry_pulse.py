from __future__ import annotations

import pytest

from flux_batch import telemetry as module
from flux_batch.telemetry import Pulse


def test_only_work_is_expected_to_show_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    pulse = Pulse()
    pulse.beat()
    assert pulse.quiet_s() == 0

    with pulse.at_work():
        now = 107.0
        assert pulse.quiet_s() == 7
        pulse.beat()
        now = 108.0
        assert pulse.quiet_s() == 1
    now = 500.0
    assert pulse.quiet_s() == 0

    with pytest.raises(ValueError, match="broken"), pulse.at_work():
        raise ValueError("broken")
    now = 900.0
    assert pulse.quiet_s() == 0
