"""A whole run under attack: no secret is written, and no row can write outside of the output."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flux_batch.cli import main
from flux_batch.config.schema import JobConfig
from flux_batch.engine.local import LocalEngine
from flux_batch.job import run
from flux_batch.storage.store import Store
from helpers.fakes import make_fake_pipeline
from helpers.hub_server import Hub, hub_server
from helpers.job_files import make_job, metadata

LAYOUTS = ["webdataset", "files", "parquet"]
SECRET = "hush-5f3a"
SIGNED = f"X-Amz-Signature={SECRET}"


def finish(config: JobConfig) -> None:
    assert run(config, engine=LocalEngine(), make_pipeline=make_fake_pipeline).is_complete


def read_all(output: Path) -> dict[str, bytes]:
    """Read every file of an output, also the compressed contents of Parquet files."""
    found = {}
    for path in output.rglob("*"):
        if path.is_file():
            found[str(path.relative_to(output))] = path.read_bytes()
        if path.suffix == ".parquet":
            table = pq.read_table(path)
            found[str(path.relative_to(output))] += repr((table.to_pylist(), table.schema.metadata)).encode()
    return found


def written_secrets(output: Path) -> list[str]:
    files = read_all(output)
    assert {"_run/job.yaml", "_run/plan.parquet", "metadata/00000.parquet", "README.md"} <= files.keys()
    return [name for name, data in files.items() if SECRET.encode() in data + name.encode()]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_secret_of_a_job_is_written_or_logged(
    tmp_path: Path, layout: str, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    rows: list[dict[str, Any]] = [
        {"prompt": "a", "input_image": f"https://127.0.0.1:1/a.png?{SIGNED}"},
        {"prompt": "b", "input_image": f"https://me:{SECRET}@127.0.0.1/b.png"},
        {"prompt": "c [raise]", "input_image": None},
        {"prompt": "d", "input_image": None},
    ]
    config = make_job(
        tmp_path,
        rows,
        prompts={"allow_http": True, "storage_options": {"token": SECRET, "client_kwargs": {"auth": SECRET}}},
        output={"format": layout, "storage_options": {"secret": SECRET}},
        model={
            "uri": f"https://host/flux.safetensors?token={SECRET}",
            "storage_options": {"key": SECRET},
            "loras": [{"uri": f"https://civitai.com/api/download/models/7?token={SECRET}"}],
        },
        failures={"max_ratio": 1.0},
    )
    finish(config)
    finish(config)

    found = metadata(config)
    assert [row["status"] for row in found] == ["failed", "failed", "failed", "success"]
    assert "not a public address" in found[0]["error_message"]
    assert found[3]["model"] == "https://host/flux.safetensors"
    assert found[3]["lora"] == "https://civitai.com/api/download/models/7"
    images = [data for name, data in read_all(Path(config.output.uri)).items() if name.startswith("train/")]
    assert any(b"civitai.com/api/download/models/7" in data for data in images)  # images could contain a secret
    assert written_secrets(Path(config.output.uri)) == []
    assert main(["status", config.output.uri]) == main(["verify", config.output.uri]) == 0
    printed = capsys.readouterr()
    assert SECRET not in caplog.text + printed.out + printed.err


def test_prompts_may_have_a_signed_address_and_its_signature_may_change(tmp_path: Path) -> None:
    table = pa.Table.from_pylist([{"prompt": f"image {number}"} for number in range(6)])
    pq.write_table(table, tmp_path / "p.parquet")
    with hub_server() as hub:
        config = make_job(tmp_path, prompts={"uri": signed(hub, tmp_path / "p.parquet", SECRET)})
        finish(config)
        assert [row["id"] for row in metadata(config)][:2] == ["p.parquet:0", "p.parquet:1"]
        assert written_secrets(Path(config.output.uri)) == []
        for key in ("_SUCCESS", "_run/commits/00001.json"):
            Store(config.output.uri).delete(key)
        finish(make_job(tmp_path, prompts={"uri": signed(hub, tmp_path / "p.parquet", "another")}))


def signed(hub: Hub, path: Path, signature: str) -> str:
    hub.repositories["o/n"] = {path.name: path.read_bytes()}
    return f"{hub.endpoint}/o/n/resolve/main/{path.name}?sig={signature}/x"


HOSTILE = [
    "../../../escaped",
    "/tmp/escaped",
    "..",
    "a/../../b",
    "a\\..\\b",
    "nul\x00byte",
    "line\nbreak",
    "\x1b[2J",
    "C:\\x",
    "x" * 5000,
    "~/escaped",
    "$(id)",
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_whatever_an_id_is_no_file_is_called_by_it(tmp_path: Path, layout: str) -> None:
    outputs = []
    for name, ids in (("plain", [f"id {number}" for number in range(len(HOSTILE))]), ("hostile", HOSTILE)):
        rows = [{"prompt": "x", "uid": each, "../up": each} for each in ids]
        folder = tmp_path / name
        config = make_job(
            folder,
            rows,
            prompts={"columns": {"id": "uid"}, "passthrough": ["../up"]},
            output={"format": layout},
            failures={"max_ratio": 1.0},
        )
        finish(config)
        assert [row["id"] for row in metadata(config)] == ids
        outputs.append(sorted(str(path.relative_to(folder)) for path in folder.rglob("*")))
    assert outputs[0] == outputs[1]


def test_no_text_of_a_row_is_an_instruction_to_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    rows = [{"prompt": "\x1b]0;owned\x07 [raise]", "id": "\x1b[2J", "input_image": "\x1b[31m.png"}]
    config = make_job(tmp_path, rows, failures={"max_ratio": 1.0})
    finish(config)
    Store(config.output.uri).write("train/\x1b[2J.tar", b"x")
    for command in (["status"], ["verify"], ["gc", "--dry-run"]):
        main([command[0], config.output.uri, *command[1:]])
    printed = capsys.readouterr()
    assert "\x1b" not in caplog.text + printed.out + printed.err
    assert "\\x1b[2J.tar" in printed.out
