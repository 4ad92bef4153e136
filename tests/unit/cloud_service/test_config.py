from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import SecretStr

from isthmus.cloud_service.config import CloudConfig, EngineConfig, Tls
from isthmus.cloud_service.vision.batching import BatchLimits
from isthmus.models.bundle.installed import SHIPPED
from isthmus.models.errors import InvalidInput
from isthmus.models.options import build


def test_options_build_it() -> None:
    values = {
        "bundle": (Path("photos"), Path("/b")),
        "model": ("m",),
        "context_mb": 64,
        "queue_mb": 32,
        "metrics": "",
        "max_batch": 4,
        "max_wait_ms": 3.0,
        "tls_certificate": Path("c"),
        "tls_key": Path("k"),
    }
    assert build(CloudConfig, values) == CloudConfig(
        bundles=(SHIPPED / "photos", Path("/b")),
        models=("m",),
        context_bytes=64 << 20,
        queue_bytes=32 << 20,
        metrics=None,
        batch=BatchLimits(4, 0.003),
        tls=Tls(Path("c"), Path("k")),
    )
    assert build(CloudConfig, {}) == CloudConfig()


@pytest.mark.parametrize("name", ["cpu", "auto", "cuda", "cuda:0", "cuda:12"])
def test_devices_have_these_names(name: str) -> None:
    assert build(CloudConfig, {"device": name}).device == name


@pytest.mark.parametrize("name", ["", "gpu", "CUDA", "cuda:", "cuda:-1", "cuda:x", "cuda:1000", "cuda:1\n", "cuda:١"])
def test_other_devices_are_refused(name: str) -> None:
    with pytest.raises(InvalidInput, match=r"^device is .*: expected cpu, cuda, cuda:N or auto$"):
        build(CloudConfig, {"device": name})


@pytest.mark.parametrize("given", ["tls_key", "tls_certificate", "tls_client_ca"])
def test_certificate_and_key_go_together(given: str) -> None:
    with pytest.raises(InvalidInput, match="--tls-(key|certificate) is missing"):
        build(CloudConfig, {given: Path("x")})


@pytest.mark.parametrize(
    "url",
    [
        "http://h:99999",
        "http://h:ab",
        "http://h:0",
        "http://h o",
        "http://h\n",
        "http://[::1",
        "h:80",
        "ftp://h",
        "http://h?k",
    ],
)
def test_an_engines_address_is_checked(url: str) -> None:
    with pytest.raises(InvalidInput):
        EngineConfig(url, "t")


@pytest.mark.parametrize("url", ["http://user:sekret@h:80/v1", "http://user:sek/ret@h", "//user:sekret@h"])
def test_a_password_in_an_address_is_not_repeated(url: str) -> None:
    with pytest.raises(InvalidInput) as raised:
        EngineConfig(url, "t")
    assert "ret" not in str(raised.value)


@pytest.mark.parametrize("raw", [b"", b" \n", b"a\nb", b"a\rb", b"a\0b", b"\xff\xfe", "clé".encode(), b"k" * 4097])
def test_what_cannot_be_a_key_is_refused_without_repeating_it(raw: bytes, tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_bytes(raw)
    with pytest.raises(InvalidInput, match="key: expected one line with an API key"):
        _ = EngineConfig("http://h", "t", key_file=file).secret
    if raw.strip():
        with pytest.raises(InvalidInput, match=r"^ISTHMUS_CLOUD_ENGINE_KEY: expected one line with an API key$"):
            _ = EngineConfig("http://h", "t", key=SecretStr(raw.decode(errors="replace"))).secret


def test_a_key_may_end_with_a_newline(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_bytes(b"sk-1\r\n")
    assert EngineConfig("http://h", "t", key_file=file).secret == "sk-1"
    assert EngineConfig("http://h", "t", key=SecretStr("sk-2\n")).secret == "sk-2"
    assert EngineConfig("http://h", "t", key=SecretStr("")).secret == ""


def test_a_key_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="cannot be read: is a directory"):
        _ = EngineConfig("http://h", "t", key_file=tmp_path).secret


@pytest.mark.parametrize("listen", ["0.0.0.0:1", "[::]:1", "10.0.0.1:1", "cloud.example:1", "[::ffff:127.0.0.1]:1"])
def test_beyond_loopback_the_service_needs_tls_and_devices_that_it_knows(listen: str) -> None:
    known, certified = Tls(Path("c"), Path("k"), Path("ca")), Tls(Path("c"), Path("k"))
    for given, words in (
        ({}, "TLS (--tls-certificate and --tls-key) and to know the devices (--tls-client-ca or --access)"),
        ({"tls": certified}, "needs to know the devices"),
        ({"access": Path("a")}, "needs TLS (--tls-certificate and --tls-key);"),
    ):
        with pytest.raises(InvalidInput, match="can be reached from other machines") as caught:
            CloudConfig(listen=listen, **given)
        assert words in str(caught.value) and "--insecure-listen goes without" in str(caught.value)
    CloudConfig(listen=listen, tls=known)
    CloudConfig(listen=listen, tls=certified, access=Path("a"))
    CloudConfig(listen=listen, insecure_listen=True)


@pytest.mark.parametrize("listen", ["127.0.0.1:1", "127.9.9.9:1", "[::1]:1", "localhost:1"])
def test_on_loopback_it_needs_neither(listen: str) -> None:
    CloudConfig(listen=listen)
