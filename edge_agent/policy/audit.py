"""Whether the exits keep their promise now: a betting test on audited answers. Pure; knows no network and no file.

    each input -> drawn with the probability `share` -> its exits' answers beside the cloud model's -> Bets

What is drawn depends on earlier inputs only, so that audited inputs are a fair sample of those that come. A bettor
stakes on "they differ more often than promised" (Waudby-Smith & Ramdas, "Estimating means of bounded random variables
by betting", JRSS B 2023): where the promise holds, the capital grows a hundredfold with a probability of 1 %. Part of
the capital is brought in evenly over time (Shiryaev's and Roberts's way), so that a shift that comes late is seen too.

An audit costs an upload, so few are made until something looks odd: bets that disagreement began lately (Page's test)
raise the share of audits, and never the alarm. Inputs that look unlike those before (`policy.drift`) are an alarm, too:
what was certified says nothing about them, until enough of them are audited.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ALPHA = 0.01  # chance of a false alarm in HORIZON inputs
HORIZON = 20_000
AT_START = 0.5  # of the capital; the rest is brought in over HORIZON inputs
ODDS = (2.0, 4.0, 8.0, 16.0, 32.0, 64.0)  # times the promised odds: what is bet on, in equal parts
LEAST, MOST = 1e-4, 0.99  # rates that can be bet on
RICHEST = 1e12  # capital that is told apart
RAISED = 0.5  # the share of inputs that is audited at most
DELTA = 0.1  # a certificate fails with at most this probability
UNKNOWN = -1  # the cloud's answer where it was not asked; no exit agrees with it


@dataclass(frozen=True, slots=True)
class Pair:
    """One audited input: score and answer of each exit, and the cloud model's answer to the same input."""

    scores: tuple[float, ...]
    answers: tuple[int, ...]
    cloud: int = UNKNOWN


@dataclass(frozen=True, slots=True)
class Level:
    """A threshold of each exit."""

    confidences: tuple[float, ...]

    def exit(self, scores: Sequence[float]) -> int | None:
        """The first exit whose score reaches its threshold."""
        return next((index for index, (s, c) in enumerate(zip(scores, self.confidences, strict=True)) if s >= c), None)

    def differs(self, pair: Pair) -> bool:
        """Whether an exit answers at this level, and not as the cloud model does."""
        found = self.exit(pair.scores)
        return found is not None and pair.answers[found] != pair.cloud


class Bets:
    """The capital of bets that something happens at more than a given rate, one for each of ODDS."""

    def __init__(self, rate: float) -> None:
        rate = min(max(rate, LEAST), MOST)
        bets = [factor * rate / (1 - rate + factor * rate) for factor in ODDS]
        self._gains = [((1 - bet) / (1 - rate), bet / rate) for bet in bets]
        self.capitals = [AT_START] * len(ODDS)
        self.lately = [1.0] * len(ODDS)

    @classmethod
    def of(cls, rate: float, capitals: Sequence[float], lately: Sequence[float]) -> Bets:
        """With what each has gained. Raises TypeError, ValueError for other than one number each."""
        bets = cls(rate)
        bets.capitals, bets.lately = [float(each) for each in capitals], [float(each) for each in lately]
        if (len(bets.capitals), len(bets.lately)) != (len(ODDS), len(ODDS)):
            raise ValueError(f"{len(bets.capitals)} and {len(bets.lately)} bets, expected {len(ODDS)}")
        return bets

    @property
    def capital(self) -> float:
        """Of all bets. Where the rate holds, it is at most 1 on average after HORIZON inputs."""
        return sum(self.capitals) / len(self.capitals)

    @property
    def suspicion(self) -> float:
        """What the bets have gained since the time that suits them best."""
        return sum(self.lately) / len(self.lately)

    def observe(self, happened: bool, inputs: int = 1) -> None:
        """One more observation; `inputs` have come since the last one."""
        fresh = (1 - AT_START) * inputs / HORIZON
        for index, gains in enumerate(self._gains):
            gain = gains[happened]
            self.capitals[index] = min((self.capitals[index] + fresh) * gain, RICHEST)
            self.lately[index] = min(max(self.lately[index] * gain, 1.0), RICHEST)


