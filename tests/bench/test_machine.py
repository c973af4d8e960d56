import mmap
import subprocess
from pathlib import Path

import pytest
import torch

from flux_batch.bench.machine import PeakMemory, commit_of, describe_machine, gpu_name


def test_a_secret_of_an_address_is_not_written_down() -> None:
    described = describe_machine(["bench", "load", "--model", "https://me:hunter2@example.org/flux"])

    assert "hunter2" not in str(described)
    assert "example.org" in described["command"]


def test_a_checkout_names_its_commit_and_whether_it_was_changed(tmp_path: Path) -> None:
    assert commit_of(tmp_path) is None

    def git(*words: str) -> str:
        who = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        done = subprocess.run(["git", "-C", str(tmp_path), *who, *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    git("init", "-q")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-qm", "first")
    git("tag", "-am", "a name", "v1")
    commit = git("rev-parse", "HEAD")[:12]
    assert commit_of(tmp_path) == commit
    (tmp_path / "a").write_text("2")
    assert commit_of(tmp_path) == f"{commit}+"


def test_a_peak_rises_with_use_and_stays_after_it() -> None:
    memory = PeakMemory(torch.device("cpu"))
    before = memory.bytes()

    # Not from the allocator, which may still have as much memory from an earlier test.
    with mmap.mmap(-1, 200_000_000) as block:
        for page in range(0, len(block), mmap.PAGESIZE):
            block[page] = 1

    assert memory.bytes() - before == pytest.approx(200e6, rel=0.2)


def test_the_name_of_a_gpu_is_that_of_the_device_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: f"GPU {device}")

    assert gpu_name(torch.device("cuda:1")) == "GPU cuda:1"
    assert gpu_name(torch.device("cpu")) is None
    assert gpu_name() == "GPU None"
