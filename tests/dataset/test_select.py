"""Selections: the right images with the right reasons, the same each time, and clear errors."""

from __future__ import annotations

import io
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flux_batch.dataset.select.near import near_embeddings, near_hashes
from flux_batch.dataset.select.select import Criteria, Selected, select
from flux_batch.dataset.select.selection import read_selection
from flux_batch.errors import JobError
from flux_batch.report.verify import verify
from flux_batch.storage.store import Store
from helpers.annotated import put_annotations
from helpers.finished_runs import command, finish
from helpers.job_files import make_job, metadata

NUM_ROWS = 40
ANIMALS = ("cat", "dog", "heron")
NO_SCORE = 9
FAILED = 5
COLUMNS = pa.schema([("similarity", pa.float32()), ("embedding", pa.list_(pa.float32()))])


def number_of(row: Any) -> int:
    return int(row["prompt"].split()[1])


def score(number: int) -> float:
    return (number * 7 % NUM_ROWS) / NUM_ROWS


def of_clip(row: Any) -> dict[str, Any] | None:
    """Return score and embedding: every fifth image looks like the previous one; one has no score, one NaN."""
    number = number_of(row)
    if number == NO_SCORE:
        return None
    like = number - (number % 5 == 1)
    vector = np.random.default_rng(like).normal(size=16).tolist()
    return {"similarity": float("nan") if number == 8 else score(number), "embedding": vector}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    rows = [
        {"prompt": f"image {number}" + (" [raise]" if number == FAILED else ""), "animal": ANIMALS[number % 3]}
        for number in range(NUM_ROWS)
    ]
    config = make_job(
        tmp_path_factory.mktemp("run"),
        rows,
        prompts={"passthrough": ["animal"]},
        output={"shard_size": 16},
        failures={"max_ratio": 1.0},
    )
    finish(config)
    store = Store(config.output.uri)
    put_annotations(store, "clip", COLUMNS, of_clip)
    hashes = {number: random.Random(number - number % 4).getrandbits(64) ^ (number % 4) for number in range(NUM_ROWS)}
    put_annotations(store, "phash", pa.schema([("phash", pa.uint64())]), lambda row: {"phash": hashes[number_of(row)]})
    return store


def chosen(store: Store, **criteria: Any) -> tuple[Selected, list[int], pa.Table]:
    """Make a selection. Returns: the outcome, the numbers of the chosen images, and the selection."""
    selected = select(store, "try", Criteria(**criteria), replace=True)
    table = read_selection(store, "try")
    assert selected.num_chosen == table.num_rows
    assert selected.num_rows == selected.num_chosen + sum(selected.left_out.values())
    return selected, [int(key[:5]) * 16 + int(key[5:]) for key in table["key"].to_pylist()], table


MADE = [number for number in range(NUM_ROWS) if number != FAILED]
SCORED = [number for number in MADE if number not in (NO_SCORE, 8)]


def best(numbers: list[int], most: int) -> list[int]:
    return sorted(sorted(numbers, key=lambda number: (-score(number), number))[:most])


def test_an_expression_reaches_metadata_and_annotations(store: Store) -> None:
    selected, numbers, table = chosen(store, where="clip.similarity > 0.5 AND animal = 'cat'")
    assert numbers == [number for number in MADE if number % 3 == 0 and number != NO_SCORE and score(number) > 0.5]
    left_out = {"failed to be made": 1, "without a value for --where": 1, "not as --where says": 38 - len(numbers)}
    assert selected.left_out == left_out
    assert set(table["split"].to_pylist()) == {"train"}
    assert set(table["reason"].to_pylist()) == {"clip.similarity > 0.5 AND animal = 'cat'"}
    assert numbers == chosen(store, where="SIMILARITY > 0.5 and metadata.animal in ('cat')")[1]


def test_columns_that_differ_in_large_letters_alone_are_told_apart(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "Seed": seed, "seed": 7, "ordinal": "x"} for seed in (1.0, 2.0, float("nan"))]
    config = make_job(tmp_path, rows, prompts={"passthrough": ["Seed", "ordinal"]}, output={"shard_size": 16})
    finish(config)
    run = Store(config.output.uri)

    assert chosen(run, where="Seed_ > 1 AND seed = 7")[1] == [1]
    assert chosen(run, where="ordinal_ = 'x'")[1] == [0, 1, 2]
    with pytest.raises(
        JobError, match="write Seed_ for the column 'Seed', since an expression cannot distinguish it from 'seed'"
    ):
        chosen(run, where="Seed > 1")
    with pytest.raises(JobError, match=r"write ordinal_ for the column 'ordinal', .* the order of the images"):
        chosen(run, where="ordinal = 'x'")


