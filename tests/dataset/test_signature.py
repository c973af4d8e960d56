"""Signatures of C2PA in the images of an export."""

from __future__ import annotations

import datetime
import io
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from flux_batch.dataset.export.export import export
from flux_batch.errors import JobError
from flux_batch.images import AI_SOURCE_TYPE
from flux_batch.storage.store import Store
from helpers.finished_runs import finish as finish_run
from helpers.job_files import make_job


def certificates(folder: Path) -> None:
    """Write a chain of two certificates, and the key of the first, as C2PA requires them."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    names = [x509.Name([x509.NameAttribute(x509.NameOID.ORGANIZATION_NAME, name)]) for name in ("signer", "authority")]
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in names]
    now = datetime.datetime.now(datetime.UTC)
    chain = b""
    for name, key in zip(names, keys, strict=True):
        is_signer = key is keys[0]
        usage = [is_signer, False, False, False, False, not is_signer, not is_signer, False, False]
        builder = x509.CertificateBuilder(names[1], name, key.public_key(), x509.random_serial_number())
        builder = builder.not_valid_before(now - datetime.timedelta(days=1)).not_valid_after(
            now + datetime.timedelta(days=1)
        )
        builder = builder.add_extension(x509.KeyUsage(*usage), critical=True)
        builder = builder.add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(keys[1].public_key()), critical=False
        )
        if is_signer:
            builder = builder.add_extension(
                x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.EMAIL_PROTECTION]), critical=False
            )
        else:
            builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        chain += builder.sign(keys[1], hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    (folder / "chain.pem").write_bytes(chain)
    pem = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "key.pem").write_bytes(keys[0].private_bytes(*pem))


def test_a_signature_of_c2pa_is_valid_and_covers_the_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    c2pa = pytest.importorskip("c2pa")
    certificates(tmp_path)
    finish = "flux_batch.dataset.export.signature:sign"
    config = make_job(tmp_path, [{"prompt": f"image {number}"} for number in range(3)])
    finish_run(config)
    store = Store(config.output.uri)
    with pytest.raises(JobError, match="C2PA_SIGN_CERT is not set"):
        export(store, Store(str(tmp_path / "unsigned")), finish=finish)
    monkeypatch.setenv("C2PA_SIGN_CERT", str(tmp_path / "chain.pem"))
    monkeypatch.setenv("C2PA_PRIVATE_KEY", str(tmp_path / "key.pem"))
    export(store, Store(str(tmp_path / "dest")), format="parquet", finish=finish)

    rows = [row for path in sorted(tmp_path.glob("dest/*/*.parquet")) for row in pq.read_table(path).to_pylist()]
    assert len(rows) == 3
    for row in rows:
        data = row["image"]["bytes"]
        said = json.loads(c2pa.Reader("image/png", io.BytesIO(data)).json())
        assert said["validation_state"] == "Valid"
        manifest = said["manifests"][said["active_manifest"]]
        assert (manifest["title"], manifest["signature_info"]["issuer"]) == (row["key"], "signer")
        (action,) = manifest["assertions"][0]["data"]["actions"]
        assert (action["action"], action["digitalSourceType"]) == ("c2pa.created", AI_SOURCE_TYPE)
    damaged = data[:-60] + bytes([data[-60] ^ 1]) + data[-59:]
    assert json.loads(c2pa.Reader("image/png", io.BytesIO(damaged)).json())["validation_state"] == "Invalid"
