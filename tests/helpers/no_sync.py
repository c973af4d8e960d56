"""Turns off fsync in every process that imports this: only a power failure would make a difference."""

import os

os.fsync = lambda file: None
