from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem

from flux_batch.config.schema import PromptsConfig, SamplingConfig
from flux_batch.errors import SourceError, StoreRefused
from flux_batch.plan.plan import make_plan
from flux_batch.prompts import source as source_module
from flux_batch.prompts.listing import LISTING_RULES
from flux_batch.prompts.source import PromptSource
from flux_batch.records import FailedRow, FileRange, ImageRequest, InputImage, Shard
from flux_batch.storage.passthrough import as_json, passthrough_of, portable
from flux_batch.storage.store import Store
from helpers.s3 import SECRET, Bucket, S3Server

HOSTILE = [
    "plain",
    'say "cheese"',
    "two\nlines\r\nand\ttabs",
    "猫と犬 🐈‍⬛ é e\u0301 \u202eright to left",
    "p" * 2000,
    "plain",
    " leading and trailing ",
    "bell \x07",
    "'; DROP TABLE prompts; --",
    "{json} <xml/> %s $HOME \\n",
]


def read(config: PromptsConfig, shard_size: int = 4, **sampling: Any) -> list[ImageRequest | FailedRow]:
    """Plan and read a whole data set."""
    source = PromptSource(config)
    found: list[ImageRequest | FailedRow] = []
    for file in source.files():
        for rows in source.split(file, shard_size):
            part = FileRange(uri=file.uri, name=file.name, **asdict(rows))
            shard = Shard(index=0, parts=(part,))
            requests = list(source.read(shard, SamplingConfig(**sampling)))
            assert [row.row for row in requests] == list(range(rows.num_rows))
            found += requests
    return found


