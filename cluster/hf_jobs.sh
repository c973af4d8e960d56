#!/usr/bin/env bash
# One run on a GPU machine of Hugging Face Jobs: one node with Ray, prompts and output in a bucket.
#
#   cluster/hf_jobs.sh s3://bucket/jobs/cats.yaml
#   HF_JOBS="--flavor h200x8 --detach" cluster/hf_jobs.sh s3://bucket/jobs/cats.yaml        options of `hf jobs run`
#   HF_JOBS=--dry-run cluster/hf_jobs.sh s3://bucket/jobs/cats.yaml                         only shows the job
#
# Takes the arguments of `flux-batch run`. A job that fails or reaches its timeout loses its unfinished shards. Each
# further attempt, and the same command later, resumes the run. The image is built from cluster/Dockerfile.
set -euo pipefail

# A model on the hub needs HF_TOKEN and HF_HUB_OFFLINE=0; the hub does not refuse a single machine.
# shellcheck disable=SC2086  # several options in one variable
exec hf jobs run --flavor a100-large --timeout 12h --attempts 3 --name flux-batch \
    --secrets HF_TOKEN --secrets AWS_ACCESS_KEY_ID --secrets AWS_SECRET_ACCESS_KEY \
    --env HF_HUB_OFFLINE=0 --env RAY_USAGE_STATS_ENABLED=0 ${HF_JOBS:-} -- \
    "${IMAGE:-registry.example.com/flux-batch:0.1.0}" flux-batch run "$@"
