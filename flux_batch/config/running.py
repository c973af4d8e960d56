"""The sections of the job file on how to run: what is good enough, on which workers, and what may fail."""

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
    """A score that images should reach, and further tries for those that do not."""

    score: str = Field(min_length=1)
    """The judge of an image: a built-in annotator, `NAME.COLUMN` if not by its first column; or `module:factory`."""
    at_least: float
    """The least score of an image that is accepted."""
    max_tries: int = Field(default=4, ge=1, le=100)
    """Tries of an image at most; each further one has a seed derived from that of the first."""
    keep: Literal["first", "best"] = "first"
    """`first` keeps the first image that is accepted, or else the best; `best` makes all tries and keeps the best."""
    otherwise: Literal["keep", "fail"] = "keep"
    """The end of an image that no try made good: it is kept with `accepted` false, or it is a failed row."""
    options: dict[str, Any] = Field(default={})
    """Options of the annotator."""
    accept_rate: float | None = Field(default=None, gt=0, le=1)
    """Share of images that one try makes good, for the figures of `flux-batch plan`; null counts `max_tries`."""

    @property
    def model_uri(self) -> str | None:
        """The address of the model that a built-in annotator judges with; None if it has none."""
        default = _SCORER_MODELS.get(self.score.partition(".")[0])
        return str(self.options.get("model", default)) if default else None

    @property
    def expected_tries(self) -> float:
        """The tries of an image on average, if a try is good by `accept_rate`."""
        if self.keep == "best" or self.accept_rate is None:
            return float(self.max_tries)
        return (1 - (1 - self.accept_rate) ** self.max_tries) / self.accept_rate


class WorkersConfig(Section):
    """The number of workers, and the devices and batch size of each."""

    min: int = Field(default=1, ge=1)
    """The run counts as stuck, and says so, while fewer workers than this are up."""
    max: int = Field(default=8, ge=1)
    """The most workers at a time."""
    num_gpus: float = Field(default=1, ge=0)
    """GPUs of each worker; 0 computes on the CPU. Where there should be one and is none, a small model runs on the CPU
    with a line that says so, and a large one is refused; one that does not start counts as lost."""
    num_cpus: float = Field(default=1, ge=0)
    """CPUs of each worker."""
    batch_size: BatchSize = 4
    """Images in one forward pass; `auto` measures it when the run starts and remembers it with the run."""
    max_gpu_hours: float | None = Field(default=None, gt=0)
    """GPU-hours that workers may take, over all invocations; a worker without a GPU counts as one. A run that reaches
    it stops in order, with 75; started again without a higher limit, it ends with 2."""

    @model_validator(mode="after")
    def _ordered(self) -> WorkersConfig:
        if self.min > self.max:
            raise InvalidSetting(f"min = {self.min}: must not exceed max = {self.max}", field="min")
        if self.num_gpus > 1 and not self.num_gpus.is_integer():  # Ray shares one GPU, and no more
            raise InvalidSetting(f"num_gpus = {self.num_gpus:g}: must be whole above 1", field="num_gpus")
        return self


class FailuresConfig(Section):
    """Limits of failures, retries and waiting."""

    max_ratio: float = Field(default=0.01, ge=0, le=1)
    """Share of images that may fail before the finished run exits with 3."""
    max_attempts: int = Field(default=3, ge=1)
    """Tries of a shard that ends in an error; the loss of a worker does not count."""
    hang_s: float = Field(default=900, gt=0)
    """Seconds without a sign of life after which a worker is killed and replaced."""
    load_hang_s: float = Field(default=3600, gt=0)
    """Seconds without a sign of life, such as bytes of a download, after which a worker that is loading its model is
    killed. It counts as a worker that could not start."""
    drain_s: float = Field(default=25, ge=0)
    """Seconds that a stopped run has to finish or put aside what is being made."""
    outage_s: float = Field(default=1800, ge=0)
    """Seconds that a run waits for a failing storage before it gives up for now."""
    lease_ttl_s: float = Field(default=60, ge=1)
    """Seconds that the driver may be out of touch before another one may go on with the run."""
