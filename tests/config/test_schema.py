from __future__ import annotations

import pickle
import traceback
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from flux_batch.config.schema import JobConfig, PromptsConfig
from flux_batch.errors import JobError
from flux_batch.redaction import REDACTED
from flux_batch.sampling_params import ALIASES, SAMPLING_FIELDS

MINIMAL = "prompts: {uri: p.parquet}\noutput: {uri: out}\nmodel: {uri: demo}\n"
FULL = """
name: cats-2026-11
prompts:
  uri: [s3://bucket/a/, s3://bucket/b/*.csv]
  columns: {prompt: caption, id: uid, guidance_scale: cfg}
  passthrough: [category]
  limit: 10
  storage_options: {key: AKIAKEY, secret: hush, endpoint_url: "https://user:hush@minio:9000", anon: false}
output:
  uri: s3://bucket/runs/cats
  format: parquet
  image: {type: jpeg, quality: 90}
  shard_size: 128
  storage_options: {token: hush, client_kwargs: {region_name: eu-west-1, aws_session_token: hush}}
model:
  uri: s3://bucket/flux
  storage_options: {secret: hush, client_kwargs: {endpoint_url: "http://minio:9000"}}
  refresh: true
  dtype: float32
  quantization: none
  compile: false
  loras: []
sampling:
  width: 512
  height: 768
  num_inference_steps: 4
  guidance_scale: 2
  true_cfg_scale: 1.5
  max_sequence_length: 256
  negative_prompt: "blur"
  num_images_per_prompt: 2
  seed: 7
workers: {min: 1, max: 2, num_gpus: 0.5, num_cpus: 1, batch_size: 2}
failures: {max_ratio: 0, max_attempts: 1}
"""


def parse(text: str = MINIMAL, *overrides: str) -> JobConfig:
    return JobConfig.from_yaml(text, origin="job.yaml", overrides=overrides)


