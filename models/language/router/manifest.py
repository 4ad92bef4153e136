"""The manifest of a router bundle: from which confidence on one device's model answers for one model in the cloud.

Values only. Units: sizes in bytes, fractions in [0, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, model_validator

from isthmus.models.bundle.manifest import BundleManifest, FileName, Fraction, Interval, Part, Sha256

MAX_BYTES = 3_000_000  # of all files: a device fetches a bundle for each pair
ModelName = Annotated[str, StringConstraints(min_length=1, max_length=200)]


class DeviceIdentity(Part):
    """The model on the device. `weights`: the checkpoint's fingerprint; `bits`: of each weight on the device."""

    name: ModelName
    weights: Sha256
    bits: Literal[4, 8]


class CloudIdentity(Part):
    """The model in the cloud, as a service declares it. `weights`: where the service holds them, else None."""

    name: ModelName
    tokenizer: Sha256
    weights: Sha256 | None = None


class Certificate(Part):
    """With confidence 1 - delta the mean loss over unseen prompts is at most `epsilon`; from so many `prompts`.

    The loss of a prompt is the share of its answer's tokens that the device decides and the cloud would not choose.
    """

    epsilon: Fraction
    delta: Annotated[float, Field(gt=0, lt=1)]
    prompts: Annotated[int, Field(ge=1)]


class OffloadLevel(Part):
    """A confidence threshold of the device's model, which offloads to the cloud what is below it.

    `likely`: the threshold. `asked`: the offload rate, the share below it. `wrong`: the mean loss over test prompts,
    with an interval from resampling them. `certificate`: what is promised.
    """

    likely: Fraction
    asked: Fraction
    wrong: Interval
    certificate: Certificate


Levels = Annotated[tuple[OffloadLevel, ...], Field(max_length=100)]  # by rising `likely`


class RouterManifest(BundleManifest):
    """The content of `manifest.json`.

    `head`: the file of the confidence head that `token_levels` are thresholds of; None without any. `verifier`: that of
    the heads that `answer_levels` and `query_levels` are thresholds of; there a level's loss is the share of answers
    that the device gives and that are worse than the cloud's.
    """

    kind: Literal["router"]
    device: DeviceIdentity
    cloud: CloudIdentity
    head: FileName | None = None
    verifier: FileName | None = None
    token_levels: Levels = ()
    answer_levels: Levels = ()
    query_levels: Levels = ()

    @model_validator(mode="after")
    def _parts_agree(self) -> RouterManifest:
        for name in ("token_levels", "answer_levels", "query_levels"):
            check_rising(name, getattr(self, name))
        if (self.head is None) == bool(self.token_levels):
            raise ValueError("head and token_levels need each other")
        if (self.verifier is None) == bool(self.answer_levels or self.query_levels):
            raise ValueError("verifier and levels of whole answers need each other")
        if not (self.token_levels or self.answer_levels or self.query_levels):
            raise ValueError("there are no levels")
        for file in (self.head, self.verifier):
            if file is not None and file not in self.files:
                raise ValueError(f"files does not list {file}")
        if (total := sum(entry.size for entry in self.files.values())) > MAX_BYTES:
            raise ValueError(f"files have {total} bytes, at most {MAX_BYTES} are allowed")
        return self


def level_for(levels: Sequence[OffloadLevel], quality: float) -> OffloadLevel | None:
    """The level that queries least and is certified to keep the quality; None when none is. `levels` rise."""
    return next((level for level in levels if 1 - level.certificate.epsilon >= quality), None)


def best_quality(levels: Sequence[OffloadLevel]) -> float | None:
    """The best that a level is certified to keep; None without levels."""
    return 1 - min(level.certificate.epsilon for level in levels) if levels else None


def check_rising(name: str, levels: tuple[OffloadLevel, ...]) -> None:
    """Raises ValueError unless thresholds rise from 0, and what is certified does not get worse."""
    likely = [level.likely for level in levels]
    if likely and (likely != sorted(set(likely)) or likely[0] != 0):
        raise ValueError(f"{name} must rise from likely 0")
    certified = [level.certificate.epsilon for level in levels]
    if certified != sorted(certified, reverse=True):
        raise ValueError(f"epsilon of the certificates of {name} must not rise")
