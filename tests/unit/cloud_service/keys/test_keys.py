from __future__ import annotations

import json
import os
import stat
import threading
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from cryptography import x509

from isthmus.cloud_service.access import Access, certificate_digest, read_access, token_digest
from isthmus.cloud_service.cli import main
from isthmus.cloud_service.keys.authority import hosts_of
from isthmus.cloud_service.keys.folder import KeyFolder, write_whole
from isthmus.cloud_service.quotas import Quota
from isthmus.models.errors import InvalidInput
from isthmus.protos.certificates import names_of, read_pems


@pytest.fixture
def folder(tmp_path: Path) -> KeyFolder:
    made = KeyFolder(tmp_path / "keys")
    made.init(("localhost", "10.0.0.1"), 30)
    return made


def keys(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["keys", *map(str, arguments)])


def certificate(folder: KeyFolder, name: str) -> x509.Certificate:
    path = folder.path / f"{name}.pem"
    return read_pems(path, path.with_suffix(".key"), None).certificates[0]


def test_every_file_is_for_its_owner_alone(folder: KeyFolder) -> None:
    folder.device("cam-7", 30)
    folder.token("cam-8")
    files = [path for path in folder.path.rglob("*") if path.is_file()]
    assert len(files) == 8 and all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in files)
    folders = (folder.path, folder.path / "devices")
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o700 for path in folders)


def test_names_are_where_tls_and_the_service_look_for_them(folder: KeyFolder) -> None:
    folder.device("cam-7", 30)
    assert hosts_of(certificate(folder, "service")) == ["localhost", "10.0.0.1"]
    assert names_of(certificate(folder, "devices/cam-7")) == ["spiffe://isthmus/device/cam-7"]
    issuer = certificate(folder, "ca")
    for name in ("service", "devices/cam-7"):
        certificate(folder, name).verify_directly_issued_by(issuer)


def test_init_leaves_what_is_there(folder: KeyFolder) -> None:
    before = {path: path.read_bytes() for path in folder.path.iterdir()}
    assert folder.init(("elsewhere",), 30) == []
    assert {path: path.read_bytes() for path in folder.path.iterdir()} == before


def test_what_expires_soon_is_renewed_with_another_key_and_what_is_revoked_is_not(folder: KeyFolder) -> None:
    folder.device("cam-7", 30)
    folder.device("cam-8", 30)
    folder.device("cam-9", 300)
    folder.revoke("cam-8")
    old = certificate(folder, "devices/cam-7")
    made = folder.renew(60, 365)
    assert [path.stem for path in made[::2]] == ["service", "cam-7"]
    assert certificate(folder, "devices/cam-7").public_key() != old.public_key()
    assert hosts_of(certificate(folder, "service")) == ["localhost", "10.0.0.1"]


def test_of_tokens_only_digests_are_kept_and_two_are_good(folder: KeyFolder) -> None:
    tokens = [folder.token("cam-7") for _ in range(3)]
    content = folder.access.read_text()
    assert not any(token in content for token in tokens)
    assert read_access(folder.access).tokens == {"cam-7": tuple(map(token_digest, tokens[1:]))}


def test_revoking_refuses_what_was_made_so_far_and_not_what_is_made_later(folder: KeyFolder) -> None:
    def allowed() -> bool:
        access = Access(folder.access, by_certificate=True)
        pem = (folder.path / "devices/cam-7.pem").read_bytes()
        proven = {"x509_pem_cert": (pem,), "peer_spiffe_id": (b"spiffe://isthmus/device/cam-7",)}
        return access.refusal(access.device("ip", proven, "")) is None

    folder.device("cam-7", 30)
    stolen = (folder.path / "devices/cam-7.pem").read_bytes()
    folder.device("cam-7", 30)
    folder.token("cam-7")
    assert allowed() and folder.revoke("cam-7") == 3
    assert not allowed() and certificate_digest(stolen) in read_access(folder.access).revoked
    folder.device("cam-7", 30)
    assert allowed()
    assert folder.revoke("stranger") == 0 and "stranger" in read_access(folder.access).revoked


def test_quotas_are_set_and_removed(folder: KeyFolder) -> None:
    folder.limit("*", Quota(requests_per_s=5))
    folder.limit("cam-7", Quota(session_mb=64))
    assert read_access(folder.access).quotas == {"*": Quota(requests_per_s=5), "cam-7": Quota(session_mb=64)}
    folder.limit("*", Quota())
    assert list(read_access(folder.access).quotas) == ["cam-7"]


@pytest.mark.parametrize("name", ["", "../x", "a/b", "a b", "-x", "x" * 65, "ü", "a\n", "*"])
def test_a_name_that_could_be_a_path_is_refused(folder: KeyFolder, name: str) -> None:
    for make in (lambda: folder.device(name, 30), lambda: folder.token(name), lambda: folder.revoke(name)):
        with pytest.raises(InvalidInput, match="is no name of a device"):
            make()


def test_a_link_in_a_file_s_place_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("untouched")
    (tmp_path / "a.key").symlink_to(tmp_path / "victim")
    write_whole(tmp_path / "a.key", b"secret")
    assert (tmp_path / "victim").read_text() == "untouched" and not (tmp_path / "a.key").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["a.key", "victim"]


def test_two_at_once_lose_nothing(folder: KeyFolder) -> None:
    threads = [threading.Thread(target=folder.token, args=(f"cam-{number}",)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read_access(folder.access).tokens) == 8


def test_the_commands_say_what_they_made(tmp_path: Path) -> None:
    where: tuple[Any, ...] = ("--folder", tmp_path / "keys")
    assert "made " in keys("init", "--host", "localhost", *where).stdout
    assert keys("init", *where).stdout == "everything is there already\n"
    made = json.loads(keys("device", "cam-7", "--json", *where).stdout)["files"]
    assert [Path(path).name for path in made] == ["cam-7.pem", "cam-7.key"]
    token = json.loads(keys("token", "cam-7", "--json", *where).stdout)["token"]
    assert token_digest(token) in (tmp_path / "keys/access.json").read_text()
    keys("token", "cam-7", "--out", tmp_path / "t", *where)
    assert (tmp_path / "t").read_text().startswith("isthmus_") and stat.S_IMODE(
        (tmp_path / "t").stat().st_mode
    ) == 0o600
    assert keys("limit", "cam-7", "--requests-per-s", "5", *where).stdout == "set the quota of cam-7\n"
    assert "revoked 3 certificates and tokens of cam-7" in keys("revoke", "cam-7", *where).stdout
    assert [line.split()[1] for line in keys("list", *where).stdout.splitlines()] == ["ca", "service", "cam-7"]
    assert keys("renew", "--within", "1", *where).stdout == "nothing expires within 1 days\n"


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    none = keys("device", "cam-7", "--folder", tmp_path)
    assert none.exit_code == 1 and "holds no authority: `cloud-service keys init` makes one" in none.stderr
    wrong = keys("init", "--host", "bücher", "--folder", tmp_path / "k")
    assert wrong.exit_code == 1 and "neither a host name nor an IP address" in wrong.stderr
    (tmp_path / "file").write_text("")
    taken = keys("init", "--folder", tmp_path / "file")
    assert taken.exit_code == 1 and len(taken.stderr.splitlines()) == 1