def refusal(text: str, *overrides: str) -> str:
    with pytest.raises(JobError) as caught:
        parse(text, *overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_the_job_file_of_the_design_is_read() -> None:
    job = parse(FULL)

    assert job.prompts.uri == ("s3://bucket/a/", "s3://bucket/b/*.csv")
    assert job.prompts.columns == {"prompt": "caption", "id": "uid", "embedded_guidance": "cfg"}
    assert (job.output.format, job.output.image.type, job.output.shard_size) == ("parquet", "jpeg", 128)
    assert (job.sampling.embedded_guidance, job.sampling.cfg_scale, job.sampling.t5_sequence_length) == (2.0, 1.5, 256)
    assert (job.workers.num_gpus, job.failures.max_ratio) == (0.5, 0.0)


def test_a_job_needs_prompts_an_output_and_a_model() -> None:
    assert parse().prompts.uri == ("p.parquet",)
    message = refusal("prompts: {}\noutput: {}\n")
    assert message.splitlines() == [
        "job.yaml: prompts.uri: missing, and it has no default; or set rows, samplers and template",
        "job.yaml: output.uri: missing, and it has no default",
        "job.yaml: model: missing, and it has no default",
    ]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("sampling.width=1000", "sampling.width = 1000: must be a multiple of 16; the nearest are 992 and 1008"),
        ("sampling.height=0", "sampling.height = 0: must be a whole number from 16"),
        ("sampling.height=9000", "to 8192"),
        ("sampling.width=64.0", "sampling.width = 64.0"),
        ("sampling.width=true", "sampling.width = True"),
        ('sampling.width="64"', "sampling.width = '64'"),
        ("sampling.num_inference_steps=0", "num_inference_steps = 0: must be a whole number from 1"),
        ("sampling.embedded_guidance=.nan", "sampling.embedded_guidance = nan"),
        ("sampling.guidance_scale=-1", "sampling.embedded_guidance = -1.0: must be a finite number of at least 0"),
        ("sampling.cfg_scale=.inf", "sampling.cfg_scale = inf"),
        ("sampling.t5_sequence_length=0", "t5_sequence_length = 0"),
        ("sampling.sigma_shift=0", "sampling.sigma_shift = 0.0: must be more than 0"),
        ("sampling.denoising_strength=0", "denoising_strength = 0.0: must be more than 0 and at most 1"),
        ("sampling.denoising_strength=1.5", "denoising_strength = 1.5: must be more than 0 and at most 1"),
        ("sampling.tile_size=8", "sampling.tile_size = 8: must be a whole number from 16"),
        ("sampling.tile_stride=129", "sampling.tile_stride = 129: must be a whole number from 1 to 128"),
        ("sampling.tiled=yes please", "sampling.tiled = 'yes please'"),
        ("sampling.input_image=https://h/a.png", "sampling.input_image is on the web: set prompts.allow_http to true"),
        ("sampling.input_image=s3://me:pass@h/a.png", "sampling.input_image holds a user name or password"),
        ("model.uri=s3://me:pass@h/flux", "model.uri holds a user name or password, which would be stored"),
        ("sampling.num_images_per_prompt=0", "sampling.num_images_per_prompt = 0"),
        ("sampling.seed=-1", "sampling.seed = -1"),
        (f"sampling.seed={2**64}", f"sampling.seed = {2**64}"),
        (
            "sampling.negative_prompt=5",
            "sampling.negative_prompt = 5: must be a text; quote a number or a date",
        ),
        (r'sampling.negative_prompt="\ud800"', "must be valid Unicode"),
        ("sampling=5", "sampling: must be a section"),
        ("sampling=", "sampling: must be a section"),
        ("output.format=zip", "output.format = 'zip': must be 'webdataset', 'files' or 'parquet'"),
        ("output.image.type=gif", "output.image.type = 'gif'"),
        ("output.image.quality=0", "output.image.quality = 0"),
        ("output.image.quality=101", "output.image.quality = 101"),
        ("output.shard_size=0", "output.shard_size = 0"),
        ("output.shard_size=10000", "output.shard_size = 10000: must be at most 9999"),
        ("output.uri=", "output.uri: must be a text"),
        ("output.uri=''", "output.uri = ''"),
        ("prompts.uri=3", "prompts.uri = 3: must be a path or an address, or a list of them; quote numbers"),
        ("prompts.uri=[a, 3]", "prompts.uri: must be a path or an address, or a list of them; quote numbers"),
        ("prompts.uri=[]", "prompts.uri: must name at least one file, folder or glob"),
        ("prompts.uri=[a, ' ']", "prompts.uri: must name at least one"),
        ("prompts.uri=*.csv", "quote a text that begins with * or &"),
        ("prompts.limit=0", "prompts.limit = 0"),
        ("prompts.columns={promt: x}", "'promt' is not a field of a prompt; did you mean 'prompt'?"),
        ("prompts.columns={guidance_scale: a, embedded_guidance: b}", "embedded_guidance is given twice"),
        ("prompts.columns=[a]", "prompts.columns: must be a section"),
        ("prompts.passthrough=a", "prompts.passthrough = 'a': must be a list, in brackets"),
        ("sampling.width=1e3", "sampling.width = 1000.0: must be a whole number"),
        ("output.format=webdatset", "'webdataset', 'files' or 'parquet'; did you mean 'webdataset'?"),
        ("sampling.seed=18446744073709551616", "must be less than 18446744073709551616"),
        ("workers.num_cpus=-1", "workers.num_cpus = -1: must be at least 0"),
        ("failures.hang_s=0", "failures.hang_s = 0: must be more than 0"),
        ("failures.outage_s=.inf", "failures.outage_s = inf: must be a finite number"),
        ("model.pipeline=mine", "model.pipeline = 'mine': must be module:factory, as in"),
        ("name=my cats", "name = 'my cats': must be up to 100 letters, digits and `._-`"),
        ("prompts.passthrough=[a, b, a]", "prompts.passthrough: names column 'a' twice"),
        ("model.dtype=int8", "model.dtype = 'int8'"),
        ("model.quantization=fp9", "model.quantization = 'fp9': is not a known quantization; did you mean 'fp8'?"),
        ("model.quantization=nf4", "known are none, bfloat16, fp8, fp8_matmul"),
        (
            "model={uri: demo, dtype: float16, quantization: fp8_matmul}",
            "model.quantization = fp8_matmul: products in fp8 give bfloat16, not float16; use dtype bfloat16, "
            "or quantization fp8",
        ),
        ("model.step_cache=-0.1", "model.step_cache = -0.1: must be a finite number of at least 0"),
        ("model.step_cache=1.5", "model.step_cache = 1.5: must be from 0, which is off, to 1"),
        ("model.step_cache=true", "model.step_cache = True: must be a number"),
        ("model.compile=yes please", "model.compile = 'yes please': must be auto, true or false"),
        ("model.cuda_graphs=1", "model.cuda_graphs = 1: must be true or false"),
        (
            "model={uri: demo, cuda_graphs: true, step_cache: 0.1}",
            "model.cuda_graphs = True: a step cache decides at each step which kernels run, and a graph is fixed; "
            "leave it out, or set step_cache = 0.1 to 0",
        ),
        ("model.loras=[a]", "model.loras.0: must be a section with keys and values"),
        ("model.loras=a", "model.loras = 'a'"),
        ("model.loras=[{uri: a, scal: 1}]", "model.loras.0.scal: unknown key; did you mean 'scale'?"),
        ("model.loras=[{scale: 1}]", "model.loras.0.uri: missing, and it has no default"),
        ("model.loras=[{uri: a, scale: .nan}]", "model.loras.0.scale = nan"),
        ("model.loras=[{uri: a, scale: '1'}]", "model.loras.0.scale = '1'"),
        (
            "model.loras=[{uri: a, name: none}]",
            "model.loras.0.name = 'none': means no LoRA in a row; choose another",
        ),
        ("model.loras=[{uri: a}, {uri: b, name: a}]", "model.loras name 'a' twice: give each a name of its own"),
        ("model.loras=[{uri: 's3://me:pass@h/a'}]", "model.loras.0.uri holds a user name or password"),
        ("workers.min=9", "workers.min = 9: must not exceed max = 8"),
        ("workers.max=0", "workers.max = 0"),
        ("workers.num_gpus=-1", "workers.num_gpus = -1"),
        ("workers.num_gpus=1.5", "workers.num_gpus = 1.5: must be whole above 1"),
        ("workers.batch_size=0", "workers.batch_size = 0: must be a whole number of at least 1, or auto"),
        ("workers.batch_size=true", "workers.batch_size = True: must be a whole number"),
        ("workers.batch_size=automatic", "workers.batch_size = 'automatic': must be"),
        ("failures.max_ratio=1.5", "failures.max_ratio = 1.5"),
        ("failures.max_attempts=0", "failures.max_attempts = 0"),
        ("name=../x", "name = '../x'"),
        ("name=", "name: must be a text"),
    ],
)
def test_each_rule_names_the_key_and_what_would_be_right(override: str, words: str) -> None:
    message = refusal(MINIMAL, override)

    assert message.startswith("--set ")
    assert words in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("override", "path", "suggestion"),
    [
        ("promts.uri=x", "promts", "prompts"),
        ("output.fromat=files", "output.fromat", "format"),
        ("output.image.qualty=1", "output.image.qualty", "quality"),
        ("sampling.num_inferense_steps=1", "sampling.num_inferense_steps", "num_inference_steps"),
        ("sampling.guidance_scal=1", "sampling.guidance_scal", "guidance_scale"),
        ("workers.gpus=1", "workers.gpus", "num_gpus"),
    ],
)
def test_an_unknown_key_suggests_the_nearest(override: str, path: str, suggestion: str) -> None:
    assert refusal(MINIMAL, override) == f"--set {path}: unknown key; did you mean '{suggestion}'?"


