from __future__ import annotations

from isthmus.models.recipes.vision import export
from isthmus.models.vision.bundle import Bundle


def test_costs_are_counted(bundle: Bundle) -> None:
    manifest = bundle.manifest
    light, deep = manifest.taps
    assert 0 < light.widths[0].encoder_macs < light.widths[1].encoder_macs
    assert min(*(s.macs for s in manifest.segments), deep.widths[0].encoder_macs) > 0
    assert 0 < manifest.tail_macs < min(light.tail_macs, deep.tail_macs)  # a decoder comes on top


def test_the_manifest_says_with_what_it_was_made(bundle: Bundle) -> None:
    assert bundle.manifest.training.versions.keys() == set(export.VERSIONS)