def write_parquet(path: Path, columns: dict[str, Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=3)
    return str(path)


def prompts_of(rows: Sequence[ImageRequest | FailedRow]) -> list[str]:
    return [row.prompt for row in rows]


# --- which files


def test_a_file_whose_name_looks_like_a_glob(tmp_path: Path) -> None:
    (tmp_path / "a[1] 100%#?.txt").write_text("odd name\n")

    rows = read(PromptsConfig(uri=str(tmp_path / "a[1] 100%#?.txt")))

    assert [(row.prompt, row.id) for row in rows] == [("odd name", "a[1] 100%#?.txt:0")]


def test_formats_may_be_mixed(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", {"prompt": ["from parquet"]})
    (tmp_path / "b.jsonl").write_text('{"prompt": "from jsonl"}\n')
    (tmp_path / "c.csv").write_text("prompt\nfrom csv\n")
    (tmp_path / "d.txt").write_text("from txt\n")

    rows = read(PromptsConfig(uri=str(tmp_path)))

    assert prompts_of(rows) == ["from parquet", "from jsonl", "from csv", "from txt"]
    assert [row.id for row in rows] == ["a.parquet:0", "b.jsonl:0", "c.csv:0", "d.txt"]


def ids_of(config: PromptsConfig, shard_size: int, rules: int = LISTING_RULES) -> list[str]:
    plan = make_plan(config, shard_size)
    source = PromptSource(config, rules)
    return [row.id for shard in plan.shards for row in source.read(shard, SamplingConfig())]


@pytest.mark.parametrize("shard_size", [1, 2, 9])
def test_the_name_of_a_file_with_one_prompt_is_its_id(tmp_path: Path, shard_size: int) -> None:
    (tmp_path / "0.txt").write_text("a long prompt\n\n")
    (tmp_path / "1.txt").write_text("a\nb\n")
    (tmp_path / "2.json").write_text('{"prompt": "c"}')
    folder = PromptsConfig(uri=str(tmp_path))

    assert ids_of(folder, shard_size) == ["0.txt", "1.txt:0", "1.txt:1", "2.json"]
    assert ids_of(folder.model_copy(update={"limit": 2}), shard_size) == ["0.txt", "1.txt:0"]
    # A run of an older version.
    assert ids_of(folder, shard_size, rules=2) == ["0.txt:0", "1.txt:0", "1.txt:1", "2.json:0"]
    assert ids_of(PromptsConfig(uri=f"{tmp_path}/0.txt"), shard_size) == ["0.txt:0"]  # the file may get a second line


@pytest.mark.parametrize("uri", ["0.txt", "./0.txt", "../{0.name}/0.txt", "{0}/0.txt", "file://{0}/0.txt"])
def test_the_id_of_a_file_does_not_depend_on_how_it_is_named(
    tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "0.txt").write_text("a long prompt\n")
    config = PromptsConfig(uri=uri.format(tmp_path))

    assert ids_of(config, 9) == ["0.txt:0"]
    assert ids_of(config, 9, rules=3) == ["0.txt:0" if uri == "{0}/0.txt" else "0.txt"]  # a run of an older version


@pytest.mark.parametrize("shard_size", [1, 2, 9])
@pytest.mark.parametrize(
    ("name", "text", "places"),
    [
        ("p.csv", 'prompt,width\n"two\nlines",16\n,16\n\nb,17\n', ["p.csv:1 (line 4)", "p.csv:2 (line 6)"]),
        ("p.csv", 'prompt,width\n"a,16\nb,16\nc,17\n', ["p.csv:0 (line 2)", "p.csv:2 (line 4)"]),
        ("p.tsv", "prompt\twidth\na\t16\n\nb\t17\n", ["p.tsv:1 (line 4)"]),
        ("p.jsonl", '\n{"prompt": "a"}\n{}\n\n{"prompt\n', ["p.jsonl:1 (line 3)", "p.jsonl:2 (line 5)"]),
        ("p.txt", "a\n\nb\0\n", ["p.txt:1 (line 3)"]),
        ("p.json", '[{"prompt": "a"},\n{}]', ["p.json:1"]),
    ],
)
def test_a_row_that_fails_is_named_with_its_line(
    tmp_path: Path, name: str, text: str, places: list[str], shard_size: int
) -> None:
    (tmp_path / name).write_text(text)

    rows = read(PromptsConfig(uri=f"{tmp_path}/{name}"), shard_size)

    assert [row.error_message.partition(": ")[0] for row in rows if isinstance(row, FailedRow)] == places


@pytest.mark.s3
@pytest.mark.parametrize("what", ["data/p.parquet", "data", "data/*.parquet", "data/p.jsonl"])
def test_prompts_in_a_bucket_are_those_on_disk(tmp_path: Path, s3_store: Bucket, what: str) -> None:
    store = Store(s3_store.uri, s3_store.storage_options)
    table = pa.table({"prompt": HOSTILE * 200, "id": [str(number) for number in range(len(HOSTILE) * 200)]})
    pq.write_table(table, tmp_path / "p.parquet", row_group_size=300, compression="none")
    store.write("data/p.parquet", tmp_path / "p.parquet")
    if not what.endswith("parquet"):
        lines = [json.dumps({"prompt": text, "id": f"j{number}"}) for number, text in enumerate(HOSTILE)]
        store.write("data/p.jsonl", "\n".join(lines).encode())
    config = PromptsConfig(uri=f"{s3_store.uri}/{what}", storage_options=s3_store.storage_options)

    rows = read(config, 500)

    expected = {"data": HOSTILE + HOSTILE * 200, "data/p.jsonl": HOSTILE}
    assert prompts_of(rows) == expected.get(what, HOSTILE * 200)
    first = PromptSource(config).files()
    assert first == PromptSource(config).files()
    store.write("data/p.jsonl" if what.endswith("jsonl") else "data/p.parquet", b"changed")
    assert PromptSource(config).files() != first


# --- what the columns mean


@pytest.mark.parametrize("name", ["p.parquet", "p.jsonl"])
@pytest.mark.parametrize("shard_size", [1, 3, 99])
def test_hostile_prompts_come_through_unchanged(tmp_path: Path, name: str, shard_size: int) -> None:
    write_parquet(tmp_path / "p.parquet", {"prompt": HOSTILE})
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in HOSTILE))

    assert prompts_of(read(PromptsConfig(uri=str(tmp_path / name)), shard_size)) == HOSTILE


def test_a_file_that_is_read_whole_is_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "p.json").write_text(json.dumps([{"prompt": str(at)} for at in range(9)]))
    opened = []
    exact = source_module.open_table
    monkeypatch.setattr(source_module, "open_table", lambda *given, **others: opened.append(given) or exact(*given))
    config = PromptsConfig(uri=str(tmp_path / "p.json"))
    source = PromptSource(config)
    plan = make_plan(config, 2)
    opened.clear()

    texts = [row.prompt for shard in plan.shards for row in source.read(shard, SamplingConfig())]

    assert texts == [str(at) for at in range(9)]
    assert len(opened) == 1


