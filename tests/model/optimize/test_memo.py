"""The last used results are kept, up to a number of bytes, for all threads."""

from __future__ import annotations

from threading import Barrier, Thread

from flux_batch.model.optimize.memo import Memo


def test_a_result_is_computed_once_while_it_is_kept() -> None:
    memo: Memo[bytes] = Memo(5, len)
    computed = []

    def compute(key: str) -> bytes:
        computed.append(key)
        return key.encode() * 2

    assert [memo.get(key, lambda key=key: compute(key)) for key in "abacab"] == [
        b"aa",
        b"bb",
        b"aa",
        b"cc",
        b"aa",
        b"bb",
    ]
    assert computed == ["a", "b", "c", "b"]
    assert memo.find("a") == b"aa"
    assert memo.find("c") is None


def test_a_result_larger_than_the_memory_is_not_kept() -> None:
    memo: Memo[bytes] = Memo(1, len)
    assert memo.get("a", lambda: b"aa") == b"aa"
    assert memo.find("a") is None


def test_threads_that_compute_the_same_at_once_count_it_once() -> None:
    memo: Memo[bytes] = Memo(4, len)
    both = Barrier(2)

    def compute() -> bytes:
        both.wait(timeout=10)
        return b"aa"

    for key in range(4):
        threads = [Thread(target=memo.get, args=(key, compute)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert memo.get("b", lambda: b"bb") == b"bb"
    assert [memo.find(key) for key in (0, 1, 2, 3, "b")] == [None, None, None, b"aa", b"bb"]
