"""The driver of the experiments, in its own process (see drive.py)."""

from __future__ import annotations

from chaos import drive
from helpers.driver import Driver


class PacedDriver(Driver):
    """`flux-batch run` with the paced pipeline."""

    program = drive
