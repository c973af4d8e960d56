"""Where the parts of a model lie: in diffusers' sub folders, in single files of a folder, or all in one file."""

from __future__ import annotations

from pathlib import Path

from flux_batch.model.checkpoint.checkpoint import open_checkpoint, weight_files
from flux_batch.model.checkpoint.files import is_pickle
from flux_batch.model.checkpoint.recognise import parts_of

# The sub folder of diffusers that holds a part.
FOLDERS = {"transformer": "transformer", "autoencoder": "vae", "clip": "text_encoder", "t5": "text_encoder_2"}
TITLES = {
    "transformer": "transformer",
    "autoencoder": "autoencoder",
    "clip": "CLIP text encoder",
    "t5": "T5 text encoder",
}
# Text encoders first: without their tokenizers beside them, nothing large is read in vain.
LOADING_ORDER = ("clip", "t5", "autoencoder", "transformer")


def find_parts(source: Path) -> list[Path]:
    """Return the files and folders that make up the model at `source`, a folder or a file that holds all parts.

    A part lies in its sub folder, else in a file of the folder itself, told by its keys.
    Raises: ValueError saying what was looked for, or which files hold the same part.
    """
    if source.is_file():
        check_all_in_one(source)
        return [source]
    found = {part: [source / name] for part, name in FOLDERS.items() if has_weights(source / name)}
    others: list[str] = []
    for path in weight_files(source) if len(found) < len(FOLDERS) else ():
        try:
            layouts = parts_of(open_checkpoint(path))
        except ValueError as error:
            others.append(str(error))
            continue
        parts = [layout.part for layout in layouts]
        # The single files of the official repositories double what lies in the sub folders.
        if not all(source / FOLDERS[part] in found.get(part, ()) for part in parts):
            for part in parts:
                found.setdefault(part, []).append(path)
    for part, paths in found.items():
        if len(paths) > 1:
            names = ", ".join(path.name for path in paths)
            raise ValueError(f"{source} holds several files for the {TITLES[part]}: {names}; keep one")
    for part, title in TITLES.items():
        if part not in found:
            looked = f"looked for {source / FOLDERS[part]}/*.safetensors or *.gguf and for such a file in {source}"
            raise ValueError("; ".join([f"no {title}: {looked}", *others]))
    return list(dict.fromkeys(found[part][0] for part in LOADING_ORDER))


def check_all_in_one(path: Path) -> None:
    """Raise ValueError unless a file holds all parts of a model."""
    parts = {layout.part for layout in parts_of(open_checkpoint(path))}
    if missing := [title for part, title in TITLES.items() if part not in parts]:
        raise ValueError(
            f"{path} holds no {' and no '.join(missing)}: put it into a folder with the other parts and pass it"
        )


def has_weights(folder: Path) -> bool:
    """Tell whether a folder holds weights, or pickles, which opening it then refuses by name."""
    if not folder.is_dir():
        return False
    return bool(weight_files(folder)) or any(is_pickle(path.name) for path in folder.iterdir())
