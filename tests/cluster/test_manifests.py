"""Checks the manifests of cluster/kuberay by the schemas of KubeRay and Kubernetes, and by further rules."""

from __future__ import annotations

import copy
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from flux_batch.arguments import parser
from flux_batch.config.text import parse_moment
from flux_batch.errors import JobError
from helpers.kuberay_rules import broken_rules, cluster_of, job_of
from helpers.kuberay_schemas import schema_errors
from helpers.kuberay_submitter import SHELL, submitter_environment, submitting_line

KUBERAY = Path(__file__).parents[2] / "cluster/kuberay"
FOLDERS = ("job", "nightly", "interactive", "nightly-cronjob", "example")
FILES = sorted(path for path in KUBERAY.rglob("*.yaml") if path.name not in ("kustomization.yaml", "images.yaml"))
RAY_FILES = [path for path in FILES if path.name != "cronjob.yaml"]
KUBERNETES = "1.33"

Tree = dict[str, Any]


def load(path: Path) -> Tree:
    tree: Tree = yaml.safe_load(path.read_text())
    return tree


@pytest.mark.parametrize("path", RAY_FILES, ids=lambda path: path.name)
def test_a_manifest_is_what_kuberay_takes(path: Path) -> None:
    manifest = load(path)
    assert schema_errors(manifest) == []
    cluster_of(manifest)["concurrencyPolicy"] = "Forbid"
    (error,) = schema_errors(manifest)
    assert "'concurrencyPolicy' was unexpected" in error


def pods(tree: Any) -> Iterator[Tree]:
    """Yield every pod template."""
    if isinstance(tree, dict):
        if "containers" in tree:
            yield tree
        for value in tree.values():
            yield from pods(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from pods(value)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_pod_is_what_kubernetes_takes(path: Path) -> None:
    manifest = load(path)
    if manifest["apiVersion"] == "batch/v1":
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
    specs = list(pods(manifest))
    assert specs
    for spec in specs:
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": spec}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate({**pod, "spec": {**spec, "gracePeriod": 3}}, KUBERNETES, strict=True)


@pytest.mark.parametrize("path", RAY_FILES, ids=lambda path: path.name)
def test_a_manifest_keeps_the_rules(path: Path) -> None:
    assert broken_rules(load(path)) == []


def set_at(path: str, value: Any) -> Callable[[Tree], None]:
    def change(tree: Any) -> None:
        *parents, last = [int(key) if key.isdecimal() else key for key in path.split("/")]
        for key in parents:
            tree = tree[key]
        tree[last] = value

    return change


HEAD = "spec/rayClusterSpec/headGroupSpec"
SPOT = "spec/rayClusterSpec/workerGroupSpecs/0"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (set_at("metadata/name", "x" * 48), "name is too long"),
        (set_at("metadata/name", "2026-cats"), "no label of DNS"),
        (set_at("metadata/labels", {"kueue.x-k8s.io/queue-name": "gpus"}), "cannot use autoscaling"),
        (set_at("spec/clusterSelector", {"a": "b"}), "a cluster of its own"),
        (set_at("spec/submissionMode", "InteractiveMode"), "a cluster of its own"),
        (set_at("spec/rayClusterSpec", {}), "no cluster to run on"),
        (set_at("spec/shutdownAfterJobFinishes", False), "ttlSecondsAfterFinished needs"),
        (set_at("spec/deletionStrategy", {"deletionRules": []}), "exclude each other"),
        (set_at("spec/activeDeadlineSeconds", 0), "a limit is out of its range"),
        (set_at("spec/backoffLimit", -1), "a limit is out of its range"),
        (set_at("spec/runtimeEnvYAML", "env_vars: {}"), "before it has stopped in order"),
        (set_at(f"{HEAD}/rayStartParams", {}), "the head would take work"),
        (set_at(f"{HEAD}/template/metadata", {}), "Karpenter may move the head"),
        (set_at(f"{HEAD}/template/spec/terminationGracePeriodSeconds", 50), "the driver is killed"),
        (set_at(f"{HEAD}/template/spec/containers/0/env", []), "the driver is killed"),  # Ray's 30 s are too short
        (set_at(f"{HEAD}/template/spec/restartPolicy", "Always"), "instead of restarting them"),
        (set_at(f"{HEAD}/resources", {"CPU": "0"}), "said twice"),
        (set_at("spec/rayClusterSpec/autoscalerOptions/version", "v1"), "need autoscaler v2"),
        (set_at(f"{SPOT}/groupName", "on-demand"), "two groups"),
        (set_at(f"{SPOT}/priority", 0), "on-demand nodes come before"),
        (set_at(f"{SPOT}/minReplicas", 9), "out of their range"),
        (set_at(f"{SPOT}/template/spec/terminationGracePeriodSeconds", 100), "before Ray has drained"),
        (set_at(f"{SPOT}/template/spec/containers/0/env/0/value", "130"), "more than a spot notice leaves"),
        (set_at(f"{SPOT}/template/spec/containers/0/resources/limits", {}), "no GPU"),
        (set_at(f"{SPOT}/rayStartParams", {}), "does not fit into /dev/shm"),
        (set_at(f"{SPOT}/template/spec/volumes/1/emptyDir/sizeLimit", "7Gi"), "does not fit into /dev/shm"),
    ],
)
def test_a_broken_rule_is_found(change: Callable[[Tree], None], words: str) -> None:
    manifest = copy.deepcopy(load(KUBERAY / "job/rayjob.yaml"))
    change(manifest)
    assert words in "; ".join(broken_rules(manifest))


