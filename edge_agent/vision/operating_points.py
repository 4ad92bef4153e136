"""The operating points of a bundle: which there are, which are good enough, what a person calls them."""

from __future__ import annotations

from collections.abc import Sequence

from isthmus.edge_agent.policy.exits import OperatingPoint
from isthmus.models.errors import InvalidInput
from isthmus.models.vision.manifest import Manifest, Rate


class OperatingPoints:
    """Every tap x width x rate with its figures."""

    def __init__(self, manifest: Manifest) -> None:
        self._taps = manifest.taps
        self._after = [tap.after for tap in manifest.architecture.taps]
        self.figures: dict[OperatingPoint, Rate] = {
            OperatingPoint(t, w, r): rate
            for t, tap in enumerate(manifest.taps)
            for w, width in enumerate(tap.widths)
            for r, rate in enumerate(width.rates)
        }

    def after(self, point: OperatingPoint) -> int:
        """Segments that must have run before it; 0 encodes the image itself."""
        return self._after[point.tap]

    def parts(self, point: OperatingPoint) -> tuple[str, float, int]:
        """Name of the tap, share of the encoder's channels, rate."""
        return self._taps[point.tap].name, self._width(point), point.rate

    def name(self, point: OperatingPoint) -> str:
        """For example "light 0.5 rate 2"; the width is left out where there is only one."""
        width = f" {self._width(point):g}" if len(self._taps[point.tap].widths) > 1 else ""
        return f"{self._taps[point.tap].name}{width} rate {point.rate}"

    def good(self, points: Sequence[OperatingPoint], min_agreement: float) -> tuple[OperatingPoint, ...]:
        """Those of `points` that meet the owner's quality; the best one when none does."""
        good = tuple(point for point in points if self.figures[point].agreement >= min_agreement)
        return good or (max(points, key=lambda point: self.figures[point].agreement),)

    def pinned(self, tap: str | None, width: float | None, rate: int | None) -> tuple[OperatingPoint, ...]:
        """The points that a request leaves open: of this tap, at this share of its channels, at this rate.

        Raises InvalidInput naming what there is.
        """
        found = tuple(self.figures)
        if tap is not None:
            found = tuple(point for point in found if self._taps[point.tap].name == tap)
            if not found:
                raise InvalidInput(
                    f"tap {tap[:64]!r} does not exist, there are {', '.join(t.name for t in self._taps)}"
                )
        where = f" at tap {tap}" if tap is not None else ""
        if width is not None:
            there = sorted({self._width(point) for point in found})
            found = tuple(point for point in found if self._width(point) == width)
            if not found:
                raise InvalidInput(
                    f"width {width:g} does not exist{where}, there are {', '.join(map('{:g}'.format, there))}"
                )
        if rate is not None:
            most = max(point.rate for point in found)
            found = tuple(point for point in found if point.rate == rate)
            if not found:
                raise InvalidInput(f"rate {rate} does not exist{where}, there are 0 to {most}")
        return found

    def _width(self, point: OperatingPoint) -> float:
        return self._taps[point.tap].widths[point.width].width
