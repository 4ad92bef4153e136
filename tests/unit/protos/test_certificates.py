from __future__ import annotations

import datetime
import os
from pathlib import Path

import pytest
import trustme
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat
from cryptography.hazmat.primitives.serialization import load_pem_private_key as load_key

from isthmus.models.errors import InvalidInput
from isthmus.protos.certificates import MAX_PEM_BYTES, expiry_problem, names_of, read_pems, stamp


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """ca.pem, one.pem and one.key, other.key."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    for name in ("one", "other"):
        issued = authority.issue_cert("localhost", "10.0.0.1")
        issued.cert_chain_pems[0].write_to_path(str(tmp_path / f"{name}.pem"))
        issued.private_key_pem.write_to_path(str(tmp_path / f"{name}.key"))
    return tmp_path


def test_what_fits_is_read(folder: Path) -> None:
    pems = read_pems(folder / "one.pem", folder / "one.key", folder / "ca.pem")
    assert (pems.key, pems.roots) == ((folder / "one.key").read_bytes(), (folder / "ca.pem").read_bytes())
    assert names_of(pems.certificates[0]) == ["localhost", "10.0.0.1"]
    assert expiry_problem(pems.certificates[0]) is None
    assert read_pems(None, None, folder / "ca.pem").not_after is None


def test_what_is_wrong_with_a_file_is_one_line_that_names_it(folder: Path) -> None:
    one, key = folder / "one.pem", folder / "one.key"
    locked = load_key(key.read_bytes(), None).private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret")
    )
    (folder / "locked.key").write_bytes(locked)
    (folder / "half.pem").write_bytes(one.read_bytes()[:-40])
    (folder / "half.key").write_bytes(key.read_bytes()[:-40])
    (folder / "huge.pem").write_bytes(bytes(MAX_PEM_BYTES + 1))
    for certificate, private, words in (
        (one, folder / "other.key", "other.key: is the key of another certificate than .*one.pem"),
        (one, folder / "locked.key", "locked.key: is protected by a password, expected a key without one"),
        (one, folder / "half.key", "half.key: holds no private key in PEM"),
        (folder / "half.pem", key, "half.pem: holds no certificate in PEM"),
        (key, key, "one.key: holds no certificate in PEM"),
        (folder / "none.pem", key, "none.pem: cannot be read: no such file or directory"),
        (folder / "huge.pem", key, "huge.pem: larger than"),
        (folder, key, "cannot be read: is a directory"),
        (one, None, "need each other"),
    ):
        with pytest.raises(InvalidInput, match=words) as caught:
            read_pems(certificate, private, None)
        assert "\n" not in str(caught.value)


def test_a_certificate_that_is_not_valid_now_says_since_when_and_by_whose_clock() -> None:
    authority = trustme.CA()
    past = authority.issue_cert("localhost", not_after=datetime.datetime(2020, 1, 1))
    problem = expiry_problem(load(past))
    assert problem is not None and "expired on 2020-01-01" in problem and "this machine's clock" in problem


def load(issued: trustme.LeafCert) -> object:
    from cryptography.x509 import load_pem_x509_certificate

    return load_pem_x509_certificate(issued.cert_chain_pems[0].bytes())


def test_a_stamp_changes_with_the_file_behind_a_link(folder: Path) -> None:
    (folder / "link.pem").symlink_to("one.pem")
    before = stamp((folder / "link.pem", None, folder / "none"))
    assert before == stamp((folder / "link.pem", None, folder / "none")) and before[1:] == (None, None)
    os.replace(folder / "other.pem", folder / "one.pem")
    assert stamp((folder / "link.pem", None, folder / "none")) != before