def test_the_folders_of_a_data_set_are_looked_up_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uris = [write_parquet(tmp_path / f"{number}.parquet", {"prompt": ["a"], "image": ["a.png"]}) for number in range(9)]
    config = PromptsConfig(uri=uris, columns={"input_image": "image"})
    plan, source = make_plan(config, 3), PromptSource(config)
    asked: list[str] = []
    isdir = LocalFileSystem.isdir
    monkeypatch.setattr(LocalFileSystem, "isdir", lambda fs, path: asked.append(path) or isdir(fs, path))

    rows = [row for shard in plan.shards for row in source.read(shard, SamplingConfig())]

    assert [type(row) for row in rows] == [ImageRequest] * 9
    assert len(asked) == len(uris)  # in a bucket each look is a request, and a worker reads many shards


def test_columns_are_mapped_and_override_the_defaults(tmp_path: Path) -> None:
    uri = write_parquet(
        tmp_path / "p.parquet",
        {"caption": ["a", "b"], "uid": ["x", None], "w": [64, None], "cfg": [2.5, None], "width": [16, 32]},
    )
    columns = {"prompt": "caption", "id": "uid", "width": "w", "true_cfg_scale": "cfg"}

    first, second = read(PromptsConfig(uri=uri, columns=columns), height=32)

    assert isinstance(first, ImageRequest)
    assert isinstance(second, ImageRequest)
    assert (first.id, first.prompt, first.sampling.width, first.sampling.cfg_scale) == ("x", "a", 64, 2.5)
    assert (second.id, second.prompt, second.sampling.width) == ("p.parquet:1", "b", 1024)
    assert first.sampling.height == second.sampling.height == 32


def test_csv_and_pandas_numbers_override_too(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("prompt,width,guidance_scale,seed\na,64.0,2,7\nb,,,\nc,63,,\n")
    uri = write_parquet(tmp_path / "q.parquet", {"prompt": ["d", "e"], "width": [48.0, None], "seed": [3.0, None]})

    a, b, c, d, e = read(PromptsConfig(uri=[str(tmp_path / "p.csv"), uri]))

    assert isinstance(a, ImageRequest)
    assert isinstance(b, ImageRequest)
    assert isinstance(d, ImageRequest)
    assert isinstance(e, ImageRequest)
    assert (a.sampling.width, a.sampling.embedded_guidance, a.seeds) == (64, 2.0, (7,))
    assert (b.sampling.width, d.sampling.width, d.seeds, e.sampling.width) == (1024, 48, (3,), 1024)
    assert isinstance(c, FailedRow)
    assert "width = 63" in c.error_message


# --- passthrough columns


def schema_of(config: PromptsConfig) -> pa.Schema:
    source = PromptSource(config)
    return source.passthrough_schema(source.files())


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (pa.int32(), pa.int64(), pa.int64()),
        (pa.int64(), pa.float64(), pa.float64()),
        (pa.string(), pa.large_string(), pa.string()),
        (pa.string(), pa.dictionary(pa.int8(), pa.string()), pa.string()),
        (pa.null(), pa.list_(pa.string()), pa.list_(pa.string())),
        (pa.timestamp("s"), pa.timestamp("us"), pa.timestamp("us")),
        (pa.date32(), pa.date64(), pa.date32()),
        (pa.binary(), pa.binary(4), pa.binary()),
        (pa.list_(pa.int64()), pa.large_list(pa.int64()), pa.list_(pa.int64())),
        (pa.list_(pa.int64(), 2), pa.list_(pa.int64()), pa.list_(pa.int64())),
    ],
)
def test_files_agree_on_the_type_that_holds_both(
    tmp_path: Path, first: pa.DataType, second: pa.DataType, expected: pa.DataType
) -> None:
    for name, kind in (("a", first), ("b", second)):
        write_parquet(tmp_path / f"{name}.parquet", {"prompt": ["p"], "x": pa.array([None], kind)})

    assert schema_of(PromptsConfig(uri=str(tmp_path), passthrough=("x",))) == pa.schema([("x", expected)])


def test_a_column_of_nulls_alone_agrees_with_any_type_in_json_too(tmp_path: Path) -> None:
    for name, value in (("a", None), ("b", 3), ("c", 0.5)):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": "p", "x": value}))
    config = PromptsConfig(uri=str(tmp_path), passthrough=("x",))

    assert schema_of(config) == pa.schema([("x", pa.float64())])
    alone = PromptsConfig(uri=str(tmp_path / "a.jsonl"), passthrough=("x",))
    assert schema_of(alone) == pa.schema([("x", pa.string())])


