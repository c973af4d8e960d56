"""Downloads of models by name or address: both hubs, a bucket, the web, and no download twice."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
import torch
from huggingface_hub import snapshot_download

from flux_batch import FluxImagePipeline, ModelManager, download_models
from flux_batch.download import hub_cache, transfer
from flux_batch.download.models import absolute_model_uri, local_model, local_path, source_kind
from flux_batch.errors import CheckpointError, DiskFull, StoreError, StoreRefused
from flux_batch.storage import retry
from helpers.counting_proxy import counting_proxy
from helpers.hub_server import COMMIT, TOKEN, Hub
from helpers.s3 import S3Server
from helpers.tiny_flux import make_tiny_repository
from helpers.waiting import PATIENCE_S, wait_until

HF = "black-forest-labs/FLUX.1-dev"
MODELSCOPE = "AI-ModelScope/FLUX.1-dev"
CPU = {"torch_dtype": torch.float32, "device": "cpu"}
SMALL = {"height": 32, "width": 32, "num_inference_steps": 1, "seed": 1, "output_type": "latent"}


@pytest.fixture(autouse=True)
def setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLUX_BATCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(transfer, "CHUNK_BYTES", 65_536)
    monkeypatch.setattr(retry, "ATTEMPTS", 2)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A tiny model with the files of FLUX.1-dev's repository: both layouts, and further files."""
    folder = make_tiny_repository(tmp_path_factory.mktemp("both") / "model")
    files = read(folder)
    original = read(make_tiny_repository(tmp_path_factory.mktemp("original") / "model", layout="original"))
    files |= {"flux1-dev.safetensors": original["flux1-tiny.safetensors"], "ae.safetensors": original["ae.safetensors"]}
    return files | {"README.md": b"# FLUX", "dev_grid.jpg": b"jpeg", "vae/diffusion_pytorch_model.bin": b"pickle"}


@pytest.fixture
def hubs(hub: Hub, repository: dict[str, bytes]) -> Hub:
    """Both hubs, with FLUX.1-dev."""
    hub.repositories = {name: dict(repository) for name in (HF, MODELSCOPE)}
    return hub


