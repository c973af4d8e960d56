"""The environment of a run on a cluster is the same for every way to submit it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from flux_batch.config.running import FailuresConfig
from helpers.airflow_stub import load_dag

ROOT = Path(__file__).parents[2]
KUBERAY = ROOT / "cluster/kuberay"


def submitted(folder: Path, *arguments: str, **environment: str) -> list[str]:
    """Run jobs/submit.sh with a fake `ray`. Returns: its arguments."""
    ray = folder / "ray"
    ray.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    ray.chmod(0o755)
    variables = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", **environment}
    for name in ("HF_HUB_OFFLINE", "RAY_LOGGING_CONFIG_ENCODING", "RAY_JOB_STOP_WAIT_TIME_S"):
        if name not in environment:
            variables.pop(name, None)
    done = subprocess.run([ROOT / "jobs/submit.sh", *arguments], env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def env_vars(words: list[str]) -> dict[str, str]:
    found: dict[str, str] = json.loads(words[words.index("--runtime-env-json") + 1])["env_vars"]
    return found


def load(path: str) -> Any:
    return yaml.safe_load((KUBERAY / path).read_text())


def test_it_is_the_same_by_every_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_hand = env_vars(submitted(tmp_path, "jobs/s3.yaml"))
    assert by_hand.keys() == {"RAY_JOB_STOP_WAIT_TIME_S", "HF_HUB_OFFLINE", "RAY_LOGGING_CONFIG_ENCODING"}
    assert float(by_hand["RAY_JOB_STOP_WAIT_TIME_S"]) > FailuresConfig().drain_s

    dag, _ = load_dag(monkeypatch)
    job, nightly = load("job/rayjob.yaml")["spec"], load("nightly/raycronjob.yaml")["spec"]["jobTemplate"]
    (container,) = load("nightly-cronjob/cronjob.yaml")["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    (by_cron,) = [one["value"] for one in container["env"] if one["name"] == "RUNTIME_ENV"]
    environments = [
        dag.RUNTIME_ENV,
        *(yaml.safe_load(one["runtimeEnvYAML"]) for one in (job, nightly)),
        json.loads(by_cron),
    ]
    assert [one["env_vars"] for one in environments] == [by_hand] * 4


def test_whoever_submits_has_the_last_word(tmp_path: Path) -> None:
    words = submitted(
        tmp_path,
        "job.yaml",
        "--set=output.uri=a folder",
        SUBMIT="--no-wait --submission-id cats-1",
        RAY_JOB_STOP_WAIT_TIME_S="90",
        HF_HUB_OFFLINE="0",
        RAY_LOGGING_CONFIG_ENCODING="TEXT",
    )
    assert words[:5] == ["job", "submit", "--no-wait", "--submission-id", "cats-1"]
    assert words[words.index("--") + 1 :] == ["python", "jobs/generate.py", "job.yaml", "--set=output.uri=a folder"]
    assert list(env_vars(words).values()) == ["90", "0", "TEXT"]
