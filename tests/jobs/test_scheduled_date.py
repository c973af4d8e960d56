import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "jobs/scheduled_date.py"


def scheduled_date(*words: str) -> tuple[int, str]:
    done = subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["flux-batch-nightly-29732760", "flux-batch-nightly-29732760-x7k2p"])
def test_the_date_is_that_of_the_schedule(name: str) -> None:
    assert scheduled_date(name) == (0, "2026-07-13T18:00:00+00:00\n")


@pytest.mark.parametrize("words", [[], ["nightly"], ["nightly-123"], ["29732760"], ["nightly-29732760-X"]])
def test_another_name_is_no_date(words: list[str]) -> None:
    code, said = scheduled_date(*words)
    assert (code, "not the name of a scheduled object" in said) == (1, True)
