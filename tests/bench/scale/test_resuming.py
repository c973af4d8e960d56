from flux_batch.bench.scale.resuming import bench_resume, format_resume


def test_a_whole_run_is_opened_with_and_without_a_log_looked_at_and_closed() -> None:
    figures = bench_resume(200)

    looks = ["every commit read", "the log read", "status", "verify --quick", "closed: all listed"]
    for what in ("seconds", "cpu_seconds", "memory_bytes"):
        assert list(figures[what]) == looks
        assert all(value >= 0 for value in figures[what].values())
    said = format_resume(figures).splitlines()
    assert said[0].startswith("200 commits, a log of ")
    assert [line[:20].strip() for line in said[2:]] == looks
