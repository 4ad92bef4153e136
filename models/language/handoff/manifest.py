"""The manifest of a handoff bundle: exits of one language model, rates of its hidden states.

Values only. Units: sizes in bytes, depths in layers, fractions in [0, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from isthmus.models.bundle.manifest import BundleManifest, FileName, Fraction, Part, Sha256

NEVER = 2.0  # a confidence that no exit reaches
Depth = Annotated[int, Field(ge=1, le=512)]  # number of lower layers


class Threshold(Part):
    """A confidence threshold of the exits, measured on held-out texts.

    `coverage`: share of tokens decoded from an exit. `agreement`: share of those that equal the full model's choice.
    """

    confidence: Fraction
    coverage: Fraction
    agreement: Fraction


class LanguageExit(Part):
    """One exit. `agreement`: the share of all tokens for which its choice equals the full model's."""

    depth: Depth
    weights: FileName
    agreement: Fraction


def least_likely(thresholds: Sequence[Threshold], agreement: float) -> float:
    """The lowest confidence at which exits may decode tokens so that `agreement` of those are the full model's choice.

    The result is at least `agreement` itself: on texts of another kind than those that the thresholds were measured on,
    the measured agreement above a lower threshold was three percentage points too high.
    """
    good = [threshold.confidence for threshold in thresholds if threshold.agreement >= agreement]
    return max(min(good, default=NEVER), agreement)


class StateRate(Part):
    """One rate of the hidden states, in entropy-coded bytes a token."""

    mean_bytes: Annotated[float, Field(ge=0)]
    max_bytes: Annotated[int, Field(ge=0, le=1 << 16)]


class StatePoint(Part):
    """An operating point of the handoff: the rates of its hidden states, with mean size and agreement.

    `rate` codes states that the cloud decodes a token from, `context_rate` all others. Measured with exits decoding the
    tokens that they are confident of. `mean_bytes`: mean over all states. `agreement`: share of the tokens decoded in
    the cloud that equal the full model's choice.
    """

    context_rate: Annotated[int, Field(ge=0, le=63)]
    rate: Annotated[int, Field(ge=0, le=63)]
    mean_bytes: Annotated[float, Field(ge=0)]
    agreement: Fraction


class HandoffManifest(BundleManifest):
    """The content of `manifest.json`."""

    VERSION: ClassVar[int] = 4
    kind: Literal["handoff"]
    base: Sha256  # fingerprint of the checkpoint that the bundle belongs to
    hidden: Annotated[int, Field(ge=1, le=1 << 16)]
    depth: Depth  # lower layers, which the device runs; the cloud runs the upper layers
    exits: Annotated[tuple[LanguageExit, ...], Field(min_length=1, max_length=8)]
    thresholds: Annotated[tuple[Threshold, ...], Field(min_length=1, max_length=100)]
    states: FileName
    rates: Annotated[tuple[StateRate, ...], Field(min_length=1, max_length=64)]
    points: Annotated[tuple[StatePoint, ...], Field(min_length=1, max_length=64)]  # by rising mean_bytes
    max_state_bytes: Annotated[int, Field(ge=1, le=1 << 16)]
    fill: FileName

    @model_validator(mode="after")
    def _parts_agree(self) -> HandoffManifest:
        depths = [exit_.depth for exit_ in self.exits]
        if depths != sorted(set(depths)) or depths[-1] != self.depth:
            raise ValueError(f"depths of the exits {depths} must rise to {self.depth}")
        if any(max(point.context_rate, point.rate) >= len(self.rates) for point in self.points):
            raise ValueError(f"a point has an unknown rate, expected 0 to {len(self.rates) - 1}")
        sizes = [point.mean_bytes for point in self.points]
        if sizes != sorted(sizes):
            raise ValueError(f"mean_bytes of the points {sizes} must rise")
        named = {self.states, self.fill, *(exit_.weights for exit_ in self.exits)}
        if missing := sorted(named - set(self.files)):
            raise ValueError(f"files does not list {', '.join(missing)}")
        return self