def test_files_that_disagree_are_an_error_that_names_the_column(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", {"prompt": ["p"], "x": ["text"]})
    write_parquet(tmp_path / "b.parquet", {"prompt": ["p"], "x": [1]})

    with pytest.raises(SourceError, match=r"prompts\.passthrough.*x"):
        schema_of(PromptsConfig(uri=str(tmp_path), passthrough=("x",)))


@pytest.mark.parametrize("kind", [pa.map_(pa.string(), pa.int64()), pa.list_(pa.map_(pa.string(), pa.int64()))])
def test_a_type_that_cannot_travel_is_refused_at_once(tmp_path: Path, kind: pa.DataType) -> None:
    uri = write_parquet(tmp_path / "a.parquet", {"prompt": ["p"], "x": pa.array([None], kind)})

    with pytest.raises(SourceError, match=r"a\.parquet: column 'x'.*map<.* cannot be passed through"):
        schema_of(PromptsConfig(uri=uri, passthrough=("x",)))


@pytest.mark.parametrize(
    ("kind", "value", "text"),
    [
        (pa.timestamp("ns"), 1, "1970-01-01T00:00:00.000000001"),
        (pa.timestamp("ns", "UTC"), 1000, "1970-01-01T00:00:00.000001000Z"),
        (pa.duration("ns"), 7, "7"),
        (pa.time64("ns"), 7, "00:00:00.000000007"),
        (pa.date32(), 5_000_000, "15659-07-15"),
        (pa.timestamp("s"), 300_000_000_000, "11476-08-15T05:20:00.000"),
        (pa.timestamp("us", tz="PST"), 1_000_000, "1970-01-01T00:00:01+00:00"),
        (pa.timestamp("us", tz="Europe/Berlin"), 1_000_000, "1970-01-01T01:00:01+01:00"),
    ],
    ids=str,
)
def test_times_of_any_unit_and_range_travel(tmp_path: Path, kind: pa.DataType, value: int, text: str) -> None:
    stored = pa.int32() if kind == pa.date32() else pa.int64()
    column = pa.array([value, None], stored).view(kind)
    uri = write_parquet(tmp_path / "a.parquet", {"prompt": ["p", "q"], "t": column})
    config = PromptsConfig(uri=uri, passthrough=("t",))
    (field,) = schema_of(config)

    first, second = (passthrough_of(row.passthrough, pa.schema([field]))["t"] for row in read(config))

    assert second is None
    assert pa.array([first, None], field.type).cast(kind).view(stored).to_pylist() == [value, None]  # Parquet has no s
    assert as_json(first, field.type) == text
    assert portable(field.type) == field.type


# --- bad data sets


def plan_error(uri: str, **prompts: Any) -> str:
    with pytest.raises(SourceError) as caught:
        make_plan(PromptsConfig(uri=uri, **prompts), 10)
    assert caught.value.exit_code == 2
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith((uri, "prompts."))
    return message


def test_a_missing_file_or_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.md").write_text("")

    assert "no such prompts file or folder" in plan_error(str(tmp_path / "missing.parquet"))
    assert "no prompts found; expected files with suffix .parquet, .jsonl" in plan_error(str(tmp_path / "empty"))
    assert "no prompts found" in plan_error(str(tmp_path / "*.csv"))


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "p.xlsx").write_bytes(b"PK")

    assert ".xlsx is not read: save the sheet as CSV" in plan_error(str(tmp_path / "p.xlsx"))


@pytest.mark.parametrize("name", ["p.parquet", "p.jsonl", "p.csv"])
def test_a_missing_column_is_named_with_the_key_that_names_it(tmp_path: Path, name: str) -> None:
    write_parquet(tmp_path / "p.parquet", {"text": ["a"], "prompt": ["b"]})
    (tmp_path / "p.jsonl").write_text('{"text": "a", "prompt": "b"}\n')
    (tmp_path / "p.csv").write_text("text,prompt\na,b\n")
    uri = str(tmp_path / name)

    assert "no column 'caption', which prompts.columns.prompt names" in plan_error(uri, columns={"prompt": "caption"})
    assert "no column 'uid', which prompts.columns.id names" in plan_error(uri, columns={"id": "uid"})
    assert "no column 'tag', which prompts.passthrough names" in plan_error(uri, passthrough=("tag",))


