"""Web requests for a row: the allowed addresses, sizes and times."""

from __future__ import annotations

import ipaddress
import socket
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest

from flux_batch.errors import RowError
from flux_batch.prompts import safe_http
from flux_batch.prompts.safe_http import IpAddress, fetch, is_public
from helpers.web_server import WebServer, redirect, status, web_server

HERE = ipaddress.ip_address("127.0.0.1")


@pytest.fixture(scope="module")
def server() -> Iterator[WebServer]:
    with web_server() as running:
        yield running


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("random.uniform", lambda low, high: 0.0)


def is_here(address: IpAddress) -> bool:
    return address == HERE


def get(url: str, max_bytes: int = 1000) -> bytes:
    return fetch(url, max_bytes, is_allowed=is_here)


def refusal(url: str, max_bytes: int = 1000) -> str:
    with pytest.raises(RowError) as caught:
        get(url, max_bytes)
    return str(caught.value)


def test_a_file_arrives_as_it_is(server: WebServer) -> None:
    assert get(server.at("/a%20cat.png?x=1&y=[2]", b"meow")) == b"meow"
    assert get(server.at("/empty", b"")) == b""


def test_names_that_need_quoting_are_quoted(server: WebServer) -> None:
    server.at("/a%20%C3%BC.png?q=%C3%A9", b"quoted")
    assert get(f"{server.url}/a ü.png?q=é") == b"quoted"


def test_redirects_are_followed_a_few_times(server: WebServer) -> None:
    server.at("/there", b"found")
    assert get(server.at("/here", redirect("/there"))) == b"found"
    assert get(server.at("/full", redirect(f"{server.url}/here"))) == b"found"
    assert "more than 5 redirects" in refusal(server.at("/loop", redirect("/loop")))


@pytest.mark.parametrize("to", ["file:///etc/passwd", "ftp://127.0.0.1/x", "gopher://h/x", "//user:secret@127.0.0.1/"])
def test_a_redirect_cannot_change_the_protocol(server: WebServer, to: str) -> None:
    message = refusal(server.at("/away", redirect(to)))
    assert "not a valid HTTP address" in message or "user name or password" in message
    assert "secret" not in message


def test_a_redirect_to_the_inside_is_refused_before_it_is_asked(server: WebServer) -> None:
    port = server.url.rpartition(":")[2]
    server.at("/inside", b"secret")
    before = len(server.asked)
    message = refusal(server.at("/trap", redirect(f"http://127.0.0.2:{port}/inside")))
    assert "127.0.0.2, which is not a public address" in message
    assert server.asked[before:] == ["/trap"]


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "0x7f.1", "2130706433", "0.0.0.0", "[::1]", "[::ffff:127.0.0.1]", "127.1"]
)
def test_this_machine_is_never_asked(server: WebServer, host: str) -> None:
    port = server.url.rpartition(":")[2]
    before = len(server.asked)
    with pytest.raises(RowError, match=r"not a public address|cannot be resolved"):
        fetch(f"http://{host}:{port}/x", 1000)
    assert server.asked[before:] == []


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("64:ff9b::808:808", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.100.100.200", False),
        ("168.63.129.16", False),
        ("192.0.0.192", False),
        ("198.18.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("240.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("::", False),
        ("fe80::1", False),
        ("fd00:ec2::254", False),
        ("fec0::1", False),
        ("ff02::1", False),
        ("::ffff:8.8.8.8", False),
        ("::127.0.0.1", False),
        ("2002:7f00:1::", False),
        ("2001:0:7f00:1::", False),
        ("64:ff9b::7f00:1", False),
        ("64:ff9b::a9fe:a9fe", False),
    ],
)
def test_public_is_what_the_internet_routes(address: str, expected: bool) -> None:
    assert is_public(ipaddress.ip_address(address)) is expected


