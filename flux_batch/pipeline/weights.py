"""The weights that a job names, found and measured before anything is loaded.

Knows files and their sizes. Knows no tensor and imports no torch, so that the driver of a run can look, too.
"""

from __future__ import annotations

import logging

from flux_batch.config.schema import ModelConfig
from flux_batch.download.models import find_local_model, local_model, local_path, model_listing, source_kind
from flux_batch.errors import CheckpointError, JobError, NotFound, StoreError, StoreRefused
from flux_batch.model.checkpoint.checkpoint import model_files
from flux_batch.model.checkpoint.detect import find_parts
from flux_batch.pipeline.errors import checkpoint_errors

# The demo model has 0.02 GB, FLUX.1 in its narrowest encodings 7 GB with its text encoders.
MAX_BYTES_ON_CPU = 2 * 10**9

log = logging.getLogger(__name__)


def check_weights(model: ModelConfig, no_gpu: str = "") -> None:
    """Check that the model, the LoRAs and the ControlNets of a job are there; nothing is fetched.

    no_gpu: the reason why the model would run on a CPU that was not asked for; a large one is then refused. A remote
    that cannot be asked now counts as having the model.
    Raises: CheckpointError, NotFound or StoreRefused for what is missing or incomplete; JobError.
    """
    size = _size_of(model)
    uris = [("LoRA", lora.uri) for lora in model.loras] + [("ControlNet", net.uri) for net in model.controlnets]
    for title, uri in uris:
        if source_kind(uri) in ("local", "file") and not local_path(uri).exists():
            raise CheckpointError(f"{title} {uri} is not there")
    if no_gpu and size > MAX_BYTES_ON_CPU:
        raise JobError(
            f"workers.num_gpus: {no_gpu}, and the weights of {model.uri} have {size / 1e9:.0f} GB, which would take "
            "hours on a CPU; run the job where there is one, or set workers.num_gpus to 0 to use the CPU all the same"
        )


def _size_of(model: ModelConfig) -> int:
    """Return the bytes of a model's weights; 0 if its remote cannot be asked now."""
    try:
        source = find_local_model(model.uri, model.storage_options)
        if source is None and source_kind(model.uri) not in ("local", "file"):
            return sum(file.size or 0 for file in model_listing(model.uri, model.storage_options).files)
        source = source or local_model(model.uri)
        with checkpoint_errors():
            return sum(file.stat().st_size for part in find_parts(source) for file in model_files(part))
    except (NotFound, StoreRefused):
        raise
    except StoreError as error:
        log.debug("%s: cannot be read: %s", model.uri, error)
        return 0