def test_a_data_set_without_a_prompt_column_says_how_to_name_it(tmp_path: Path) -> None:
    uri = write_parquet(tmp_path / "p.parquet", {"text": ["a"]})

    assert "no column 'prompt'; name yours in prompts.columns.prompt" in plan_error(uri)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("p.jsonl", '{"prompt": "a"\n', "no row of it can be read; the first one: not valid JSON: "),
        ("p.json", "[1, 2]", "no row of it can be read; the first one: neither a JSON object nor a text"),
        ("p.json", "[{}]", "no column 'prompt'; name yours in prompts.columns.prompt; it has none"),
    ],
)
def test_a_file_without_columns_says_what_is_wrong_with_its_first_row(
    tmp_path: Path, name: str, text: str, said: str
) -> None:
    (tmp_path / name).write_text(text)
    assert f"{tmp_path / name}: {said}" in plan_error(str(tmp_path / name))


@pytest.mark.parametrize("column", [[1, 2], [["a"], ["b"]], [b"a", b"b"], [1.5, None]])
def test_a_prompt_column_that_is_not_text(tmp_path: Path, column: list[Any]) -> None:
    uri = write_parquet(tmp_path / "p.parquet", {"prompt": column})

    assert "column 'prompt' holds" in plan_error(uri)


@pytest.mark.parametrize("data", [b"PAR1", b"PAR1 this is no Parquet file PAR1"])
def test_an_unreadable_parquet_file(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "bad.parquet").write_bytes(data)

    assert "not a readable Parquet file" in plan_error(str(tmp_path / "bad.parquet"))


@pytest.mark.parametrize("name", ["p.jsonl", "p.txt"])
def test_an_empty_text_file_among_others_does_no_harm(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("\n")
    (tmp_path / "q.txt").write_text("a\n")

    assert prompts_of(read(PromptsConfig(uri=str(tmp_path)))) == ["a"]


@pytest.mark.s3
@pytest.mark.parametrize("what", ["", "/data", "/data/p.parquet", "/data/*.parquet"])
def test_wrong_credentials_are_refused_without_showing_them(rclone: S3Server, what: str) -> None:
    uri = f"{rclone.make_bucket()}{what}"
    options = rclone.storage_options | {"secret": "wrong-secret-12"}

    with pytest.raises(StoreRefused, match="credentials") as caught:
        PromptSource(PromptsConfig(uri=uri, storage_options=options)).files()
    assert uri in str(caught.value)
    assert "secret" not in str(caught.value)
    assert SECRET not in repr(PromptsConfig(uri=uri, storage_options=rclone.storage_options))


def test_the_ids_of_a_folder_do_not_change_when_a_sibling_appears(tmp_path: Path) -> None:
    write_parquet(tmp_path / "set/monday/a.parquet", {"prompt": ["x"]})
    config = PromptsConfig(uri=str(tmp_path / "set"))
    before = [row.id for row in read(config)]
    write_parquet(tmp_path / "set/tuesday/a.parquet", {"prompt": ["y"]})
    assert before == ["monday/a.parquet:0"]
    assert [row.id for row in read(config)] == ["monday/a.parquet:0", "tuesday/a.parquet:0"]


def test_the_ids_of_a_glob_are_relative_to_what_is_fixed_in_it(tmp_path: Path) -> None:
    write_parquet(tmp_path / "set/monday/a.parquet", {"prompt": ["x"]})
    assert [row.id for row in read(PromptsConfig(uri=f"{tmp_path}/set/*/a.parquet"))] == ["monday/a.parquet:0"]


@pytest.mark.s3
def test_a_list_may_mix_a_disk_with_a_bucket(tmp_path: Path, moto: S3Server) -> None:
    bucket = moto.make_bucket()
    local = write_parquet(tmp_path / "a.parquet", {"prompt": ["x"]})
    Store(bucket, moto.storage_options).write("b.parquet", Path(local))
    config = PromptsConfig(uri=(local, f"{bucket}/b.parquet"), storage_options=moto.storage_options)
    assert len({row.id for row in read(config)}) == 2


# --- input images


@pytest.mark.parametrize("name", ["p.jsonl", "p.csv"])
def test_images_named_in_text_formats(tmp_path: Path, name: str) -> None:
    rows = [{"prompt": "a", "input_image": "a.png", "denoising_strength": "0.5", "sigma_shift": "3"}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "p.csv").write_text("prompt,input_image,denoising_strength,sigma_shift\na,a.png,0.5,3\n")

    (row,) = read(PromptsConfig(uri=str(tmp_path / name)))

    assert isinstance(row, ImageRequest), row
    assert row.images.input_image == InputImage(
        name="a.png", uri=str(tmp_path / "a.png"), allowed_roots=(str(tmp_path),)
    )
    assert (row.sampling.denoising_strength, row.sampling.sigma_shift) == (0.5, 3.0)
