"""When an exit's answer is good enough: what it is judged by, and the certified score of each exit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from isthmus.models.vision.exit_score import exit_score
from isthmus.models.vision.manifest import NEVER, Among, Exit, Head, Promise, Threshold
from isthmus.models.vision.outputs import ExitOutput

VOID = "no exit answers early, as its certificates are void: {}"


@dataclass(frozen=True, slots=True)
class ExitRule:
    """`confidences`: the score from which each exit answers; NEVER where it does not."""

    exits: Sequence[Exit]
    confidences: Sequence[float]

    def score(self, exits: Sequence[ExitOutput]) -> float:
        """Of the last of the exits run so far, from what they gave."""
        return exit_score(exits, self.exits[len(exits) - 1])

    def confidence(self, passed: int) -> float:
        """From which the last of the `passed` exits answers; NEVER before the first."""
        return self.confidences[passed - 1] if passed else NEVER


def certified(head: Head, epsilon: float, promise: Promise = "accuracy", among: Among = "all") -> Threshold | None:
    """The certificate for the largest epsilon up to the given one; None if there is none."""
    allowed = [
        each
        for each in head.thresholds
        if (each.promise, each.among) == (promise, among) and each.epsilon <= epsilon + 1e-12
    ]
    return max(allowed, key=lambda threshold: threshold.epsilon, default=None)


def exit_rule(head: Head, epsilon: float, promise: Promise = "accuracy", among: Among = "all") -> ExitRule:
    """The rule of that certificate; no exit answers if there is none."""
    best = certified(head, epsilon, promise, among)
    return ExitRule(head.exits, best.confidences if best else (NEVER,) * len(head.exits))


def exit_shares(head: Head, best: Threshold | None) -> list[float]:
    """The share of the inputs reaching each exit that it answers, on the calibration part; none if there is no rule."""
    found, reach = [], 1.0
    for share in best.shares if best else (0.0,) * len(head.exits):
        found.append(min(share / reach, 1.0) if reach > 0 else 0.0)
        reach -= share
    return found
