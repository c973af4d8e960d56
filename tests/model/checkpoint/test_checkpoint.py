"""Opening checkpoints: files, shards and indexes, and one clear error for damaged or disguised files."""

from __future__ import annotations

import json
import pickle
import re
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from flux_batch.errors import CheckpointError
from flux_batch.model.checkpoint.checkpoint import Checkpoint, StoredTensor, model_files, open_checkpoint, read_json
from flux_batch.pipeline.model_manager import ModelManager
from helpers.layout_files import LAYOUTS, coarse_state, save

# One layout of each encoding, since a damaged file must be an error in each.
ENCODINGS = ("original bf16", "all in one", "fp8 e5m2", "comfy_quant", "metadata", "gguf Q8_0", "gguf F16")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return an intact file of each encoding."""
    folder = tmp_path_factory.mktemp("whole")
    return {name: LAYOUTS[name].write(coarse_state(), folder / name) for name in ENCODINGS}


def load(path: Path) -> None:
    ModelManager(torch.float32, "cpu", [path])


def assert_damaged(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"is (cut short or damaged .*download|not there)") as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("tenths", range(10))
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_file_cut_short_is_said_to_be_so(whole: dict[str, Path], tmp_path: Path, encoding: str, tenths: int) -> None:
    data = whole[encoding].read_bytes()
    assert_damaged(tmp_path / whole[encoding].name, data[: len(data) * tenths // 10])


@pytest.mark.parametrize("encoding", ENCODINGS)
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_file_cut_anywhere_is_said_to_be_so(
    whole: dict[str, Path], tmp_path: Path, encoding: str, share: float
) -> None:
    data = whole[encoding].read_bytes()
    assert_damaged(tmp_path / whole[encoding].name, data[: int(len(data) * share)])


@pytest.mark.parametrize("encoding", ENCODINGS)
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1, exclude_max=True), noise=st.binary(min_size=1, max_size=64))
def test_noise_in_a_header_never_does_worse_than_an_error(
    whole: dict[str, Path], tmp_path: Path, encoding: str, share: float, noise: bytes
) -> None:
    data = bytearray(whole[encoding].read_bytes())
    place = int(2000 * share)
    data[place : place + len(noise)] = noise
    path = tmp_path / whole[encoding].name
    path.write_bytes(data)
    try:
        open_checkpoint(path)
    except ValueError as error:
        assert str(path) in str(error)  # noqa: PT017 (noise may also be harmless)


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    encoding=st.sampled_from([name for name in ENCODINGS if name != "all in one"]),
    key=st.sampled_from(sorted(coarse_state())),
)
def test_one_key_missing_is_named(tmp_path: Path, encoding: str, key: str) -> None:
    state = {name: value for name, value in coarse_state().items() if name != key}
    path = LAYOUTS[encoding].write(state, tmp_path / "model")
    with pytest.raises(CheckpointError, match=rf"does not hold .*{re.escape(key)}"):
        load(path)


def with_header(change: Callable[[dict[str, object]], None]) -> Callable[[bytes], bytes]:
    """Return a function that changes the header of a safetensors file and keeps its data."""

    def changed(data: bytes) -> bytes:
        (size,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + size])
        change(header)
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + size :]

    return changed


def entry(**words: object) -> Callable[[dict[str, object]], None]:
    def change(header: dict[str, object]) -> None:
        header["img_in.weight"] = {**header["img_in.weight"], **words}  # type: ignore[dict-item]

    return change


MISLABELLED = {
    "larger dtype": with_header(entry(dtype="F32")),
    "smaller dtype": with_header(entry(dtype="U8")),
    "unknown dtype": with_header(entry(dtype="F13")),
    "larger shape": with_header(entry(shape=[2**31, 2**31])),
    "negative shape": with_header(entry(shape=[-1, 64])),
    "place beyond the end": with_header(entry(data_offsets=[0, 2**50])),
    "place before the start": with_header(entry(data_offsets=[-8, 0])),
    "no place": with_header(entry(data_offsets=None)),
    "header of 2 GB": lambda data: struct.pack("<Q", 2**31) + data[8:],
    "header of 99 MB": lambda data: struct.pack("<Q", 99 * 10**6) + data[8:],
    "header of 8 EB": lambda data: struct.pack("<Q", 2**63 + 5) + data[8:],
    "header of 0": lambda data: struct.pack("<Q", 0) + data[8:],
    "more at the end": lambda data: data + b"\0",
    "nothing": lambda _: b"",
    "no json": lambda _: struct.pack("<Q", 8) + b"not json",
    "nested json": lambda _: struct.pack("<Q", 200_000) + b"[" * 200_000,
}


@pytest.mark.parametrize("name", MISLABELLED)
def test_a_false_header_is_refused(whole: dict[str, Path], tmp_path: Path, name: str) -> None:
    assert_damaged(tmp_path / "flux1-dev.safetensors", MISLABELLED[name](whole["original bf16"].read_bytes()))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool])
def test_weights_that_are_no_floats_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    path = save(coarse_state() | {"img_in.weight": torch.ones(32, 64).to(dtype)}, tmp_path)
    with pytest.raises(CheckpointError, match=r"1 quantised, which is not supported \(img_in\.weight \(\w+\)\)"):
        load(path)


class Mine:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("name", ["x.safetensors", "x.gguf", "x.sft", "x.bin", "x.ckpt", "x.pt", "x.pth", "x.pkl"])
def test_a_pickle_is_refused_and_not_read_whatever_it_is_called(tmp_path: Path, name: str, protocol: int) -> None:
    trace = tmp_path / "trace"
    (tmp_path / name).write_bytes(pickle.dumps({"img_in.weight": Mine(trace)}, protocol))
    with pytest.raises(CheckpointError, match=r"is a pickle|is cut short or damaged"):
        load(tmp_path / name)
    assert not trace.exists()


def test_a_pickle_of_torch_is_named_whatever_it_is_called(tmp_path: Path) -> None:
    path = tmp_path / "flux1-dev.safetensors"
    torch.save({"img_in.weight": torch.zeros(1)}, path)
    assert zipfile.is_zipfile(path)
    with pytest.raises(CheckpointError, match=r"is a pickle \(zip\), not safetensors"):
        load(path)


def test_a_file_is_detected_by_its_content(whole: dict[str, Path], tmp_path: Path) -> None:
    """The suffixes are swapped: neither layout nor format depends on a name."""
    for encoding, name in (("original bf16", "x.gguf"), ("gguf Q8_0", "x.safetensors"), ("original bf16", "x.sft")):
        path = tmp_path / name
        path.write_bytes(whole[encoding].read_bytes())
        (tmp_path / "config.json").write_text((whole[encoding].parent / "config.json").read_text())
        load(path)


def folder_with_index(folder: Path, weight_map: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/outside.safetensors", "sub/x.safetensors", "..", "", ".", "x/../y"]
)
def test_an_index_may_name_no_file_elsewhere(tmp_path: Path, name: str) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "outside.safetensors")
    folder = folder_with_index(tmp_path / "model", {"x": name})
    with pytest.raises(ValueError, match=r"index\.json names .*, (which is not a file beside it|and .* is not there)"):
        open_checkpoint(folder)


@pytest.mark.parametrize("weight_map", [{}, [], None, "x", {"x": 1}, {"x": ["a.safetensors"]}, {"x": None}])
def test_an_index_that_lists_nothing_is_named(tmp_path: Path, weight_map: object) -> None:
    with pytest.raises(ValueError, match=r"index\.json has no weight_map"):
        open_checkpoint(folder_with_index(tmp_path, weight_map))


def test_an_index_naming_a_missing_shard_is_named(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "a.safetensors")
    folder = folder_with_index(tmp_path, {"x": "a.safetensors", "y": "b.safetensors"})
    with pytest.raises(ValueError, match=r"index\.json names b\.safetensors, and .*b\.safetensors is not there"):
        open_checkpoint(folder)


def test_a_folder_of_pickles_says_so(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match=r"no \.safetensors or \.gguf file in .*, only pytorch_model\.bin, which can"):
        open_checkpoint(tmp_path)


def test_shards_of_any_format_need_no_index(tmp_path: Path) -> None:
    names = [f"model-{i:05d}-of-00002.gguf" for i in (1, 2)]
    for name in names:
        (tmp_path / name).touch()
    assert [path.name for path in model_files(tmp_path)] == names
    (tmp_path / "other.safetensors").touch()
    with pytest.raises(ValueError, match="several files and no index"):
        model_files(tmp_path)


def test_names_are_changed_one_to_one(tmp_path: Path) -> None:
    tensors = {name: StoredTensor(tmp_path, name, (1,), "F32") for name in ("p.a", "a", "b")}
    checkpoint = Checkpoint("file", tmp_path, tensors)
    assert set(checkpoint.rename({"p.a": "c", "b": "b"}).tensors) == {"c", "b"}
    with pytest.raises(ValueError, match=r"file holds a twice, as a and p\.a: keep one"):
        checkpoint.rename({"p.a": "a", "a": "a", "b": "b"})


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "\udcff", "[]", '"x"'])
def test_invalid_json_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"config\.json is not"):
        read_json(path)


CLAIMS = {
    "safetensors": struct.pack("<Q", 2**31) + b"{" + b" " * 1000,
    "gguf": b"GGUF" + struct.pack("<IQQ", 3, 2**62, 2**62) + b"\0" * 1000,
    "gguf list": b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 4, 2**60) + b"\0" * 1000,
}


@pytest.mark.parametrize("name", CLAIMS)
def test_what_a_header_claims_is_not_allocated(tmp_path: Path, name: str) -> None:
    """Open the file with little memory: allocating the claimed size would fail."""
    path = tmp_path / "model"
    path.write_bytes(CLAIMS[name])
    code = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from flux_batch.model.checkpoint.checkpoint import open_checkpoint\n"
        "used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 200 * 2**20,) * 2)\n"
        "try:\n"
        "    open_checkpoint(Path(sys.argv[1]))\n"
        "except ValueError as error:\n"
        "    sys.stdout.write(str(error))\n"
    )
    result = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert "is cut short or damaged" in result.stdout
