"""The operating points and image formats of a bundle: their figures, their names, and which a request may use."""

from __future__ import annotations

from collections.abc import Sequence

from isthmus.edge_agent.policy.exits import OperatingPoint
from isthmus.models.errors import InvalidInput
from isthmus.models.vision.manifest import ImageForm, ImageWay, Manifest, Rate

PINNED_QUALITY = 75  # of a format for which none is given


class OperatingPoints:
    """Every combination of tap, width and rate, with its figures from the manifest."""

    def __init__(self, manifest: Manifest) -> None:
        self._taps = manifest.taps
        self.images = manifest.images
        self._after = [tap.after for tap in manifest.architecture.taps]
        self.figures: dict[OperatingPoint, Rate] = {
            OperatingPoint(t, w, r): rate
            for t, tap in enumerate(manifest.taps)
            for w, width in enumerate(tap.widths)
            for r, rate in enumerate(width.rates)
        }

    def after(self, point: OperatingPoint) -> int:
        """Number of segments that must run first; 0 if the point encodes the image itself."""
        return self._after[point.tap]

    def parts(self, point: OperatingPoint) -> tuple[str, float, int]:
        """Name of the tap, share of the encoder's channels, index of the rate."""
        return self._taps[point.tap].name, self._width(point), point.rate

    def name(self, point: OperatingPoint) -> str:
        """For example "light 0.5 rate 2"; the width is left out where there is only one."""
        width = f" {self._width(point):g}" if len(self._taps[point.tap].widths) > 1 else ""
        return f"{self._taps[point.tap].name}{width} rate {point.rate}"

    def good_enough(self, points: Sequence[OperatingPoint], min_agreement: float) -> tuple[OperatingPoint, ...]:
        """Those of `points` whose agreement with the cloud model is at least `min_agreement`, or else the best one."""
        good = tuple(point for point in points if self.figures[point].agreement >= min_agreement)
        return good or (max(points, key=lambda point: self.figures[point].agreement),)

    def least(self, points: Sequence[OperatingPoint], min_agreement: float) -> float:
        """The agreement below which nothing is sent: `min_agreement`, or the best point's where none reaches it."""
        return min(min_agreement, max(self.figures[point].agreement for point in points))

    def image(self, least: float, *, best: bool, form: ImageForm | None, quality: int | None) -> ImageWay:
        """How a whole photo is sent: as pinned by `form` or `quality`, or else by the figures.

        Of the ways that agree with the cloud model on at least the share `least`, that of the fewest bytes takes the
        least time, money and energy; `best` takes the one that agrees most. Where no way agrees that much, the one that
        agrees most. A pinned quality that was not measured has the figures of the nearest one.
        """
        if form or quality:
            form, quality = form or "jpeg", quality or PINNED_QUALITY
            same = [way for way in self.images if way.form == form]
            measured = min(same, key=lambda way: abs(way.quality - quality), default=self.images[0])
            pinned = 100 if form == "png" else quality
            return measured.model_copy(update={"form": form, "quality": pinned})
        good = [way for way in self.images if way.agreement >= least]
        if best or not good:
            return max(self.images, key=lambda way: (way.agreement, -way.mean_bytes))
        return min(good, key=lambda way: way.mean_bytes)

    def select(self, tap: str | None, width: float | None, rate: int | None) -> tuple[OperatingPoint, ...]:
        """The points of this tap, at this share of its encoder's channels, at this rate; None matches all.

        Raises InvalidInput that lists the values there are.
        """
        found = tuple(self.figures)
        if tap is not None:
            found = tuple(point for point in found if self._taps[point.tap].name == tap)
            if not found:
                raise InvalidInput(f"tap {tap!r:.66} does not exist, there are {', '.join(t.name for t in self._taps)}")
        where = f" at tap {tap}" if tap is not None else ""
        if width is not None:
            widths = sorted({self._width(point) for point in found})
            found = tuple(point for point in found if self._width(point) == width)
            if not found:
                raise InvalidInput(
                    f"width {width!r:.64} does not exist{where}, there are {', '.join(map('{:g}'.format, widths))}"
                )
        if rate is not None:
            most = max(point.rate for point in found)
            found = tuple(point for point in found if point.rate == rate)
            if not found:
                raise InvalidInput(f"rate {rate!r:.64} does not exist{where}, there are 0 to {most}")
        return found

    def _width(self, point: OperatingPoint) -> float:
        return self._taps[point.tap].widths[point.width].width
