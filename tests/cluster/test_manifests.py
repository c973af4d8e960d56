"""The manifests of cluster/kuberay: against KubeRay's and Kubernetes' own schemas, and rules beyond those."""

from __future__ import annotations

import copy
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from jsonschema import Draft7Validator

from flux_batch.cli import parser
from kuberay_rules import broken_rules, cluster_of, job_of

KUBERAY = Path(__file__).parents[2] / "cluster/kuberay"
SCHEMAS = Path(__file__).parents[3] / "shared/reference/kuberay-crds"
FOLDERS = ("job", "nightly", "interactive", "nightly-cronjob", "example")
FILES = sorted(path for path in KUBERAY.rglob("*.yaml") if path.name not in ("kustomization.yaml", "images.yaml"))
RAY_FILES = [path for path in FILES if path.name != "cronjob.yaml"]
CPU_VERSION = "1.33"

Tree = dict[str, Any]


def load(path: Path) -> Tree:
    tree: Tree = yaml.safe_load(path.read_text())
    return tree


def closed(schema: Any) -> Any:
    """Forbid what a schema does not name."""
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    tree = {key: closed(value) for key, value in schema.items()}
    if isinstance(tree.get("properties"), dict) and not tree.get("x-kubernetes-preserve-unknown-fields"):
        tree.setdefault("additionalProperties", False)
    return tree


@pytest.fixture(scope="module")
def schema_of() -> Callable[[str], Any]:
    if not SCHEMAS.is_dir():
        pytest.skip("KubeRay's schemas are not here")
    found = {}
    for path in SCHEMAS.glob("*.yaml"):
        definition = load(path)
        (version,) = (one for one in definition["spec"]["versions"] if one["name"] == "v1")
        schema = closed(version["schema"]["openAPIV3Schema"])
        schema["properties"]["metadata"] = {"type": "object"}
        found[definition["spec"]["names"]["kind"]] = Draft7Validator(schema)
    return found.__getitem__


def errors(validator: Any, manifest: Tree) -> list[str]:
    return [f"{'.'.join(map(str, error.path))}: {error.message}" for error in validator.iter_errors(manifest)]


@pytest.mark.parametrize("path", RAY_FILES, ids=lambda path: path.name)
def test_a_manifest_is_what_kuberay_takes(path: Path, schema_of: Callable[[str], Any]) -> None:
    manifest = load(path)
    assert errors(schema_of(manifest["kind"]), manifest) == []
    cluster_of(manifest)["concurrencyPolicy"] = "Forbid"
    assert len(errors(schema_of(manifest["kind"]), manifest)) == 1


def pods(tree: Any) -> Iterator[Tree]:
    """Find every pod template."""
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
        kubernetes_validate.validate(manifest, CPU_VERSION, strict=True)
    specs = list(pods(manifest))
    assert specs
    for spec in specs:
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": spec}
        kubernetes_validate.validate(pod, CPU_VERSION, strict=True)
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate({**pod, "spec": {**spec, "gracePeriod": 3}}, CPU_VERSION, strict=True)


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


SPOT = "spec/rayClusterSpec/workerGroupSpecs/0"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (set_at("metadata/name", "x" * 48), "name is too long"),
        (set_at("spec/clusterSelector", {"a": "b"}), "a cluster of its own"),
        (set_at("spec/shutdownAfterJobFinishes", False), "ttlSecondsAfterFinished needs"),
        (set_at("spec/runtimeEnvYAML", "env_vars: {}"), "before it has stopped in order"),
        (set_at("spec/rayClusterSpec/headGroupSpec/rayStartParams", {}), "head would take work"),
        (set_at("spec/rayClusterSpec/headGroupSpec/template/spec/terminationGracePeriodSeconds", 20), "the driver is"),
        (set_at(f"{SPOT}/groupName", "on-demand"), "two groups"),
        (set_at(f"{SPOT}/priority", 0), "on-demand nodes come before"),
        (set_at(f"{SPOT}/minReplicas", 9), "out of their range"),
        (set_at(f"{SPOT}/template/spec/terminationGracePeriodSeconds", 100), "before Ray has drained"),
        (set_at(f"{SPOT}/template/spec/containers/0/env/0/value", "130"), "more than a spot notice leaves"),
        (set_at(f"{SPOT}/template/spec/containers/0/resources/limits", {}), "no GPU"),
    ],
)
def test_a_broken_rule_is_found(change: Callable[[Tree], None], words: str) -> None:
    manifest = copy.deepcopy(load(KUBERAY / "job/rayjob.yaml"))
    change(manifest)
    assert words in "; ".join(broken_rules(manifest))


def test_all_have_the_same_cluster() -> None:
    clusters = [cluster_of(load(path)) for path in RAY_FILES]
    assert len(clusters) == 3
    assert clusters[1:] == clusters[:-1]


def command_lines() -> Iterator[str]:
    """Find every command line that ends in jobs/generate.py and its arguments."""
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
        before, _, arguments = line.partition("/app/jobs/generate.py ")
        assert before.endswith("python ")
        given = parser().parse_args(["run", *shlex.split(arguments)])
        assert given.job.startswith("s3://bucket/jobs/")
        assert (given.logical_date is None) == ("nightly" not in given.job)


@pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not installed")
@pytest.mark.parametrize("folder", FOLDERS)
def test_kustomize_makes_of_a_folder_what_it_says(folder: str, schema_of: Callable[[str], Any]) -> None:
    words = ["kubectl", "kustomize", str(KUBERAY / folder)]
    (manifest,) = yaml.safe_load_all(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    if manifest["kind"] != "CronJob":
        assert errors(schema_of(manifest["kind"]), manifest) == []
        assert broken_rules(manifest) == []
    images = {one["image"] for spec in pods(manifest) for one in spec["containers"] + spec.get("initContainers", [])}
    if folder == "example":
        assert images == {"registry.example.com/flux-batch:0.1.0"}
        assert manifest["metadata"]["namespace"] == "rendering"
        assert "s3://my-bucket/" in manifest["spec"]["entrypoint"]
    else:
        assert images == {"flux-batch"}
