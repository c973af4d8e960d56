"""Listings of S3 that begin behind a name; s3fs has no public way to ask for them."""

from __future__ import annotations

from typing import Any


async def names_after(fs: Any, folder: str, after: str) -> list[str]:
    """Return the names in a folder that sort behind `after`, a thousand by each request."""
    bucket, prefix, _ = fs.split_path(f"{folder}/")
    about = {"Bucket": bucket, "Prefix": prefix, "Delimiter": "/"}
    where = {"StartAfter": f"{prefix}{after}"} if after else {}
    names: list[str] = []
    while True:
        page = await fs._call_s3("list_objects_v2", **about, **where)
        names += [one["Key"].removeprefix(prefix) for one in page.get("Contents", ())]
        if not page.get("IsTruncated"):
            return [name for name in names if name]
        where = {"ContinuationToken": page["NextContinuationToken"]}
