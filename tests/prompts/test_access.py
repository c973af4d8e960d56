"""The images that a row may name: beside its prompts, under the job's root, or on the web if allowed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flux_batch.config.schema import PromptsConfig
from flux_batch.errors import RowError
from flux_batch.prompts.access import ImageAccess, is_inside, scheme_of


def places(file: str, uri: str | list[str] = "", **prompts: Any) -> ImageAccess:
    return ImageAccess(PromptsConfig(uri=uri or file, **prompts), file)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data set: data/set/sub/p.jsonl, with images beside it and in folders above it."""
    folder = tmp_path / "data"
    (folder / "set" / "sub").mkdir(parents=True)
    (folder / "set" / "sub" / "p.jsonl").touch()
    return folder


def refusal(of: ImageAccess, name: str) -> str:
    with pytest.raises(RowError) as caught:
        of.find(name)
    return str(caught.value)


@pytest.mark.parametrize(
    ("uri", "name", "expected"),
    [
        ("set/sub/p.jsonl", "a.png", "set/sub/a.png"),
        ("set/sub/p.jsonl", "./more/a.png", "set/sub/more/a.png"),
        ("set/sub/p.jsonl", "more/../a.png", "set/sub/a.png"),
        ("set/sub/p.jsonl", "a b%20#?[1].png", "set/sub/a b%20#?[1].png"),
        ("set", "../a.png", "set/a.png"),
        ("set/", "../other/a.png", "set/other/a.png"),
        ("set/*/p.jsonl", "../a.png", "set/a.png"),
        ("set/**/*.jsonl", "../a.png", "set/a.png"),
    ],
)
def test_a_path_is_relative_to_its_prompts_file(data: Path, uri: str, name: str, expected: str) -> None:
    found = places(str(data / "set/sub/p.jsonl"), f"{data}/{uri}").find(name)

    assert (found.name, found.uri) == (name, str(data / expected))
    assert found.allowed_roots is not None


@pytest.mark.parametrize(
    ("uri", "name"),
    [
        ("set/sub/p.jsonl", "../a.png"),
        ("set/sub/p.jsonl", "a/../../sub/../a.png"),
        ("set", "../../a.png"),
        ("set", "../../set2/a.png"),
        ("set/*/p.jsonl", "../../a.png"),
        ("set", "../../../../../../../../etc/passwd"),
        ("set/sub/p.jsonl", "."),
        ("set/sub/p.jsonl", "../sub"),
    ],
)
def test_a_path_may_not_leave_the_data_set(data: Path, uri: str, name: str) -> None:
    message = refusal(places(str(data / "set/sub/p.jsonl"), f"{data}/{uri}"), name)

    assert message.startswith(f"input_image {name}: leads out of {data}/set")


def test_the_folder_of_another_entry_of_the_list_is_another(data: Path) -> None:
    file = str(data / "set/sub/p.jsonl")
    (data / "p.txt").touch()

    assert "leads out of" in refusal(places(file, [file, str(data / "p.txt")]), "../../a.png")


@pytest.mark.parametrize("name", ["/etc/passwd", "file:///etc/passwd", "FILE:///etc/passwd", "//etc/passwd"])
def test_an_absolute_path_needs_a_root_that_holds_it(data: Path, name: str) -> None:
    file = str(data / "set/sub/p.jsonl")

    assert "only under prompts.input_image_root, which is not set" in refusal(places(file), name)
    assert f"which is {data}" in refusal(places(file, input_image_root=str(data)), name)


@pytest.mark.parametrize("name", ["{}/images/a.png", "file://{}/images/a.png", "file://localhost{}/images/a.png"])
@pytest.mark.parametrize("root", ["{}/images", "{}/images/", "file://{}/images", "{}/other/../images"])
def test_absolute_paths_under_the_root(data: Path, name: str, root: str) -> None:
    found = places(str(data / "set/sub/p.jsonl"), input_image_root=root.format(data)).find(name.format(data))

    assert found.uri == f"{data}/images/a.png"
    assert found.allowed_roots == (f"{data}/images",)


@pytest.mark.parametrize("name", ["{}/images2/a.png", "{}/images/../a.png", "file://host{}/images/a.png"])
def test_names_that_only_look_like_the_root(data: Path, name: str) -> None:
    of = places(str(data / "set/sub/p.jsonl"), input_image_root=str(data / "images"))

    refusal(of, name.format(data))


@pytest.mark.parametrize("url", ["http://example.com/a.png", "https://example.com/a.png?b=c", "HTTPS://example.com/a"])
def test_the_web_only_where_the_job_file_allows_it(data: Path, url: str) -> None:
    file = str(data / "set/sub/p.jsonl")

    assert places(file, allow_http=True).find(url).uri == url
    assert "only if prompts.allow_http is true" in refusal(places(file), url)


def test_a_password_in_an_address_is_refused(data: Path) -> None:
    of = places(str(data / "set/sub/p.jsonl"), allow_http=True)

    assert "user name or password" in refusal(of, "https://me:hush@example.com/a.png")


@pytest.mark.parametrize(
    "name", ["s3://bucket/a.png", "gs://bucket/a.png", "memory://a.png", "local:///etc/passwd", "data://a", "ftp://h/a"]
)
def test_other_stores_only_where_the_data_set_lies(data: Path, name: str) -> None:
    message = refusal(places(str(data / "set/sub/p.jsonl"), allow_http=True), name)

    assert (
        f"a row may name {scheme_of(name)}:// only if its prompts, or prompts.input_image_root, lie in such" in message
    )


def test_a_root_may_be_a_store(data: Path) -> None:
    of = places(str(data / "set/sub/p.jsonl"), input_image_root="s3://bucket/images")

    assert of.find("s3://bucket/images/a.png").uri == "s3://bucket/images/a.png"
    for name in ("s3://bucket/other/a.png", "s3://bucket/images/../a.png", "s3://bucket/images2/a.png"):
        refusal(of, name)


def test_beside_prompts_in_a_store() -> None:
    import fsspec

    fs = fsspec.filesystem("memory")
    fs.pipe("/places/set/sub/p.jsonl", b"{}")
    of = places("memory://places/set/sub/p.jsonl", "memory://places/set")

    assert of.find("a.png").uri == "memory:///places/set/sub/a.png"
    assert of.find("../a.png").uri == "memory:///places/set/a.png"
    assert of.find("memory://elsewhere/a.png").uri == "memory://elsewhere/a.png"
    for name in ("../../a.png", "/a.png", "memory://x/../a.png", "simplecache::memory://a.png", "s3://bucket/a.png"):
        refusal(of, name)


@pytest.mark.parametrize("name", ["x" * 5000, "a\0.png"])
def test_what_is_no_name(data: Path, name: str) -> None:
    message = refusal(places(str(data / "set/sub/p.jsonl")), name)

    assert "not a path or an address" in message
    assert len(message) < 200


@given(st.text("./a:~\\% \n", max_size=20))
def test_whatever_a_row_names_lies_in_the_data_set(name: str) -> None:
    of = places("/no/such/set/p.jsonl")
    try:
        found = of.find(name)
    except RowError:
        return
    assert is_inside(found.uri, "/no/such/set")
    assert ".." not in found.uri.split("/")
