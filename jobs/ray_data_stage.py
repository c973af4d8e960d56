"""FLUX as one stage of a Ray Data pipeline: take this instead of a job where images go on to further stages.

    python jobs/ray_data_stage.py jobs/demo.yaml out/images
    ray job submit --working-dir . -- python jobs/ray_data_stage.py jobs/nightly.yaml s3://bucket/images \
        --logical-date 2026-11-23

Streams the Parquet files of `prompts.uri` through the model and writes Parquet with an `image` column (encoded bytes),
its `seed` and `sha256`, and `status`, `error_type` and `error_message`, since a row that fails stays a row. The same
ids and seeds give the images of `flux-batch run`. What a job has and a pipeline of Ray Data has not: it goes on where
it was stopped, writes each image once, and waits for a storage that is away. Here, all is made again, in another
folder: one that is there is refused.

Credentials of buckets come from the environment: Ray Data and Arrow know no `storage_options`.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter

import ray
from ray.data import ActorPoolStrategy, Dataset

from flux_batch import FluxMapper
from flux_batch.config.schema import JobConfig
from flux_batch.config.text import parse_moment
from flux_batch.engine.ray_cluster import connect
from flux_batch.job import load_job, with_absolute_paths

# What one call gets, is retried with, and costs if its worker is lost: some minutes of a GPU.
ROWS_PER_CALL = 64


def with_images(prompts: Dataset, config: JobConfig) -> Dataset:
    """Add the images of a data set of prompts, with the settings of a job file."""
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
        batch_format="pyarrow",  # keeps the types of columns where a whole batch has failed
        num_gpus=config.workers.num_gpus,
        num_cpus=0,  # else workers take the CPUs of a small cluster, and reading and writing never start
    )


def main() -> int:
    """Run the pipeline: put your own stages before and after."""
    parser = argparse.ArgumentParser(description="FLUX as a stage of a Ray Data pipeline.")
    parser.add_argument("job", metavar="JOB.yaml", help="whose prompts, model, sampling, image and workers are used")
    parser.add_argument("output", metavar="OUTPUT", help="the folder that the Parquet files go to")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="SECTION.KEY=VALUE")
    parser.add_argument("--logical-date", type=parse_moment, metavar="DATE")
    arguments = parser.parse_args()
    config = with_absolute_paths(load_job(arguments.job, arguments.overrides, arguments.logical_date))
    connect(config.workers.max, config.workers.num_gpus)

    prompts = ray.data.read_parquet(list(config.prompts.uri))
    with_images(prompts, config).write_parquet(arguments.output, mode="create")  # a second run would add to it

    outcomes: Counter[str] = Counter()
    for batch in ray.data.read_parquet(arguments.output).select_columns("status").iter_batches(batch_format="pyarrow"):
        outcomes.update(batch["status"].to_pylist())
    print(", ".join(f"{count} {status}" for status, count in sorted(outcomes.items())), "in", arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