def resolves_to(*addresses: str) -> Any:
    def getaddrinfo(host: str, port: int, **_: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    return getaddrinfo


def test_one_bad_address_of_a_name_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", resolves_to("8.8.8.8", "169.254.169.254"))
    with pytest.raises(RowError, match=r"images\.example: is 169\.254\.169\.254, which is not a public address"):
        fetch("http://images.example/x.png", 1000)


def test_the_address_that_was_looked_at_is_the_one_that_is_asked(
    server: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host name that resolves differently the second time gains no access."""
    answers = iter([resolves_to("127.0.0.1"), resolves_to("127.0.0.66")])
    resolve = socket.getaddrinfo
    looked_up = []

    def rebinding(host: str, port: int, *args: Any, **kwargs: Any) -> Any:
        if host[0].isdigit():
            return resolve(host, port, *args, **kwargs)
        looked_up.append(host)
        return next(answers)(host, port)

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    server.at("/x", b"right")
    port = server.url.rpartition(":")[2]
    assert get(f"http://rebind.example:{port}/x") == b"right"
    assert looked_up == ["rebind.example"]


@pytest.mark.parametrize(
    ("url", "port"),
    [
        ("http://[2606:4700::1111]/x", 80),
        ("https://[2606:4700::6810:85e5]/x", 443),
        ("http://[2606:4700::1111]:8080/x", 8080),
    ],
)
def test_the_end_of_an_address_is_no_port(monkeypatch: pytest.MonkeyPatch, url: str, port: int) -> None:
    asked: list[tuple[str, int]] = []

    def resolve(host: str, port: int, **others: Any) -> Any:
        asked.append((host, port))
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with pytest.raises(RowError, match="cannot be resolved"):
        fetch(url, 1000)
    assert set(asked) == {(url.partition("[")[2].partition("]")[0], port)}


@pytest.mark.parametrize(
    "url",
    ["http:///x", "https://", "http://h:port/", "http://[::1/", "ftp://h/x", "x.png", "http://a@h/", "http://:p@h"],
)
def test_addresses_that_are_none(url: str) -> None:
    assert "address" in refusal(url)


def test_a_password_is_not_repeated() -> None:
    assert "hunter2" not in refusal("http://me:hunter2@127.0.0.1/x.png")


def test_too_much_is_refused_whether_announced_or_not(server: WebServer) -> None:
    assert get(server.at("/fits", b"x" * 100), 100) == b"x" * 100
    assert "101 bytes, more than the 100 allowed" in refusal(server.at("/large", b"x" * 101), 100)

    def endless(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.end_headers()
        for _ in range(1000):
            request.wfile.write(b"x" * 1000)

    assert "more than the 5000 bytes allowed" in refusal(server.at("/endless", endless), 5000)


def test_other_answers_say_what_they_were(server: WebServer) -> None:
    assert "the server answered 404" in refusal(f"{server.url}/none")
    assert "the server answered 204" in refusal(server.at("/nothing", status(204)))
    assert "compressed, although that was not" in refusal(server.at("/gzip", status(200, Content_Encoding="gzip")))


def test_a_moody_server_is_asked_again(server: WebServer) -> None:
    count = 0

    def moody(request: BaseHTTPRequestHandler) -> None:
        nonlocal count
        count += 1
        status(503 if count < 3 else 200)(request)

    assert get(server.at("/moody", moody)) == b"body"
    assert count == 3
    before = len(server.asked)
    assert "the server answered 500" in (message := refusal(server.at("/broken", status(500))))
    assert "tried 3 times" in message
    assert len(server.asked) - before == 3
    before = len(server.asked)
    refusal(f"{server.url}/none")
    assert len(server.asked) - before == 1


def test_an_answer_that_ends_too_soon_is_no_file(server: WebServer) -> None:
    def short(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.send_header("Content-Length", "100")
        request.end_headers()
        request.wfile.write(b"half")

    assert "ended too soon; tried 3 times" in refusal(server.at("/short", short))


@pytest.mark.parametrize("where", ["headers", "body"])
def test_an_answer_that_never_ends_is_cut(server: WebServer, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    monkeypatch.setattr(safe_http, "WHOLE_S", 0.5)

    def dripping(request: BaseHTTPRequestHandler) -> None:
        request.wfile.write(b"HTTP/1.0 200 OK\r\n" + (b"\r\n" if where == "body" else b"X-A: "))
        while True:  # until the other side closes
            time.sleep(0.05)
            try:
                request.wfile.write(b"x")
                request.wfile.flush()
            except OSError:
                return

    assert "took longer than 0.5 s" in refusal(server.at(f"/drip/{where}", dripping))


def test_nobody_there() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        assert "no answer: " in refusal(f"http://127.0.0.1:{port}/x.png")


def test_https_checks_the_certificate(server: WebServer) -> None:
    url = server.url.replace("http:", "https:")
    assert "no answer: " in refusal(f"{url}/x.png")