def read(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def latents(pipe: FluxImagePipeline) -> torch.Tensor:
    found: torch.Tensor = pipe("a cat", **SMALL)
    return found


def weights(pipe: FluxImagePipeline) -> dict[str, torch.Tensor]:
    parts = {
        "transformer": pipe.transformer,
        "autoencoder": pipe.autoencoder,
        "clip": pipe.clip.model,
        "t5": pipe.t5.model,
    }
    found = {f"{part}.{key}": value for part, module in parts.items() for key, value in module.state_dict().items()}
    assert len({key.partition(".")[0] for key in found}) == len(parts)
    return found


class TestDownload:
    @pytest.mark.parametrize("website", ["HuggingFace", "ModelScope"])
    def test_the_sample_of_the_model_card(self, hubs: Hub, repository: dict[str, bytes], website: str) -> None:
        download_models(["FLUX.1-dev"], downloading_priority=[website])
        manager = ModelManager(torch_dtype=torch.float32, device="cpu")
        manager.load_models(
            [
                "models/FLUX/FLUX.1-dev/text_encoder/model.safetensors",
                "models/FLUX/FLUX.1-dev/text_encoder_2",
                "models/FLUX/FLUX.1-dev/ae.safetensors",
                "models/FLUX/FLUX.1-dev/flux1-dev.safetensors",
            ]
        )
        image = latents(FluxImagePipeline.from_model_manager(manager))
        assert torch.equal(image, latents(FluxImagePipeline.from_pretrained("models/FLUX/FLUX.1-dev", **CPU)))
        files = {name: data for name, data in read(Path("models/FLUX/FLUX.1-dev")).items() if name[0] != "."}
        assert files == {name: repository[name] for name in files}
        assert {name for name in repository if name not in files} == {
            "README.md",
            "dev_grid.jpg",
            "transformer/diffusion_pytorch_model.safetensors",
            "vae/diffusion_pytorch_model.bin",
            "vae/diffusion_pytorch_model.safetensors",
        }

    @pytest.mark.parametrize("website", ["HuggingFace", "ModelScope"])
    def test_a_second_call_touches_no_network(self, hubs: Hub, website: str) -> None:
        download_models(["FLUX.1-dev"], [website])
        hubs.requests.clear()
        assert download_models(["FLUX.1-dev"], [website]) == [Path("models/FLUX/FLUX.1-dev")]
        assert hubs.requests == []

    def test_a_model_that_others_put_there_is_used(self, hubs: Hub, repository: dict[str, bytes]) -> None:
        for names in (set(repository), {name for name in repository if "/" in name}):
            shutil.rmtree("models", ignore_errors=True)
            for name in names:
                place(Path("models/FLUX/FLUX.1-dev") / name, repository[name])
            download_models(["FLUX.1-dev"])
            assert hubs.requests == []

    @pytest.mark.parametrize("missing", ["ae.safetensors", "tokenizer", "text_encoder"])
    def test_files_that_others_left_out_are_fetched(
        self, hubs: Hub, repository: dict[str, bytes], missing: str
    ) -> None:
        left_out = (missing, f"{missing}/", "transformer/", "vae/")
        for name in repository:
            if not name.startswith(left_out):
                place(Path("models/FLUX/FLUX.1-dev") / name, repository[name])
        download_models(["FLUX.1-dev"])
        assert hubs.gets("flux1-dev.safetensors") == []
        assert latents(FluxImagePipeline.from_pretrained("models/FLUX/FLUX.1-dev", **CPU)).shape[0] == 1

    def test_the_next_hub_is_asked_if_one_is_away(self, hubs: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
        download_models(["FLUX.1-dev"], ["HuggingFace", "ModelScope"])
        assert Path("models/FLUX/FLUX.1-dev/ae.safetensors").exists()
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:1")
        with pytest.raises(StoreError, match=r"black-forest-labs/FLUX\.1-schnell .*; .*AI-ModelScope") as caught:
            download_models(["FLUX.1-schnell"])
        assert caught.value.exit_code == 75

    def test_a_licence_that_was_not_accepted_is_no_reason_to_go_elsewhere(self, hubs: Hub) -> None:
        hubs.gated = {HF}
        with pytest.raises(CheckpointError, match=f"is gated: log in at {hubs.endpoint}/{HF}, accept its licence"):
            download_models(["FLUX.1-dev"], ["HuggingFace", "ModelScope"])
        assert hubs.gets("FilePath") == []
        download_models(["FLUX.1-dev"], token=TOKEN)

    def test_a_token_goes_to_the_hub_alone(self, hubs: Hub) -> None:
        hubs.gated = {HF}
        download_models(["FLUX.1-dev"], token=TOKEN)
        assert {request.headers["Authorization"] for request in hubs.requests if request.is_cdn} == {None}
        asked = [request for request in hubs.gets() if not request.is_cdn]
        assert {request.headers["Authorization"] for request in asked} == {f"Bearer {TOKEN}"}

    @pytest.mark.parametrize("website", ["HuggingFace", "ModelScope"])
    def test_a_file_that_arrives_damaged_is_not_kept(
        self, hubs: Hub, repository: dict[str, bytes], website: str
    ) -> None:
        hubs.damaged = {"ae.safetensors"}
        with pytest.raises(StoreError, match=r"ae\.safetensors arrived damaged"):
            download_models(["FLUX.1-dev"], [website])
        assert not Path("models/FLUX/FLUX.1-dev/ae.safetensors").exists()
        hubs.damaged = set()
        (folder,) = download_models(["FLUX.1-dev"], [website])
        assert (folder / "ae.safetensors").read_bytes() == repository["ae.safetensors"]

    def test_models_share_what_is_the_same(self, hubs: Hub, repository: dict[str, bytes]) -> None:
        schnell = {name.replace("flux1-dev", "flux1-schnell"): data for name, data in repository.items()}
        hubs.repositories["black-forest-labs/FLUX.1-schnell"] = schnell | {"flux1-schnell.safetensors": b"another"}
        dev, other = download_models(["FLUX.1-dev", "FLUX.1-schnell"])
        assert (dev / "ae.safetensors").samefile(other / "ae.safetensors")
        assert (other / "flux1-schnell.safetensors").read_bytes() == b"another"
        whole = [each for each in hubs.gets("ae.safetensors") if each.is_cdn]
        assert len(whole) == len({each.headers["Range"] for each in whole})

    def test_any_repository_and_any_folder(self, hubs: Hub, repository: dict[str, bytes], tmp_path: Path) -> None:
        (folder,) = download_models([HF])
        assert folder == Path("models") / HF
        assert "flux1-dev.safetensors" not in read(folder)
        (other,) = download_models([f"{HF}@{COMMIT}"], to=tmp_path / "there")
        assert other == tmp_path / "there"
        assert torch.equal(*(latents(FluxImagePipeline.from_pretrained(each, **CPU)) for each in (folder, other)))

    def test_a_repository_of_something_else(self, hubs: Hub) -> None:
        hubs.repositories["someone/words"] = {"config.json": b"{}", "pytorch_model.bin": b"pickle"}
        with pytest.raises(CheckpointError, match="someone/words: holds no weights"):
            download_models(["someone/words"])

    def test_wrong_names_are_said(self, hubs: Hub, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"FLUX\.2: no such model; there are FLUX\.1-dev, FLUX\.1-schnell"):
            download_models(["FLUX.2"])
        with pytest.raises(CheckpointError, match="gitlab: no such hub; there are HuggingFace and ModelScope"):
            download_models(["FLUX.1-dev"], ["GitLab"])
        with pytest.raises(CheckpointError, match="one folder for 2 models"):
            download_models(["FLUX.1-dev", "FLUX.1-schnell"], to=tmp_path)
        with pytest.raises(CheckpointError, match="nobody/nothing: there is no such repository"):
            download_models("nobody/nothing")  # one alone is a list of one
        assert not Path("models").exists()

    @pytest.mark.parametrize("website", ["HuggingFace", "ModelScope"])
    def test_a_killed_download_goes_on(self, hubs: Hub, website: str, tmp_path: Path) -> None:
        big = os.urandom(2_000_000)
        for files in hubs.repositories.values():
            files["flux1-dev.safetensors"] = big
        hubs.stops_after = 1_500_000
        process = start_download(hubs, website, tmp_path)
        folder = Path("models/FLUX/FLUX.1-dev")
        wait_until(lambda: prefix_in(folder, big) >= 65_536)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=PATIENCE_S)
        assert not (folder / "flux1-dev.safetensors").exists()

        # The other hub has the same bytes.
        there = prefix_in(folder, big)
        hubs.stops_after = None
        hubs.requests.clear()
        download_models(["FLUX.1-dev"], ["ModelScope"])
        assert (folder / "flux1-dev.safetensors").read_bytes() == big
        starts = [each.headers["Range"] for each in hubs.gets("flux1-dev.safetensors")]
        assert min(int(each.removeprefix("bytes=").partition("-")[0]) for each in starts) == there
        assert [path.name for path in folder.iterdir() if "partial" in path.name] == []

    def test_two_downloads_at_once_fetch_once(self, hubs: Hub, tmp_path: Path) -> None:
        hubs.pause_s = 0.02
        processes = [start_download(hubs, "ModelScope", tmp_path) for _ in range(2)]
        for process in processes:
            process.communicate(timeout=PATIENCE_S)
        assert [process.returncode for process in processes] == [0, 0]
        asked = [(each.path, each.headers["Range"]) for each in hubs.gets()]
        assert len(asked) == len(set(asked))


def prefix_in(folder: Path, data: bytes) -> int:
    """Return the number of bytes of a file that have arrived."""
    parts = [path.read_bytes() for path in folder.glob("*partial*/*")]
    return max((len(part) for part in parts if data.startswith(part)), default=0)


DOWNLOAD = """
import sys
from flux_batch.download.models import download_models
from flux_batch.download import hub_cache, transfer
transfer.CHUNK_BYTES = 65_536
download_models(["FLUX.1-dev"], [sys.argv[1]])
"""


LOAD_HUB = """
import sys
from flux_batch.download.models import local_model
print(local_model(sys.argv[1]))
"""


def start_download(hub: Hub, website: str, folder: Path) -> subprocess.Popen[bytes]:
    return start(DOWNLOAD, hub, website, folder)


def start(program: str, hub: Hub, argument: str, folder: Path, **options: Any) -> subprocess.Popen[bytes]:
    endpoints = {"HF_ENDPOINT": hub.endpoint, "MODELSCOPE_ENDPOINT": hub.endpoint}
    environment = {**os.environ, **endpoints, "HF_HUB_OFFLINE": "0", "HF_HOME": str(folder / "hf")}
    return subprocess.Popen([sys.executable, "-c", program, argument], env=environment, cwd=folder, **options)


def place(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


class TestLocalModel:
    def test_a_repository_of_the_hub(self, hubs: Hub, repository: dict[str, bytes]) -> None:
        folder = local_model(f"hf://{HF}")
        assert "flux1-dev.safetensors" not in read(folder)
        hubs.requests.clear()
        assert local_model(HF) == local_model(f"hf://{HF}@main") == folder
        assert hubs.requests == []
        assert local_model(f"hf://{HF}@{COMMIT}") == folder

    def test_a_part_and_a_file_of_a_repository(self, hubs: Hub, repository: dict[str, bytes]) -> None:
        encoder = local_path(f"hf://{HF}/text_encoder_2")
        assert (encoder.name, (encoder.parent / "tokenizer_2").is_dir()) == ("text_encoder_2", True)
        weights = local_path(f"hf://{HF}/ae.safetensors")
        assert weights.read_bytes() == repository["ae.safetensors"]
        assert hubs.gets("flux1-dev") == []

    def test_a_model_in_a_folder_of_a_repository(self, hubs: Hub, repository: dict[str, bytes]) -> None:
        hubs.repositories["me/mine"] = {f"runs/7/{name}": data for name, data in repository.items()}
        pipe = FluxImagePipeline.from_pretrained("hf://me/mine/runs/7", **CPU)
        assert torch.equal(latents(pipe), latents(FluxImagePipeline.from_pretrained(HF, **CPU)))

    def test_the_cache_of_hugging_face_is_used_if_a_model_is_whole(
        self, hubs: Hub, repository: dict[str, bytes], tmp_path: Path
    ) -> None:
        home = tmp_path / "cache/huggingface" / f"models--{HF.replace('/', '--')}"
        snapshot = home / "snapshots" / COMMIT
        place(home / "refs/main", COMMIT.encode())
        for name in repository:
            if "/" in name or name == "model_index.json":
                place(snapshot / name, repository[name])
        assert local_model(HF) == snapshot
        assert hubs.requests == []
        (snapshot / "text_encoder/model.safetensors").unlink()
        assert local_model(HF) == snapshot
        assert (snapshot / "text_encoder/model.safetensors").exists()
        assert {each.path.rpartition("/")[2].partition("?")[0] for each in hubs.gets()} == {"model.safetensors"}

    def test_a_worker_that_fetches_from_the_hub_is_alive(self, hubs: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
        beats: list[str] = []
        monkeypatch.setattr("flux_batch.download.hub.LOADING.beat", lambda: beats.append("alive"))
        local_model(HF)
        assert len(beats) >= len(hubs.gets()) > 3

    def test_what_was_fetched_is_there_for_other_programs(self, hubs: Hub) -> None:
        folder = local_model(HF)
        hubs.requests.clear()
        names = ["model_index.json", "transformer/*", "text_encoder*/*", "vae/config.json", "scheduler/*"]
        assert snapshot_download(HF, allow_patterns=names, endpoint=hubs.endpoint) == str(folder)
        assert hubs.gets() == []

    @pytest.mark.parametrize("name", ["text_encoder/model.safetensors", "vae/config.json"])
    def test_a_damaged_file_of_the_hub_is_not_kept(self, hubs: Hub, repository: dict[str, bytes], name: str) -> None:
        hubs.damaged = {name.rpartition("/")[2], name}
        with pytest.raises(StoreError, match=f"{name} arrived damaged"):
            local_model(HF)
        hubs.damaged = set()
        assert (local_model(HF) / name).read_bytes() == repository[name]

    def test_a_file_that_is_gone_is_fetched_again(self, hubs: Hub, repository: dict[str, bytes]) -> None:
        path = local_model(HF) / "text_encoder/model.safetensors"
        path.resolve().unlink()
        assert local_model(HF) / "text_encoder/model.safetensors" == path
        assert path.read_bytes() == repository["text_encoder/model.safetensors"]

    def test_a_hub_that_changes_while_it_is_copied(self, hubs: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
        real = hub_cache.download_snapshot

        def another_commit(repository: str, revision: str, names: Sequence[str]) -> Path:
            hubs.commit = "9" * 40
            return real(repository, revision, names)

        monkeypatch.setattr(hub_cache, "download_snapshot", another_commit)
        with pytest.raises(StoreError, match="was changed while it was copied; run the same command again"):
            local_model(HF)
        assert local_model(HF).name == "9" * 40

    def test_refresh_fetches_what_changed(self, hubs: Hub) -> None:
        old = local_model(HF)
        hubs.requests.clear()
        assert local_model(HF, refresh=True) == old
        assert hubs.gets() == []
        hubs.commit = "9" * 40
        hubs.repositories[HF]["scheduler/scheduler_config.json"] = b'{"shift": 1}'
        new = local_model(HF, refresh=True)
        assert (new.name, local_model(HF)) == ("9" * 40, new)
        assert {each.path.rpartition("/")[2] for each in hubs.gets()} == {"scheduler_config.json"}
        hubs.statuses = [503] * 99
        assert local_model(HF, refresh=True) == new

    def test_a_disk_that_is_too_small_for_the_hub(self, hubs: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=transfer.SPARE_BYTES))
        with pytest.raises(DiskFull, match=r"[MG]B are free on this disk; .*HF_HUB_CACHE"):
            local_model(HF)
        assert hubs.gets() == []

    def test_two_processes_fetch_a_repository_once(self, hubs: Hub, tmp_path: Path) -> None:
        hubs.pause_s = 0.02
        processes = [start(LOAD_HUB, hubs, HF, tmp_path, stdout=subprocess.PIPE) for _ in range(2)]
        folders = {process.communicate(timeout=110)[0] for process in processes}
        assert ([process.returncode for process in processes], len(folders)) == ([0, 0], 1)
        asked = [each.path for each in hubs.gets()]
        assert len(asked) == len(set(asked))

    def test_a_killed_fetch_goes_on_with_the_next_file(self, hubs: Hub, tmp_path: Path) -> None:
        hubs.repositories[HF]["transformer/diffusion_pytorch_model.safetensors"] = os.urandom(2_000_000)
        hubs.pause_s = 0.1
        process = start(LOAD_HUB, hubs, HF, tmp_path)
        blobs = tmp_path / "hf/hub"
        wait_until(lambda: any(blobs.glob("**/snapshots/*/vae/*.safetensors")))
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)

        hubs.pause_s = 0.0
        hubs.requests.clear()
        process = start(LOAD_HUB, hubs, HF, tmp_path)
        process.communicate(timeout=110)
        assert process.returncode == 0
        assert {each.path.rpartition("/")[2].partition("?")[0] for each in hubs.gets() if each.is_cdn} == {
            "diffusion_pytorch_model.safetensors"
        }

    def test_a_name_of_no_folder_and_no_repository_is_an_error(self, hubs: Hub) -> None:
        with pytest.raises(
            CheckpointError, match=r"there is no folder models/flux here, and as a repository: .*no such"
        ):
            local_model("models/flux")

    def test_a_file_on_the_web(self, hubs: Hub, repository: dict[str, bytes]) -> None:
        address = f"{hubs.endpoint}/{HF}/resolve/main/ae.safetensors?download=true"
        found = local_path(address)
        assert (found.name, found.read_bytes()) == ("ae.safetensors", repository["ae.safetensors"])
        hubs.requests.clear()
        assert local_path(address) == found
        assert hubs.requests == []

    def test_pickles_are_not_even_fetched(self, hubs: Hub) -> None:
        for uri in ("s3://bucket/flux.ckpt", f"hf://{HF}/x.bin", "https://host/x.pt?a=b", "s3://bucket/FLUX.CKPT"):
            with pytest.raises(CheckpointError, match="is a pickle, which can run any code"):
                local_path(uri)
        assert hubs.requests == []

    def test_a_protocol_nobody_knows(self) -> None:
        with pytest.raises(StoreRefused, match="nope://bucket/flux: cannot be opened"):
            local_model("nope://bucket/flux")

    def test_kinds(self, tmp_path: Path) -> None:
        (tmp_path / "own/model").mkdir(parents=True)
        kinds = {
            "/a/b": "local",
            "a": "local",
            "own/model": "local",
            "other/model": "hub",
            "other/model.safetensors": "local",
            "./other/model": "local",
            "file:///a": "file",
            "hf://a/b": "hub",
            "s3://a/b": "storage",
            "memory://a": "storage",
        }
        assert {uri: source_kind(uri) for uri in kinds} == kinds
        assert absolute_model_uri("own/model") == str(tmp_path / "own/model")
        assert absolute_model_uri("~/x") == os.path.expanduser("~/x")
        for uri in ("demo", "other/model", "s3://a/b", "file:///a"):
            assert absolute_model_uri(uri) == uri


@pytest.mark.s3
class TestBucket:
    @pytest.fixture
    def bucket(self, moto: S3Server, repository: dict[str, bytes]) -> str:
        uri = f"{moto.make_bucket()}/models/flux"
        fs, root = fsspec.url_to_fs(uri, **moto.storage_options)
        for name, data in repository.items():
            fs.pipe_file(f"{root}/{name}", data)
        return uri

    def test_a_model_and_its_parts(self, bucket: str, moto: S3Server, repository: dict[str, bytes]) -> None:
        options = moto.storage_options
        pipe = FluxImagePipeline.from_pretrained(bucket, **CPU, storage_options=options)
        manager = ModelManager(torch.float32, "cpu", storage_options=options)
        manager.load_models(
            [
                f"{bucket}/text_encoder/model.safetensors",
                f"{bucket}/text_encoder_2",
                [f"{bucket}/ae.safetensors"],
                f"{bucket}/flux1-dev.safetensors",
            ]
        )
        parts = FluxImagePipeline.from_model_manager(manager)
        torch.testing.assert_close(weights(parts), weights(pipe), rtol=0, atol=0)
        # Not bit for bit: the order of a CPU's sums depends on the position of a weight in the mapped file.
        torch.testing.assert_close(latents(parts), latents(pipe), rtol=1e-5, atol=1e-5)
        assert "README.md" not in read(local_model(bucket, options))

    def test_two_processes_fetch_a_model_once_and_it_loads_without_network(
        self, bucket: str, moto: S3Server, repository: dict[str, bytes]
    ) -> None:
        with counting_proxy(moto.endpoint_url) as proxy:
            options = moto.storage_options | {"endpoint_url": proxy.endpoint_url}
            command = [sys.executable, "-c", LOAD, bucket, json.dumps(options)]
            processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
            folders = {Path(process.communicate(timeout=PATIENCE_S)[0].strip()) for process in processes}
            assert [process.returncode for process in processes] == [0, 0]
            asked = proxy.gets()
            assert len(asked) == len(set(asked))
            fetched = {path.partition("/models/flux/")[2] for path, _ in asked}
            in_folders = {name for name in repository if "/" in name and not name.endswith(".bin")}
            assert fetched == in_folders | {"model_index.json"}

            proxy.is_down = True
            proxy.requests.clear()
            pipe = FluxImagePipeline.from_pretrained(bucket, **CPU, storage_options=options)
            assert folders == {local_model(bucket, options)}
            assert proxy.requests == []
        assert torch.equal(latents(pipe), latents(FluxImagePipeline.from_pretrained(folders.pop(), **CPU)))


# The first steps of a worker, without the slow import of torch.
LOAD = """
import json, sys
from flux_batch.download.models import local_model
from flux_batch.download import hub_cache, transfer
transfer.CHUNK_BYTES = 65_536
print(local_model(sys.argv[1], json.loads(sys.argv[2])))
"""
