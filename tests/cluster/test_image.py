"""The image, built by buildah from the Dockerfile and started; needs ten minutes and 20 GB of disk."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "cluster/Dockerfile"
BASE = re.findall(r"^FROM (\S+)", DOCKERFILE.read_text(), flags=re.MULTILINE)[0]
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
# Debian packages that replace the Python base image, since no image registry may be reachable.
PACKAGES = "python3,python3-pip,python3-venv,python3-wheel,python3-setuptools,ca-certificates"

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(3000),
    pytest.mark.skipif(not shutil.which("buildah"), reason="needs buildah: apt-get install buildah"),
    pytest.mark.skipif(os.getuid() != 0, reason="needs root, for a chroot"),
]


def run(*words: str, cwd: Path | None = None) -> str:
    """Run a command. Returns: its output."""
    done = subprocess.run(words, capture_output=True, text=True, cwd=cwd, check=False)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def buildah(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """The buildah command, with its own store that has the base image."""
    folder = tmp_path_factory.mktemp("images")
    command = ["buildah", "--root", str(folder / "root"), "--runroot", str(folder / "run"), "--storage-driver", "vfs"]
    pulled = subprocess.run([*command, "pull", f"docker.io/library/{BASE}"], capture_output=True, check=False)
    if pulled.returncode != 0:
        if not shutil.which("debootstrap"):
            pytest.skip("no registry of images can be reached, and debootstrap is not here")
        make_base(command, folder / "debian")
    yield command
    shutil.rmtree(folder, ignore_errors=True)


def make_base(buildah: list[str], folder: Path) -> None:
    """Make an image with Debian's Python under the name of the base image."""
    run("debootstrap", "--variant=minbase", f"--include={PACKAGES}", BASE.rpartition("-")[2], str(folder))
    (folder / "usr/local/bin/python").symlink_to("/usr/bin/python3")
    (folder / "usr/local/bin/pip").symlink_to("/usr/bin/pip3")
    for path in (folder / "usr/lib").glob("python3*/EXTERNALLY-MANAGED"):
        path.unlink()
    shutil.copy(CERTIFICATES, folder / CERTIFICATES.relative_to("/"))
    container = run(*buildah, "from", "scratch").strip()
    run(*buildah, "add", container, str(folder), "/")
    run(*buildah, "commit", "--rm", container, f"docker.io/library/{BASE}")
    shutil.rmtree(folder)


def test_it_has_the_program_and_no_compiler(buildah: list[str], tmp_path: Path) -> None:
    # Only the files that git tracks, as in a clone.
    run("git", "clone", "--quiet", "--no-hardlinks", str(ROOT), str(tmp_path / "source"))
    build = ["bud", "--isolation", "chroot", "--pull-never", "--build-arg", "COMPILER=", "--tag", "flux-batch:test"]
    run(*buildah, *build, "--file", "cluster/Dockerfile", ".", cwd=tmp_path / "source")
    container = run(*buildah, "from", "--pull-never", "localhost/flux-batch:test").strip()

    def inside(line: str) -> str:
        return run(*buildah, "run", "--isolation", "chroot", container, "--", "bash", "-c", line).strip()

    assert inside("id -u") == "1000"
    assert "flux-batch" in inside("flux-batch --version")
    assert not inside("cd / && python -c 'import flux_batch; print(flux_batch.__file__)'").startswith("/app")
    assert inside("ls /app/jobs/demo.yaml /wheel").endswith(".whl")
    assert inside("which gcc g++ cc clang || echo none") == "none"
    said = inside("cd /tmp && flux-batch plan /app/jobs/demo.yaml --set output.uri=/tmp/out --json")
    assert '"num_images": 72' in said