def test_nan_is_no_value(store: Store) -> None:
    selected, numbers, _ = chosen(store, where="similarity > 0")
    assert numbers == [number for number in SCORED if score(number) > 0]
    assert selected.left_out["without a value for --where"] == 2
    assert chosen(store, where="similarity IS NULL")[1] == sorted([NO_SCORE, 8])
    assert 8 not in chosen(store, where="coalesce(similarity, -1) >= 0")[1]


def test_a_quantile_is_a_window_over_the_images_that_were_made(store: Store) -> None:
    values = [score(number) for number in MADE if number != NO_SCORE and number != 8]
    cut = float(np.quantile(values, 0.75))
    where = "similarity >= quantile_cont(similarity, 0.75) OVER ()"
    assert chosen(store, where=where)[1] == [number for number in SCORED if score(number) >= cut]


def test_the_best_are_kept_also_of_each_group(store: Store) -> None:
    selected, numbers, table = chosen(store, by="similarity", top=5)
    assert numbers == best(SCORED, 5)
    assert selected.left_out == {
        "failed to be made": 1,
        "without a value for --by": 2,
        "below the top 5": len(SCORED) - 5,
    }
    ranks = sorted(table["reason"].to_pylist())
    assert ranks == [f"rank {number} by similarity" for number in range(1, 6)]

    _, numbers, table = chosen(store, by="similarity", top=2, within="animal")
    groups = [[number for number in SCORED if number % 3 == place] for place in range(3)]
    assert numbers == sorted(number for group in groups for number in best(group, 2))
    assert "rank 1 by similarity in heron" in table["reason"].to_pylist()
    assert chosen(store, by="-similarity", top=1)[1] == [min(SCORED, key=score)]


