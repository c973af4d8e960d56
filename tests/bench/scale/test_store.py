import pytest

from flux_batch.bench.scale.store import bench_store, format_store
from flux_batch.errors import JobError
from helpers.s3 import S3Server


@pytest.mark.s3
def test_requests_of_shards_batches_and_the_lease_are_counted(moto: S3Server) -> None:
    figures = bench_store(moto.make_bucket(), moto.storage_options, 2)
    assert figures["requests_a_shard"] == 7
    assert 0 < figures["requests_a_further_batch"] <= 2
    assert figures["requests_of_the_lease_a_minute"] <= 3
    assert "a further batch" in format_store(figures)


def test_a_disk_has_no_requests() -> None:
    with pytest.raises(JobError, match=r"--output /tmp/x: requests are counted on a store of the S3 kind"):
        bench_store("/tmp/x", {}, 1)
