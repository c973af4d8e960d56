"""FluxMapper, called as Ray Data calls it; tests/end_to_end runs jobs/ray_data_stage.py."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from PIL import Image

from flux_batch import FluxMapper
from flux_batch.engine.local import LocalEngine
from flux_batch.errors import CheckpointError, DeviceFatal, JobError, SourceError
from flux_batch.images import read_provenance
from flux_batch.job import run
from flux_batch.mapper import rows_of, with_columns
from helpers.fakes import ControlledPipeline, FakePipeline, fake_image
from helpers.job_files import make_job, metadata

SAMPLING = {"width": 16, "height": 16, "num_inference_steps": 2}


def mapper(pipeline: FakePipeline | None = None, **settings: Any) -> FluxMapper:
    settings = {"model": {"uri": "demo"}, "sampling": SAMPLING, "batch_size": 2} | settings
    return FluxMapper(make_pipeline=lambda model: pipeline or FakePipeline(), **settings)


def pixels(data: bytes) -> bytes:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image).tobytes()


@pytest.mark.parametrize("kind", ["png", "jpeg"])
def test_the_same_rows_give_the_images_of_a_job(tmp_path: Path, kind: str) -> None:
    rows = [
        {"id": f"row-{at}", "prompt": f"image {at}", "seed": None if at % 3 else 7 * at, "cfg_scale": 1.0 + at % 2}
        for at in range(9)
    ]
    rows[4] |= {"prompt": " "}
    image = {"type": kind}
    sampling = {"num_images_per_prompt": 2, "seed": 5}
    config = make_job(tmp_path, rows, output={"format": "files", "image": image}, sampling=sampling)
    run(config, engine=LocalEngine(), make_pipeline=lambda model: FakePipeline())
    of_job = metadata(config)

    table = mapper(sampling=SAMPLING | sampling, image=image)(pa.Table.from_pylist(rows))

    found = table.to_pylist()
    assert table.column_names[:3] == ["id", "prompt", "cfg_scale"]
    for name in ("id", "image_index", "seed", "width", "height", "status", "error_type", "clip_truncated"):
        assert [row[name] for row in found] == [row[name] for row in of_job], name
    assert [row["image_index"] for row in found[6:]] == [0, 1, 0, *[0, 1] * 4]
    for row, record in zip(found, of_job, strict=True):
        if record["status"] == "failed":
            assert row["image"] is row["sha256"] is None
            continue
        stored = (tmp_path / "out" / record["file_name"]).read_bytes()
        assert pixels(row["image"]) == pixels(stored)
        assert row["sha256"] == hashlib.sha256(row["image"]).hexdigest()
        inside = read_provenance(stored)
        assert inside.pop("key") == record["key"]
        assert read_provenance(row["image"]) == inside


@pytest.mark.parametrize("otherwise", ["keep", "fail"])
def test_quality_keeps_the_tries_that_a_job_keeps(tmp_path: Path, otherwise: str) -> None:
    rows = [{"id": f"row-{at}", "prompt": f"image {at}" + " [raise]" * (at == 3)} for at in range(9)]
    quality = {"score": "helpers.annotators:FirstRed", "at_least": 0.7, "max_tries": 2, "otherwise": otherwise}
    config = make_job(
        tmp_path, rows, output={"format": "files"}, sampling={"seed": 5}, quality=quality, failures={"max_ratio": 1.0}
    )
    run(config, engine=LocalEngine(), make_pipeline=lambda model: FakePipeline())
    of_job = metadata(config)

    found = mapper(sampling=SAMPLING | {"seed": 5}, quality=quality)(pa.Table.from_pylist(rows)).to_pylist()

    for name in ("id", "seed", "status", "error_type", "error_message", "tries", "score", "accepted"):
        assert [row[name] for row in found] == [row[name] for row in of_job], name
    assert {row["tries"] for row in found if row["status"] == "success"} == {1, 2}
    for row, record in zip(found, of_job, strict=True):
        if record["status"] == "success":
            assert pixels(row["image"]) == pixels((tmp_path / "out" / record["file_name"]).read_bytes())
    assert any(row["error_type"] == "BelowQuality" for row in found) == (otherwise == "fail")


def test_a_bad_row_comes_back_as_a_failed_row() -> None:
    prompts = ["good", None, "[raise] it", "also good", "wide", "[oom whole]", "x" * 100]
    widths = [None, None, None, None, 17, None, None]

    found = mapper()(pa.table({"prompt": prompts, "width": widths})).to_pylist()

    assert [row["prompt"] for row in found] == prompts
    assert [row["status"] for row in found] == [
        "success",
        "failed",
        "failed",
        "success",
        "failed",
        "success",
        "success",
    ]
    assert "a prompt is needed" in found[1]["error_message"]
    assert (found[2]["error_type"], found[2]["width"]) == ("RuntimeError", 16)
    assert "width = 17: must be a multiple of 16" in found[4]["error_message"]
    assert [row["clip_truncated"] for row in found] == [False, None, False, False, None, False, True]
    assert [row["image"] is not None for row in found] == [row["status"] == "success" for row in found]


def test_column_types_do_not_depend_on_failures() -> None:
    good, bad = (mapper()(pa.table({"prompt": [prompt]})) for prompt in ("good", "[raise]"))

    assert good.schema == bad.schema
    assert good.schema.field("image").type == pa.binary()


def test_a_numpy_batch_comes_back_as_a_numpy_batch() -> None:
    batch = {
        "prompt": np.array(["a", "b", "c"]),
        "seed": np.array([3.0, np.nan, 2.0]),  # integers with a null become floats
        "embedding": np.arange(6).reshape(3, 2),
        "num_images_per_prompt": np.array([1, 2, 1]),
    }

    found = mapper()(batch)

    assert isinstance(found, dict)
    assert found["prompt"].tolist() == ["a", "b", "b", "c"]
    assert found["embedding"].tolist() == [[0, 1], [2, 3], [2, 3], [4, 5]]
    assert found["seed"].tolist()[::3] == [3, 2]
    assert found["error_type"].tolist() == [None] * 4
    first = fake_image("a", seed=3, width=16, height=16, num_inference_steps=2)
    assert pixels(found["image"][0]) == first.tobytes()


def test_a_row_without_id_and_seed_gives_the_same_image_in_any_batch() -> None:
    stage = mapper()

    found = stage(pa.table({"prompt": ["a", "b", "a"]}))["sha256"].to_pylist()

    assert found[0] == found[2] != found[1]
    assert stage(pa.table({"prompt": ["b"]}))["sha256"].to_pylist() == found[1:2]


def test_stages_can_follow_each_other() -> None:
    pipeline = FakePipeline()
    first = mapper()
    refine = {"input_image": "image"}
    second = mapper(
        pipeline, prompts={"columns": refine}, sampling=SAMPLING | {"denoising_strength": 0.5}, prefix="fine_"
    )

    found = second(first(pa.table({"prompt": ["a", "[raise]"]}))).to_pylist()

    assert [row["fine_status"] for row in found] == ["success", "failed"]
    assert "needs an input_image" in found[1]["fine_error_message"]
    assert np.asarray(pipeline.input_images[0]).tobytes() == pixels(found[0]["image"])
    assert pixels(found[0]["fine_image"]) != pixels(found[0]["image"])


def test_relative_paths_start_from_the_folder_of_the_prompts(tmp_path: Path) -> None:
    Image.new("RGB", (16, 16), "red").save(tmp_path / "red.png")
    stage = mapper(prompts={"uri": str(tmp_path)})

    found = stage(pa.table({"prompt": ["a", "b", "c"], "input_image": ["red.png", "../red.png", "blue.png"]}))

    assert found["status"].to_pylist() == ["success", "failed", "failed"]
    assert "leads out of" in found["error_message"][1].as_py()
    assert "there is no file" in found["error_message"][2].as_py()


def test_an_unavailable_storage_fails_the_rows_that_need_it() -> None:
    names = ["none", "s3://away/x.safetensors", "none"]

    found = mapper()(pa.table({"prompt": ["a", "b", "c"], "lora": names}))

    assert found["error_type"].to_pylist() == [None, "StoreError", None]


def test_a_lost_device_fails_the_call_and_not_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    class Lost(FakePipeline):
        def __call__(self, *prompts: Any, **others: Any) -> Any:
            raise DeviceFatal("an illegal memory access was encountered")

    exits: list[int] = []
    monkeypatch.setattr(os, "_exit", exits.append)
    for exit_on_device_loss in (False, True):
        with pytest.raises(DeviceFatal):
            mapper(Lost(), exit_on_device_loss=exit_on_device_loss)(pa.table({"prompt": ["a"]}))
        assert exits == [70] * exit_on_device_loss


@pytest.mark.parametrize(
    ("columns", "settings", "message"),
    [
        ({"caption": ["a"]}, {}, "no column 'prompt'; prompts.columns.prompt names the column"),
        ({"prompt": ["a"]}, {"prompts": {"columns": {"id": "uid"}}}, "no column 'uid'; prompts.columns.id"),
        ({"prompt": ["a"], "status": ["x"]}, {}, "column 'status' already"),
        ({"prompt": ["a"], "a_seed": [1]}, {"prefix": "a_"}, "column 'a_seed' already"),
    ],
)
def test_wrong_columns_are_refused_in_one_sentence(
    columns: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(SourceError, match=message):
        mapper(**settings)(pa.table(columns))


def test_another_kind_of_batch_is_refused_in_one_sentence() -> None:
    with pytest.raises(SourceError, match="use batch_format 'numpy' or 'pyarrow'"):
        mapper()([{"prompt": "a"}])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampling": {"widht": 16}}, "FluxMapper: sampling.widht: unknown key; did you mean 'width'"),
        ({"sampling": {"width": 17}}, "FluxMapper: sampling.width = 17: must be a multiple of 16"),
        ({"prompts": {"limit": 3}}, "prompts.limit is for jobs; leave it out"),
        ({"prompts": {"samplers": {"a": ["x"]}}}, "prompts.samplers is for jobs; leave it out"),
        ({"batch_size": "auto"}, "batch_size = auto is for jobs"),
        ({"image": {"type": "gif"}}, "output.image.type = 'gif'"),
        ({"image": "png"}, "FluxMapper: output.image: must be a section with keys and values"),
        ({"prompts": "p.csv"}, "FluxMapper: prompts: must be a section with keys and values"),
        ({"sampling": 5}, "FluxMapper: sampling: must be a section with keys and values"),
    ],
)
def test_settings_are_checked_as_in_a_job_file(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(JobError, match=message):
        mapper(**settings)


def test_a_model_that_is_no_section_is_refused_in_one_sentence() -> None:
    with pytest.raises(JobError, match="FluxMapper: model: must be a section with keys and values"):
        FluxMapper("demo")  # type: ignore[arg-type]


def test_the_model_section_is_that_of_a_job_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        FluxMapper({"uri": str(tmp_path)})


# --- batches in columns


def test_rows_hold_plain_values_of_the_requested_columns() -> None:
    large = 2**60 + 1  # no float holds it
    rows = [{"prompt": "a", "seed": large}, {"prompt": "b", "seed": None}]
    batch = {"prompt": np.array(["a", "b"]), "seed": np.array([large, None], dtype=object), "other": np.zeros(2)}

    assert rows_of(pa.table({"prompt": ["a", "b"], "seed": [large, None], "other": [0, 0]}), {"prompt", "seed"}) == rows
    assert rows_of(batch, {"prompt", "seed", "absent"}) == rows
    assert rows_of({"seed": np.array([1.5, np.nan])}, {"seed"}) == [{"seed": 1.5}, {"seed": None}]
    assert type(rows_of({"seed": np.array([3])}, {"seed"})[0]["seed"]) is int
    of_pandas = pd.array(["no", None], dtype="string").to_numpy()  # as Ray Data hands over texts of pandas
    assert rows_of({"negative_prompt": of_pandas}, {"negative_prompt"}) == [
        {"negative_prompt": "no"},
        {"negative_prompt": None},
    ]


def test_a_cell_that_cannot_be_read_costs_its_row() -> None:
    """As in a job: Arrow declares text as UTF-8, but does not check it."""
    ends, data = np.array([0, 1, 2], np.int32), pa.py_buffer(b"a\xff")
    prompts = pa.Array.from_buffers(pa.string(), 2, [None, pa.py_buffer(ends), data])
    ids = pa.array([253402300800, None], pa.timestamp("s"))  # the year 10000

    found = mapper()(pa.table({"prompt": prompts, "id": ids}))

    assert found["status"].to_pylist() == ["success", "failed"]
    assert "column 'prompt' is not UTF-8" in found["error_message"][1].as_py()


def test_a_column_of_lists_is_one_in_numpy_too(tmp_path: Path) -> None:
    """In its default format, Ray Data passes lists as arrays in an array of objects."""
    for name in ("red", "blue"):
        Image.new("RGB", (64, 64), name).save(tmp_path / f"{name}.png")
    lists = [["red.png", "blue.png"], ["blue.png"], [], None]
    cells = np.empty(len(lists), object)
    cells[:] = [None if each is None else np.array(each, object) for each in lists]
    prompts = ["a", "b", "c", "d"]
    stage = mapper(prompts={"uri": str(tmp_path)})

    in_numpy = stage({"prompt": np.array(prompts), "reference_image": cells})
    in_arrow = stage(pa.table({"prompt": prompts, "reference_image": lists}))

    assert in_numpy["status"].tolist() == ["success"] * 4
    assert in_numpy["sha256"].tolist() == in_arrow["sha256"].to_pylist()


def test_new_columns_replace_those_of_the_same_name() -> None:
    schema = pa.schema([("seed", pa.int64()), ("image", pa.binary())])
    columns = {"seed": [7, None, 9], "image": [b"x", None, b"z"]}

    table = with_columns(pa.table({"seed": ["a", "b"], "prompt": ["p", "q"]}), [0, 0, 1], columns, schema)

    assert table.schema == pa.schema([("prompt", pa.string()), *schema])
    assert table.to_pydict() == {"prompt": ["p", "p", "q"], **columns}
    empty = with_columns(table.slice(0, 0), [], {name: [] for name in columns}, schema)
    assert (empty.num_rows, empty.schema) == (0, table.schema)
    in_numpy = with_columns({"seed": np.array(["a", "b"]), "prompt": ["p", "q"]}, [0, 0, 1], columns, schema)
    assert {name: values.tolist() for name, values in in_numpy.items()} == {"prompt": ["p", "p", "q"], **columns}


@pytest.mark.parametrize(
    "other",
    [
        pa.array(["x", "y"], pa.string_view()),
        pa.RunEndEncodedArray.from_arrays([1, 2], ["x", "y"]),
    ],
)
def test_columns_of_any_type_of_arrow_come_along(other: pa.Array) -> None:
    """pyarrow has no kernel to take rows of some."""
    table = with_columns(pa.table({"other": other}), [0, 0, 1], {"seed": [1, 2, 3]}, pa.schema([("seed", pa.int64())]))
    assert table["other"].to_pylist() == ["x", "x", "y"]
    assert table["other"].type == other.type


def test_no_array_has_more_images_than_arrow_has_room_for() -> None:
    """An array holds at most 2 GiB, but a thousand images of 1024 x 1024 need more, as do rows with images."""
    rows = [number // 4 for number in range(400)]
    batch = pa.table({"prompt": list(map(str, range(100))), "input_image": [b"before"] * 100})

    table = with_columns(batch, rows, {"image": [b"after"] * 400}, pa.schema([("image", pa.binary())]))

    for name in ("input_image", "image"):
        assert max(map(len, table[name].chunks)) * 200_000_000 < 2**31
    assert table["prompt"].to_pylist() == list(map(str, rows))
    assert table["image"].to_pylist() == [b"after"] * 400


def test_the_guidance_of_a_row_is_that_of_the_model_with_its_loras() -> None:
    pipeline = ControlledPipeline()
    model = {"uri": "demo", "loras": [{"uri": "/canny.safetensors"}]}

    mapper(pipeline, model=model)(pa.table({"prompt": ["edges", "a cat"], "lora": [None, "none"]}))

    assert pipeline.guidances == [30, 3.5]