def test_an_unknown_key_like_no_other_lists_those_there_are() -> None:
    assert "unknown key; known are max_ratio, max_attempts" in refusal(MINIMAL, "failures.zzz=1")


def test_all_findings_come_at_once() -> None:
    assert len(refusal(MINIMAL, "sampling.width=1000", "workers.min=9", "nmae=x").splitlines()) == 3


@pytest.mark.parametrize(
    "text", ["", "just text", "[1, 2]", "prompts: [", "a: b: c", "\x00", "x: 2026-13-01", "x: !!int y", "!!timestamp x"]
)
def test_what_is_no_job_file_names_the_file(text: str) -> None:
    message = refusal(text)

    assert message.startswith("job.yaml: ")
    assert "\n" not in message


def test_broken_yaml_names_the_line() -> None:
    assert refusal("name: x\nprompts: {a: b: c}\n").startswith("job.yaml: line 2: not valid YAML: ")


def test_overrides_win_and_make_sections() -> None:
    job = parse(
        MINIMAL,
        "sampling.width=64",
        "sampling.guidance_scale=2.5",
        "prompts.uri=[a.txt, b.txt]",
        "prompts.columns.prompt=caption",
        "output.uri = s3://bucket/with=equals",
        "name=x",
        "name=y",
    )

    assert (job.sampling.width, job.sampling.embedded_guidance, job.name) == (64, 2.5, "y")
    assert job.prompts.uri == ("a.txt", "b.txt")
    assert job.prompts.columns == {"prompt": "caption"}
    assert job.output.uri == "s3://bucket/with=equals"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("sampling.width", "--set sampling.width: must be section.key=value"),
        ("=5", "must be section.key=value"),
        ("prompts.uri.first=x", "--set prompts.uri.first: uri is not a section"),
        ("sampling.width=[", "--set sampling.width: line 1: not valid YAML"),
        ("sampling.width=2026-13-01", "--set sampling.width: not valid YAML"),
    ],
)
def test_an_override_that_cannot_be_applied(override: str, words: str) -> None:
    assert words in refusal(MINIMAL, override)


