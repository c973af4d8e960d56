"""The checks of `make release-check`: of the published files, and of their installation."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CHANGELOG = ROOT / "CHANGELOG.md"
# The demo's model is most of the wheel. PyPI takes 100 MB.
MAX_MB = 20
# Tests that need no packages of the `test` extra except FOR_TESTS.
QUICK_TESTS = ("tests/test_records.py", "tests/test_sampling_params.py", "tests/config", "tests/prompts/formats")
FOR_TESTS = ("pytest>=8.3", "pytest-timeout>=2.3", "hypothesis>=6.115", "cryptography>=45")
SMALL = ("sampling.width=64", "sampling.height=64", "sampling.num_inference_steps=4")
# `lowest-direct` is the lower bound of each direct dependency.
RESOLUTIONS = ("lowest-direct", "highest")


def main() -> None:
    """Build, check, install and run the release. Exits at the first error."""
    check_version(PROJECT["version"], CHANGELOG.read_text(), tag_here())
    with tempfile.TemporaryDirectory(prefix="release-") as folder:
        place = Path(folder)
        tools = new_environment(place / "tools", "build>=1.3", "twine>=6.1", "uv>=0.9")
        run(tools / "python", "-m", "build", "--outdir", place / "dist", ROOT)
        files = sorted((place / "dist").iterdir())
        run(tools / "twine", "check", "--strict", *files)
        for file in files:
            check_file(file)
        (wheel,) = (place / "dist").glob("*.whl")
        for resolution in RESOLUTIONS:
            try_with(resolution, wheel, tools / "uv", place)


def check_version(version: str, changelog: str, tag: str) -> None:
    """Exit unless the newest entry of the changelog and the tag of this commit, if any, have the version."""
    (newest, *_) = re.findall(r"^## (\S+)", changelog, flags=re.MULTILINE)
    if newest != version:
        sys.exit(f"{CHANGELOG.name} begins with {newest}, and pyproject.toml has version {version}")
    if tag and tag != f"v{version}":
        sys.exit(
            f"this commit has the tag {tag}, and pyproject.toml has version {version}: the tag would be v{version}"
        )


def tag_here() -> str:
    """Return the tag of this commit; empty without one."""
    words = ["git", "-C", str(ROOT), "tag", "--points-at", "HEAD", "v*"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.partition("\n")[0]


def check_file(file: Path) -> None:
    """Exit if a file is too large, lacks needed files, or has files that do not belong into a release."""
    size = file.stat().st_size / 1e6
    if file.suffix == ".whl":
        names = zipfile.ZipFile(file).namelist()
        needed = {"flux_batch/py.typed", "flux_batch/cli.py", "flux_batch/demo/flux-demo/model_index.json"}
    else:
        with tarfile.open(file) as archive:
            names = [name.partition("/")[2] for name in archive.getnames()]
        needed = {"pyproject.toml", "README.md", "LICENSE", "flux_batch/cli.py"}
    if missing := sorted(needed - set(names)):
        sys.exit(f"{file.name} lacks {', '.join(missing)}")
    if strange := [name for name in names if re.search(r"__pycache__|(^|/)\.|(^|/)out/", name)]:
        sys.exit(f"{file.name} has {strange[0]}")
    if size > MAX_MB:
        sys.exit(f"{file.name} has {size:.1f} MB, more than {MAX_MB}")
    say(f"{file.name}: {size:.1f} MB, {len(names)} files")


def try_with(resolution: str, wheel: Path, uv: Path, place: Path) -> None:
    """Install a wheel with the lowest or the newest dependencies, make the demo's images and run the quick tests."""
    environment = place / resolution
    run(uv, "venv", "--quiet", "--python", sys.executable, environment)
    install = [uv, "pip", "install", "--quiet", "--python", environment / "bin/python"]
    run(*install, "--resolution", resolution, "-r", ROOT / "pyproject.toml", *FOR_TESTS)
    run(*install, "--no-deps", wheel)
    programs = environment / "bin"
    run(programs / "python", "-c", "import flux_batch; assert 'site-packages' in flux_batch.__file__", at=place)
    run(programs / "flux-batch", "--version", at=place)
    settings = [f"--set={setting}" for setting in (f"output.uri={place}/out-{resolution}", *SMALL)]
    run(programs / "flux-batch", "run", ROOT / "jobs/demo.yaml", *settings, at=place)
    run(programs / "flux-batch", "verify", place / f"out-{resolution}", at=place)
    # `python -m pytest` would import the package from this folder. Warnings of other versions are not errors here.
    run(programs / "pytest", "-q", "-m", "not slow", "-W", "default", "-p", "no:cacheprovider", *QUICK_TESTS)
    say(f"{resolution}: demo and quick tests pass")
    shutil.rmtree(environment)


def new_environment(folder: Path, *packages: str) -> Path:
    """Return the bin folder of a new virtual environment with some packages."""
    run(sys.executable, "-m", "venv", folder)
    run(folder / "bin/pip", "install", "--quiet", *packages)
    return folder / "bin"


def run(*words: str | Path, at: Path = ROOT) -> None:
    """Run a program without PYTHONPATH and VIRTUAL_ENV. Exits with its code if it fails."""
    say(f"$ {' '.join(map(str, words))}")
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    if code := subprocess.run([str(word) for word in words], cwd=at, env=environment, check=False).returncode:
        sys.exit(f"{words[0]}: exit code {code}")


def say(line: str) -> None:
    """Print a line and flush."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
