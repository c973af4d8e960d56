"""A fake pipeline that takes a given time and logs its finished images outside of the output.

The folder `model.uri` has the log with one line per image, the time per image, and the number of images after which
batches are held up. It obeys the same marks in prompts as the fake pipeline.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flux_batch.config.schema import ModelConfig
from helpers.fakes import FakePipeline

LOG, PACE, HOLD = "made.log", "pace_s", "hold"
# A hold ends after this time, since the process that set it may have died.
HOLD_S = 240


class PacedPipeline(FakePipeline):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._folder = folder
        self._log = folder / LOG
        self._pace_s = float((folder / PACE).read_text())

    def __call__(self, prompt: Any, **others: Any) -> Any:
        images = super().__call__(prompt, **others)
        time.sleep(self._pace_s * len(prompt))
        until = time.monotonic() + HOLD_S
        while is_held(self._folder) and time.monotonic() < until:
            time.sleep(0.01)
        # A single write in append mode is atomic, even with other writers and kills.
        lines = "".join(f"{os.getpid()} {text}\n" for text in prompt).encode()
        handle = os.open(self._log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(handle, lines)
        os.close(handle)
        return images


def make_paced_pipeline(model: ModelConfig) -> PacedPipeline:
    return PacedPipeline(Path(model.uri))


def model_folder(folder: Path, pace_s: float) -> Path:
    """Make the folder that `model.uri` names. Returns: its path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PACE).write_text(str(pace_s))
    return folder


@contextmanager
def held(folder: Path, after: int = 0) -> Iterator[None]:
    """Hold up every batch in this block once `after` images are finished."""
    hold(folder, after)
    try:
        yield
    finally:
        let_go(folder)


def hold(folder: Path, after: int = 0) -> None:
    """Hold up every batch once `after` images are finished, until `let_go`."""
    scratch = folder / f"{HOLD}.new"
    scratch.write_text(str(after))
    scratch.rename(folder / HOLD)


def let_go(folder: Path) -> None:
    """Stop holding up batches."""
    (folder / HOLD).unlink()


def is_held(folder: Path) -> bool:
    try:
        after = int((folder / HOLD).read_text())
    except FileNotFoundError:
        return False
    return len(made(folder)) >= after


def made(folder: Path) -> Counter[str]:
    """Count how often each prompt became an image."""
    return Counter(prompt for _, prompt in made_by(folder))


def made_by(folder: Path) -> list[tuple[int, str]]:
    """List the process and the prompt of each image, in the order in which they were made."""
    log = folder / LOG
    lines = log.read_text().splitlines() if log.exists() else []
    return [(int(pid), prompt) for pid, _, prompt in (line.partition(" ") for line in lines)]


def forget(folder: Path) -> None:
    """Empty the log."""
    (folder / LOG).unlink(missing_ok=True)
