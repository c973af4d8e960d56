"""Listings of repositories from a server with the HTTP APIs of both hubs."""

from __future__ import annotations

import hashlib

import pytest
from huggingface_hub import constants

from flux_batch.download.hub import HubUri, is_repository_name, list_huggingface, list_modelscope
from helpers.hub_server import COMMIT, TOKEN, Hub

NAME = "black-forest-labs/FLUX.1-dev"
FILES = {"flux1-dev.safetensors": b"weights" * 9, "vae/config.json": b'{"a b": 1}'}
LISTERS = [list_huggingface, list_modelscope]


@pytest.fixture(autouse=True)
def repository(hub: Hub) -> None:
    hub.repositories[NAME] = dict(FILES)


def test_huggingface_tells_names_sizes_and_hashes_of_one_commit(hub: Hub) -> None:
    weights, config = list_huggingface(NAME).files
    assert (weights.name, weights.size) == ("flux1-dev.safetensors", 63)
    assert (weights.sha256, weights.git_sha1) == (hashlib.sha256(b"weights" * 9).hexdigest(), "")
    assert config.git_sha1 == hashlib.sha1(b'blob 10\0{"a b": 1}').hexdigest()
    assert config.sha256 == ""
    assert config.url == f"{hub.endpoint}/{NAME}/resolve/{COMMIT}/vae/config.json"


def test_modelscope_tells_names_sizes_and_hashes(hub: Hub) -> None:
    weights, config = list_modelscope(NAME).files
    assert (weights.name, weights.size, config.size) == ("flux1-dev.safetensors", 63, 10)
    assert weights.sha256 == hashlib.sha256(b"weights" * 9).hexdigest()
    assert config.url == f"{hub.endpoint}/api/v1/models/{NAME}/repo?Revision=master&FilePath=vae%2Fconfig.json"


def test_a_gated_repository_says_where_its_licence_is(hub: Hub) -> None:
    hub.gated.add(NAME)
    with pytest.raises(ValueError, match=rf"{NAME} is gated: log in at {hub.endpoint}/{NAME}, accept its licence"):
        list_huggingface(NAME)
    with pytest.raises(ValueError, match="is gated"):
        list_huggingface(NAME, token="hf_of-someone-else")
    assert list_huggingface(NAME, token=TOKEN).headers == {"Authorization": f"Bearer {TOKEN}"}


@pytest.mark.parametrize(("key", "lister"), [("HF_TOKEN", LISTERS[0]), ("MODELSCOPE_API_TOKEN", LISTERS[1])])
def test_the_token_of_the_environment_is_sent(
    hub: Hub, key: str, lister: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(key, TOKEN)
    assert lister(NAME).headers == {"Authorization": f"Bearer {TOKEN}"}
    assert {request.headers["Authorization"] for request in hub.requests} >= {f"Bearer {TOKEN}"}
    assert lister(NAME, token="mine").headers == {"Authorization": "Bearer mine"}


@pytest.mark.parametrize("lister", LISTERS)
def test_a_missing_repository_is_an_error(hub: Hub, lister: type) -> None:
    with pytest.raises(ValueError, match=f"{hub.endpoint}/.*nobody/nothing.*no such repository"):
        lister("nobody/nothing")


def test_a_revision_that_is_not_there_is_said(hub: Hub) -> None:
    with pytest.raises(ValueError, match="has no revision v9"):
        list_huggingface(NAME, "v9")


@pytest.mark.parametrize("lister", LISTERS)
@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_hub_may_be_asked_again(hub: Hub, lister: type, status: int) -> None:
    hub.statuses = [status] * 9
    with pytest.raises(ConnectionError, match=f"answered {status} for {hub.endpoint}/.*{NAME}"):
        lister(NAME)


@pytest.mark.parametrize("lister", LISTERS)
def test_a_hub_that_cannot_be_reached_is_named(lister: type, monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("HF_ENDPOINT", "MODELSCOPE_ENDPOINT"):
        monkeypatch.setenv(key, "http://127.0.0.1:1")
    with pytest.raises(ConnectionError, match=r"http://127.0.0.1:1/.* cannot be reached"):
        lister(NAME)


def test_offline_is_offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE forbids"):
        list_huggingface(NAME)
    assert hub.requests == []


def test_another_server_at_the_endpoint_is_said(hub: Hub) -> None:
    hub.statuses = [200] * 3
    with pytest.raises(ConnectionError, match="not JSON"):
        list_modelscope(NAME)


def test_hub_addresses() -> None:
    assert HubUri.parse("hf://a/b") == HubUri("a/b", "main", "")
    assert HubUri.parse("a/b@v1") == HubUri("a/b", "v1", "")
    assert HubUri.parse("hf://a/b@v1/vae/x.safetensors") == HubUri("a/b", "v1", "vae/x.safetensors")
    for wrong in ("hf://a", "hf://", "hf://a/..", "hf://../b", "hf://a/b c"):
        with pytest.raises(ValueError, match="must be hf://owner/repository"):
            HubUri.parse(wrong)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a/b", True), ("a/b@main", True), ("a", False), ("a/b/c", False), ("../b", False), ("./b", False), ("/b", False)],
)
def test_repository_names(text: str, expected: bool) -> None:
    assert is_repository_name(text) is expected
