"""Which steps are run, against those of diffusers and of the schedules."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flux_batch.model.params import DEV_SCHEDULE, first_step, steps_run
from flux_batch.model.sampling import make_sigmas


@pytest.mark.parametrize(
    ("num_steps", "strength", "step"),
    [(4, 1.0, 0), (4, 0.6, 1), (50, 0.8, 10), (28, 0.3, 19), (4, 0.2, 3), (4, 0.0, 4)],
)
def test_first_step_is_that_of_diffusers(num_steps: int, strength: float, step: int) -> None:
    assert first_step(num_steps, strength) == step


@given(st.integers(1, 60), st.floats(0.01, 1.0), st.sampled_from([None, 1.0, 3.0]))
def test_what_is_counted_is_what_the_schedule_has(n: int, strength: float, sigma_shift: float | None) -> None:
    sigmas = make_sigmas(n, 4096, DEV_SCHEDULE, sigma_shift, strength)
    assert steps_run(n, strength, sigma_shift) == len(sigmas) - 1