class Audit:
    """The audit of one promise: among all inputs, exits differ from the cloud model in at most `epsilon`.

    levels: strictest last; the first is the owner's. The one in force is the first that no bet has won against;
    after the last one no exit answers. strict: no exit answers either while inputs look unlike those before.
    """

    def __init__(
        self, epsilon: float, levels: Sequence[Level], share: float, seed: int = 0, *, strict: bool = False
    ) -> None:
        self.epsilon, self.levels, self._share, self._strict = epsilon, tuple(levels), share, strict
        self._owners = self.levels
        self.bets = [Bets(epsilon) for _ in self.levels]
        self.doubted = False  # inputs look unlike those before, and not enough of them are audited yet
        self.pairs_in_alarm = self._differing = 0
        self._random = random.Random(seed)
        self._inputs = 0  # since the last pair

    @property
    def level(self) -> int:
        """Index of the level in force; the number of levels where no exit may answer."""
        return len(self.levels) if self.doubted and self._strict else self._holding

    @property
    def _holding(self) -> int:
        """Index of the first level that no bet has won against."""
        holding = (index for index, each in enumerate(self.bets) if each.capital < 1 / ALPHA)
        return next(holding, len(self.levels))

    @property
    def alarm(self) -> bool:
        """Whether the owner's level does not keep the promise, or nothing is known about such inputs."""
        return self.doubted or self._holding > 0

    @property
    def share(self) -> float:
        """The probability with which the next input is audited."""
        if self._share == 0:
            return 0.0
        if self.doubted or (self.alarm and self.pairs_in_alarm < self.pairs_due):
            return max(self._share, RAISED)
        level = self._holding
        raised = self._share * self.bets[level].suspicion if level < len(self.levels) else 0.0
        return max(self._share, min(raised, RAISED))

    @property
    def pairs_due(self) -> int:
        """Audited pairs after an alarm from which a recalibration is worth trying."""
        return 4 * pairs_needed(self.epsilon)

    @property
    def in_force(self) -> Level | None:
        """None where no exit may answer."""
        return self.levels[self.level] if self.level < len(self.levels) else None

    def draw(self) -> bool:
        """Whether to audit the next input."""
        self._inputs += 1
        return self._random.random() < self.share

    def doubt(self) -> None:
        """Inputs look unlike those before: an alarm, until `pairs_due` of them are audited and keep the promise."""
        if not self.alarm:
            self.pairs_in_alarm = self._differing = 0
        self.doubted = True

    def dump(self) -> dict[str, Any]:
        """What was found so far, for JSON."""
        return {
            "epsilon": self.epsilon,
            "owners": dumped(self._owners),
            "levels": dumped(self.levels),
            "bets": [[each.capitals, each.lately] for each in self.bets],
            "doubted": self.doubted,
            "in_alarm": [self.pairs_in_alarm, self._differing],
        }

    def load(self, found: Mapping[str, Any]) -> bool:
        """Go on from what `dump` wrote, with its levels. False, and nothing changes, where it has another promise.

        Raises KeyError, TypeError, ValueError, without a change, for what `dump` did not write.
        """
        if (found["epsilon"], found["owners"]) != (self.epsilon, dumped(self._owners)):
            return False
        levels = tuple(Level(tuple(map(float, confidences))) for confidences in found["levels"])
        bets = [Bets.of(self.epsilon, capitals, lately) for capitals, lately in found["bets"]]
        exits = len(self._owners[0].confidences)
        if len(levels) != len(bets) or any(len(level.confidences) != exits for level in levels):
            raise ValueError(f"{len(bets)} bets on {len(levels)} levels, not all of {exits} exits")
        pairs_in_alarm, differing = map(int, found["in_alarm"])
        self.levels, self.bets, self.doubted = levels, bets, bool(found["doubted"])
        self.pairs_in_alarm, self._differing = pairs_in_alarm, differing
        return True

    def renew(self, levels: Sequence[Level]) -> None:
        """Other levels from now on, of which nothing is known yet. The alarm ends."""
        self.levels, self.bets = tuple(levels), [Bets(self.epsilon) for _ in levels]
        self.doubted, self.pairs_in_alarm, self._differing = False, 0, 0

    def add(self, pair: Pair) -> bool:
        """One audited input, in whatever order they come back. Returns whether another level is in force now."""
        before, alarm = self.level, self.alarm
        inputs, self._inputs = self._inputs, 0
        for level, bets in zip(self.levels, self.bets, strict=True):
            bets.observe(level.differs(pair), inputs)
        self.pairs_in_alarm += alarm
        if self.doubted and (holding := self._holding) < len(self.levels):
            self._differing += self.levels[holding].differs(pair)
            holds = self._differing <= self.epsilon * self.pairs_in_alarm
            self.doubted = self.pairs_in_alarm < self.pairs_due or not holds
        return self.level != before


def dumped(levels: Sequence[Level]) -> list[Any]:
    """For JSON."""
    return [list(level.confidences) for level in levels]


def pairs_needed(epsilon: float, delta: float = DELTA) -> int:
    """The fewest pairs that certify `epsilon`, if no exit's answer among them differs."""
    return math.ceil(math.log(delta) / math.log1p(-min(max(epsilon, 1e-6), 0.999)))
