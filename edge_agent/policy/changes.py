"""Whether a measured quantity has changed, or one observation of it was an outlier.

A two-sided CUSUM test (Page, "Continuous inspection schemes", Biometrika 41, 1954) of the logarithms of observation
over prediction, in standard deviations that the test estimates itself:

    high = max(0, high + z - SLACK)    low = max(0, low - z - SLACK)    changed: either is above ALARM

Each observation is clipped, so that none alone is a change. What was observed since the sum was last zero is of the new
value (Hawkins and Olwell, "Cumulative sum charts and charting for quality improvement", 1998).
"""

from __future__ import annotations

from typing import Literal

SLACK = 0.5  # standard deviations: half of the smallest lasting change that is to be found soon
ALARM = 7.4  # standard deviations: a normal quantity raises it falsely once in some thousand observations
OUTLIER = 3.0  # standard deviations beyond which an observation says nothing until others confirm it
MOST_HIGH, MOST_LOW = 3.0, 4.5  # of one observation: three high ones in a row are a change, but two low ones are, since
# a stall may make anything slow, and nothing is quicker than the link or the machine allows
FIRST_SPREAD, LEAST_SPREAD = 0.25, 0.05  # standard deviation of a logarithm: before any observation, and at least
SPREAD_WEIGHT = 0.05  # of one observation in the spread
DEVIATION = 1.2533  # standard deviations in a mean absolute deviation of a normal quantity

Verdict = Literal["usual", "outlier", "changed"]


class ChangeTest:
    """The test of one quantity. `spread` is the relative standard deviation of an observation."""

    def __init__(self) -> None:
        self.spread = FIRST_SPREAD
        self.run = 0  # after "changed": the latest observations that are of the new value
        self._count = 0
        self._high = self._low = 0.0
        self._high_run = self._low_run = 0  # observations since the sum was last zero

    def observe(self, log_ratio: float, doubt: float = 1.0) -> Verdict:
        """Test the logarithm of observation over prediction. `doubt`: spreads that are usual for this prediction."""
        z = max(-MOST_LOW, min(log_ratio / (self.spread * doubt), MOST_HIGH))
        self._count += 1
        weight = max(1 / (self._count + 4), SPREAD_WEIGHT)
        self.spread += weight * (DEVIATION * min(abs(z), OUTLIER) * self.spread - self.spread)
        self.spread = max(self.spread, LEAST_SPREAD)
        self._high, self._low = max(0.0, self._high + z - SLACK), max(0.0, self._low - z - SLACK)
        self._high_run = self._high_run + 1 if self._high else 0
        self._low_run = self._low_run + 1 if self._low else 0
        if max(self._high, self._low) > ALARM:
            self.run = self._high_run if self._high > self._low else self._low_run
            self._high, self._low, self._high_run, self._low_run = 0.0, 0.0, 0, 0
            return "changed"
        return "outlier" if abs(z) >= OUTLIER else "usual"
