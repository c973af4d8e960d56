"""C2PA signatures of images, for `--finish flux_batch.dataset.export.signature:sign`. Needs the extra `c2pa`.

Two variables name PEM files: C2PA_SIGN_CERT, the certificate and its chain, and C2PA_PRIVATE_KEY. With
C2PA_TIMESTAMP_URL a time-stamping authority certifies the time of signing. The manifest has one action of
`c2pa.actions.v2`, `c2pa.created`, with the digital source type that is also in the image's IPTC metadata.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from flux_batch.errors import JobError, one_line
from flux_batch.images import AI_SOURCE_TYPE

if TYPE_CHECKING:
    from c2pa import Signer

_CERTIFICATES, _KEY, _TIMESTAMPS = "C2PA_SIGN_CERT", "C2PA_PRIVATE_KEY", "C2PA_TIMESTAMP_URL"
# A thumbnail inside the image would be larger than the rest of the manifest.
_SETTINGS = {"builder": {"thumbnail": {"enabled": False}}}


def sign(data: bytes, record: Mapping[str, Any]) -> bytes:
    """Return an encoded image with a signed manifest inside. Raises: JobError without a certificate and key."""
    try:
        from c2pa import Builder, Context, Settings
    except ImportError as error:
        raise JobError("signing needs a library: pip install 'flux-batch[c2pa]'") from error

    with Image.open(io.BytesIO(data)) as image:
        kind = f"image/{str(image.format).lower()}"
    signed = io.BytesIO()
    context = Context(Settings.from_dict(_SETTINGS))
    with _signer() as signer, Builder(json.dumps(_manifest(record, kind)), context) as builder:
        builder.sign(signer, kind, io.BytesIO(data), signed)
    return signed.getvalue()


def _manifest(record: Mapping[str, Any], kind: str) -> dict[str, Any]:
    created = {
        "action": "c2pa.created",
        "digitalSourceType": AI_SOURCE_TYPE,
        "softwareAgent": {"name": str(record["model"])},
    }
    return {
        "claim_generator_info": [{"name": "flux-batch"}],
        "title": str(record["key"]),
        "format": kind,
        "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": [created]}}],
    }


def _signer() -> Signer:
    """Return a signer from the environment's variables. Raises: JobError."""
    from c2pa import C2paSignerInfo, Signer

    certificates, key = _read(_CERTIFICATES), _read(_KEY)
    url = os.environ.get(_TIMESTAMPS)
    info = C2paSignerInfo(_algorithm(key), certificates, key, url.encode() if url else None)
    return Signer.from_info(info)


def _read(name: str) -> bytes:
    """Read the file that a variable names. Raises: JobError."""
    if not (path := os.environ.get(name)):
        raise JobError(f"{name} is not set: it must name a file in PEM")
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise JobError(f"{name}: {path} cannot be read: {one_line(error)}") from error


def _algorithm(key: bytes) -> bytes:
    """Return C2PA's name of the algorithm for a private key. Raises: JobError for a key that C2PA does not allow."""
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        private = load_pem_private_key(key, None)
    except (TypeError, ValueError) as error:
        raise JobError(f"{_KEY}: is no private key in PEM without a password: {one_line(error)}") from error
    if isinstance(private, ec.EllipticCurvePrivateKey) and private.key_size in (256, 384):
        return b"es%d" % private.key_size
    if isinstance(private, ed25519.Ed25519PrivateKey):
        return b"ed25519"
    if isinstance(private, rsa.RSAPrivateKey):
        return b"ps256"
    raise JobError(f"{_KEY}: must be of P-256, P-384, Ed25519 or RSA, which C2PA allows")
