"""FLUX as one stage of a Ray Data pipeline: an alternative to a job if further stages use the images.

    python jobs/ray_data_stage.py jobs/demo.yaml out/images
    ray job submit --working-dir . -- python jobs/ray_data_stage.py jobs/nightly.yaml s3://bucket/images \
        --logical-date 2026-11-23

Streams the Parquet files of `prompts.uri` through the model and writes Parquet with an `image` column (encoded bytes),
its `seed` and `sha256`, and `status`, `error_type` and `error_message`, since a failed row is kept. The same ids and
seeds give the images of `flux-batch run`. Unlike a job, a Ray Data pipeline does not resume, does not write each image
exactly once, and does not wait while storage is unavailable: a second run makes every image again, and needs another
output folder.

Credentials of buckets come from the environment: Ray Data and Arrow ignore `storage_options`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter

import ray
from ray.data import ActorPoolStrategy, Dataset

from flux_batch import FluxMapper, JobConfig, load_job

# Rows per call. If a worker is lost, they are all made again, which takes a GPU some minutes.
ROWS_PER_CALL = 64


def with_images(prompts: Dataset, config: JobConfig) -> Dataset:
    """Return the prompts with their images, made with the settings of a job file."""
    settings = {
        "model": config.model.model_dump(),
        "sampling": config.sampling.model_dump(),
        "prompts": config.prompts.model_dump(include={"columns", "allow_http", "input_image_root", "storage_options"}),
        "image": config.output.image.model_dump(),
        "batch_size": config.workers.batch_size,
        "exit_on_device_loss": True,
    }
    return prompts.repartition(target_num_rows_per_block=ROWS_PER_CALL).map_batches(
        FluxMapper,
        fn_constructor_kwargs=settings,
        compute=ActorPoolStrategy(min_size=config.workers.min, max_size=config.workers.max),
        batch_size=ROWS_PER_CALL,
        batch_format="pyarrow",  # keeps the column types of a batch whose rows all failed
        num_gpus=gpus_of_a_worker(config),
        num_cpus=0,  # or workers would take all CPUs of a small cluster, and reading and writing would never start
    )


def gpus_of_a_worker(config: JobConfig) -> float:
    """Return the GPUs of a worker.

    This is 0 on this machine if it has no GPU. A cluster may still start a node with one.
    """
    is_here = os.environ.get("RAY_ADDRESS", "") in ("", "local")
    return 0 if is_here and not ray.cluster_resources().get("GPU") else config.workers.num_gpus


def main() -> int:
    """Run the pipeline; add your own stages before and after."""
    parser = argparse.ArgumentParser(description="FLUX as a stage of a Ray Data pipeline.")
    parser.add_argument("job", metavar="JOB.yaml", help="its prompts, model, sampling, image and workers are used")
    parser.add_argument("output", metavar="OUTPUT", help="folder of the Parquet files, must not exist")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="SECTION.KEY=VALUE")
    parser.add_argument("--logical-date", metavar="DATE")
    arguments = parser.parse_args()
    config = load_job(arguments.job, arguments.overrides, arguments.logical_date)
    ray.init(os.environ.get("RAY_ADDRESS") or "local")

    prompts = ray.data.read_parquet(list(config.prompts.uri))
    with_images(prompts, config).write_parquet(arguments.output, mode="create")  # or a second run would append to it

    outcomes: Counter[str] = Counter()
    for batch in ray.data.read_parquet(arguments.output).select_columns("status").iter_batches(batch_format="pyarrow"):
        outcomes.update(batch["status"].to_pylist())
    print(", ".join(f"{count} {status}" for status, count in sorted(outcomes.items())), "in", arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
