"""Rules of KubeRay and of a run that no schema can express.

They include the time that a worker and a driver need to stop.
Source: kuberay 1.7, ray-operator/controllers/ray/utils/validation.go.
"""

from __future__ import annotations

import re
import zoneinfo
from collections.abc import Iterator
from typing import Any

import yaml

from flux_batch.config.running import FailuresConfig

QUEUE = "kueue.x-k8s.io/queue-name"
LONGEST_NAME = {"RayCronJob": 36, "RayJob": 47, "RayCluster": 53}
# The seconds of an AWS spot notice, and the seconds that a driver needs after its drain to release its lease.
SPOT_NOTICE_S, DRIVER_SPARE_S = 120, 5
DRAIN_S = FailuresConfig().drain_s
# The defaults of Kubernetes, of Ray for a node that gets SIGTERM, and of `ray job stop`.
GRACE_S, NODE_DRAIN_S, JOB_STOP_S = 30, 30, 3
OF_RAY_START = {"num-cpus", "num-gpus", "memory", "resources"}


def broken_rules(manifest: dict[str, Any]) -> list[str]:
    """List the rules that a manifest of Ray breaks."""
    return list(_broken(manifest))


def job_of(manifest: dict[str, Any]) -> dict[str, Any] | None:
    """Return the spec of the RayJob in a manifest, None without one."""
    spec: dict[str, Any] = manifest["spec"]
    job: dict[str, Any] | None = {"RayJob": spec, "RayCronJob": spec.get("jobTemplate")}.get(manifest["kind"])
    return job


