from __future__ import annotations

from typing import Any

import pytest

from flux_batch.config.schema import JobConfig
from flux_batch.output.formats import format_for
from flux_batch.records import ImageRequest, LoraUse
from flux_batch.sampling_params import SamplingParams
from flux_batch.worker.batches import ImageTask
from flux_batch.worker.recorder import Recorder

STYLE = LoraUse(name="style", uri="/style.safetensors", scale=0.8)
DETAIL = LoraUse(name="detail", uri="/detail.safetensors", scale=1.0)


def lora_fields(of_job: tuple[LoraUse, ...], loras: tuple[LoraUse, ...]) -> dict[str, Any]:
    """Return the fields about LoRAs of an image that is made with `loras`."""
    model = {"uri": "m", "loras": [{"name": lora.name, "uri": lora.uri, "scale": lora.scale} for lora in of_job]}
    config = JobConfig.from_dict({"prompts": {"uri": "p"}, "output": {"uri": "o"}, "model": model})
    recorder = Recorder(config.model, format_for(config.output), 512)
    request = ImageRequest(row=0, id="x", prompt="p", sampling=SamplingParams(), seeds=(1,), loras=loras)
    fields = recorder.fields("00000", ImageTask(request, 0))
    return {name: value for name, value in fields.items() if name.startswith("lora")}


@pytest.mark.parametrize(
    ("of_job", "loras", "expected"),
    [
        ((), (), {}),
        ((STYLE,), (), {"lora": ""}),
        ((STYLE,), (STYLE,), {"lora": "style", "lora_scale": 0.8}),
        ((), (DETAIL,), {"lora": "detail", "lora_scale": 1.0}),
        ((STYLE, DETAIL), (STYLE, DETAIL), {"lora": "style (0.8), detail (1)"}),
    ],
)
def test_a_record_names_the_loras_of_its_image(
    of_job: tuple[LoraUse, ...], loras: tuple[LoraUse, ...], expected: dict[str, object]
) -> None:
    assert lora_fields(of_job, loras) == expected
