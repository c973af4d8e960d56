"""Writes that do not wait for the disk, in every process that imports this: only a power cut could tell."""

import os

os.fsync = lambda file: None