def test_a_job_that_is_sent_to_a_cluster_has_rules_of_its_own() -> None:
    manifest = load(KUBERAY / "job/rayjob.yaml")
    sent = {"clusterSelector": {"ray.io/cluster": "flux-batch"}, "backoffLimit": 0}
    manifest["spec"] |= {"rayClusterSpec": {}} | sent
    assert broken_rules(manifest) == []
    manifest["spec"]["suspend"] = True
    assert broken_rules(manifest) == ["a job that is sent to a cluster cannot be suspended"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (set_at("metadata/name", "x" * 37), "name is too long"),
        (set_at("spec/schedule", "2 o'clock"), "five fields"),
        (set_at("spec/schedule", "CRON_TZ=UTC 0 2 * * *"), "five fields"),
        (set_at("spec/timeZone", "Mars/Olympus"), "time zone"),
    ],
)
def test_a_broken_rule_of_a_schedule_is_found(change: Callable[[Tree], None], words: str) -> None:
    manifest = load(KUBERAY / "nightly/raycronjob.yaml")
    change(manifest)
    assert words in "; ".join(broken_rules(manifest))


def test_a_night_ends_before_the_next_and_a_data_set_takes_as_long_as_it_takes() -> None:
    assert "activeDeadlineSeconds" not in load(KUBERAY / "job/rayjob.yaml")["spec"]
    for path in ("nightly/raycronjob.yaml", "nightly-cronjob/cronjob.yaml"):
        spec = load(KUBERAY / path)["spec"]
        assert spec["schedule"] == "0 2 * * *"
        job = spec["jobTemplate"]
        assert 0 < job.get("spec", job)["activeDeadlineSeconds"] < 24 * 3600


def test_all_have_the_same_cluster() -> None:
    clusters = [cluster_of(load(path)) for path in RAY_FILES]
    assert len(clusters) == 3
    assert clusters[1:] == clusters[:-1]


