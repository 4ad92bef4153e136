"""TLS and mutual TLS between two real processes, with certificates made for the test."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
import trustme
from PIL import Image

from isthmus.edge_agent import EdgeAgent
from isthmus.edge_agent.config import Tls
from isthmus.models.vision.bundle import Bundle
from tests.bench.processes import ROOT, START_S, CloudProcess


@pytest.fixture(scope="module")
def credentials(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ca.pem, and certificate and key of the server, of a device, and of a device of another authority."""
    folder = tmp_path_factory.mktemp("tls")
    ours, strangers = trustme.CA(), trustme.CA()
    ours.cert_pem.write_to_path(str(folder / "ca.pem"))
    for name, issuer in (("server", ours), ("device", ours), ("stranger", strangers)):
        certificate = issuer.issue_cert("localhost", common_name=name)
        certificate.private_key_pem.write_to_path(str(folder / f"{name}.key"))
        certificate.cert_chain_pems[0].write_to_path(str(folder / f"{name}.pem"))
    return folder


@pytest.fixture(scope="module")
def tls_cloud(tiny_bundle: Bundle, credentials: Path) -> Iterator[CloudProcess]:
    arguments = (
        "--threads",
        "1",
        "--tls-certificate",
        f"{credentials}/server.pem",
        "--tls-key",
        f"{credentials}/server.key",
    )
    cloud = CloudProcess(tiny_bundle.folder, arguments=(*arguments, "--tls-client-ca", f"{credentials}/ca.pem"))
    cloud.start(wait=False)
    yield cloud
    cloud.__exit__()


def test_a_device_with_a_trusted_certificate_is_answered(
    tls_cloud: CloudProcess, credentials: Path, new_agent: Callable[..., EdgeAgent], photo: Image.Image
) -> None:
    tls = Tls(credentials / "ca.pem", credentials / "device.pem", credentials / "device.key")
    agent = new_agent(f"localhost:{tls_cloud.port}", mode="split", tls=tls, connect_s=0.0, deadline_s=5.0)
    for _ in range(600):  # the service is still starting
        if agent.infer(photo).route == "split":
            return
        time.sleep(0.1)
    raise AssertionError("the cloud never answered")


@pytest.mark.parametrize("name", [None, "stranger"])
def test_a_device_without_a_trusted_certificate_answers_locally(
    tls_cloud: CloudProcess,
    credentials: Path,
    new_agent: Callable[..., EdgeAgent],
    photo: Image.Image,
    name: str | None,
) -> None:
    tls = Tls(
        credentials / "ca.pem", *((credentials / f"{name}.pem", credentials / f"{name}.key") if name else (None, None))
    )
    answer = new_agent(f"localhost:{tls_cloud.port}", mode="split", tls=tls, connect_s=3.0).infer(photo)
    assert answer.degraded
    assert answer.bytes_up == 0


@pytest.mark.parametrize(
    ("client", "state"),
    [("device", "SERVING"), ("stranger", "UNAVAILABLE"), (None, "UNAVAILABLE")],
)
@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_the_health_check_speaks_mutual_tls(
    tls_cloud: CloudProcess, credentials: Path, client: str | None, state: str, host: str
) -> None:
    tls_cloud_ready(tls_cloud, credentials)
    certificate = f"{credentials}/{client}"
    arguments = ["--check-certificate", f"{certificate}.pem", "--check-key", f"{certificate}.key"] if client else []
    if host != "localhost":
        arguments += ["--check-name", "localhost"]
    assert check(f"{host}:{tls_cloud.port}", "--check-ca", f"{credentials}/ca.pem", *arguments) == state


def test_the_health_check_refuses_a_certificate_for_another_name(tls_cloud: CloudProcess, credentials: Path) -> None:
    tls_cloud_ready(tls_cloud, credentials)
    device = ["--check-certificate", f"{credentials}/device.pem", "--check-key", f"{credentials}/device.key"]
    ca = ["--check-ca", f"{credentials}/ca.pem"]
    assert check(f"127.0.0.1:{tls_cloud.port}", *ca, *device) == "UNAVAILABLE"


def test_the_health_check_reaches_its_own_address_past_a_proxy(
    tls_cloud: CloudProcess, credentials: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tls_cloud_ready(tls_cloud, credentials)
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    device = ["--check-certificate", f"{credentials}/device.pem", "--check-key", f"{credentials}/device.key"]
    assert check(f"localhost:{tls_cloud.port}", "--check-ca", f"{credentials}/ca.pem", *device) == "SERVING"


def check(address: str, *arguments: str) -> str:
    """Output of `cloud-service --check` in a process of its own, as gRPC reads proxies once."""
    command = [sys.executable, "-m", "isthmus.cloud_service", "--check", address, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == (0 if done.stdout == "SERVING\n" else 1), done.stderr
    return done.stdout.strip()


def tls_cloud_ready(cloud: CloudProcess, credentials: Path) -> None:
    """Wait until the service serves."""
    pems = [(credentials / name).read_bytes() for name in ("ca.pem", "device.key", "device.pem")]
    with grpc.secure_channel(f"localhost:{cloud.port}", grpc.ssl_channel_credentials(*pems)) as channel:
        grpc.channel_ready_future(channel).result(START_S)


def test_a_device_without_tls_answers_locally(
    tls_cloud: CloudProcess, new_agent: Callable[..., EdgeAgent], photo: Image.Image
) -> None:
    assert new_agent(f"localhost:{tls_cloud.port}", mode="split", connect_s=3.0).infer(photo).degraded
