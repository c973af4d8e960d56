import json
import sys
from pathlib import Path

import pytest

from flux_batch.bench.pipeline.lowering import format_lowering
from flux_batch.cli import main


def test_json_has_the_figures_and_the_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.json"

    assert main(["bench", "plan", "--rows", "300", "--files", "2", "--repeats", "2", "--json", str(path)]) == 0

    figures = json.loads(path.read_text())
    assert figures["benchmark"] == "plan"
    assert figures["rows"] == 300
    assert figures["command"] == f"flux-batch bench plan --rows 300 --files 2 --repeats 2 --json {path}"
    assert figures["hardware"]["cpu"]
    assert figures["hardware"]["cores"] >= 1
    assert figures["versions"]["python"].startswith("3.")
    assert figures["versions"]["torch"]
    assert figures["date"].startswith("20")
    assert "300 rows in 2 files" in capsys.readouterr().out


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
