"""A fake pipeline that takes its time and writes down, outside of the output, which images it finished.

The folder `model.uri` has the log, one line an image, how long an image takes, and from how many on they are held up.
Its marks are those of the fakes.
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
# A hold that is not let go, since who asked for it has died, ends by itself.
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
        # One write in append mode is whole, whoever writes beside it and whatever is killed.
        lines = "".join(f"{os.getpid()} {text}\n" for text in prompt).encode()
        handle = os.open(self._log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(handle, lines)
        os.close(handle)
        return images


def make_paced_pipeline(model: ModelConfig) -> PacedPipeline:
    return PacedPipeline(Path(model.uri))


def model_folder(folder: Path, pace_s: float) -> Path:
    """Make what `model.uri` names."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PACE).write_text(str(pace_s))
    return folder


@contextmanager
def held(folder: Path, after: int = 0) -> Iterator[None]:
    """Let no batch be finished meanwhile, as long as it takes, once so many images are."""
    hold(folder, after)
    try:
        yield
    finally:
        let_go(folder)


def hold(folder: Path, after: int = 0) -> None:
    """Hold up every batch that ends after so many images, until further notice."""
    scratch = folder / f"{HOLD}.new"
    scratch.write_text(str(after))
    scratch.rename(folder / HOLD)


def let_go(folder: Path) -> None:
    """Hold up no batch any more."""
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
