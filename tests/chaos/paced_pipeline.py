"""A fake pipeline that takes its time and writes down, outside of the output, which pictures it finished.

The folder `model.uri` has the log, one line a picture, and how long a picture takes. Its marks are those of the fakes.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

from fakes import FakePipeline
from flux_batch.config import ModelConfig

LOG, PACE = "made.log", "pace_s"


class PacedPipeline(FakePipeline):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._log = folder / LOG
        self._pace_s = float((folder / PACE).read_text())

    def __call__(self, prompt: Any, **others: Any) -> Any:
        pictures = super().__call__(prompt, **others)
        time.sleep(self._pace_s * len(prompt))
        # One write in append mode is whole, whoever writes beside it and whatever is killed.
        lines = "".join(f"{os.getpid()} {text}\n" for text in prompt).encode()
        handle = os.open(self._log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(handle, lines)
        os.close(handle)
        return pictures


def make_paced_pipeline(model: ModelConfig) -> PacedPipeline:
    return PacedPipeline(Path(model.uri))


def model_folder(folder: Path, pace_s: float) -> Path:
    """Make what `model.uri` names."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PACE).write_text(str(pace_s))
    return folder


def made(folder: Path) -> Counter[str]:
    """Count how often each prompt became a picture."""
    log = folder / LOG
    lines = log.read_text().splitlines() if log.exists() else []
    return Counter(line.partition(" ")[2] for line in lines)


def forget(folder: Path) -> None:
    """Empty the log."""
    (folder / LOG).unlink(missing_ok=True)
