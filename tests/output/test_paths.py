from pathlib import Path

from flux_batch.output.paths import METADATA, TRAIN, RunFolder, image_key, is_within, number_in, shard_name
from flux_batch.storage.store import Store


def test_names_of_shards_and_images_sort_and_have_no_dots() -> None:
    assert shard_name(7, 8) == shard_name(7, 100_000) == "00007"
    assert shard_name(7, 100_001) == "000007"
    assert image_key("00007", 12, 0) == "000070012"
    assert image_key("00007", 12, 3) == "000070012_3"
    assert shard_name(99_999, 100_000) == "99999"


def test_only_a_whole_number_names_a_shard(tmp_path: Path) -> None:
    assert number_in("00012.json", ".json") == number_in("00012") == 12
    for name in ("00012", "12a.json", ".json", "00012.json.json", "-1.json"):
        assert number_in(name, ".json") is None

    run = RunFolder(Store(str(tmp_path)), 3)
    assert run.shard_of("00002.parquet", ".parquet") == run.shard_of(run.shard_name(2)) == 2
    assert [run.shard_of(name) for name in ("00003", "2", "000002", "00002.tar")] == [None] * 4


def test_a_path_may_not_lead_out_of_its_folder() -> None:
    assert is_within("train/00000/0.png", TRAIN)
    assert is_within("metadata/00000.parquet", TRAIN, METADATA)
    for path in ("metadata/00000.parquet", "train", "train/../_run/job.yaml", "/train/x", "trains/x"):
        assert not is_within(path, TRAIN), path
