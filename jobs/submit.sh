#!/usr/bin/env bash
# Submits a job file to a Ray cluster, with the environment that a run needs there. The same command again goes on with
# a run that was stopped, and does nothing for one that is done.
#
#   RAY_ADDRESS=http://head:8265 jobs/submit.sh jobs/s3.yaml
#   RAY_ADDRESS=http://head:8265 jobs/submit.sh s3://bucket/jobs/nightly.yaml --logical-date 2026-11-23
#   SUBMIT="--no-wait --submission-id cats-1" jobs/submit.sh jobs/s3.yaml       options of `ray job submit`
#
# This folder travels to every node: what .gitignore names stays here, and Ray takes up to 512 MiB. The exit code of
# `ray job submit` is 0 for a job that was stopped, and 1 for whatever else went wrong: how the run itself ended stands
# in its log, and in _run/report.json of its output.
set -euo pipefail
cd "$(dirname "$0")/.."

# RAY_JOB_STOP_WAIT_TIME_S    seconds between `ray job stop` and the kill; Ray's 3 would cost the work in hand. More than
#                             failures.drain_s of the job file.
# HF_HUB_OFFLINE              no worker looks for a hub: a thousand of them would be refused. 0 where model.uri or
#                             prompts.uri is one.
# RAY_LOGGING_CONFIG_ENCODING a log line is a JSON object with job, node and actor; TEXT for people.
env_vars=$(printf '{"RAY_JOB_STOP_WAIT_TIME_S": "%s", "HF_HUB_OFFLINE": "%s", "RAY_LOGGING_CONFIG_ENCODING": "%s"}' \
    "${RAY_JOB_STOP_WAIT_TIME_S:-40}" "${HF_HUB_OFFLINE:-1}" "${RAY_LOGGING_CONFIG_ENCODING:-JSON}")

# shellcheck disable=SC2086  # several options in one variable
exec ray job submit ${SUBMIT:-} --working-dir . --runtime-env-json "{\"env_vars\": $env_vars}" -- \
    python jobs/generate.py "$@"
