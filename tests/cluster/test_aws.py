"""Ray's own check of the launcher's file, and the spot watcher with a loopback metadata service."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.raylets import no_dashboard
from helpers.waiting import PATIENCE_S, wait_until
from helpers.web_server import Answer, WebServer, web_server

AWS = Path(__file__).parents[2] / "cluster/aws"
WATCHER = AWS.parent / "spot_watcher.py"
NOTICE = "/latest/meta-data/spot/instance-action"


def launcher_file() -> dict[str, Any]:
    tree: dict[str, Any] = yaml.safe_load((AWS / "cluster.yaml").read_text())
    return tree


def test_the_launcher_takes_its_file() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(launcher_file()))


def test_workers_are_spot_nodes_that_are_watched_and_nobody_carries_a_key() -> None:
    tree = launcher_file()
    spot = tree["available_node_types"]["spot-h100"]
    assert spot["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert tree["available_node_types"]["head"]["resources"] == {"CPU": 0}
    assert all("IamInstanceProfile" in kind["node_config"] for kind in tree["available_node_types"].values())
    assert "AWS_SECRET" not in (AWS / "cluster.yaml").read_text()
    ((there, here),) = tree["file_mounts"].items()
    assert AWS.parents[1] / here == WATCHER
    assert f"python {there}" in tree["worker_start_ray_commands"][-1]


def test_workers_see_their_gpu_and_ray_chooses_the_shared_memory() -> None:
    """Ray uses NVIDIA's runtime, which reads a variable that only NVIDIA's images set: others need --gpus."""
    docker = launcher_file()["docker"]
    assert "NVIDIA_VISIBLE_DEVICES" not in (AWS.parent / "Dockerfile").read_text()
    assert "--gpus=all" in docker["worker_run_options"]
    assert "--gpus" not in " ".join(docker["run_options"])  # the head has none
    assert "--shm-size" not in " ".join(docker["run_options"])  # a smaller size would put Ray's object store on disk


def test_the_image_has_what_the_launcher_needs_in_it() -> None:
    """Ray copies files into a container with rsync, and its head asks AWS for nodes from within one."""
    text = (AWS.parent / "Dockerfile").read_text()
    (packages,) = re.findall(r"apt-get install (.*) \\", text)
    assert "rsync" in packages.split()
    assert "constraints.txt /wheel/*.whl boto3\n" in text
    assert re.search(r"^boto3==", (AWS.parent / "constraints.txt").read_text(), flags=re.MULTILINE)


@contextmanager
def watcher(
    server: WebServer, folder: Path, exit_codes: str = "0", cloud: str = "aws"
) -> Iterator[subprocess.Popen[str]]:
    """Start a watcher with a fake `ray` that records its calls and ends with each of the codes in turn."""
    lines = ["#!/bin/sh", f'echo "$@" >> {folder}/calls', f"set -- {exit_codes}"]
    lines += [f"shift $(($(wc -l < {folder}/calls) - 1))", "exit $1"]
    ray = folder / "ray"
    ray.write_text("\n".join(lines) + "\n")
    ray.chmod(0o755)
    words = [sys.executable, str(WATCHER), "--cloud", cloud, "--metadata", server.url, "--interval", "0.05"]
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def in_s(seconds: float) -> bytes:
    end = datetime.now(UTC) + timedelta(seconds=seconds)
    return json.dumps({"action": "terminate", "time": f"{end:%Y-%m-%dT%H:%M:%SZ}"}).encode()


def only_with_token(answer: bytes) -> Any:
    def answering(request: BaseHTTPRequestHandler) -> None:
        is_known = request.headers["X-aws-ec2-metadata-token"] == "token"
        request.send_response(200 if is_known else 401)
        request.end_headers()
        if is_known:
            request.wfile.write(answer)

    return answering


def test_a_notice_drains_the_node_in_the_time_that_is_left(tmp_path: Path) -> None:
    with web_server() as server, watcher(server, tmp_path) as process:
        server.at("/latest/api/token", b"token")
        wait_until(lambda: server.asked.count(NOTICE) >= 3)  # it keeps asking without a notice
        assert process.poll() is None
        server.at(NOTICE, only_with_token(in_s(12_000)))
        out, _ = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0
    assert re.search(r"draining it within 11\d\d\d s", out)
    (call,) = (tmp_path / "calls").read_text().splitlines()
    words = call.split()
    assert words[:3] == ["drain-node", "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    # Ten seconds less than the notice leaves, and less the seconds of the test.
    assert 12_000 - 10 - PATIENCE_S <= int(words[-1]) <= 12_000 - 10


def with_header(name: str, value: str, answer: bytes) -> Any:
    """Answer only requests as in the documentation."""

    def answering(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200 if request.headers[name] == value else 403)
        request.end_headers()
        request.wfile.write(answer)

    return answering


def azure_events(*events: dict[str, Any]) -> Any:
    body = json.dumps({"DocumentIncarnation": 1, "Events": events}).encode()
    return with_header("Metadata", "true", body)


PREEMPTED = "/computeMetadata/v1/instance/preempted"
EVENTS = "/metadata/scheduledevents?api-version=2020-07-01"
NAME = "/metadata/instance/compute/name?api-version=2021-02-01&format=text"


def test_google_says_that_a_node_goes_and_leaves_half_a_minute(tmp_path: Path) -> None:
    with web_server() as server:
        server.at(PREEMPTED, with_header("Metadata-Flavor", "Google", b"FALSE"))
        with watcher(server, tmp_path, cloud="google") as process:
            wait_until(lambda: server.asked.count(PREEMPTED) >= 3)
            assert process.poll() is None
            server.at(PREEMPTED, with_header("Metadata-Flavor", "Google", b"TRUE"))
            process.communicate(timeout=PATIENCE_S)
            assert process.returncode == 0
    (call,) = (tmp_path / "calls").read_text().splitlines()
    assert 1 <= int(call.split()[-1]) <= 20


def test_azure_names_the_machines_that_go(tmp_path: Path) -> None:
    event = {"EventId": "1", "EventType": "Preempt", "ResourceType": "VirtualMachine", "EventStatus": "Scheduled"}
    end = datetime.now(UTC) + timedelta(seconds=12_000)
    event |= {"NotBefore": f"{end:%a, %d %b %Y %H:%M:%S} GMT"}
    with web_server() as server:
        server.at(NAME, with_header("Metadata", "true", b"gpu_7"))
        others = [event | {"Resources": ["gpu_8"]}, event | {"EventType": "Reboot", "Resources": ["gpu_7"]}]
        server.at(EVENTS, azure_events(*others))
        with watcher(server, tmp_path, cloud="azure") as process:
            wait_until(lambda: server.asked.count(EVENTS) >= 3)
            assert process.poll() is None
            server.at(EVENTS, azure_events(*others, event | {"Resources": ["gpu_8", "gpu_7"]}))
            process.communicate(timeout=PATIENCE_S)
            assert process.returncode == 0
    (call,) = (tmp_path / "calls").read_text().splitlines()
    assert 12_000 - 10 - PATIENCE_S <= int(call.split()[-1]) <= 12_000 - 10


@pytest.mark.parametrize(
    ("left_s", "exit_codes", "code", "num_calls"), [(6_000, "1 1 0", 0, 3), (-1, "1 1", 1, 1)], ids=["late", "too late"]
)
def test_ray_is_told_again_where_it_could_not_be_told(
    tmp_path: Path, left_s: float, exit_codes: str, code: int, num_calls: int
) -> None:
    with web_server() as server:
        server.at("/latest/api/token", b"token")
        server.at(NOTICE, only_with_token(in_s(left_s)))
        with watcher(server, tmp_path, exit_codes) as process:
            process.communicate(timeout=PATIENCE_S)
            assert process.returncode == code
    assert len((tmp_path / "calls").read_text().splitlines()) == num_calls


@pytest.mark.parametrize(
    "answer",
    [
        *(only_with_token(said) for said in (b"not json", b"{}", b'{"time": "soon"}', b"[]", b'{"time": null}')),
        lambda request: request.wfile.write(b"no HTTP\r\n\r\n") and None,
        lambda request: request.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 40\r\n\r\n{") and None,
    ],
    ids=["no JSON", "no time", "a word", "a list", "null", "no HTTP", "cut"],
)
def test_an_answer_that_makes_no_sense_is_said_and_asked_for_again(tmp_path: Path, answer: Answer) -> None:
    with web_server() as server:
        server.at("/latest/api/token", b"token")
        server.at(NOTICE, answer)
        with watcher(server, tmp_path) as process:
            assert process.stderr is not None
            assert process.stderr.readline().startswith("spot_watcher: ")
            server.at(NOTICE, only_with_token(in_s(6_000)))
            process.communicate(timeout=PATIENCE_S)
            assert process.returncode == 0


def test_the_proxy_of_the_environment_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    with web_server() as server:
        server.at("/latest/api/token", b"token")
        server.at(NOTICE, only_with_token(in_s(6_000)))
        with watcher(server, tmp_path) as process:
            process.communicate(timeout=PATIENCE_S)
            assert process.returncode == 0


class Worker:
    def begin(self) -> None:
        pass


@pytest.mark.ray
@pytest.mark.nodes
def test_ray_drains_the_node_that_it_is_told_of() -> None:
    import ray

    from flux_batch.engine.ray_cluster import draining_nodes

    # Without "local", it would join a cluster that another test has started with `ray start`.
    with no_dashboard():
        ray.init(address="local", num_cpus=1, num_gpus=0, include_dashboard=False)
    context = ray.get_runtime_context()
    environment = {**os.environ, "RAY_ADDRESS": context.gcs_address}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    try:
        worker = ray.remote(Worker).remote()  # a node without an actor leaves as soon as it is drained
        ray.get(worker.begin.remote())
        assert draining_nodes() == set()
        with web_server() as server:
            server.at("/latest/api/token", b"token")
            server.at(NOTICE, only_with_token(in_s(6_000)))
            words = [sys.executable, str(WATCHER), "--metadata", server.url, "--interval", "0.1"]
            done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=PATIENCE_S)
        assert done.returncode == 0, done.stdout + done.stderr
        # Ray accepts the request at once, but tells the node later.
        wait_until(lambda: draining_nodes() == {context.get_node_id()})
    finally:
        ray.shutdown()
