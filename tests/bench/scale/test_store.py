import pytest

from flux_batch.bench.scale.store import bench_store
from flux_batch.errors import JobError


def test_a_disk_has_no_requests() -> None:
    with pytest.raises(JobError, match=r"--output /tmp/x: requests are counted on a store of the S3 kind"):
        bench_store("/tmp/x", {}, 1)
