"""The benchmark of requests to an S3-compatible store: of a shard, of a further batch and of the lease."""

from __future__ import annotations

import json
import logging
import tempfile
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np

from flux_batch.config.schema import JobConfig
from flux_batch.engine.local import LocalEngine
from flux_batch.errors import JobError
from flux_batch.images import Pixels
from flux_batch.job import run
from flux_batch.output.lease import BEATS_PER_LEASE, LOOK_BEATS, Lease
from flux_batch.output.paths import LEASE, PROGRESS
from flux_batch.records import Kernels
from flux_batch.storage.store import Store

_SIDE, _BATCH, _MOST_BATCHES = 16, 2, 4
_TTL_S = 60.0
# The logger of the S3 client, and the start of its line about a request.
_CLIENT, _REQUEST = "botocore.endpoint", "Making request for"


def bench_store(uri: str, storage_options: Mapping[str, Any], num_shards: int) -> dict[str, Any]:
    """Count the requests of runs in new folders under `uri`, which are deleted afterwards.

    The images of these runs take no time.
    """
    if not uri.startswith(("s3://", "s3a://")):
        raise JobError(f"--output {uri}: requests are counted on a store of the S3 kind, as s3://bucket/folder")
    one = _requests_of_run(uri, storage_options, 1, 1)
    all_shards = _requests_of_run(uri, storage_options, 1 + num_shards, 1)
    all_batches = _requests_of_run(uri, storage_options, 1 + num_shards, _MOST_BATCHES)
    of_shards = all_shards - one
    of_batches = (all_batches.total() - all_shards.total()) / (1 + num_shards) / (_MOST_BATCHES - 1)
    return {
        "benchmark": "store",
        "shards": num_shards,
        "requests_a_shard": of_shards.total() / num_shards,
        "requests_a_further_batch": of_batches,
        "requests_of_the_lease_a_minute": _requests_of_lease(uri, storage_options),
        "operations": {name: count / num_shards for name, count in of_shards.most_common()},
    }


def format_store(figures: dict[str, Any]) -> str:
    """Return the figures as text for people."""
    kinds = ", ".join(f"{count:.3g} {name}" for name, count in figures["operations"].items())
    return (
        f"a shard of one batch   {figures['requests_a_shard']:.3g} requests ({kinds})\n"
        f"a further batch        {figures['requests_a_further_batch']:.3g}\n"
        f"the lease, a minute    {figures['requests_of_the_lease_a_minute']:.3g}\n"
        f"over {figures['shards']} shards"
    )


class _ReadyPipeline:
    """A pipeline that returns the same finished image for every prompt."""

    default_t5_sequence_length = 512
    default_guidance = 3.5
    needed_images: tuple[str, ...] = ()
    compile_cache = None
    precision: Mapping[str, str] = {"dtype": "float32", "quantization": "none"}
    kernels = Kernels(device="none", attention="none", compile=False, torch="none")
    native_dtype = "float32"
    offloads_text_encoders = False

    def __call__(self, prompt: Sequence[str] | None, **others: Any) -> Sequence[Pixels]:
        image = np.zeros((_SIDE, _SIDE, 3), np.uint8)
        return [image] * len(prompt or ())

    def set_loras(self, loras: Sequence[tuple[str, float]]) -> None:
        """Do nothing: there is no model."""

    def encode_prompt(self, prompt: Sequence[str], t5_sequence_length: int | None = None) -> tuple[Any, Any]:
        """Return nothing: there is no text encoder."""
        return (), ()

    def truncations(self, prompts: Sequence[str], t5_sequence_length: int | None = None) -> list[tuple[bool, bool]]:
        """Return False for every prompt: none is truncated."""
        return [(False, False)] * len(prompts)


def _requests_of_run(uri: str, options: Mapping[str, Any], num_shards: int, batches: int) -> Counter[str]:
    """Count the requests of a whole run by operation."""
    output = f"{uri.rstrip('/')}/{uuid.uuid4().hex}"
    shard_size = _BATCH * batches
    with tempfile.TemporaryDirectory(prefix="flux-batch-bench-") as folder:
        prompts = Path(folder) / "prompts.jsonl"
        rows = (json.dumps({"prompt": f"a red circle, number {number}"}) for number in range(num_shards * shard_size))
        prompts.write_text("\n".join(rows))
        config = JobConfig.from_dict(
            {
                "prompts": {"uri": str(prompts)},
                "output": {"uri": output, "shard_size": shard_size, "storage_options": dict(options)},
                "model": {"uri": "demo"},
                "sampling": {"width": _SIDE, "height": _SIDE, "num_inference_steps": 1},
                "workers": {"batch_size": _BATCH, "num_cpus": 1},
            }
        )
        with _counted(but=(LEASE, PROGRESS)) as counts:
            run(config, engine=LocalEngine(), make_pipeline=lambda model: _ReadyPipeline())
    Store(output, options).delete_folder("")
    return counts


def _requests_of_lease(uri: str, options: Mapping[str, Any]) -> float:
    """Count the requests of a lease in a minute of a simulated clock."""
    store = Store(f"{uri.rstrip('/')}/{uuid.uuid4().hex}", options)
    now = 0.0
    lease = Lease(store, ttl_s=_TTL_S, clock=lambda: now)
    lease.acquire()
    lease.beat()
    with _counted() as counts:
        for _ in range(LOOK_BEATS):
            now += _TTL_S / BEATS_PER_LEASE
            lease.beat()
    lease.release()
    store.delete_folder("")
    return counts.total() / (LOOK_BEATS * _TTL_S / BEATS_PER_LEASE / 60)


@contextmanager
def _counted(but: tuple[str, ...] = ()) -> Iterator[Counter[str]]:
    """Count the requests of this process to S3, by the log of its client.

    but: keys and folders that do not count, since they are written at an interval, whatever the work.
    """
    counts: Counter[str] = Counter()

    class Counting(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if not str(record.msg).startswith(_REQUEST) or not isinstance(record.args, tuple):
                return
            operation, request = record.args[:2]
            where = unquote(str(request))
            if not any(f"/{key}" in where for key in but):
                counts[getattr(operation, "name", "other")] += 1

    log, handler = logging.getLogger(_CLIENT), Counting()
    level, propagate = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    log.propagate = False
    try:
        yield counts
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = propagate
