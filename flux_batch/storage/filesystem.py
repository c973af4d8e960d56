"""The file system of an address, with the settings of its client; knows nothing of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import fsspec

from flux_batch.errors import StoreRefused, one_line
from flux_batch.redaction import public_text
from flux_batch.storage import s3

# Retries by the S3 client itself; the default of botocore.
_S3_RETRIES = 4


def open_filesystem(
    uri: str, storage_options: Mapping[str, Any], *, num_retries: int = _S3_RETRIES
) -> tuple[fsspec.AbstractFileSystem, str]:
    """Open the file system of a URI; listings are never cached, since other machines write too.

    num_retries: the number of retries that the S3 client makes itself.
    Returns: the file system and the path of `uri` in it.
    Raises: StoreRefused for a protocol that is not installed or options that do not fit; OSError if the client
    connects immediately and fails.
    """
    options = {**storage_options, "use_listings_cache": False}
    try:
        if uri.startswith(("s3://", "s3a://")):
            options["config_kwargs"] = {**s3.client_settings(num_retries), **options.get("config_kwargs", {})}
        if uri.startswith(("http://", "https://")):
            options["client_kwargs"] = {**_http_client(), **options.get("client_kwargs", {})}
        fs, path = fsspec.url_to_fs(uri, **options)
        if hasattr(fs, "connect"):
            fs.connect()  # otherwise s3fs would reject wrong options only at its first request
    except (ImportError, ValueError, TypeError) as error:
        raise StoreRefused(f"{uri}: cannot be opened: {one_line(error)}; check the URI and storage_options") from error
    except OSError as error:
        if type(error) is not OSError or error.errno is not None:  # a network error: another attempt may succeed
            raise
        reason = public_text(str(error)).partition("\n")[0]  # HDFS without Java prints pages after the first line
        raise StoreRefused(f"{uri}: cannot be opened: {reason}") from error
    return fs, path


def _http_client() -> dict[str, Any]:
    """Return the settings of HTTP clients: proxies from the environment, no time limit while bytes arrive."""
    from aiohttp import ClientTimeout

    return {"trust_env": True, "timeout": ClientTimeout(total=None, sock_connect=30, sock_read=60)}
