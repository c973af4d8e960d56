"""The demo model's place in the user's cache, filled on first use; knows nothing of what is in it."""

from __future__ import annotations

import hashlib
import os
import shutil
from importlib import metadata, resources
from pathlib import Path

# Whatever has a say in the bytes of the model: a change of any gives the folder another name.
OWN_SOURCES = {
    "flux_batch.demo": ("captions.py", "tokenizers.py", "parts.py"),
    "flux_batch.model": ("transformer.py", "layers.py", "autoencoder.py", "weights.py"),
}
LIBRARIES = ("torch", "transformers", "tokenizers", "sentencepiece", "safetensors")


def demo_model_folder() -> Path:
    """Return the folder of the demo model; the first call on a machine builds it.

    Safe in many processes at once, and whenever one is killed: the folder is there whole or not at all.
    """
    folder = cache_folder() / f"demo-{content_version()}"
    if not folder.is_dir():
        build(folder)
    return folder


def cache_folder() -> Path:
    """Return where this package may keep files: FLUX_BATCH_CACHE, else `flux-batch` in the user's cache."""
    if own := os.environ.get("FLUX_BATCH_CACHE"):
        return Path(own).expanduser()
    users = os.environ.get("XDG_CACHE_HOME")
    return (Path(users) if users else Path.home() / ".cache") / "flux-batch"


def content_version() -> str:
    """Return a short name for the bytes of the model: a hash of the sources and library versions that make them."""
    digest = hashlib.blake2b(digest_size=6)
    for package, names in OWN_SOURCES.items():
        for name in names:
            digest.update(resources.files(package).joinpath(name).read_bytes())
    for library in LIBRARIES:
        digest.update(f"{library}={metadata.version(library)}".encode())
    return digest.hexdigest()


def build(folder: Path) -> None:
    """Make `folder` under a lock: written beside it, then renamed."""
    from filelock import FileLock

    from flux_batch.demo.parts import write_model

    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.partial")
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if folder.is_dir():  # built while this process waited
            return
        if partial.exists():  # of a build that was killed
            shutil.rmtree(partial)
        partial.mkdir()
        write_model(partial)
        partial.rename(folder)
