import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import fsspec
import pytest

from flux_batch.arguments import parser
from flux_batch.cli import main
from flux_batch.config.schema import JobConfig
from flux_batch.engine.local import LocalEngine
from flux_batch.errors import JobError
from flux_batch.job import run
from helpers.driver import Hold, commits
from helpers.fakes import make_fake_pipeline
from helpers.hub_server import TOKEN, Hub
from helpers.job_files import make_job, write_job
from helpers.waiting import PATIENCE_S, wait_until


def flux_batch(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    """Call the command line. Returns: exit code, stdout, stderr."""
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_help_needs_no_heavy_import() -> None:
    code = (
        "import sys; from flux_batch.arguments import parser; parser().format_help(); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'ray', 'pyarrow', 'pydantic', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_command_line_helps_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["rn", "job.yaml"])
    assert "did you mean 'run'?" in capsys.readouterr().err
    code, out, err = flux_batch(capsys)
    assert (code, out, "flux-batch init job.yaml" in err) == (2, "", True)
    code, out, _ = flux_batch(capsys, "--version")
    assert (code, out.startswith("flux-batch "), ", torch " in out) == (0, True, True)
    schema = json.loads(flux_batch(capsys, "schema")[1])
    assert {"prompts", "output", "model"} <= schema["properties"].keys()
    assert flux_batch(capsys, "skill")[1].startswith("---\nname: flux-batch\n")
    job = write_job(make_job(tmp_path), tmp_path / "job.yaml")
    err = flux_batch(capsys, "plan", job, "--set", "sampling.widht=512")[2]
    assert err == "flux-batch: --set sampling.widht: unknown key; did you mean 'width'?\n"
    code, _, err = flux_batch(capsys, "status", job)
    sentence = f"flux-batch: {job} is a job file; this command takes the output of a run: {tmp_path}/out\n"
    assert (code, err) == (2, sentence)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/README.md").write_text("mine")
    code, _, err = flux_batch(capsys, "run", job)
    assert (code, "holds another README.md" in err) == (2, True)


def commands() -> dict[str, argparse.ArgumentParser]:
    return kinds_of(parser())


def test_every_argument_says_what_it_is_for() -> None:
    kinds = {name: [each] for name, each in commands().items()}
    kinds["bench"] = list(kinds_of(commands()["bench"]).values())
    for name, parsers in kinds.items():
        for each in parsers:
            assert [action.dest for action in each._actions if not action.help] == [], name
        if name != "completion":
            assert all("--json" in each._option_string_actions for each in parsers), name
        assert "examples:" in (commands()[name].epilog or ""), name


def test_every_option_is_on_a_page() -> None:
    root = Path(__file__).parents[1]
    pages = [root / "README.md", *root.glob("jobs/*.md"), *root.glob("flux_batch/**/*.md")]
    text = "\n".join(page.read_text() for page in pages)
    options = {name for each in commands().values() for name in each._option_string_actions if name.startswith("--")}
    assert [name for name in sorted(options) if not re.search(rf"{name}\b", text)] == []


def kinds_of(command: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    (found,) = (action for action in command._actions if isinstance(action, argparse._SubParsersAction))
    return found.choices


def test_every_command_that_prints_can_print_json() -> None:
    bench = commands().pop("bench")
    kinds = [each for action in bench._actions if isinstance(action.choices, dict) for each in action.choices.values()]
    others = {name: each for name, each in commands().items() if name not in ("bench", "completion")}
    for each in (*kinds, *others.values()):
        assert "--json" in each._option_string_actions, each.prog


def test_what_is_for_programs_is_one_object_on_stdout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    code, said, _ = flux_batch(capsys, "init", tmp_path / "new.yaml", "--json")
    assert (code, json.loads(said)) == (0, {"job": f"{tmp_path}/new.yaml", "prompts": "demo"})
    run(make_job(tmp_path), engine=LocalEngine(), make_pipeline=make_fake_pipeline)
    (out / "train/stray").write_text("")
    capsys.readouterr()
    said = flux_batch(capsys, "gallery", out, "--max-images", "4", "--json")[1]
    figures = json.loads(said)
    assert Path(figures["page"]).is_file()
    assert (figures["num_shown"], figures["num_images"], figures["is_complete"]) == (4, 10, True)
    assert Path(json.loads(flux_batch(capsys, "report", out, "--json")[1])["page"]).is_file()
    code, said, _ = flux_batch(capsys, "verify", out, "--json")
    figures = json.loads(said)
    assert (code, figures["exit_code"], figures["num_images"], figures["leftovers"]) == (3, 3, 10, {"stray": 1})
    assert figures["problems"][0]["check"] == "leftovers"
    assert json.loads(flux_batch(capsys, "gc", out, "--json")[1]) == {"num_removed": 1}
    assert json.loads(flux_batch(capsys, "skill", "--json")[1])["skill"].startswith("---\nname: flux-batch\n")


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_completes_commands_options_and_choices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "flux-batch.bash"
    script.write_text(flux_batch(capsys, "completion", "bash")[1])
    (tmp_path / "cats.yaml").write_text("")

    def completed(*words: str) -> set[str]:
        code = (
            f"source {script}; cd {tmp_path}; COMP_WORDS=({' '.join(map(repr, words))}); "
            f"COMP_CWORD={len(words) - 1}; _shtab_flux_batch; printf '%s\\n' \"${{COMPREPLY[@]}}\""
        )
        done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
        return set(done.stdout.split())

    assert completed("flux-batch", "re") == {"report", "reproduce"}
    assert completed("flux-batch", "plan", "--pr") == {"--price"}
    assert completed("flux-batch", "completion", "") == {"bash", "zsh", "fish"}
    assert completed("flux-batch", "plan", "ca") == {"cats.yaml"}
    assert "--peak-tflops" in completed("flux-batch", "bench", "pipeline", "--p")


@pytest.mark.parametrize(
    "command",
    [
        *(["status", "?"], ["gallery", "?"], ["gallery", "out", "--beside", "?"], ["report", "?"], ["verify", "?"]),
        *(["reproduce", "?", "000000000"], ["compare", "?", "out"], ["compare", "out", "?"], ["gc", "?"]),
        *(["annotate", "?", "--with", "phash"], ["select", "?", "a"], ["export", "?", "out"]),
        ["publish", "?", "hf://datasets/a/b", "--license", "mit"],
    ],
    ids=" ".join,
)
def test_a_file_in_place_of_an_output_is_told_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    for name, text, sentence in (
        ("job.yaml", "output: {uri: out/cats}", "is a job file; this command takes the output of a run: out/cats\n"),
        ("p.csv", "prompt\na\n", "is a file; this command takes the output of a run, which is a folder\n"),
    ):
        path = tmp_path / name
        path.write_text(text)
        code, _, err = flux_batch(capsys, *[str(path) if each == "?" else each for each in command])
        assert (code, err) == (2, f"flux-batch: {path} {sentence}")


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a" * 300, None, "File name too long"),
        ("job.yaml", b"name: caf\xe9", "is a job file; this command takes the output of a run\n"),
    ],
    ids=["long", "not UTF-8"],
)
def test_an_output_that_cannot_be_looked_at_is_told_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes | None, sentence: str
) -> None:
    if content:
        (tmp_path / name).write_bytes(content)
    code, _, err = flux_batch(capsys, "status", str(tmp_path / name))
    assert sentence in err
    assert "unexpected" not in err
    assert code != 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["plan", "job.yaml", "--jsn"], "unrecognized arguments: --jsn; did you mean '--json'?"),
        (
            ["status", "out", "--measure"],
            "flux-batch status: unrecognized arguments: --measure; another command has it",
        ),
        (["gallery", "out", "--measur"], "unrecognized arguments: --measur\n`flux-batch gallery --help` shows"),
        (["gallery", "out", "--colums=id"], "unrecognized arguments: --colums=id; did you mean '--columns'?"),
        (["--nope"], "flux-batch: unrecognized arguments: --nope\n"),
        (["status", "out", "two"], "flux-batch status: unrecognized arguments: two\n"),
        (["bench", "driver", "--jsn"], "flux-batch bench driver: unrecognized arguments: --jsn; did you mean '--json'"),
        (["bench", "kernels", "--quantization", "none"], "bench kernels: unrecognized arguments: --quantization none;"),
        (["plan", "job.yaml", "--price", "two"], "--price: two: must be a number greater than 0"),
        (["plan", "job.yaml", "--price", "0"], "--price: 0: must be a number greater than 0"),
    ],
)
def test_a_wrong_option_says_what_would_be_right(
    capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "job.yaml: there is no such job file; `flux-batch init` writes one"),
        (
            "prompt,seed\na fox,1\n",
            "is not a job file with the sections prompts, output and model; `flux-batch init`",
        ),
        ("prompts: [", "not valid YAML"),
        ("- a list", "is not a job file"),
        ("promts: {uri: x}\noutput: {uri: y}\nmodel: {uri: demo}", "unknown key; did you mean 'prompts'?"),
        ("prompts: {uri: x}\noutput: {uri: y}", "model: missing"),
        (
            "prompts: {uri: x}\noutput: {uri: y}\nmodel: {uri: demo}\nsampling: {height: 1000}",
            "nearest are 992 and 1008",
        ),
        (
            "prompts: {uri: x}\noutput: {uri: y}\nmodel: {uri: demo}\nquality: {score: clp, at_least: 0.3}",
            "quality.score = clp: is not an annotator",
        ),
        (
            "prompts: {rows: 2, samplers: {a: {file: /nowhere.txt}}, template: x}\n"
            "output: {uri: y}\nmodel: {uri: demo}",
            "prompts.samplers.a: file: /nowhere.txt: not found",
        ),
        ("prompts: {uri: /nowhere.parquet}\noutput: {uri: y}\nmodel: {uri: demo}", "/nowhere.parquet: no such prompts"),
    ],
)
def test_a_bad_job_file_is_one_sentence_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None, sentence: str
) -> None:
    if text is not None:
        (tmp_path / "job.yaml").write_text(text)
    for command in ("run", "plan"):
        code, out, err = flux_batch(capsys, command, tmp_path / "job.yaml")
        assert code == 2
        assert sentence in err
        assert "Traceback" not in err
        assert out == ""


