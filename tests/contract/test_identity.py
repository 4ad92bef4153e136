"""What a misconfigured device and its service say of TLS, in real processes; certificates by `cloud-service keys`."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from isthmus.cloud_service.keys.authority import issue_device, issue_service, load_pair
from isthmus.cloud_service.keys.folder import KeyFolder, write_whole
from isthmus.edge_agent import EdgeAgent, EdgeConfig
from isthmus.edge_agent.cli.main import main
from isthmus.edge_agent.config import Tls
from tests.bench.processes import ROOT, CloudProcess

BUNDLE = ROOT / "models/zoo/fashion"
WAIT_S = 15.0
PHOTO = Image.new("L", (28, 28), 100)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> KeyFolder:
    """Also `expired.pem` of a device, and `other`, an authority that nobody knows."""
    made = KeyFolder(tmp_path_factory.mktemp("keys"))
    made.init(("localhost",), 30)
    made.device("cam-7", 30)
    other = KeyFolder(made.path / "other")
    other.init(("localhost",), 30)
    other.device("stranger", 30)
    authority = load_pair((made.path / "ca.pem").read_bytes(), (made.path / "ca.key").read_bytes())
    for name, pair in (
        ("expired", issue_device(authority, "cam-7", 0)),
        ("expired-service", issue_service(authority, ["localhost"], 0)),
    ):
        (made.path / f"{name}.pem").write_bytes(pair.certificate_pem)
        (made.path / f"{name}.key").write_bytes(pair.key_pem)
    return made


def start(folder: KeyFolder) -> CloudProcess:
    arguments = ["--threads", "1", "--access", str(folder.access)]
    for option, name in (("certificate", "service.pem"), ("key", "service.key"), ("client-ca", "ca.pem")):
        arguments += [f"--tls-{option}", str(folder.path / name)]
    return CloudProcess(BUNDLE, arguments=tuple(arguments)).start(wait=False)


def wait_for(cloud: CloudProcess, text: str) -> str:
    deadline_s = time.monotonic() + WAIT_S
    while text not in (log := cloud.read_log()) and time.monotonic() < deadline_s:
        time.sleep(0.1)
    assert text in log
    return log


@pytest.fixture(scope="module")
def cloud(folder: KeyFolder) -> Iterator[CloudProcess]:
    made = start(folder)
    wait_for(made, "serving")
    yield made
    made.__exit__()


def new_agent(cloud: CloudProcess, tls: Tls | None, state: Path, host: str = "localhost") -> EdgeAgent:
    config = EdgeConfig(
        bundle=BUNDLE,
        clouds=(f"{host}:{cloud.port}",),
        mode="split",
        tls=tls,
        connect_s=20.0,
        deadline_s=20.0,
        threads=1,
        ledger=state / "ledger.db",
    )
    return EdgeAgent(config)


def pair(folder: KeyFolder, name: str, ca: str = "ca.pem") -> Tls:
    return Tls(folder.path / ca, folder.path / f"{name}.pem", folder.path / f"{name}.key")


@pytest.mark.parametrize(
    ("own", "ca", "device_says", "service_says"),
    [
        ("", "ca.pem", "the cloud asks for a certificate of this device", "it has no certificate"),
        ("other/devices/stranger", "ca.pem", "the cloud refuses this device's certificate: it must", "no authority of"),
        (
            "expired",
            "ca.pem",
            "the cloud refuses this device's certificate, which expired on",
            "its certificate has expired",
        ),
        ("devices/cam-7", "other/ca.pem", "not signed by an authority that this device trusts: --tls-ca", ""),
        ("devices/cam-7", "127.0.0.1", "for another name than the one that --cloud gives", ""),
        ("", "", "the cloud speaks TLS: --tls-ca names its authority", "it does not speak TLS"),
    ],
)
def test_both_ends_say_in_a_plain_line_why_a_device_cannot_connect(
    cloud: CloudProcess,
    folder: KeyFolder,
    tmp_path: Path,
    own: str,
    ca: str,
    device_says: str,
    service_says: str,
) -> None:
    host = ca if ca == "127.0.0.1" else "localhost"
    ca = ca if host == "localhost" else "ca.pem"
    tls = (pair(folder, own, ca) if own else Tls(folder.path / ca)) if ca else None
    with new_agent(cloud, tls, tmp_path, host) as agent:
        (link,) = agent.replicas
        answer = agent.infer(PHOTO)
    assert link.refusal is not None and device_says in link.refusal
    assert "SSL" not in link.refusal and "failed to connect" not in link.refusal
    assert answer.degraded and device_says in answer.why
    log = wait_for(cloud, f"a device could not connect: {service_says}" if service_says else "")
    assert "SSL" not in log and "cam-7" not in log


def test_a_renewal_that_devices_refuse_is_said_by_both_programs(cloud: CloudProcess, folder: KeyFolder) -> None:
    kept = {name: (folder.path / name).read_bytes() for name in ("service.key", "service.pem")}
    for name in kept:
        write_whole(folder.path / name, (folder.path / f"expired-{name}").read_bytes())
    try:
        said = agent_run(f"localhost:{cloud.port}", pair(folder, "devices/cam-7"))
    finally:
        for name, data in kept.items():
            write_whole(folder.path / name, data)
    words = "the cloud's certificate has expired, by this device's clock: 20"
    assert f"warning: cloud localhost:{cloud.port}: cloud: UNAVAILABLE: {words}" in said and "SSL" not in said
    assert "so devices refuse it" in cloud.read_log()


def agent_run(target: str, tls: Tls) -> str:
    """What `edge-agent run` prints at its start."""
    command = [sys.executable, "-m", "isthmus.edge_agent", "run", "--bundle", str(BUNDLE), "--cloud", target]
    command += ["--listen", "127.0.0.1:0", "--connect-s", "10", "--threads", "1"]
    command += ["--tls-ca", str(tls.ca), "--tls-certificate", str(tls.certificate), "--tls-key", str(tls.key)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=dict(os.environ)
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if " on http://" in line:
            process.terminate()
    process.wait(30)
    return "".join(lines)


def test_a_key_of_another_certificate_ends_the_agent_s_start_with_one_line(folder: KeyFolder) -> None:
    wrong = ["--tls", "--tls-certificate", f"{folder.path}/service.pem", "--tls-key", f"{folder.path}/ca.key"]
    image = str(ROOT / "docs/samples/cell.png")
    done = CliRunner().invoke(main, ["infer", image, "--bundle", str(BUNDLE), "--cloud", "localhost:1", *wrong])
    words = f"{folder.path}/ca.key: is the key of another certificate than {folder.path}/service.pem"
    assert (done.exit_code, done.stderr.strip().splitlines()[-1]) == (1, f"error: {words}")


def test_renewed_certificates_cost_no_photo_and_a_revoked_device_is_turned_away(
    cloud: CloudProcess, folder: KeyFolder, tmp_path: Path
) -> None:
    tls = pair(folder, "devices/cam-7")
    with new_agent(cloud, tls, tmp_path) as agent:
        (link,) = agent.replicas
        assert agent.infer(PHOTO).route == "split"
        opened = link._stub._open
        folder.renew(60, 90)
        deadline_s = time.monotonic() + 10.0
        while link._stub._open is opened and time.monotonic() < deadline_s:
            assert agent.infer(PHOTO).route == "split"
        assert link._stub._open is not opened
        assert agent.infer(PHOTO).route == "split"
        wait_for(cloud, "a renewed certificate is used for new connections")
        folder.revoke("cam-7")
        wait_for(cloud, "the changed file of devices is used")
        answer = agent.infer(PHOTO)
    assert answer.degraded and "the access of this device was revoked" in answer.why
    assert cloud.metric("auth_failures_total", reason="revoked") >= 1
