"""The service with replicas on a real Ray cluster: answers, deaths, a locked door, and its end."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import psutil
import pytest
from PIL import Image

from isthmus.edge_agent import Answer, EdgeAgent, EdgeConfig
from isthmus.models.vision.bundle import Bundle
from tests.bench.ray_cloud import RayProcess

pytest.importorskip("ray", reason="needs pip install 'isthmus[ray]'")

REPLICAS, KILLS, DEVICES = 2, 2, 2
LOOPBACK = ("127.0.0.1", "::1", "::ffff:127.0.0.1")


@pytest.fixture(scope="module")
def cloud(tiny_bundle: Bundle) -> Iterator[RayProcess]:
    with RayProcess(tiny_bundle.folder, count=REPLICAS) as process:
        yield process


def agent(bundle: Bundle, cloud: RayProcess, mode: str) -> EdgeAgent:
    return EdgeAgent(EdgeConfig(bundle.folder, (cloud.target,), mode, threads=1, deadline_s=20.0, connect_s=10.0))


@pytest.mark.parametrize("mode", ["split", "offload"])
def test_photos_are_answered_by_replicas(cloud: RayProcess, tiny_bundle: Bundle, photo: Image.Image, mode: str) -> None:
    before = cloud.metric("inputs_total")
    with agent(tiny_bundle, cloud, mode) as device:
        answers = [device.infer(photo) for _ in range(10)]
    assert [answer.degraded for answer in answers] == [False] * 10
    assert cloud.metric("inputs_total") == before + 10
    assert cloud.metric("batch_size_sum") == cloud.metric("inputs_total")


def test_photos_under_sigkill_of_replicas(cloud: RayProcess, tiny_bundle: Bundle, photo: Image.Image) -> None:
    """Photos in flight all the while, of two devices; the service answers each of them."""
    stop, answers = threading.Event(), list[Answer]()

    def send() -> None:
        with agent(tiny_bundle, cloud, "split") as device:
            while not stop.is_set():
                answers.append(device.infer(photo))

    devices = [threading.Thread(target=send) for _ in range(DEVICES)]
    for device in devices:
        device.start()
    try:
        for number in range(KILLS):
            cloud.kill_replica(number)
    finally:
        stop.set()
        for device in devices:
            device.join()
    assert len(answers) > KILLS
    assert sum(answer.degraded for answer in answers) == 0


def test_no_port_does_anything_without_the_token(cloud: RayProcess) -> None:
    """Of every process: the dashboard refuses, gRPC refuses, and what others reach is the port of replicas alone."""
    assert cloud.process is not None
    family = [psutil.Process(cloud.process.pid), *psutil.Process(cloud.process.pid).children(recursive=True)]
    ours = {cloud.port, cloud.metrics_port}
    ports = {
        (process.name(), connection.laddr.ip, connection.laddr.port)
        for process in family
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port not in ours
    }
    assert {name for name, ip, _ in ports if ip not in LOOPBACK} == {"ray::ServeReplica:isthmus:photos"}
    dashboard = cloud.read_log().partition("dashboard is on ")[2].partition(";")[0]
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{dashboard}/api/jobs/", timeout=5)
    for name, _, port in ports:
        assert refused(port), f"{name} answers at {port}"


def refused(port: int) -> bool:
    """Whether a call that runs code is refused; a port that does not speak gRPC refuses it too."""
    calls = ("/ray.rpc.CoreWorkerService/PushTask", "/ray.rpc.NodeManagerService/RequestWorkerLease")
    gcs, replica = "/ray.rpc.JobInfoGcsService/AddJob", "/ray.serve.ASGIService/HandleRequest"
    with grpc.insecure_channel(f"127.0.0.1:{port}", [("grpc.enable_http_proxy", 0)]) as channel:
        for method in (*calls, gcs, replica):
            try:
                channel.unary_unary(method)(b"", timeout=5)
            except grpc.RpcError as error:
                if error.code() not in (
                    grpc.StatusCode.UNAUTHENTICATED,
                    grpc.StatusCode.UNIMPLEMENTED,
                    grpc.StatusCode.UNAVAILABLE,
                ):
                    return False
            else:
                return False
    return True


def test_serve_status_shows_the_replicas(cloud: RayProcess) -> None:
    dashboard = cloud.read_log().partition("dashboard is on ")[2].partition(";")[0]
    command = [str(Path(sys.executable).with_name("serve")), "status", "--address", dashboard]
    shown = subprocess.run(
        command, env={**os.environ, "RAY_AUTH_MODE": "token"}, capture_output=True, text=True, timeout=60
    )
    assert f"RUNNING: {REPLICAS}" in shown.stdout


def test_more_replicas_than_cores_are_one_clear_line(tiny_bundle: Bundle) -> None:
    with pytest.raises(RuntimeError, match="too few for 500 replicas"):
        RayProcess(tiny_bundle.folder, count=500).start()


def test_sigterm_ends_the_service_and_the_cluster(tiny_bundle: Bundle) -> None:
    with RayProcess(tiny_bundle.folder, count=1) as cloud:
        assert cloud.process is not None
        family = psutil.Process(cloud.process.pid).children(recursive=True)
        found = re.search(r"[^= ]*/isthmus-ray-[^/]+", " ".join(word for each in family for word in each.cmdline()))
        assert found is not None
        assert len(family) > 5
        assert cloud.stop() == 0
        assert psutil.wait_procs(family, timeout=10)[1] == []
        assert not Path(found[0]).exists()
    assert "drained" in cloud.log_text