def test_of_near_duplicates_the_best_stays(store: Store) -> None:
    selected, numbers, table = chosen(store, dedup="phash", by="similarity")
    groups = [[number for number in MADE if number // 4 == group] for group in range(10)]
    rank = {number: (number not in SCORED, -score(number), number) for number in MADE}
    assert numbers == sorted(min(group, key=lambda number: rank[number]) for group in groups)
    assert selected.left_out["near-duplicates by phash"] == 39 - 10
    assert Counter(table["reason"].to_pylist()) == {"best of 4 near-duplicates": 9, "best of 3 near-duplicates": 1}
    assert len(chosen(store, dedup="phash", distance=1)[1]) == 20

    selected, numbers, _ = chosen(store, dedup="clip.embedding")
    likes = {number for number in MADE if number % 5 == 1 and number - 1 in MADE}
    assert numbers == [number for number in MADE if number not in likes | {NO_SCORE}]
    assert selected.left_out["without a value for --dedup clip.embedding"] == 1


def test_equal_embeddings_are_near_at_no_distance() -> None:
    vectors = np.repeat(np.random.default_rng(0).normal(size=(200, 512)).astype(np.float32), 2, axis=0)
    assert near_embeddings(vectors, 0.0).tolist() == [2 * (number // 2) for number in range(400)]


@pytest.mark.parametrize("num", [1, 700, 1500])
def test_what_is_dropped_is_near_to_what_stays_and_nothing_else_is(num: int) -> None:
    # With blocks of 512: one block, two blocks, and images beyond the first comparison.
    dice = np.random.default_rng(num)
    hashes = dice.choice(dice.integers(0, 2**64, 60, np.uint64), num) ^ (
        np.uint64(1) << dice.integers(0, 64, num).astype(np.uint64)
    )
    vectors = dice.normal(size=(num, 3)).astype(np.float32)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    for found, near in (
        (near_hashes(hashes, 2), lambda i, j: np.bitwise_count(hashes[i] ^ hashes[j]) <= 2),
        (near_embeddings(vectors, 0.02), lambda i, j: unit[i] @ unit[j].T >= 0.98),
    ):
        stays = np.flatnonzero(found == np.arange(num))
        assert all(near(i, found[i]) and found[i] <= i and found[i] in stays for i in range(num))
        assert not any(near(i, j) for i in stays for j in stays if i < j)


def test_keys_come_from_a_file_of_any_kind(store: Store, tmp_path: Path) -> None:
    keys = ["000000001", "000010003"]
    pq.write_table(pa.table({"key": keys}), tmp_path / "keys.parquet")
    texts = {
        "keys.txt": "000000001\r\n\n 000010003\n",
        "keys.csv": "note,key\ngood,000000001\n,000010003\n",
        "keys.json": json.dumps([{"key": "000000001"}, "000010003"]),
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    for name in [*texts, "keys.parquet"]:
        assert chosen(store, keys=str(tmp_path / name))[1] == [1, 19]
    (tmp_path / "keys.txt").write_text("000000001\n777770001\n")
    with pytest.raises(JobError, match=r"keys.txt: 1 key not of this run: '777770001'"):
        chosen(store, keys=str(tmp_path / "keys.txt"))
    with pytest.raises(JobError, match=r"none.txt: there is no such file"):
        chosen(store, keys=str(tmp_path / "none.txt"))


def test_a_run_of_too_few_images_has_no_more(tmp_path: Path) -> None:
    config = make_job(tmp_path, [{"prompt": "a"}])
    finish(config)

    with pytest.raises(JobError, match=r"--take 3: 1 image left, 2 too few: the run has no more"):
        chosen(Store(config.output.uri), take=3)


def test_exactly_so_many_are_taken_or_a_sentence_says_how_many_are_there(store: Store) -> None:
    first = chosen(store, take=10)[1]
    assert len(first) == 10
    assert first == chosen(store, take=10)[1]
    assert set(first) < set(chosen(store, take=11)[1])
    with pytest.raises(JobError, match=r"--take 30: 12 images left, 18 too few: 1 failed .*, 27 not as --where"):
        chosen(store, where="animal = 'heron'", take=30)
    with pytest.raises(JobError, match=r"no image is left: 1 failed to be made, 39 not as --where says"):
        chosen(store, where="animal = 'newt'")


def test_splits_are_of_rows_and_of_each_group_in_proportion(store: Store) -> None:
    split = {"train": 0.5, "test": 0.5}
    _, numbers, table = chosen(store, split=split)
    places = dict(zip(numbers, table["split"].to_pylist(), strict=True))
    assert 10 <= list(places.values()).count("test") <= 30
    # An image stays in its split, even if other images are chosen.
    _, numbers, table = chosen(store, split=split, where="animal = 'dog'")
    assert dict(zip(numbers, table["split"].to_pylist(), strict=True)) == {n: places[n] for n in numbers}

    selected, numbers, table = chosen(store, split={"train": 0.75, "test": 0.25}, stratify="animal")
    counts = Counter((number % 3, split) for number, split in zip(numbers, table["split"].to_pylist(), strict=True))
    assert counts == {
        (0, "train"): 10,
        (0, "test"): 4,
        (1, "train"): 10,
        (1, "test"): 3,
        (2, "train"): 9,
        (2, "test"): 3,
    }
    assert selected.splits == {"train": 29, "test": 10}


def test_images_of_a_row_share_a_split_though_their_groups_differ(tmp_path: Path) -> None:
    rows = [{"prompt": f"image {number}"} for number in range(NUM_ROWS)]
    config = make_job(tmp_path, rows, sampling={"num_images_per_prompt": 4}, output={"shard_size": 16})
    finish(config)
    store = Store(config.output.uri)
    ids = {row["key"]: row["id"] for row in metadata(config)}
    split = {"train": 0.75, "test": 0.25}
    for stratify in ("seed % 3", "image_index", "CASE WHEN image_index > 0 THEN seed % 3 END"):
        selected = select(store, "try", Criteria(split=split, stratify=stratify), replace=True)
        table = read_selection(store, "try").to_pydict()
        splits: dict[str, set[str]] = {}
        for key, name in zip(table["key"], table["split"], strict=True):
            splits.setdefault(ids[key], set()).add(name)
        assert (len(splits), {len(names) for names in splits.values()}) == (NUM_ROWS, {1})
        # Three groups, each exact to within a row of four images.
        assert abs(selected.splits["test"] - NUM_ROWS) <= 3 * 4
    assert selected.splits == {"train": 3 * NUM_ROWS, "test": NUM_ROWS}  # only the first images have a group


BAD = [
    (
        {"where": "similrity > 0.5"},
        r"'similrity > 0.5': there is no column \"similrity\"; near it are .*\"similarity\".*flux-batch annotate",
    ),
    ({"where": 'animal = "cat"'}, r"""there is no column "cat"; .*; a text is in single quotes, as 'cat'"""),
    ({"where": "similarity >"}, "is no expression"),
    ({"where": "similarity"}, "is a FLOAT; it must be true or false"),
    ({"where": " "}, "' ': must be one expression"),
    ({"top": 5, "by": "-- similarity"}, "must be one expression"),
    ({"where": "avg(similarity) > 0.5"}, r"written with OVER \(\)"),
    ({"where": "true) FROM metadata; DROP TABLE metadata; --"}, "is no expression"),
    ({"where": "1 = 1) AS x, (key = '1'"}, "must be one expression"),
    ({"where": "(SELECT count(*) FROM read_csv('/etc/passwd')) > 0"}, "must not have a SELECT"),
    ({"where": "random() > 0.5"}, r"random\(\) has another value each time"),
    ({"where": "prompt::INTEGER > 5"}, "cannot be computed: Could not convert"),
    ({"where": "error_type IS NULL"}, "Ambiguous"),
    ({"by": "similarity"}, "--by needs --top or --dedup"),
    ({"top": 5}, "--top needs --by"),
    ({"top": 0, "by": "seed"}, "--top 0: must be 1 or more"),
    ({"within": "animal"}, "--within needs --top"),
    ({"distance": 3.0}, "needs --dedup"),
    ({"dedup": "animal"}, "'cat' is no hash of 64 bits"),
    ({"dedup": "similarity"}, "must hold hashes of 64 bits, or embeddings"),
    ({"split": {"train": 0.9, "test": 0.2}}, "add up to 1"),
]


@pytest.mark.parametrize(("criteria", "sentence"), BAD, ids=[str(next(iter(each[0].values()))) for each in BAD])
def test_what_cannot_be_is_one_sentence(store: Store, criteria: dict[str, Any], sentence: str) -> None:
    with pytest.raises(JobError, match=sentence) as raised:
        select(store, "bad", Criteria(**criteria))
    assert "\n" not in str(raised.value)
    assert not store.exists("_run/selections/bad.parquet")


def test_a_selection_is_written_once_and_is_no_leftover(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["select", store.uri, "cats", "--where", "animal = 'cat'", "--split", "train=0.9,test=0.1"]
    code, said = command(capsys, *arguments)
    assert code == 0
    lines = said.splitlines()
    assert lines[0].split() == ["images", "of", "the", "run", "40"]
    assert [line.split()[-1] for line in lines[1:4]] == ["1", "25", "14"]
    assert lines[-1] == "selection cats: written"
    before = store.read("_run/selections/cats.parquet")
    assert command(capsys, *arguments)[1].splitlines()[-1] == "selection cats: the same is there already"
    code, said = command(capsys, *arguments[:4], "animal = 'dog'")
    assert (code, "where is \"animal = 'cat'\" there" in said, "--replace" in said) == (2, True, True)
    assert store.read("_run/selections/cats.parquet") == before

    code, said = command(capsys, *arguments[:4], "animal = 'dog'", "--replace", "--json")
    assert (code, json.loads(said)["num_chosen"]) == (0, 13)
    made_by = json.loads(pq.read_schema(io.BytesIO(store.read("_run/selections/cats.parquet"))).metadata[b"flux_batch"])
    assert made_by["criteria"]["where"] == "animal = 'dog'"
    assert command(capsys, "gc", store.uri, "--dry-run")[1] == "nothing to remove\n"
    assert verify(store, quick=True).problems == []
    for name, sentence in (("a/b", "letters, digits"), ("cat", "did you mean 'cats'")):
        with pytest.raises(JobError, match=sentence):
            read_selection(store, name)


def test_a_number_is_a_share_of_a_split(capsys: pytest.CaptureFixture[str], store: Store) -> None:
    for text in ("train=0.9,test", "train=1.5", "a-b=1", "train=0.5,train=0.5", "all=1"):
        code, said = command(capsys, "select", store.uri, "x", "--split", text)
        assert (code, "must be a name and a share" in said) == (2, True)
