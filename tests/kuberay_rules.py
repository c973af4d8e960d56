"""Rules of KubeRay and of a run that no schema can express. Source: kuberay 1.7, ray-operator/controllers/ray/utils/
validation.go; and how long a worker and a driver take to stop."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml

from flux_batch.config import FailuresConfig

LONGEST_NAME = {"RayCronJob": 36, "RayJob": 47, "RayCluster": 53}
# What a notice of AWS leaves, and what a driver needs beyond its drain to give its lease back.
SPOT_NOTICE_S, DRIVER_SPARE_S = 120, 5
DRAIN_S = FailuresConfig().drain_s


def broken_rules(manifest: dict[str, Any]) -> list[str]:
    """List what a manifest of Ray breaks."""
    return list(_broken(manifest))


def job_of(manifest: dict[str, Any]) -> dict[str, Any] | None:
    """Find the spec of a RayJob in a manifest."""
    spec: dict[str, Any] = manifest["spec"]
    job: dict[str, Any] | None = {"RayJob": spec, "RayCronJob": spec.get("jobTemplate")}.get(manifest["kind"])
    return job


def cluster_of(manifest: dict[str, Any]) -> dict[str, Any]:
    """Find the spec of a RayCluster in a manifest."""
    job = job_of(manifest)
    cluster: dict[str, Any] = manifest["spec"] if job is None else job["rayClusterSpec"]
    return cluster


def _broken(manifest: dict[str, Any]) -> Iterator[str]:
    if len(manifest["metadata"]["name"]) > LONGEST_NAME[manifest["kind"]]:
        yield "the name is too long for what is made of it"
    if (job := job_of(manifest)) is not None:
        yield from _broken_job(job)
    yield from _broken_cluster(cluster_of(manifest))


def _broken_job(job: dict[str, Any]) -> Iterator[str]:
    if job.get("backoffLimit") and (job.get("clusterSelector") or job.get("submissionMode") == "InteractiveMode"):
        yield "backoffLimit needs a cluster of its own"
    if job.get("ttlSecondsAfterFinished") and not job.get("shutdownAfterJobFinishes"):
        yield "ttlSecondsAfterFinished needs shutdownAfterJobFinishes"
    if job.get("suspend") and not job.get("shutdownAfterJobFinishes"):
        yield "suspend needs shutdownAfterJobFinishes"
    env = yaml.safe_load(job["runtimeEnvYAML"])["env_vars"]
    if float(env.get("RAY_JOB_STOP_WAIT_TIME_S", 3)) < DRAIN_S + DRIVER_SPARE_S:
        yield "a stopped job is killed before it has stopped in order"


def _broken_cluster(cluster: dict[str, Any]) -> Iterator[str]:
    head = cluster["headGroupSpec"]
    if head["rayStartParams"].get("num-cpus") != "0":
        yield "the head would take work"
    if head["template"]["spec"].get("terminationGracePeriodSeconds", 30) < DRAIN_S + DRIVER_SPARE_S:
        yield "the driver is killed before it has stopped in order"
    groups = cluster["workerGroupSpecs"]
    names = [group["groupName"] for group in groups]
    if len(set(names)) < len(names):
        yield "two groups have one name"
    for group in groups:
        yield from _broken_group(group)
    priorities = {group["groupName"]: group.get("priority", 0) for group in groups}
    if priorities.get("spot", 1) <= priorities.get("on-demand", 0):
        yield "on-demand nodes come before spot ones"


def _broken_group(group: dict[str, Any]) -> Iterator[str]:
    if not group.get("minReplicas", 0) <= group.get("replicas", 0) <= group["maxReplicas"]:
        yield "replicas are out of their range"
    spec = group["template"]["spec"]
    env = {one["name"]: one.get("value") for one in spec["containers"][0]["env"]}
    drain_s = float(env.get("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S") or 30)
    if spec.get("terminationGracePeriodSeconds", 30) <= drain_s:
        yield "a pod is killed before Ray has drained its node"
    if not DRAIN_S < drain_s < SPOT_NOTICE_S:
        yield "a node is drained for less than a worker needs, or for more than a spot notice leaves"
    if not any("nvidia.com/gpu" in one["resources"]["limits"] for one in spec["containers"]):
        yield "a worker has no GPU"
