#!/usr/bin/env bash
# Submits a job file to a Ray cluster, with the environment that a run needs there. The same command again resumes a run
# that was stopped, and does nothing for a run that is done.
#
#   RAY_ADDRESS=http://head:8265 jobs/submit.sh jobs/s3.yaml
#   RAY_ADDRESS=http://head:8265 jobs/submit.sh s3://bucket/jobs/nightly.yaml --logical-date 2026-11-23
#   SUBMIT="--no-wait --submission-id cats-1" jobs/submit.sh jobs/s3.yaml       options of `ray job submit`
#
# Ray copies this folder to every node, up to 512 MiB, without the files that .gitignore names. `ray job submit` exits
# with 0 for a stopped job, and with 1 after any failure. For the exit code of the run itself, see its log, or
# _run/report.json of its output.
set -euo pipefail
cd "$(dirname "$0")/.."

# RAY_JOB_STOP_WAIT_TIME_S    seconds between `ray job stop` and the kill; more than failures.drain_s of the job file.
#                             Ray's default of 3 would lose the images in work.
# HF_HUB_OFFLINE              1: no worker asks the hub, which would refuse a thousand of them. Set 0 if model.uri or
#                             prompts.uri is on the hub.
# RAY_LOGGING_CONFIG_ENCODING JSON: a log line is a JSON object with job, node and actor. TEXT is easier to read.
env_vars=$(printf '{"RAY_JOB_STOP_WAIT_TIME_S": "%s", "HF_HUB_OFFLINE": "%s", "RAY_LOGGING_CONFIG_ENCODING": "%s"}' \
    "${RAY_JOB_STOP_WAIT_TIME_S:-40}" "${HF_HUB_OFFLINE:-1}" "${RAY_LOGGING_CONFIG_ENCODING:-JSON}")

# shellcheck disable=SC2086  # several options in one variable
exec ray job submit ${SUBMIT:-} --working-dir . --runtime-env-json "{\"env_vars\": $env_vars}" -- \
    python jobs/generate.py "$@"