@pytest.mark.parametrize(("alias", "field"), ALIASES.items())
def test_the_spellings_of_diffusers_mean_ours_and_both_are_an_error(alias: str, field: str) -> None:
    assert getattr(parse(MINIMAL, f"sampling.{alias}=3").sampling, field) == 3
    assert parse(MINIMAL, f"prompts.columns.{alias}=x").prompts.columns == {field: "x"}
    assert f"{field} is given twice" in refusal(MINIMAL, f"sampling.{alias}=3", f"sampling.{field}=3")


def test_writing_and_reading_a_job_keeps_everything_but_secrets() -> None:
    job = parse(FULL)
    text = job.to_yaml()

    again = parse(text)
    without = {section: {"storage_options"} for section in ("prompts", "output", "model")}
    assert again.model_dump(exclude=without) == job.model_dump(exclude=without)
    assert again.identity() == job.identity()
    assert again.to_yaml() == text
    assert again.prompts.storage_options == {
        "key": REDACTED,
        "secret": REDACTED,
        "endpoint_url": "https://minio:9000",
        "anon": False,
    }
    assert again.output.storage_options == {
        "token": REDACTED,
        "client_kwargs": {"region_name": "eu-west-1", "aws_session_token": REDACTED},
    }
    assert again.model.storage_options == {
        "secret": REDACTED,
        "client_kwargs": {"endpoint_url": "http://minio:9000"},
    }


def test_secrets_show_nowhere() -> None:
    job = parse(FULL)

    for text in (job.to_yaml(), repr(job), str(job), str(job.identity())):
        assert "hush" not in text
        assert "AKIAKEY" not in text


@pytest.mark.parametrize(
    "text",
    [
        "prompts: {uri: p.txt, storage_options: hush}",
        "prompts: {uri: p.txt, storage_options: [hush]}",
        "prompts: {uri: p.txt, storage_options: {1: hush}}",
        "prompts: [{storage_options: {secret: hush}}]",
        "prompts: {uri: p.txt, storage_options: {secret: 'hush}}",
        "prompts: {uri: p.txt, storage_options: {secret: hush}, bogus: 1}",
        "prompts: {storage_options: {secret: hush: x}}",
    ],
)
def test_secrets_show_in_no_message(text: str) -> None:
    assert "hush" not in refusal(text)


@pytest.mark.parametrize("path", ["prompts.uri", "prompts.input_image_root", "output.uri", "model.uri"])
def test_a_password_in_an_address_is_refused(path: str) -> None:
    message = refusal(MINIMAL, f"{path}=s3://key:hush@bucket/x")
    section = path.partition(".")[0]
    assert f"{path} holds a user name or password" in message
    assert f"use {section}.storage_options" in message
    assert "hush" not in message


def test_the_query_of_an_address_is_used_and_written_nowhere() -> None:
    text = """
        prompts: {uri: 'https://h/p.csv?sig=hush', input_image_root: 'https://h/x?sig=hush', allow_http: true}
        output: {uri: 'https://h/out?sig=hush'}
        model: {uri: 'https://h/m.safetensors?sig=hush', loras: [{uri: 'https://h/7?token=hush'}]}
        sampling: {input_image: 'https://h/a.png?sig=hush'}
    """
    job = parse(text)
    assert job.prompts.uri == ("https://h/p.csv?sig=hush",)
    assert job.model.loras[0].uri == "https://h/7?token=hush"
    for written in (job.to_yaml(), repr(job), str(job), str(job.identity())):
        assert "hush" not in written
    assert JobConfig.from_yaml(job.to_yaml()).identity() == job.identity()
    assert parse(text.replace("hush", "another")).identity() == job.identity()


