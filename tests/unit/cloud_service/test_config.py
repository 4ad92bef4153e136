from __future__ import annotations

from pathlib import Path

import pytest

from isthmus.cloud_service.config import CloudConfig, Tls
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
