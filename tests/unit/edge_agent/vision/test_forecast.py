from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from isthmus.edge_agent.config import EdgeConfig
from isthmus.edge_agent.policy.estimates import LinkEstimate
from isthmus.edge_agent.vision.device_profile import DeviceProfile, measure_profile, read_profile
from isthmus.edge_agent.vision.exit_rule import certified
from isthmus.edge_agent.vision.forecast import DEVICE, Expectation, Speeds, expect, measure
from isthmus.models.errors import InvalidInput
from isthmus.models.vision.bundle import Bundle
from isthmus.models.vision.certificates import runtime

FAST, THIN = LinkEstimate(0.001, 1e8), LinkEstimate(0.05, 1e4)


def speeds(factor: float = 1.0) -> Speeds:
    return Speeds(
        segments_s=(0.04 * factor, 0.02 * factor),
        encode_s=((0.02 * factor, 0.03 * factor, 0.05 * factor), (0.001 * factor,)),
        image_encode_s={"jpeg": 0.002 * factor, "webp": 0.014 * factor, "png": 0.027 * factor},
        runtime=runtime(),
    )


def forecast(bundle: Bundle, link: LinkEstimate | None, factor: float = 1.0, **settings: Any) -> Expectation:
    return expect(bundle.manifest, speeds(factor), EdgeConfig(bundle.folder, ("cloud:1",), **settings), link, 0.03)


def test_every_photo_is_answered_once(elpv_bundle: Bundle) -> None:
    for link in (FAST, THIN, None):
        found = forecast(elpv_bundle, link)
        assert sum(found.ways.values()) == pytest.approx(1)
        assert found.seconds > 0 and 0.9 < found.agreement <= 1


def test_exits_answer_the_share_that_the_bundle_states(elpv_bundle: Bundle) -> None:
    found = forecast(elpv_bundle, THIN, epsilon=0.01)
    covered = sum(share for name, share in found.ways.items() if name.startswith("exit"))
    best = certified(elpv_bundle.manifest.heads["fp32"], 0.01)
    assert best is not None and covered == pytest.approx(best.coverage)
    assert found.way.startswith("exits, then ") and 0 < found.up_bytes < 1000


def test_a_slow_device_on_a_fast_link_sends_what_it_need_not_compute(elpv_bundle: Bundle) -> None:
    found = forecast(elpv_bundle, FAST, factor=10.0)
    assert list(found.ways.values()) == [1.0] and not found.way.startswith("exit")
    assert found.seconds < forecast(elpv_bundle, THIN, factor=10.0).seconds


def test_without_a_link_the_device_answers_and_sends_nothing(elpv_bundle: Bundle) -> None:
    found = forecast(elpv_bundle, None)
    assert (found.way, found.up_bytes, found.usd) == (DEVICE, 0, 0)
    assert set(found.ways) == {"exit0", "exit1"}


def test_on_a_runtime_that_certificates_are_void_with_no_exit_answers_early(elpv_bundle: Bundle) -> None:
    other = speeds().model_copy(update={"runtime": "onnxruntime 0.9"})
    found = expect(elpv_bundle.manifest, other, EdgeConfig(elpv_bundle.folder, ("cloud:1",)), THIN, 0.03)
    assert list(found.ways.values()) == [1.0] and "certified with" in found.why and "onnxruntime 0.9" in found.why


def test_the_same_question_has_the_same_answer(elpv_bundle: Bundle) -> None:
    assert forecast(elpv_bundle, THIN) == forecast(elpv_bundle, THIN)


def test_measured_speeds_fit_their_bundle_and_survive_a_file(tiny_bundle: Bundle, tmp_path: Path) -> None:
    assert measure(tiny_bundle, "fp32", 1).fits(tiny_bundle.manifest)
    profile = measure_profile("camera", [(tiny_bundle, "fp32")], 1)
    file = tmp_path / "camera.json"
    file.write_text(profile.model_dump_json(), encoding="utf-8")
    assert read_profile(file) == profile
    assert profile.speeds(tiny_bundle, "fp32").fits(tiny_bundle.manifest)


def test_a_profile_without_this_bundle_says_what_it_has(tiny_bundle: Bundle, elpv_bundle: Bundle) -> None:
    profile = measure_profile("camera", [(tiny_bundle, "fp32")], 1)
    with pytest.raises(InvalidInput, match="camera has no speeds of bundle elpv .* it has tiny fp32; measure it"):
        profile.speeds(elpv_bundle, "fp32")


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("no JSON", "the file"),
        ('{"device": "x"}', "bundles"),
        ('{"device": "x", "bundles": {}, "more": 1}', "more"),
        (
            '{"device": "x", "bundles": {"a": {"name": "a", "precisions": {"fp32":'
            ' {"segments_s": [-1], "encode_s": [], "image_encode_s": {}, "runtime": "any 1.0"}}}}}',
            "segments_s.0",
        ),
        (" " * (1 << 20) + "{}", "larger than"),
    ],
)
def test_what_is_no_profile_is_refused_by_file_and_field(tmp_path: Path, content: str, named: str) -> None:
    file = tmp_path / "bad.json"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(InvalidInput) as refused:
        read_profile(file)
    assert str(file) in str(refused.value) and named in str(refused.value)


def test_a_profile_of_another_shape_is_refused(elpv_bundle: Bundle) -> None:
    wrong = Speeds(
        segments_s=(1.0,), encode_s=(), image_encode_s={"jpeg": 1.0, "webp": 1.0, "png": 1.0}, runtime="any 1.0"
    )
    bundles = {elpv_bundle.fingerprint.hex(): {"name": "elpv", "precisions": {"fp32": wrong}}}
    profile = DeviceProfile.model_validate({"device": "x", "bundles": bundles})
    with pytest.raises(InvalidInput, match="no speeds of bundle elpv"):
        profile.speeds(elpv_bundle, "fp32")