def cluster_of(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return the spec of the RayCluster in a manifest; empty for a job that is sent to a cluster."""
    job = job_of(manifest)
    cluster: dict[str, Any] = manifest["spec"] if job is None else job.get("rayClusterSpec", {})
    return cluster


def _broken(manifest: dict[str, Any]) -> Iterator[str]:
    name = manifest["metadata"]["name"]
    if len(name) > LONGEST_NAME[manifest["kind"]]:
        yield "the name is too long for what is made of it"
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        yield "the name is no label of DNS"
    if manifest["kind"] == "RayCronJob":
        yield from _broken_schedule(manifest["spec"])
    if (job := job_of(manifest)) is not None:
        yield from _broken_job(job)
    if cluster := cluster_of(manifest):
        yield from _broken_cluster(cluster)
        if QUEUE in manifest["metadata"].get("labels", {}) and cluster.get("enableInTreeAutoscaling"):
            yield "a job in a queue of Kueue cannot use autoscaling"


def _broken_schedule(spec: dict[str, Any]) -> Iterator[str]:
    if len(spec["schedule"].split()) != 5 or "TZ=" in spec["schedule"]:
        yield "the schedule is not one of five fields"
    if spec.get("timeZone", "Etc/UTC") not in zoneinfo.available_timezones():
        yield "the time zone does not exist"


def _broken_job(job: dict[str, Any]) -> Iterator[str]:
    is_sent = bool(job.get("clusterSelector"))
    if job.get("backoffLimit") and (is_sent or job.get("submissionMode") == "InteractiveMode"):
        yield "backoffLimit needs a cluster of its own"
    if not is_sent and not job.get("rayClusterSpec"):
        yield "there is no cluster to run on"
    if job.get("suspend") and is_sent:
        yield "a job that is sent to a cluster cannot be suspended"
    for key in ("ttlSecondsAfterFinished", "suspend"):
        if job.get(key) and not job.get("shutdownAfterJobFinishes"):
            yield f"{key} needs shutdownAfterJobFinishes"
    if job.get("deletionStrategy") and job.get("shutdownAfterJobFinishes"):
        yield "deletionStrategy and shutdownAfterJobFinishes exclude each other"
    if job.get("activeDeadlineSeconds", 1) <= 0 or job.get("backoffLimit", 0) < 0:
        yield "a limit is out of its range"
    env = yaml.safe_load(job["runtimeEnvYAML"])["env_vars"]
    if float(env.get("RAY_JOB_STOP_WAIT_TIME_S", JOB_STOP_S)) < DRAIN_S + DRIVER_SPARE_S:
        yield "a stopped job is killed before it has stopped in order"


def _broken_cluster(cluster: dict[str, Any]) -> Iterator[str]:
    head, groups = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    if head["rayStartParams"].get("num-cpus") != "0":
        yield "the head would take work"
    if not DRAIN_S + DRIVER_SPARE_S < node_drain_s(head) < grace_s(head):
        yield "the driver is killed before it has stopped in order"
    annotations = head["template"].get("metadata", {}).get("annotations", {})
    if annotations.get("karpenter.sh/do-not-disrupt") != "true":
        yield "Karpenter may move the head, and the driver on it"
    names = [group["groupName"] for group in groups]
    if len(set(names)) < len(names):
        yield "two groups have one name"
    is_v2 = cluster.get("enableInTreeAutoscaling") and cluster.get("autoscalerOptions", {}).get("version") == "v2"
    for group in (head, *groups):
        if is_v2 and group["template"]["spec"].get("restartPolicy", "Never") != "Never":
            yield "autoscaler v2 replaces pods instead of restarting them"
        if not is_v2 and {"priority", "idleTimeoutSeconds"} & group.keys():
            yield "priority and idleTimeoutSeconds of a group need autoscaler v2"
        if group.get("resources") and OF_RAY_START & group["rayStartParams"].keys():
            yield "resources of a group are said twice"
    for group in groups:
        yield from _broken_group(group)
    priorities = {group["groupName"]: group.get("priority", 0) for group in groups}
    if len(groups) > 1 and priorities.get("spot", 1) <= priorities.get("on-demand", 0):
        yield "on-demand nodes come before spot ones"


def _broken_group(group: dict[str, Any]) -> Iterator[str]:
    if not group.get("minReplicas", 0) <= group.get("replicas", 0) <= group["maxReplicas"]:
        yield "replicas are out of their range"
    if grace_s(group) <= node_drain_s(group):
        yield "a pod is killed before Ray has drained its node"
    if not DRAIN_S < node_drain_s(group) < SPOT_NOTICE_S:
        yield "a node is drained for less than a worker needs, or for more than a spot notice leaves"
    if shm_bytes(group) < object_store_bytes(group):
        yield "Ray's object store does not fit into /dev/shm"
    if not any("nvidia.com/gpu" in one["resources"]["limits"] for one in group["template"]["spec"]["containers"]):
        yield "a worker has no GPU"


def grace_s(group: dict[str, Any]) -> float:
    """Return the seconds from SIGTERM to the kill of a group's pod."""
    return float(group["template"]["spec"].get("terminationGracePeriodSeconds", GRACE_S))


def node_drain_s(group: dict[str, Any]) -> float:
    """Return the seconds that Ray drains a node of a group after SIGTERM before it ends its processes."""
    env = {one["name"]: one.get("value") for one in group["template"]["spec"]["containers"][0].get("env", [])}
    return float(env.get("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S") or NODE_DRAIN_S)


def shm_bytes(group: dict[str, Any]) -> float:
    """Return the bytes of /dev/shm; without a volume for it, KubeRay makes one as large as the memory."""
    pod = group["template"]["spec"]
    mounts = pod["containers"][0].get("volumeMounts", [])
    names = [mount["name"] for mount in mounts if mount["mountPath"] == "/dev/shm"]
    sizes = [volume["emptyDir"]["sizeLimit"] for volume in pod.get("volumes", []) if volume["name"] in names]
    return gibibytes(sizes[0]) if sizes else memory_bytes(group)


def object_store_bytes(group: dict[str, Any]) -> float:
    """Return the bytes of the object store. Source: ray 2.60, _private/utils.py, resolve_object_store_memory."""
    given = group["rayStartParams"].get("object-store-memory")
    return float(given or min(0.3 * memory_bytes(group), max(1e10, 0.95 * shm_bytes(group))))


def memory_bytes(group: dict[str, Any]) -> float:
    return gibibytes(group["template"]["spec"]["containers"][0]["resources"]["limits"].get("memory", "1Gi"))


def gibibytes(quantity: str) -> float:
    return float(quantity.removesuffix("Gi")) * 2**30
