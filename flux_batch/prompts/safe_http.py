"""Fetching a row's image from the public web: limited in size and time, never from the internal network.

Rows may be hostile: a URL must not make a worker read from an internal service, such as a cloud's metadata service. So
every IP address of a host is checked, the connection is made to a checked address, and each redirect is checked again.
Proxies of the environment are not used.
"""

from __future__ import annotations

import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from flux_batch.errors import RowError, one_line
from flux_batch.storage.retry import RetryPolicy

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

_ATTEMPTS = 3
_FIRST_WAIT_S = 1.0
_MAX_REDIRECTS = 5
_MAX_ADDRESSES = 4
# Timeouts of one answer: until the next byte, and until the end.
_SILENCE_S, WHOLE_S = 10.0, 60.0
_REDIRECTS = {301, 302, 303, 307, 308}
# The server is overloaded or broken at the moment, so the request is retried.
_RETRYABLE_STATUSES = {408, 425, 429, 500, 502, 503, 504}
_NAT64 = ipaddress.ip_network("64:ff9b::/96")  # RFC 6052: IPv4 addresses as seen from an IPv6 network
# Networks that the ipaddress module, or some versions of it, wrongly treats as public.
_NOT_PUBLIC = (
    # Azure's platform service: https://learn.microsoft.com/azure/virtual-network/what-is-ip-address-168-63-129-16
    ipaddress.ip_network("168.63.129.16/32"),
    ipaddress.ip_network("192.0.0.0/24"),  # RFC 6890; Oracle's metadata service is in it
    ipaddress.ip_network("fec0::/10"),  # RFC 3879: site-local, deprecated
)


class _Unavailable(Exception):
    """The server did not answer, or answered that it is busy; the message is the reason."""


def fetch(url: str, max_bytes: int, *, is_allowed: Callable[[IpAddress], bool] | None = None) -> bytes:
    """Return the bytes of a file by HTTP or HTTPS.

    is_allowed: the check of each IP address before a connection; by default the address must be public.
    Raises: RowError for an address that is not allowed, more than `max_bytes`, or an answer that is not a file; its
    message does not contain the URL.
    """
    policy = RetryPolicy(attempts=_ATTEMPTS, first_wait_s=_FIRST_WAIT_S)
    try:
        return policy.retry(
            lambda: _follow(url, max_bytes, is_allowed or is_public), lambda error: isinstance(error, _Unavailable)
        )
    except _Unavailable as error:
        raise RowError(f"{error}; tried {_ATTEMPTS} times") from error


def is_public(address: IpAddress) -> bool:
    """Return whether an address is public: not this machine's, its network's or its cloud's."""
    if isinstance(address, ipaddress.IPv6Address):
        if address in _NAT64:
            return is_public(ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF))
        # Other forms that wrap an IPv4 address are refused: they would only hide it.
        if address.ipv4_mapped or address.sixtofour or address.teredo:
            return False
    is_special = address.is_multicast or address.is_reserved or address.is_unspecified
    return address.is_global and not is_special and not any(address in network for network in _NOT_PUBLIC)


def check_url(url: str) -> SplitResult:
    """Return the parts of a URL. Raises: RowError unless it is HTTP(S), without user and password."""
    try:
        parts = urlsplit(url)
        has_host = bool(parts.hostname)
        _ = parts.port
    except ValueError as error:
        raise RowError(f"not a valid HTTP address: {error}") from error
    if parts.scheme not in ("http", "https") or not has_host:
        raise RowError("not a valid HTTP address")
    if "@" in parts.netloc:
        raise RowError("an address with a user name or password is not fetched; remove them")
    return parts


def _follow(url: str, max_bytes: int, is_allowed: Callable[[IpAddress], bool]) -> bytes:
    deadline = time.monotonic() + WHOLE_S
    at = url
    for _ in range(_MAX_REDIRECTS + 1):
        parts = check_url(at)
        try:
            with _connected(parts, is_allowed, deadline) as connection, _ask(connection, parts) as answer:
                if answer.status not in _REDIRECTS:
                    return _read(answer, max_bytes, deadline)
                at = urljoin(at, answer.getheader("Location") or "")
        except (OSError, HTTPException) as error:
            _check_time(deadline)
            raise _Unavailable(f"no answer: {one_line(error)}") from error
    raise RowError(f"more than {_MAX_REDIRECTS} redirects")


