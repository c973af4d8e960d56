"""A bucket of the Hugging Face Hub in memory, below `HfFileSystem`, since the Hub only takes files by Xet."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, HfFileSystem


def hub_bucket(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Replace every `hf://buckets/` by one bucket in memory. Returns: its files by path."""
    bucket_file: Any = pytest.importorskip("huggingface_hub", "2.0").BucketFile
    files: dict[str, bytes] = {}
    a_day = "2026-01-01T00:00:00.0Z"

    def listed(api: HfApi, bucket_id: str, prefix: str | None = None, recursive: bool | None = None) -> list[Any]:
        folder = (prefix or "").rstrip("/")
        return [file_of(path) for path in sorted(files) if not folder or f"{path}/".startswith(f"{folder}/")]

    def file_of(path: str) -> Any:
        return bucket_file(type="file", path=path, size=len(files[path]), xetHash="0" * 64, mtime=a_day)

    def change(api: HfApi, bucket_id: str, *, add: Sequence[Any] = (), delete: Sequence[str] = ()) -> None:
        for source, path in add:
            files[path] = source if isinstance(source, bytes) else Path(source).read_bytes()
        for path in delete:
            del files[path]

    def read(system: HfFileSystem, path: str) -> bytes:
        found = files.get(system.resolve_path(path).path)
        if found is None:
            raise FileNotFoundError(path)
        return found

    opened = HfFileSystem._open

    def open_file(system: HfFileSystem, path: str, mode: str = "rb", **options: Any) -> Any:
        return io.BytesIO(read(system, path)) if mode == "rb" else opened(system, path, mode, **options)

    def cat_file(system: HfFileSystem, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        return read(system, path)[start:end]

    monkeypatch.setattr(HfApi, "bucket_info", lambda api, bucket_id: object())
    monkeypatch.setattr(HfApi, "list_bucket_tree", listed)
    monkeypatch.setattr(HfApi, "batch_bucket_files", change)
    monkeypatch.setattr(HfFileSystem, "_open", open_file)
    monkeypatch.setattr(HfFileSystem, "cat_file", cat_file)
    return files
