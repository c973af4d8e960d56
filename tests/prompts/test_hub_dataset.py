"""Data sets of Hugging Face by address, with split and configuration, from a loopback hub."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flux_batch.config.schema import PromptsConfig, SamplingConfig
from flux_batch.errors import SourceError, StoreError, StoreRefused
from flux_batch.plan.plan import make_plan
from flux_batch.prompts.hub_dataset import HubDataset
from flux_batch.prompts.source import PromptSource
from helpers.hub_server import Hub, hub_server, point_at

CARD = """---
license: cc0-1.0
configs:
- config_name: large
  data_files:
  - split: train
    path: large/train-*
  - split: test
    path: [large/test.parquet]
- config_name: small
  data_dir: small
- config_name: notes
  data_files: "*.jsonl"
---
# Data
"""
FILES = ["large/train-00000.parquet", "large/train-00001.parquet", "large/test.parquet", "small/eval/a.csv"]
FILES += ["small/train/b.csv", "n.jsonl"]


def chosen(query: str, names: list[str] = FILES, card: str = CARD, root: str = "hf://datasets/o/n") -> set[str]:
    dataset = HubDataset.of(f"{root}{query}")
    assert dataset is not None
    return dataset.choose(names, card)


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("?config=large&split=train", set(FILES[:2])),
        ("/?split=test+train&config=large", set(FILES[:3])),
        ("?config=small&split=test", {"small/eval/a.csv"}),
        ("@v1?config=notes", {"n.jsonl"}),
    ],
)
def test_a_card_says_which_files_are_a_split(query: str, expected: set[str]) -> None:
    assert chosen(query) == expected


@pytest.mark.parametrize(
    ("query", "names", "expected"),
    [
        ("", ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "other.csv"], [0, 1]),
        ("?split=fold_1", ["data/fold_1-00000-of-00001.parquet", "data/fold_2-00000-of-00001.parquet"], [0]),
        ("?split=validation", ["train.csv", "my-dev.csv", "tests/x.csv"], [1]),
        ("?split=train", ["train.csv", "test.csv"], [0]),
        ("", ["prompts.txt", "more/trainer.txt", "contest.txt"], [0, 1, 2]),
        ("?config=default", ["a.csv"], [0]),
        ("@~parquet?config=c", ["c/partial-train/0000.parquet", "d/train/0000.parquet"], [0]),
        ("@refs/convert/parquet?config=d&split=test", ["d/test/0.parquet", "d/train/0.parquet"], [0]),
    ],
)
def test_names_say_it_where_no_card_does(query: str, names: list[str], expected: list[int]) -> None:
    assert chosen(query, names, "") == {names[index] for index in expected}


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("", "has the configurations large, small, notes; choose one, e.g. hf://datasets/o/n?config=large"),
        (
            "?config=large",
            "has the splits train, test; choose one, e.g. hf://datasets/o/n?config=large&split=train",
        ),
        ("?config=smal", "has no configuration 'smal'; did you mean 'small'?"),
        ("?config=large&split=dev", "has no split 'dev'; there are train, test"),
        ("?name=large", "'name' is not known after the question mark"),
    ],
)
def test_what_cannot_be_chosen_says_what_can(query: str, words: str) -> None:
    with pytest.raises(SourceError) as caught:
        chosen(query)
    assert words in str(caught.value)


def test_other_addresses_are_files_and_folders() -> None:
    for uri in ("hf://datasets/o/n/data", "hf://o/model", "s3://datasets/o/n", "hf://datasets/o/n@main/a.parquet"):
        assert HubDataset.of(uri) is None
    for uri in ("hf://datasets/o", "hf://datasets", "hf://", "hf://datasets/a b/n"):
        with pytest.raises(SourceError, match=r"must be hf://datasets/owner/name"):
            HubDataset.of(uri)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with hub_server() as server:
        point_at(server, monkeypatch, tmp_path)
        yield server


def parquet(*prompts: str) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"prompt": list(prompts)}), sink)
    return sink.getvalue()


def read(hub: Hub, uri: str, **options: Any) -> list[tuple[str, str]]:
    config = PromptsConfig(uri=uri, storage_options={"endpoint": hub.endpoint, **options})
    source = PromptSource(config)
    rows = [row for shard in make_plan(config, 2).shards for row in source.read(shard, SamplingConfig())]
    return [(row.id, row.prompt) for row in rows]


def test_a_split_is_read_from_the_hub_and_the_rest_is_said(hub: Hub) -> None:
    hub.repositories["datasets/o/n"] = {
        "README.md": CARD.encode(),
        ".gitattributes": b"",
        "large/train-00000.parquet": parquet("a", "b", "c"),
        "large/test.parquet": parquet("d"),
        "small/train/b.csv": b"prompt\ne\n",
    }
    expected = [(f"large/train-00000.parquet:{number}", text) for number, text in enumerate("abc")]

    assert read(hub, "hf://datasets/o/n?config=large&split=train") == expected
    assert read(hub, "hf://datasets/o/n@main/large/test.parquet") == [("test.parquet:0", "d")]
    assert read(hub, "hf://datasets/o/n/**/*.csv") == [("small/train/b.csv:0", "e")]
    listing = PromptSource(
        PromptsConfig(uri="hf://datasets/o/n?config=small", storage_options={"endpoint": hub.endpoint})
    ).listing()
    assert [(file.name, len(file.version)) for file in listing.files] == [("small/train/b.csv", 40)]
    assert listing.skipped == {"of another split or configuration": ["large/test.parquet", "large/train-00000.parquet"]}


def test_a_data_set_that_may_not_be_read_is_one_sentence(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories["datasets/o/gated"] = {"train.csv": b"prompt\na\n"}
    hub.gated.add("datasets/o/gated")

    with pytest.raises(SourceError, match="there is no such data set or revision, or it is private and the token"):
        read(hub, "hf://datasets/o/none")
    with pytest.raises(SourceError, match="there is no such data set or revision"):
        read(hub, "hf://datasets/o/gated@v9")
    with pytest.raises(StoreRefused, match="restricted"):
        read(hub, "hf://datasets/o/gated")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(StoreError, match="offline"):
        read(hub, "hf://datasets/o/n", token=False)
    with pytest.raises(StoreError, match="offline"):
        read(hub, "hf://datasets/o/n/a.csv", token=False)
