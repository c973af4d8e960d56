from flux_batch.bench.scale.resuming import bench_resume, format_resume


def test_every_commit_is_counted_with_and_without_a_log() -> None:
    figures = bench_resume(200)

    assert figures["seconds"].keys() == {"commits", "log", "check"}
    assert "200 commits" in format_resume(figures)
