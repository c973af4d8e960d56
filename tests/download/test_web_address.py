from __future__ import annotations

import json
from pathlib import Path

import pytest

from flux_batch.download.models import find_local_model, local_path
from flux_batch.errors import NotFound
from helpers.web_server import web_server


def test_a_web_address_that_answers_with_weights_is_a_file_whatever_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Civitai's addresses are such: /api/download/models/1080034?type=Model&format=SafeTensor."""
    monkeypatch.setenv("FLUX_BATCH_CACHE", str(tmp_path))
    header = json.dumps({"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}).encode()
    data = len(header).to_bytes(8, "little") + header + b"abcd"
    with web_server() as server:
        lora = server.at("/api/download/models/1080034?type=Model&format=SafeTensor", data)
        page = server.at("/api/download/models/2?type=Model", b"<html>log in</html>")

        assert find_local_model(lora) is None
        path = local_path(lora)
        num_asked = len(server.asked)

        assert path.read_bytes() == data
        assert find_local_model(lora) == local_path(lora) == path
        assert len(server.asked) == num_asked
        with pytest.raises(NotFound, match=r"/models/2: answers neither with a safetensors file nor with a list"):
            local_path(page)
