"""Whether the exits keep their promise now: a betting test on audited answers. Pure; knows no network and no file.

    each input -> drawn with the probability `share` -> its exits' answers beside the cloud model's -> Bets

What is drawn depends on earlier inputs only, so that audited inputs are a fair sample of those that come. A bettor
stakes on "they differ more often than promised" (Waudby-Smith & Ramdas, "Estimating means of bounded random variables
by betting", JRSS B 2023): where the promise holds, the capital grows a hundredfold with a probability of 1 %. Part of
the capital is brought in evenly over time (Shiryaev's and Roberts's way), so that a shift that comes late is seen too.

An audit costs an upload, so few are made until something looks odd: bets that a shift began lately (Page's test), on
disagreement and, for nothing, on the share of inputs that exit, raise the share of audits. They never raise the alarm.
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
ODD = 20.0  # times its stake: what a bet on the share of exits gains before more is audited
TOLERANCE = 0.02  # of the share of exits that a calibration part predicts
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
    """A threshold of each exit, and the share of all inputs that the first exit that may answer is known to answer."""

    confidences: tuple[float, ...]
    first_share: float

    @property
    def first(self) -> int | None:
        """The first exit that may answer."""
        return next((index for index, confidence in enumerate(self.confidences) if confidence <= 1), None)

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


class ExitShare:
    """Bets that the share of inputs that exit is not the predicted one, in either direction."""

    def __init__(self, coverage: float) -> None:
        self._more, self._fewer = Bets(coverage + TOLERANCE), Bets(1 - coverage + TOLERANCE)

    @property
    def odd(self) -> bool:
        """Whether it looks different from what is predicted."""
        return max(self._more.suspicion, self._fewer.suspicion) >= ODD

    def observe(self, exited: bool) -> None:
        """One input, audited or not."""
        self._more.observe(exited)
        self._fewer.observe(not exited)


class Audit:
    """The audit of one promise: among all inputs, exits differ from the cloud model in at most `epsilon`.

    levels: strictest last; the first is the owner's. The one in force is the first that no bet has won against;
    after the last one no exit answers.
    """

    def __init__(self, epsilon: float, levels: Sequence[Level], share: float, seed: int = 0) -> None:
        self.epsilon, self.levels, self._share = epsilon, tuple(levels), share
        self._owners = self.levels
        self.bets = [Bets(epsilon) for _ in self.levels]
        self.pairs_in_alarm = 0
        self._random = random.Random(seed)
        self._inputs = 0  # since the last pair
        self._watched: Level | None = None
        self._exit_share, self._learnt = ExitShare(0.5), (0, 0)
        self._watch()

    @property
    def level(self) -> int:
        """Index of the level in force; the number of levels where no exit may answer."""
        holding = (index for index, each in enumerate(self.bets) if each.capital < 1 / ALPHA)
        return next(holding, len(self.levels))

    @property
    def alarm(self) -> bool:
        """Whether the owner's level does not keep the promise."""
        return self.level > 0

    @property
    def share(self) -> float:
        """The probability with which the next input is audited."""
        if self._share == 0:
            return 0.0
        level = self.level
        if level and self.pairs_in_alarm < self.pairs_due:
            return max(self._share, RAISED)  # pairs for a recalibration
        if level == len(self.levels):
            return self._share
        raised = RAISED if self._exit_share.odd else self._share * self.bets[level].suspicion
        return max(self._share, min(raised, RAISED))

    @property
    def pairs_due(self) -> int:
        """Audited pairs after an alarm from which a recalibration is worth trying."""
        return 4 * pairs_needed(self.epsilon)

    @property
    def in_force(self) -> Level | None:
        """None where no exit may answer."""
        return self.levels[self.level] if self.level < len(self.levels) else None

    def draw(self, reached: bool | None) -> bool:
        """Whether to audit the next input.

        reached: whether the first exit that may answer did, None where it did not run.
        """
        self._inputs += 1
        if reached is not None:
            self._exit_share.observe(reached)
        return self._random.random() < self.share

    def dump(self) -> dict[str, Any]:
        """What was found so far, for JSON."""
        return {
            "epsilon": self.epsilon,
            "owners": dumped(self._owners),
            "levels": dumped(self.levels),
            "bets": [[each.capitals, each.lately] for each in self.bets],
            "pairs_in_alarm": self.pairs_in_alarm,
        }

    def load(self, found: Mapping[str, Any]) -> bool:
        """Go on from what `dump` wrote, with its levels. False, and nothing changes, where it has another promise.

        Raises KeyError, TypeError, ValueError, without a change, for what `dump` did not write.
        """
        if (found["epsilon"], found["owners"]) != (self.epsilon, dumped(self._owners)):
            return False
        levels = tuple(Level(tuple(map(float, confidences)), float(share)) for confidences, share in found["levels"])
        bets = [Bets.of(self.epsilon, capitals, lately) for capitals, lately in found["bets"]]
        exits = len(self._owners[0].confidences)
        if len(levels) != len(bets) or any(len(level.confidences) != exits for level in levels):
            raise ValueError(f"{len(bets)} bets on {len(levels)} levels, not all of {exits} exits")
        pairs_in_alarm = int(found["pairs_in_alarm"])
        if levels != self.levels:
            self.levels = levels
        self.bets, self.pairs_in_alarm = bets, pairs_in_alarm
        self._watch()
        return True

    def renew(self, levels: Sequence[Level]) -> None:
        """Other levels from now on, of which nothing is known yet. The alarm ends."""
        self.levels, self.bets = tuple(levels), [Bets(self.epsilon) for _ in levels]
        self.pairs_in_alarm = 0
        self._watch()

    def add(self, pair: Pair) -> bool:
        """One audited input, in whatever order they come back. Returns whether another level is in force now."""
        before = self.level
        inputs, self._inputs = self._inputs, 0
        for level, bets in zip(self.levels, self.bets, strict=True):
            bets.observe(level.differs(pair), inputs)
        self.pairs_in_alarm += before > 0
        self._watch(pair)
        return self.level != before

    def _watch(self, pair: Pair | None = None) -> None:
        """Watch how often the first exit of the level in force answers.

        What has been looked into without finding more disagreement than promised is how things are now.
        """
        level = self.in_force
        if level is not self._watched:
            self._watched, self._learnt = level, (0, 0)
            self._exit_share = ExitShare(level.first_share if level else 0.0)
        first = level.first if level else None
        if pair is None or level is None or first is None or not self._exit_share.odd:
            self._learnt = (0, 0)
            return
        reached, count = self._learnt
        self._learnt = (reached + (pair.scores[first] >= level.confidences[first]), count + 1)
        if self._learnt[1] >= self.pairs_due and self.bets[self.level].suspicion < ODD:
            self._exit_share, self._learnt = ExitShare(self._learnt[0] / self._learnt[1]), (0, 0)


def dumped(levels: Sequence[Level]) -> list[Any]:
    """For JSON."""
    return [[list(level.confidences), level.first_share] for level in levels]


def pairs_needed(epsilon: float, delta: float = DELTA) -> int:
    """The fewest pairs that certify `epsilon`, if no exit's answer among them differs."""
    return math.ceil(math.log(delta) / math.log1p(-min(max(epsilon, 1e-6), 0.999)))
