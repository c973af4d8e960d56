import pickle

import pytest

from flux_batch.engine.failure import Failure, FailureKind
from flux_batch.errors import (
    AlreadyExists,
    CheckpointError,
    DamagedObject,
    DeviceFatal,
    DiskFull,
    FluxBatchError,
    JobError,
    NotFound,
    Stopped,
    StoreError,
    StoreRefused,
)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (JobError("x"), "run_failed"),
        (CheckpointError("x"), "run_failed"),
        (StoreRefused("x"), "run_failed"),
        (DeviceFatal("x"), "device_lost"),
        (Stopped("x"), "stopped"),
        (StoreError("x"), "storage_unavailable"),
        (DiskFull("x"), "storage_unavailable"),
        (NotFound("x"), "shard_failed"),
        (AlreadyExists("x"), "shard_failed"),
        (DamagedObject("x"), "shard_failed"),
        (FluxBatchError("x"), "shard_failed"),
        (ZeroDivisionError("x"), "shard_failed"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else value,
)
def test_the_kind_of_an_error_says_what_becomes_of_its_shard(error: Exception, kind: FailureKind) -> None:
    assert Failure.of(error).kind == kind


def test_a_failure_keeps_our_error_and_how_long_storage_was_waited_for_across_processes() -> None:
    error = StoreError("s3://bucket: 503")
    error.waited_s = 12.0
    failure = pickle.loads(pickle.dumps(Failure.of(error)))
    assert (failure.message, failure.waited_s, type(failure.error)) == ("s3://bucket: 503", 12.0, StoreError)
    assert failure.error.waited_s == 12.0


def test_an_error_of_others_is_described_with_its_class_and_traceback() -> None:
    def fail() -> None:
        raise ZeroDivisionError("one by nothing")

    with pytest.raises(ZeroDivisionError) as caught:
        fail()
    failure = Failure.of(caught.value)
    assert (failure.message, failure.error) == ("ZeroDivisionError: one by nothing", None)
    assert "in fail" in failure.details
