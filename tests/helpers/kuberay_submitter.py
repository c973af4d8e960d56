"""The command that KubeRay's operator gives to the pod which submits a RayJob, and the environment of that pod.

Source: kuberay 1.7, ray-operator/controllers/ray/common/job.go (BuildJobSubmitCommand) and rayjob_controller.go
(getSubmitterTemplate).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import yaml

# The program and its options, to which the line of `submitting_line` is the one argument.
SHELL = ("/bin/bash", "-ce", "--")


def submitting_line(job: Mapping[str, Any], address: str, job_id: str) -> str:
    """Return the line of bash for the spec of a RayJob; a retry of the pod follows a job that is submitted already.

    Leaves out the loop before it, which waits for the dashboard.
    """
    runtime_env = json.dumps(json.dumps(yaml.safe_load(job["runtimeEnvYAML"])))
    at, options = f"--address {address}", f"--runtime-env-json {runtime_env} --submission-id {job_id}"
    return (
        f"if ! ray job status {at} {job_id} >/dev/null 2>&1 ; "
        f"then ray job submit {at} --no-wait {options} -- {job['entrypoint'].strip()} ; "
        f"fi ; ray job logs {at} --follow {job_id}"
    )


def submitter_environment(job: Mapping[str, Any], address: str, job_id: str, name: str) -> dict[str, str]:
    """Return what the pod has beyond its image: what its template says, and what the operator adds.

    `name` is that of the RayJob, which the submitting Job shares, and Kubernetes labels the pods of a Job with it.
    """
    fields = {"metadata.labels['batch.kubernetes.io/job-name']": name}
    template = job.get("submitterPodTemplate", {"spec": {"containers": [{}]}})
    variables = template["spec"]["containers"][0].get("env", [])
    said = {each["name"]: each.get("value") or fields[each["valueFrom"]["fieldRef"]["fieldPath"]] for each in variables}
    operators = {"PYTHONUNBUFFERED": "1", "RAY_DASHBOARD_ADDRESS": address, "RAY_JOB_SUBMISSION_ID": job_id}
    return said | operators
