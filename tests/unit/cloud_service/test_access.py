from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from isthmus.cloud_service import access as module
from isthmus.cloud_service.access import Access, Device, certificate_digest, read_access, token_digest
from isthmus.cloud_service.quotas import Usage
from isthmus.models.errors import InvalidInput, Overloaded, Refused, Unauthenticated

PEM = b"-----BEGIN CERTIFICATE-----\naGVsbG8=\n-----END CERTIFICATE-----\n"


def written(path: Path, **content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def proven(spiffe: tuple[bytes, ...] = (), names: tuple[bytes, ...] = ()) -> dict[str, tuple[bytes, ...]]:
    return {"x509_pem_cert": (PEM,), "peer_spiffe_id": spiffe, "x509_subject_alternative_name": names}


def test_without_a_file_and_certificates_everyone_is_welcome_and_known_by_the_connection() -> None:
    access = Access()
    device = access.device("ipv4:1.2.3.4:5", {}, "Bearer x")
    assert device == Device("ipv4:1.2.3.4:5") and access.refusal(device) is None and not access.needed


def test_a_token_is_known_by_its_digest_alone(tmp_path: Path) -> None:
    access = Access(written(tmp_path / "a.json", tokens={"cam-7": [token_digest("good")]}))
    assert "good" not in (tmp_path / "a.json").read_text()
    device = access.device("ip", {}, "Bearer good")
    assert (device.peer, device.name) == ("device cam-7", "cam-7") and access.refusal(device) is None


@pytest.mark.parametrize(
    "authorization",
    ["", "good", "Basic good", "bearer good", "Bearer ", "Bearer goo", "Bearer good2", f"Bearer {'x' * 5000}"],
)
def test_whatever_is_not_the_token_is_refused_as_unknown(tmp_path: Path, authorization: str) -> None:
    access = Access(written(tmp_path / "a.json", tokens={"cam-7": [token_digest("good")]}))
    refusal = access.refusal(access.device("ip", {}, authorization))
    assert refusal is not None and isinstance(refusal[0], Unauthenticated)
    assert refusal[1] == ("wrong_token" if authorization.startswith("Bearer goo") else "no_token")


def test_the_digest_of_a_token_is_no_token(tmp_path: Path) -> None:
    access = Access(written(tmp_path / "a.json", tokens={"cam-7": [token_digest("good")]}))
    assert access.refusal(access.device("ip", {}, f"Bearer {token_digest('good')}")) is not None


def test_a_device_is_named_by_the_spiffe_id_of_its_certificate_and_by_nothing_else() -> None:
    access = Access(by_certificate=True)
    device = access.device("ip", proven((b"spiffe://isthmus/device/cam-7",)), "Bearer x")
    assert (device.peer, device.name, device.proof) == ("device cam-7", "cam-7", certificate_digest(PEM))
    for forged in (
        proven(names=(b"spiffe://isthmus/device/cam-7",)),  # as a DNS name
        proven(names=(b"device cam-7",)),
        proven((b"spiffe://isthmus/device/cam-7", b"spiffe://isthmus/device/cam-8")),
        proven((b"spiffe://isthmus/device/cam-7/x",)),
        proven((b"spiffe://isthmus/service",)),
    ):
        other = access.device("ip", forged, "")
        assert other.name == "" and other.peer != "device cam-7"


def test_a_certificate_or_a_name_can_be_revoked(tmp_path: Path) -> None:
    device = Device("device cam-7", "cam-7", certificate_digest(PEM))
    for revoked in ("cam-7", certificate_digest(PEM)):
        access = Access(written(tmp_path / "a.json", revoked=[revoked]), by_certificate=True)
        refusal = access.refusal(device)
        assert refusal is not None and type(refusal[0]) is Refused and refusal[1] == "revoked"
        assert access.refusal(Device("device cam-8", "cam-8", "other")) is None


def test_quotas_are_a_device_s_own_or_everyone_s(tmp_path: Path) -> None:
    quotas = {"*": {"requests_per_s": 1}, "cam-7": {"requests_per_s": 100}}
    access = Access(written(tmp_path / "a.json", quotas=quotas), by_certificate=True)
    for _ in range(50):
        access.spend(Device("device cam-7", "cam-7", "x"), Usage(1))
    with pytest.raises(Overloaded, match="quota of 1 requests a second"):
        for _ in range(10):
            access.spend(Device("device cam-8", "cam-8", "y"), Usage(1))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "is no JSON"),
        ('{"tokens": {"cam-7": ["ab', "is no JSON"),  # half written
        ("[" * 100_000, "is no JSON"),
        ("[]", "is no JSON object"),
        ('{"token": {}}', "has no field 'token'"),
        ('{"tokens": {"../x": []}}', "tokens"),
        ('{"tokens": {"a": ["secret"]}}', "tokens.a.0"),
        ('{"quotas": {"a": {"requests": 1}}}', "requests"),
        ('{"quotas": {"a": {"requests_per_s": "many"}}}', "requests_per_s"),
        ('{"revoked": "cam-7"}', "revoked"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line_that_names_it(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(InvalidInput, match=words) as caught:
        read_access(tmp_path / "a.json")
    assert "a.json" in str(caught.value) and "\n" not in str(caught.value)


def test_a_huge_file_is_refused_before_it_is_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_FILE_BYTES", 100)
    with pytest.raises(InvalidInput, match="larger than 100 bytes"):
        read_access(written(tmp_path / "a.json", revoked=["x" * 60, "y" * 60]))
