"""TLS and mutual TLS between two real processes, with certificates made for the test."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trustme
from PIL import Image

from isthmus.edge_agent import EdgeAgent
from isthmus.edge_agent.config import Tls
from isthmus.models.vision.bundle import Bundle
from tests.bench.processes import CloudProcess


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


def test_a_device_without_tls_answers_locally(
    tls_cloud: CloudProcess, new_agent: Callable[..., EdgeAgent], photo: Image.Image
) -> None:
    assert new_agent(f"localhost:{tls_cloud.port}", mode="split", connect_s=3.0).infer(photo).degraded