@contextmanager
def _connected(
    parts: SplitResult, is_allowed: Callable[[IpAddress], bool], deadline: float
) -> Iterator[HTTPConnection]:
    """Yield a connection to a checked address; HTTPS checks the certificate against the host's name.

    The connection is closed at the deadline, since a server may send single bytes forever.
    """
    host = parts.hostname or ""
    is_secure = parts.scheme == "https"
    # Without a port, http.client would parse one from the host, and take the end of an IPv6 address for it.
    port = parts.port or (443 if is_secure else 80)
    connection = (HTTPSConnection if is_secure else HTTPConnection)(host, port, timeout=_SILENCE_S)
    connection.auto_open = 0  # reconnecting would resolve the name again, unchecked
    link = _open(_resolve(host, port, is_allowed), port)
    if is_secure:
        context = ssl.create_default_context()
        link = context.wrap_socket(link, server_hostname=host, do_handshake_on_connect=False)
    watch = threading.Timer(max(deadline - time.monotonic(), 0.0), _cut, [link])
    watch.daemon = True
    watch.start()
    try:
        if isinstance(link, ssl.SSLSocket):
            link.do_handshake()
        connection.sock = link
        yield connection
    finally:
        watch.cancel()
        connection.close()
        link.close()


def _resolve(host: str, port: int, is_allowed: Callable[[IpAddress], bool]) -> list[IpAddress]:
    """Return the addresses of a host. Raises: RowError if one of them is not allowed."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, ValueError) as error:
        raise _Unavailable(f"the name {host} cannot be resolved") from error
    # ipaddress does not need the zone, as in fe80::1%eth0.
    addresses = list(dict.fromkeys(ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found))
    for address in addresses:
        if not is_allowed(address):
            raise RowError(f"{host}: is {address}, which is not a public address; rows may name only public ones")
    return addresses[:_MAX_ADDRESSES]


def _open(addresses: list[IpAddress], port: int) -> socket.socket:
    """Return a connection to the first address that answers."""
    failure: OSError | None = None
    for address in addresses:
        try:
            return socket.create_connection((str(address), port), timeout=_SILENCE_S)
        except OSError as error:
            failure = error
    raise failure or OSError("no address")


def _cut(link: socket.socket) -> None:
    with suppress(OSError):
        link.shutdown(socket.SHUT_RDWR)


def _ask(connection: HTTPConnection, parts: SplitResult) -> HTTPResponse:
    target = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~")
    if parts.query:
        target += "?" + quote(parts.query, safe="/%:@!$&'()*+,;=~?[]")
    # No compression: a small answer could expand to a huge one.
    headers = {"Accept": "image/*", "Accept-Encoding": "identity", "User-Agent": "flux-batch"}
    connection.request("GET", target, headers=headers)
    return connection.getresponse()


def _read(answer: HTTPResponse, max_bytes: int, deadline: float) -> bytes:
    """Return a whole answer. Raises: RowError if it is too long or too slow."""
    if answer.status in _RETRYABLE_STATUSES:
        raise _Unavailable(f"the server answered {answer.status} {answer.reason}")
    if answer.status != 200:
        raise RowError(f"the server answered {answer.status} {answer.reason}")
    if (answer.getheader("Content-Encoding") or "identity").lower() != "identity":
        raise RowError("the server sent it compressed, although that was not requested")
    if (answer.length or 0) > max_bytes:
        raise RowError(f"{answer.length} bytes, more than the {max_bytes} allowed")
    data = bytearray()
    while chunk := answer.read1(1 << 16):
        data += chunk
        if len(data) > max_bytes:
            raise RowError(f"more than the {max_bytes} bytes allowed")
    _check_time(deadline)
    if answer.length:
        raise _Unavailable("the answer ended too soon")
    return bytes(data)


def _check_time(deadline: float) -> None:
    if time.monotonic() >= deadline:
        raise RowError(f"took longer than {WHOLE_S:g} s")