def command_lines() -> Iterator[str]:
    """Yield every command line that ends in an entry point of jobs/ and its arguments."""
    for path in FILES:
        manifest = load(path)
        if path.name == "cronjob.yaml":
            yield manifest["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]["command"][-1]
        elif job := job_of(manifest):
            yield job["entrypoint"]


def test_the_commands_are_those_of_the_program() -> None:
    lines = list(command_lines())
    assert len(lines) == 3
    for line in lines:
        before, _, arguments = re.split(r"/app/jobs/(generate|rayjob)\.py ", line)
        assert before.endswith("python ")
        given = parser().parse_args(["run", *shlex.split(arguments)])
        assert given.job.startswith("s3://bucket/jobs/")
        assert (given.logical_date is None) == ("nightly" not in given.job)


def test_the_day_of_a_nightly_run_reaches_the_command_that_is_submitted(tmp_path: Path) -> None:
    """KubeRay inserts the entrypoint into a line of bash in the submitting pod, which evaluates its words."""
    job = load(KUBERAY / "nightly/raycronjob.yaml")["spec"]["jobTemplate"]
    job["entrypoint"] = job["entrypoint"].replace("/app/", f"{KUBERAY.parents[1]}/")
    # A fake `ray` that knows no job and records the submission.
    ray = '#!/bin/sh\ncase "$2" in status) exit 1;; submit) printf "%s\\n" "$@";; esac\n'
    (tmp_path / "ray").write_text(ray)
    (tmp_path / "ray").chmod(0o755)
    (tmp_path / "python").symlink_to(sys.executable)
    name = "flux-batch-nightly-29732760"
    pod = submitter_environment(job, "http://head:8265", "nightly-x", name)

    def submitted(environment: dict[str, str]) -> list[str]:
        """Return the arguments of `ray job submit`."""
        words = [*SHELL, submitting_line(job, "http://head:8265", "nightly-x")]
        path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
        done = subprocess.run(words, env=path | environment, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    said = submitted(pod)
    assert said[-2:] == ["--logical-date", "2026-07-13T18:00:00+00:00"]
    assert json.loads(said[said.index("--runtime-env-json") + 1]) == yaml.safe_load(job["runtimeEnvYAML"])
    assert submitted({name: value for name, value in pod.items() if name != "SCHEDULED_NAME"})[-2:] == [
        "--logical-date",
        "",
    ]
    with pytest.raises(JobError, match="--logical-date is empty: the command that should print the day failed"):
        parse_moment("")


def at(tree: Any, path: str) -> list[Any]:
    """Return the values at a kustomize path, which includes every item of a list."""
    found = [tree]
    for key in path.split("/"):
        found = [one for each in found for one in (each if isinstance(each, list) else [each])]
        found = [one[key] for one in found if isinstance(one, dict) and key in one]
    return found


@pytest.mark.parametrize("path", RAY_FILES, ids=lambda path: path.name)
def test_an_overlay_finds_every_image(path: Path) -> None:
    manifest = load(path)
    fields = load(KUBERAY / "example/images.yaml")["images"]
    found = [image for field in fields if field["kind"] == manifest["kind"] for image in at(manifest, field["path"])]
    assert found == ["flux-batch"] * sum(
        len(spec["containers"] + spec.get("initContainers", [])) for spec in pods(manifest)
    )


def test_an_overlay_replaces_what_is_there() -> None:
    overlay = load(KUBERAY / "example/kustomization.yaml")
    (folder,) = overlay["resources"]
    (base,) = load(KUBERAY / "example" / folder / "kustomization.yaml")["resources"]
    manifest = load(KUBERAY / "example" / folder / base)
    (patch,) = overlay["patches"]
    assert patch["target"] == {"kind": manifest["kind"], "name": manifest["metadata"]["name"]}
    operations = yaml.safe_load(patch["patch"])
    assert len(operations) == 2
    for operation in operations:
        place: Any = manifest
        for key in operation["path"].strip("/").split("/"):
            place = place[int(key) if isinstance(place, list) else key]
        assert (operation["op"], type(operation["value"])) == ("replace", type(place))


@pytest.mark.parametrize("folder", FOLDERS)
def test_kustomize_makes_of_a_folder_what_it_says(folder: str) -> None:
    # Debian's kustomize is of 2020 and has no `patches`, so the test needs that of `kubectl`.
    if not shutil.which("kubectl"):
        pytest.skip("kubectl is not installed")
    words = ["kubectl", "kustomize", str(KUBERAY / folder)]
    (manifest,) = yaml.safe_load_all(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    if manifest["kind"] != "CronJob":
        assert schema_errors(manifest) == []
        assert broken_rules(manifest) == []
    images = {one["image"] for spec in pods(manifest) for one in spec["containers"] + spec.get("initContainers", [])}
    if folder == "example":
        assert images == {"registry.example.com/flux-batch:0.1.0"}
        assert manifest["metadata"]["namespace"] == "rendering"
        assert "s3://my-bucket/" in manifest["spec"]["entrypoint"]
    else:
        assert images == {"flux-batch"}


@pytest.mark.parametrize("folder", ["nightly", "interactive", "nightly-cronjob"])
def test_the_overlay_fits_the_other_folders(folder: str, tmp_path: Path) -> None:
    if not shutil.which("kubectl"):
        pytest.skip("kubectl is not installed")
    shutil.copytree(KUBERAY, tmp_path / "kuberay")
    overlay = load(KUBERAY / "example/kustomization.yaml") | {"resources": [f"../{folder}"], "patches": []}
    (tmp_path / "kuberay/example/kustomization.yaml").write_text(yaml.safe_dump(overlay))
    words = ["kubectl", "kustomize", str(tmp_path / "kuberay/example")]
    said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert "image: flux-batch" not in said
    assert said.count("image: registry.example.com/flux-batch:0.1.0") >= 1
    assert "namespace: rendering" in said


def test_a_job_in_a_queue_of_kueue_has_all_its_workers_from_the_start(tmp_path: Path) -> None:
    if not shutil.which("kubectl"):
        pytest.skip("kubectl is not installed")
    shutil.copytree(KUBERAY, tmp_path / "kuberay")
    overlay = load(KUBERAY / "example/kustomization.yaml") | {"components": ["../kueue"]}
    (tmp_path / "kuberay/example/kustomization.yaml").write_text(yaml.safe_dump(overlay))
    words = ["kubectl", "kustomize", str(tmp_path / "kuberay/example")]
    manifest = yaml.safe_load(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    assert schema_errors(manifest) == []
    assert broken_rules(manifest) == []
    assert manifest["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "gpu-queue"}
    (group,) = manifest["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert group["minReplicas"] == group["replicas"] == 8
