"""The sections of the job file on how to run: quality, workers and failures."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from flux_batch.config.section import Section
from flux_batch.config.values import BatchSize
from flux_batch.errors import InvalidSetting

# The models that annotators load unless an option `model` names another.
CLIP_MODEL = "openai/clip-vit-large-patch14"
SAFETY_MODEL = "Falconsai/nsfw_image_detection"
_SCORER_MODELS = {"clip": CLIP_MODEL, "aesthetic": CLIP_MODEL, "safety": SAFETY_MODEL}


class QualityConfig(Section):
    """A score that images should reach, and further tries for images below it."""

    score: str = Field(min_length=1)
    """The scorer: a built-in annotator, as `NAME` for its first column or `NAME.COLUMN`; or `module:factory`."""
    at_least: float
    """The lowest score that is accepted."""
    max_tries: int = Field(default=4, ge=1, le=100)
    """The most tries of an image; the seeds of further tries are derived from the first."""
    keep: Literal["first", "best"] = "first"
    """`first` keeps the first accepted image, or the best if none is accepted; `best` makes all tries and keeps the
    best."""
    otherwise: Literal["keep", "fail"] = "keep"
    """If no try is accepted: `keep` keeps the image with `accepted` false, `fail` makes it a failed row."""
    options: dict[str, Any] = Field(default={})
    """Options of the annotator."""
    accept_rate: float | None = Field(default=None, gt=0, le=1)
    """The expected share of accepted tries, for the estimates of `flux-batch plan`; null assumes `max_tries` for each
    image."""

    @property
    def model_uri(self) -> str | None:
        """The address of the model of a built-in annotator; None if it has none."""
        default = _SCORER_MODELS.get(self.score.partition(".")[0])
        return str(self.options.get("model", default)) if default else None

    @property
    def expected_tries(self) -> float:
        """The average number of tries of an image, by `accept_rate`."""
        if self.keep == "best" or self.accept_rate is None:
            return float(self.max_tries)
        return (1 - (1 - self.accept_rate) ** self.max_tries) / self.accept_rate


class WorkersConfig(Section):
    """The number of workers, and the devices and batch size of each."""

    min: int = Field(default=1, ge=1)
    """While fewer workers than this are up, the run counts as stuck and logs it."""
    max: int = Field(default=8, ge=1)
    """The most workers at a time."""
    num_gpus: float = Field(default=1, ge=0)
    """GPUs of each worker; 0 computes on the CPU. On a machine without a GPU, a small model runs on the CPU with a
    warning, and a large one is refused; a GPU that does not start counts as lost."""
    num_cpus: float = Field(default=1, ge=0)
    """CPUs of each worker."""
    batch_size: BatchSize = 4
    """Images in one forward pass; `auto` measures it when the run starts and remembers it with the run."""
    max_gpu_hours: float | None = Field(default=None, gt=0)
    """GPU-hours that workers may use, over all invocations; a worker without GPUs counts as one GPU. A run that reaches
    the limit stops cleanly with exit code 75; started again without a higher limit, it exits with 2."""

    @model_validator(mode="after")
    def _ordered(self) -> WorkersConfig:
        if self.min > self.max:
            raise InvalidSetting(f"min = {self.min}: must not exceed max = {self.max}", field="min")
        if self.num_gpus > 1 and not self.num_gpus.is_integer():  # Ray shares one GPU, and no more
            raise InvalidSetting(f"num_gpus = {self.num_gpus:g}: must be whole above 1", field="num_gpus")
        return self


class FailuresConfig(Section):
    """Limits for failures, retries and waiting."""

    max_ratio: float = Field(default=0.01, ge=0, le=1)
    """Share of images that may fail before the finished run exits with 3."""
    max_attempts: int = Field(default=3, ge=1)
    """Attempts at a shard that fails with an error; the loss of a worker does not count."""
    hang_s: float = Field(default=900, gt=0)
    """Seconds without a sign of life after which a worker is killed and replaced."""
    load_hang_s: float = Field(default=3600, gt=0)
    """Seconds without a sign of life, such as bytes of a download, after which a worker that is loading its model is
    killed. It counts as a worker that could not start."""
    drain_s: float = Field(default=25, ge=0)
    """Seconds that a stopped run has to finish or save the images in progress."""
    outage_s: float = Field(default=1800, ge=0)
    """Seconds that a run waits for an unavailable storage before it gives up; it can be resumed later."""
    lease_ttl_s: float = Field(default=60, ge=1)
    """Seconds without a renewal of the driver's lease after which another driver may take over the run."""
