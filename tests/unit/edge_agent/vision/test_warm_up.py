from __future__ import annotations

import pytest

from isthmus.edge_agent.cost_profiles import open_profile
from isthmus.edge_agent.vision.costs import Costs
from isthmus.edge_agent.vision.warm_up import warm_up
from isthmus.models.vision.bundle import Bundle
from isthmus.models.vision.head import Head
from tests.tiny_bundle import random_images


def test_every_segment_and_every_width_of_every_encoder_runs_three_times(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    head, costs = Head(tiny_bundle, 1), Costs(tiny_bundle.manifest, open_profile("wifi"))
    segment, encode = head.segment, head.encode
    runs: list[tuple[object, ...]] = []
    monkeypatch.setattr(head, "segment", lambda i, x_CHW: [runs.append(("segment", i)), segment(i, x_CHW)][1])
    monkeypatch.setattr(head, "encode", lambda t, x_CHW, w: [runs.append(("tap", t, w)), encode(t, x_CHW, w)][1])
    warm_up(head, [tiny_bundle.codec(tap) for tap in range(2)], costs, random_images(1, 0)[0])
    once = [("segment", 0), ("segment", 1), ("tap", 0, 0), ("tap", 0, 1), ("tap", 1, 0)]
    assert runs == once * 3


def test_a_latent_over_the_cap_does_not_keep_the_agent_from_starting(tiny_bundle: Bundle) -> None:
    head, costs = Head(tiny_bundle, 1), Costs(tiny_bundle.manifest, open_profile("wifi"))
    codecs = [tiny_bundle.codec(tap) for tap in range(2)]
    for codec in codecs:
        codec.max_bytes = 0
    before = costs.encode_s[0][1].value
    warm_up(head, codecs, costs, random_images(1, 0)[0])
    assert costs.encode_s[0][1].value != before
