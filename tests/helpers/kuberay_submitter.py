"""The command and the environment of the pod with which KubeRay's operator submits a RayJob.

Source: kuberay 1.7, ray-operator/controllers/ray/common/job.go (BuildJobSubmitCommand) and rayjob_controller.go
(getSubmitterTemplate).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import yaml

# The program and its options; its only argument is `submitting_line`.
SHELL = ("/bin/bash", "-ce", "--")


def submitting_line(job: Mapping[str, Any], address: str, job_id: str) -> str:
    """Return the line of bash for the spec of a RayJob.

    A retry of the pod follows the job if it is already submitted.

    The operator's loop that waits for the dashboard is left out.
    """
    runtime_env = json.dumps(json.dumps(yaml.safe_load(job["runtimeEnvYAML"])))
    at, options = f"--address {address}", f"--runtime-env-json {runtime_env} --submission-id {job_id}"
    return (
        f"if ! ray job status {at} {job_id} >/dev/null 2>&1 ; "
        f"then ray job submit {at} --no-wait {options} -- {job['entrypoint'].strip()} ; "
        f"fi ; ray job logs {at} --follow {job_id}"
    )


def submitter_environment(job: Mapping[str, Any], address: str, job_id: str, name: str) -> dict[str, str]:
    """Return the pod's environment variables: those of its template and those of the operator.

    `name` is the name of the RayJob and of the Job that submits it; Kubernetes labels the pods of a Job with it.
    """
    fields = {"metadata.labels['batch.kubernetes.io/job-name']": name}
    template = job.get("submitterPodTemplate", {"spec": {"containers": [{}]}})
    variables = template["spec"]["containers"][0].get("env", [])
    said = {each["name"]: each.get("value") or fields[each["valueFrom"]["fieldRef"]["fieldPath"]] for each in variables}
    operators = {"PYTHONUNBUFFERED": "1", "RAY_DASHBOARD_ADDRESS": address, "RAY_JOB_SUBMISSION_ID": job_id}
    return said | operators
