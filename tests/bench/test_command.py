import json
import sys
from pathlib import Path
from typing import Any

import pytest

from flux_batch.bench.pipeline.lowering import format_lowering
from flux_batch.cli import main
from helpers.s3 import S3Server

# A hundredth of the full benchmarks: 100 million rows in a thousand files, 400,000 commits, a thousand workers on 125
# nodes.
PLAN = ["plan", "--rows", "1000000", "--files", "10", "--repeats", "1"]
RESUME = ["resume", "--commits", "4000"]
DRIVER = ["driver", "--workers", "10", "--shards", "4000"]
WEIGHTS = ["weights", "--workers", "10", "--nodes", "2", "--request-s", "0.002"]


def measured(arguments: list[str], path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], str]:
    """Run a benchmark. Returns: its figures and its output."""
    assert main(["bench", *arguments, "--json", str(path)]) == 0
    return json.loads(path.read_text()), capsys.readouterr().out


def test_planning_is_measured_and_json_has_the_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.json"
    figures, said = measured(PLAN, path, capsys)

    assert figures["benchmark"] == "plan"
    assert (figures["rows"], figures["shards"]) == (1_000_000, 3910)
    assert figures["rows_per_second"] == pytest.approx(1_000_000 / figures["seconds"]["median"])
    assert "1000000 rows in 10 files -> 3910 shards" in said
    assert figures["command"] == f"flux-batch bench {' '.join(PLAN)} --json {path}"
    assert figures["hardware"]["cpu"]
    assert figures["hardware"]["cores"] >= 1
    assert figures["versions"]["python"].startswith("3.")
    assert figures["versions"]["torch"]
    assert figures["date"].startswith("20")


def test_a_whole_run_is_opened_looked_at_and_closed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures, said = measured(RESUME, tmp_path / "resume.json", capsys)

    looks = ["every commit read", "the log read", "status", "verify --quick", "closed: all listed"]
    for what in ("seconds", "cpu_seconds", "memory_bytes"):
        assert list(figures[what]) == looks
        assert all(value >= 0 for value in figures[what].values())
    lines = said.splitlines()
    assert lines[0].startswith("4000 commits, a log of ")
    assert [line[:20].strip() for line in lines[2:]] == looks


def test_the_drivers_loop_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures, said = measured(DRIVER, tmp_path / "driver.json", capsys)

    (run,) = figures["runs"]
    assert run["least_busy"] >= 0.98
    assert run["answers"] >= 8000
    assert "4000 shards on simulated workers" in said


def test_a_node_asks_for_the_weights_once_and_a_refused_one_costs_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures, said = measured(WEIGHTS, tmp_path / "weights.json", capsys)

    # One for each file, and a listing before and after them.
    assert figures["most_requests_of_a_node"] == 24 + 2
    assert (figures["requests_of_the_refused_node"], figures["failed_workers"]) == (5, 5)
    assert "10 workers on 2 nodes" in said


@pytest.mark.s3
def test_requests_of_shards_batches_and_the_lease_are_counted(
    moto: S3Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [f"--storage-option={key}={value}" for key, value in moto.storage_options.items()]
    arguments = ["store", "--output", moto.make_bucket(), "--shards", "2", *options]
    figures, said = measured(arguments, tmp_path / "store.json", capsys)

    assert figures["requests_a_shard"] == 7
    assert 0 < figures["requests_a_further_batch"] <= 2
    assert figures["requests_of_the_lease_a_minute"] <= 3
    assert "a further batch" in said


def test_a_pipeline_is_measured_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "pipeline.json"
    size = ["--width", "32", "--height", "48", "--steps", "1", "--t5-sequence-length", "64"]
    what = ["--random-weights", "tiny", "--device", "cpu", "--dtype", "float32", "--repeats", "2", "--peak-tflops", "2"]

    code = main(["bench", "pipeline", *what, *size, "--option", "step_cache=0.1", "--json", str(path)])

    figures = json.loads(path.read_text())
    assert code == 0
    assert figures["model"] == "random weights, size tiny"
    assert figures["pipeline_options"] == {"step_cache": 0.1}
    assert figures["call"] == {"width": 32, "height": 48, "steps": 1, "batch_size": 1, "t5_sequence_length": 64}
    assert figures["peak_tflops"] == 2
    assert "32 x 48, 1 steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["pipeline", "--model", "/nowhere"], "/nowhere"),
        (["pipeline", "--random-weights", "tiny", "--device", "cuda"], "no CUDA device"),
        (["pipeline", "--random-weights", "tiny", "--device", "cpu", "--option", "x"], "must be KEY=VALUE"),
        (["pipeline", "--random-weights", "tiny", "--device", "cpu", "--width", "100"], "nearest are 96 and 112"),
        (["plan", "--json", "/nowhere/plan.json"], "there is no such folder"),
    ],
)
def test_a_bad_argument_is_one_sentence_and_exit_code_2(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")

    assert main(["bench", *arguments]) == 2
    assert sentence in capsys.readouterr().err


def test_lowering_without_triton_is_one_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert main(["bench", "lowering"]) == 2
    assert "bench lowering: triton is not installed; pip install triton" in capsys.readouterr().err


def test_kernels_are_counted_by_their_kinds() -> None:
    kernels = ["triton_red_fused_native_layer_norm_0", "triton_poi_fused_cat_gelu_1", "triton_poi_fused_add_mul_2"]
    said = format_lowering({"blocks": {"single block, fp8": {"triton": kernels, "calls": ["mm", "mm"]}}})
    assert said.splitlines()[-1].split() == ["single", "block,", "fp8", "3", "2", "1", "0", "2"]


@pytest.mark.parametrize("arguments", [["--repeats", "0"], ["--rows", "-3"]])
def test_counts_are_at_least_1(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["bench", "plan", *arguments])

    assert caught.value.code == 2
    assert "must be 1 or more" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "limit"),
    [
        (["driver", "--speedup", "0"], "1 or more"),
        (["driver", "--spread", "nan"], "1 or more"),
        (["driver", "--slow-share", "2"], "from 0 to 1"),
        (["weights", "--request-s", "-1"], "0 or more"),
        (["pipeline", "--peak-tflops", "0"], "0.001 or more"),
        (["job", "--num-gpus", "some"], "0 or more"),
    ],
)
def test_numbers_have_limits(arguments: list[str], limit: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["bench", *arguments])

    assert caught.value.code == 2
    assert f"{arguments[1]}: {arguments[2]}: must be {limit}" in capsys.readouterr().err
