"""Which steps of a schedule are run; knows no tensor."""

from __future__ import annotations


def first_step(num_steps: int, strength: float) -> int:
    """Return the step at which image-to-image starts. Source: diffusers 0.42.1, FluxImg2ImgPipeline."""
    return int(max(num_steps - min(num_steps * strength, num_steps), 0))


def steps_run(num_steps: int, strength: float, sigma_shift: float | None) -> int:
    """Return how many of the steps are run: with DiffSynth-Studio's static schedule all, whatever the strength."""
    return num_steps if sigma_shift is not None else num_steps - first_step(num_steps, strength)
