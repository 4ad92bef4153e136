"""What a hand-off bundle says of itself: exits of one language model, judges, and how its hidden states cross.

Values only. Units: rows are (hidden,) float32 behind a layer, sizes in bytes, fractions in [0, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, model_validator

from isthmus.models.bundle.manifest import BundleManifest, FileName, Fraction, Part, Sha256

NEVER = 2.0  # a likelihood that no exit reaches
Depth = Annotated[int, Field(ge=1, le=512)]  # counts layers: rows behind the first `depth` of them


class Threshold(Part):
    """Exits trusted from `confidence` on: the share of tokens they decide, and of those how many stay the model's."""

    confidence: Fraction
    coverage: Fraction
    agreement: Fraction


class LanguageExit(Part):
    """One exit, and how many of all tokens its choice is the full model's."""

    depth: Depth
    weights: FileName
    agreement: Fraction


def least_likely(thresholds: Sequence[Threshold], agreement: float) -> float:
    """How likely right a token must be that an exit decides, so that so many of those decided are the model's.

    No token is decided that is less likely right than all of them together are to be: on texts of another kind than the
    thresholds were measured on, the mean above its own threshold was three points too good.
    """
    good = [threshold.confidence for threshold in thresholds if threshold.agreement >= agreement]
    return max(min(good, default=NEVER), agreement)


class StateRate(Part):
    """One rate of the hidden states: entropy-coded bytes a token."""

    mean_bytes: Annotated[float, Field(ge=0)]
    max_bytes: Annotated[int, Field(ge=0, le=1 << 16)]


class StatePoint(Part):
    """Rates of hidden states that decide a token, and of those that are context alone; what that is worth.

    Measured where exits decide what they are sure of: bytes of a row on average over texts, and how many of the tokens
    that the cloud completes are the model's.
    """

    context_rate: Annotated[int, Field(ge=0, le=63)]
    rate: Annotated[int, Field(ge=0, le=63)]
    mean_bytes: Annotated[float, Field(ge=0)]
    agreement: Fraction


class OffloadLevel(Part):
    """A copy that decides no token it finds less than `likely` to be right: what share of all tokens is not decided
    then, and what share is, otherwise than by the full model (the upper end of a 95 % interval).
    """

    likely: Fraction
    asked: Fraction
    wrong: Fraction


class LocalModelEntry(Part):
    """The whole model on a device, with weights of so many bits: a judge of its choices, and what that is worth."""

    bits: Literal[4, 8]
    judge: FileName
    levels: Annotated[tuple[OffloadLevel, ...], Field(min_length=1, max_length=100)]

    @model_validator(mode="after")
    def _levels_rise(self) -> LocalModelEntry:
        likely = [level.likely for level in self.levels]
        if likely != sorted(set(likely)) or likely[0] != 0:
            raise ValueError(f"levels of the {self.bits}-bit copy must rise from likely 0")
        return self


class HandoffManifest(BundleManifest):
    """The whole of `manifest.json`."""

    kind: Literal["handoff"]
    base: Sha256  # fingerprint of the checkpoint that all this belongs to
    hidden: Annotated[int, Field(ge=1, le=1 << 16)]
    depth: Depth  # layers that the device runs; the cloud goes on behind them
    exits: Annotated[tuple[LanguageExit, ...], Field(min_length=1, max_length=8)]
    thresholds: Annotated[tuple[Threshold, ...], Field(min_length=1, max_length=100)]
    states: FileName
    rates: Annotated[tuple[StateRate, ...], Field(min_length=1, max_length=64)]
    points: Annotated[tuple[StatePoint, ...], Field(min_length=1, max_length=64)]  # in the order of bytes
    max_state_bytes: Annotated[int, Field(ge=1, le=1 << 16)]
    fill: FileName
    copies: Annotated[tuple[LocalModelEntry, ...], Field(max_length=2)] = ()

    @model_validator(mode="after")
    def _parts_agree(self) -> HandoffManifest:
        depths = [exit_.depth for exit_ in self.exits]
        if depths != sorted(set(depths)) or depths[-1] != self.depth:
            raise ValueError(f"exits at {depths} must rise, and the last be at depth {self.depth}")
        if any(max(point.context_rate, point.rate) >= len(self.rates) for point in self.points):
            raise ValueError(f"a point names a rate that does not exist, there are 0 to {len(self.rates) - 1}")
        sizes = [point.mean_bytes for point in self.points]
        if sizes != sorted(sizes):
            raise ValueError(f"points of {sizes} bytes must rise")
        named = {
            self.states,
            self.fill,
            *(exit_.weights for exit_ in self.exits),
            *(copy.judge for copy in self.copies),
        }
        if missing := sorted(named - set(self.files)):
            raise ValueError(f"files does not list {', '.join(missing)}")
        return self