def test_no_traceback_shows_what_was_wrong() -> None:
    override = "prompts.storage_options=hush"  # a variable, since a traceback quotes the line of the call
    with pytest.raises(JobError) as caught:
        parse(MINIMAL, override)
    assert "hush" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    "override",
    ["prompts.storage_options.secret=[hush", "prompts.storage_options=hush", "prompts.storage_options.secret:hush"],
)
def test_secrets_of_overrides_show_in_no_message(override: str) -> None:
    assert "hush" not in refusal(MINIMAL, override)


def test_identity_names_what_changes_images_and_nothing_else() -> None:
    keys = parse(FULL).identity().keys()

    assert {f"sampling.{name}" for name in (*SAMPLING_FIELDS, "seed", "num_images_per_prompt")} <= keys
    assert {"output.shard_size", "output.format", "output.image.type", "model.uri", "model.dtype"} <= keys
    assert {"model.quantization", "model.step_cache", "model.compile"} <= keys
    assert not [key for key in keys if key.startswith(("workers.", "failures.")) or "storage_options" in key]
    assert not {"name", "output.uri", "prompts.uri", "model.cuda_graphs", "model.offload_text_encoders"} & keys


def test_ways_to_start_from_a_image() -> None:
    overrides = ["prompts.allow_http=true", "sampling.input_image=https://h/a.png", "sampling.denoising_strength=0.5"]
    job = parse(MINIMAL, *overrides)

    assert (job.sampling.input_image, job.sampling.params().denoising_strength) == ("https://h/a.png", 0.5)
    keys = {"sampling.input_image", "sampling.denoising_strength", "sampling.sigma_shift", "sampling.tiled"}
    assert keys | {"prompts.allow_http", "sampling.tile_size"} <= job.identity().keys()
    assert "prompts.input_image_root" not in job.identity()
    assert "hush" not in refusal(MINIMAL, "sampling.input_image=https://me:hush@h/a.png")


def test_a_job_is_frozen_and_travels() -> None:
    job = parse(FULL)

    with pytest.raises(ValueError, match="frozen"):
        job.name = "other"  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(job)) == job


def test_a_program_may_give_paths_of_pathlib() -> None:
    prompts, lora = Path("prompts.csv"), {"uri": Path("style.safetensors")}
    tree: dict[str, Any] = {"prompts": {"uri": prompts}, "output": {"uri": Path("out")}, "model": {"uri": Path("flux")}}
    job = JobConfig.from_dict(tree | {"model": {"uri": Path("flux"), "loras": [lora]}})
    assert (job.prompts.uri, job.output.uri, job.model.uri) == (("prompts.csv",), "out", "flux")
    assert (job.model.loras[0].uri, job.model.loras[0].name) == ("style.safetensors", "style.safetensors")
    assert JobConfig.from_dict(tree | {"prompts": {"uri": [prompts]}}).prompts.uri == ("prompts.csv",)


def test_one_uri_may_be_written_without_a_list() -> None:
    assert PromptsConfig(uri="a").uri == PromptsConfig(uri=["a"]).uri == ("a",)  # type: ignore[arg-type]


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
sections = st.sampled_from(["name", "prompts", "output", "model", "sampling", "workers", "failures"])
keys = st.sampled_from(
    ["uri", "columns", "limit", "storage_options", "format", "image", "width", "guidance_scale", "seed", "min", "max"]
)


def check_only_job_errors(text: str) -> None:
    try:
        job = JobConfig.from_yaml(text)
    except JobError as error:
        assert str(error)  # noqa: PT017
    else:
        assert JobConfig.from_yaml(job.to_yaml()).identity() == job.identity()


@settings(max_examples=100)
@given(st.text(max_size=40) | st.text("{}[]:,-&*!?|>%@`'\"# \n0x~.ab", max_size=40))
def test_no_text_whatever_gives_another_error(text: str) -> None:
    check_only_job_errors(text)
    check_only_job_errors(MINIMAL + text)


@settings(max_examples=100)
@given(st.dictionaries(sections, plain | st.dictionaries(keys, plain, max_size=3), max_size=3))
def test_no_tree_whatever_gives_another_error(tree: dict[str, Any]) -> None:
    base = {"prompts": {"uri": "p"}, "output": {"uri": "o"}, "model": {"uri": "demo"}}
    for name, values in tree.items():
        base[name] = {**base.get(name, {}), **values} if isinstance(values, dict) else values
    check_only_job_errors(yaml.safe_dump(base, allow_unicode=True))