def test_demo_takes_its_folder_and_rows_as_they_are(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = ["out #1", "2026", "a: b", "[x"]
    found: list[str] = []

    def note_output(config: JobConfig, **how: object) -> None:
        found.append(config.output.uri)
        raise JobError("seen")

    monkeypatch.setattr("flux_batch.job.run", note_output)
    for folder in folders:
        assert flux_batch(capsys, "demo", folder)[0] == 2
    assert found == [str(Path(folder).absolute()) for folder in folders]
    assert "prompts.limit = 0: must be at least 1" in flux_batch(capsys, "demo", "--rows", "0")[2]


def test_a_traceback_comes_with_debug_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "Traceback" in flux_batch(capsys, "run", tmp_path / "none.yaml", "--debug")[2]
    assert "Traceback" in flux_batch(capsys, "--debug", "run", tmp_path / "none.yaml")[2]


def test_plan_counts_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = write_job(make_job(tmp_path), tmp_path / "job.yaml")
    code, out, _ = flux_batch(capsys, "plan", job, "--json", "--set", "sampling.num_images_per_prompt=3")
    figures = json.loads(out)
    assert (code, figures["num_prompts"], figures["num_images"], figures["num_shards"]) == (0, 10, 30, 3)
    assert not (tmp_path / "out").exists()
    assert "10 in 1 file\n" in flux_batch(capsys, "plan", job)[1]


def test_plan_knows_the_work_of_flux_dev(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = write_job(make_job(tmp_path, model={"uri": str(tmp_path / "absent")}), tmp_path / "job.yaml")
    size = ["sampling.width=1024", "sampling.height=1024", "sampling.num_inference_steps=28"]
    out = flux_batch(capsys, "plan", job, "--json", *(word for each in size for word in ("--set", each)))[1]
    # 74.38 TFLOP per step, for the 57 blocks without the embedders and the last layer.
    assert json.loads(out)["pflop_per_image"] == pytest.approx(28 * 74.38e-3, rel=0.005)


def test_a_scheduled_job_is_of_the_date_it_is_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = write_job(make_job(tmp_path, output={"uri": str(tmp_path / "out-{date}")}), tmp_path / "job.yaml")
    code, _, err = flux_batch(capsys, "plan", job)
    assert (code, err.startswith(f"flux-batch: {job}: output.uri needs the date of the run")) == (2, True)
    code, out, _ = flux_batch(capsys, "plan", job, "--logical-date", "2026-11-22")
    assert (code, "10 in 1 file\n" in out) == (0, True)


def test_status_reads_a_run_from_its_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_job(tmp_path)
    assert flux_batch(capsys, "status", tmp_path / "out")[0] == 2
    run(config, engine=LocalEngine(), make_pipeline=make_fake_pipeline)
    (tmp_path / "out/_run/commits/00001.json").unlink()
    (tmp_path / "out/_SUCCESS").unlink()
    code, out, _ = flux_batch(capsys, "status", tmp_path / "out")
    assert code == 0
    assert "2 of 3 committed (67 %)" in out
    assert "last report" in out
    status = json.loads(flux_batch(capsys, "status", tmp_path / "out", "--json")[1])
    assert (status["num_committed"], status["num_images"], status["is_complete"]) == (2, 6, False)


def test_gallery_says_where_the_page_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    code, said, err = flux_batch(capsys, "gallery", out)
    assert (code, said, "there is no run here" in err) == (2, "", True)
    run(make_job(tmp_path), engine=LocalEngine(), make_pipeline=make_fake_pipeline)
    capsys.readouterr()

    for single in ([], ["--single-file"]):
        code, said, err = flux_batch(capsys, "gallery", out, "--max-images", "4", "--columns", "model,key", *single)
        assert (code, err) == (0, "")
        assert said.splitlines() == [
            "flux-batch: 4 of 10 images, 0 failed; complete",
            f"page          {out}/_run/gallery/index.html",
            f"contact sheet {out}/_run/gallery/contact-sheet.jpg",
        ]
        page = (out / "_run/gallery/index.html").read_text()
        # A single file names the model once under each image, and once among the values that all images share.
        assert page.count("<dt>model</dt>") == (4 + 1 if single else 0)
        for options, sentence in ((["--max-images", "0"], "must be from 1 to"), (["--columns", "x"], "no such column")):
            code, said, err = flux_batch(capsys, "gallery", out, *options, *single)
            assert (code, said, sentence in err) == (2, "", True)


def test_download_says_where_the_model_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = "AI-ModelScope/FLUX.1-dev"
    hub.repositories[name] = {"flux1-dev.safetensors": b"weights", "vae/config.json": b"{}"}
    where = ("--from", "modelscope", "--to", tmp_path / "there")
    assert flux_batch(capsys, "download", "FLUX.1-dev", *where) == (0, f"{tmp_path}/there\n", "")
    assert (tmp_path / "there/flux1-dev.safetensors").read_bytes() == b"weights"

    hub.repositories["black-forest-labs/FLUX.1-dev"] = hub.repositories[name]
    hub.gated = {"black-forest-labs/FLUX.1-dev"}
    code, out, err = flux_batch(capsys, "download", "FLUX.1-dev")
    assert (code, out) == (2, "")
    assert "accept its licence" in err
    assert flux_batch(capsys, "download", "FLUX.1-dev", "--token", TOKEN)[1] == "models/FLUX/FLUX.1-dev\n"


def test_download_fills_the_cache_from_an_address(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLUX_BATCH_CACHE", str(tmp_path))
    fs = fsspec.filesystem("memory")
    for text in ("one", "two"):
        fs.pipe_file("/download/flux/all.safetensors", text.encode())
        code, out, _ = flux_batch(capsys, "download", "memory://download/flux", "--refresh")
        assert (code, Path(out.strip(), "all.safetensors").read_text()) == (0, text)


def test_init_says_a_next_command_that_can_be_pasted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "my job.yaml"
    assert flux_batch(capsys, "init", path)[1] == f"{path}: written; next: flux-batch plan '{path}'\n"


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("plan", "interrupted; nothing was written"),
        ("preview", "interrupted; the output of the job is as it was"),
        ("run", "interrupted; committed work stays, the same command resumes the run"),
    ],
)
def test_an_interrupted_command_says_what_it_leaves(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    sentence: str,
) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("flux_batch.job.load_job", interrupted)
    code, _, err = flux_batch(capsys, command, tmp_path / "job.yaml")
    assert (code, err) == (75, f"flux-batch: {sentence}\n")


def test_a_job_file_of_another_encoding_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = tmp_path / "job.yaml"
    job.write_bytes("name: cats".encode("utf-16"))
    sentence = f"flux-batch: {job}: the job file is not in UTF-8: save it as UTF-8\n"
    assert flux_batch(capsys, "plan", job) == (2, "", sentence)


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_stream_that_is_closed_is_written_to_nowhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    job = write_job(make_job(tmp_path), tmp_path / "job.yaml")
    monkeypatch.setattr(sys, name, None)
    assert main(["validate", str(job)]) == 0
    assert getattr(sys, name) is None
    assert "unexpected" not in capsys.readouterr().err


@pytest.mark.slow
def test_prompts_are_validated_without_torch(tmp_path: Path) -> None:
    """It takes longer to import than all the rest, though a tokenizer and the shapes of a model are read."""
    job = write_job(make_job(tmp_path, [{"prompt": "a cat"}], model={"uri": "demo"}), tmp_path / "job.yaml")
    code = "import sys; from flux_batch.cli import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, "validate", str(job)], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "False"
    assert "tokenizer" not in done.stdout  # they were found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "gone", "code"),
    [
        (["validate", "JOB"], {"stdout"}, 3),
        (["validate", "JOB"], {"stdout", "stderr"}, 3),
        (["schema"], {"stdout"}, 0),
        (["validate", "none.yaml"], {"stdout", "stderr"}, 2),
    ],
)
def test_the_exit_code_stands_though_nobody_reads_the_answer(
    tmp_path: Path, words: list[str], gone: set[str], code: int
) -> None:
    job = write_job(make_job(tmp_path, [{"prompt": ""}, {"prompt": "a cat"}]), tmp_path / "job.yaml")
    nobody, pipe = os.pipe()
    os.close(nobody)
    words = [str(job) if word == "JOB" else word for word in words]
    streams = {name: pipe if name in gone else subprocess.PIPE for name in ("stdout", "stderr")}
    done = subprocess.run([sys.executable, "-m", "flux_batch", *words], text=True, check=False, **streams)
    os.close(pipe)
    assert done.returncode == code
    assert "Broken" not in (done.stderr or "")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "redirections", "code"),
    [
        (["validate", "none.yaml"], "2>/dev/full", 2),
        (["validate", "none.yaml", "--debug"], "2>/dev/full", 2),
        (["--version"], "2>/dev/full", 0),
        (["--version"], ">&-", 0),
        (["--version"], ">/dev/full", 1),
        (["schema"], ">/dev/full", 1),
    ],
)
def test_a_full_disk_costs_the_answer_only(tmp_path: Path, words: list[str], redirections: str, code: int) -> None:
    command = shlex.join([sys.executable, "-m", "flux_batch", *words])
    done = subprocess.run(f"{command} {redirections}", shell=True, cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == code
    assert b"Traceback" not in done.stderr


@pytest.mark.slow
def test_a_closed_terminal_stops_a_run_in_order(tmp_path: Path) -> None:
    rows = [{"prompt": f"image {number}" + (" [hold]" if number == 4 else "")} for number in range(12)]
    job = write_job(make_job(tmp_path, rows, output={"shard_size": 4}), tmp_path / "job.yaml")
    hold = Hold(tmp_path / "hold")
    terminal, end = os.openpty()
    os.set_blocking(terminal, False)

    def is_committed() -> bool:
        with suppress(BlockingIOError):
            os.read(terminal, 1 << 16)  # otherwise the terminal's buffer would be full
        return len(commits(tmp_path / "out")) == 1

    process = subprocess.Popen(
        [sys.executable, "-m", "helpers.drive", str(job), "local"],
        stdin=end,
        stdout=end,
        stderr=end,
        env={**os.environ, **hold.environment, "TERM": "xterm", "PYTHONPATH": os.pathsep.join(sys.path)},
        start_new_session=True,
    )
    os.close(end)
    try:
        wait_until(is_committed)
        os.close(terminal)
        process.send_signal(signal.SIGHUP)
        hold.release()
        assert process.wait(PATIENCE_S) == 75
    finally:
        process.kill()
    assert "stopped by SIGHUP" in (tmp_path / "out/_run/progress.json").read_text()
    assert len(commits(tmp_path / "out")) < 3
