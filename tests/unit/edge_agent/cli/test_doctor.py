from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import trustme
from click.testing import CliRunner

from isthmus.cloud_service.cli import main as cloud_main
from isthmus.edge_agent.cli.main import main
from isthmus.protos import diagnosis
from tests.bench.processes import ROOT, free_port

BUNDLE = str(ROOT / "models/zoo/fashion")


def examined(command: Any, *arguments: str | Path) -> tuple[int, dict[str, tuple[str, str, str]]]:
    """Exit code, and what was found by what was looked at, without paths: state, text, fix."""
    done = CliRunner().invoke(command, ["doctor", "--json", *map(str, arguments)])
    found = json.loads(done.stdout)
    assert found["healthy"] == (done.exit_code == 0), done.output
    rows = {each["what"].partition("/")[0].strip(): each for each in found["findings"]}
    return done.exit_code, {name: (each["state"], each["text"], each["fix"]) for name, each in rows.items()}


def test_a_device_that_is_well_has_nothing_to_fix() -> None:
    code, found = examined(main, "--bundle", BUNDLE)
    assert code == 0 and found["settings"][0] == found["clock"][0] == found["bundle"][0] == "ok"
    assert found["cloud"] == ("warning", "none is given: the device answers alone", "give --cloud HOST:PORT")


def test_what_is_wrong_ends_with_1_and_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://user:secret@127.0.0.1:1")
    shutil.copytree(BUNDLE, tmp_path / "bundle")
    head = next(path for path in (tmp_path / "bundle").iterdir() if path.suffix == ".onnx")
    os.truncate(head, 100)
    (tmp_path / "ca.pem").write_text("junk")
    target = f"127.0.0.1:{free_port()}"
    code, found = examined(main, "--bundle", tmp_path / "bundle", "--cloud", target, "--tls-ca", tmp_path / "ca.pem")
    assert code == 1
    assert found["bundle"][0] == "wrong" and head.name in found["bundle"][1]
    assert found["certificate"][0] == "wrong" and "holds no certificate in PEM" in found["certificate"][1]
    assert found[f"cloud {target}"][0] == "wrong"
    assert found["proxy"][0] == "warning" and "http_proxy" in found["proxy"][1] and "secret" not in str(found)


def test_a_clock_before_the_installation_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis.time, "time", lambda: 0.0)
    assert diagnosis.look_at_clock().state == "wrong" and "1970-01-01" in diagnosis.look_at_clock().text


def test_the_service_s_files_are_looked_at_too(tmp_path: Path) -> None:
    issued = trustme.CA().issue_cert("localhost")
    issued.cert_chain_pems[0].write_to_path(str(tmp_path / "a.pem"))
    issued.private_key_pem.write_to_path(str(tmp_path / "a.key"))
    (tmp_path / "a.key").chmod(0o644)
    (tmp_path / "access.json").write_text("{}")
    tls = ("--tls-certificate", tmp_path / "a.pem", "--tls-key", tmp_path / "a.key")
    ports = ("--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0")
    code, found = examined(cloud_main, "--bundle", BUNDLE, *tls, "--access", tmp_path / "access.json", *ports)
    assert code == 0 and "localhost" in found["tls"][1] and found["certificate"][0] == found["devices"][0] == "ok"
    assert found["secret"][:2] == ("warning", "mode 644: others may read it")
    code, found = examined(cloud_main, *tls, "--access", tmp_path / "a.key", *ports)
    assert code == 1 and found["devices"][0] == found["models"][0] == "wrong"
    code, found = examined(
        cloud_main, "--bundle", BUNDLE, "--tls-certificate", tmp_path / "a.pem", "--tls-key", tmp_path / "a.pem"
    )
    assert code == 1 and "holds no private key" in found["tls"][1]
