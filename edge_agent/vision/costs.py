"""What the ways on are expected to take: seconds, bytes and money, from the bundle's figures and what was measured."""

from __future__ import annotations

from isthmus.edge_agent.policy.estimates import Average, GraphSeconds, LinkEstimate, Load
from isthmus.edge_agent.policy.exits import OperatingPoint, RouteEstimate
from isthmus.edge_agent.policy.prices import Prices
from isthmus.edge_agent.vision.operating_points import OperatingPoints
from isthmus.edge_agent.vision.request import InferenceRequest
from isthmus.models.vision.manifest import Manifest
from isthmus.protos.limits import MAX_FRAMING_BYTES

CLOUD_MACS_PER_S = 20e9  # first guess of the cloud's speed, corrected by the first answer
DEVICE_MACS_PER_S = 10e9  # first guess of the device's
IMAGE_BYTES_PER_PIXEL = 0.1  # first guess for a stored photo
IMAGE_ENCODE_S = 0.005


class Costs:
    """Running averages, shared by all requests of an agent. A lost update under threads costs one observation."""

    def __init__(self, manifest: Manifest, prices: Prices) -> None:
        self._prices = prices
        height, width = manifest.preprocessing.crop
        head_macs = [segment.macs for segment in manifest.segments]
        self.whole_macs = sum(head_macs) + manifest.tail_macs
        self.tail_macs = [tap.tail_macs for tap in manifest.taps]
        load = Load()
        self.segment_s = [GraphSeconds(macs / DEVICE_MACS_PER_S, load) for macs in head_macs]
        self.encode_s = [
            [GraphSeconds(width.encoder_macs / DEVICE_MACS_PER_S, load) for width in tap.widths]
            for tap in manifest.taps
        ]
        self.image_encode_s = Average(IMAGE_ENCODE_S)
        self.image_bytes = Average(height * width * IMAGE_BYTES_PER_PIXEL)
        self.points = OperatingPoints(manifest)
        self.point_bytes = {point: Average(rate.mean_bytes) for point, rate in self.points.figures.items()}
        self.cloud_s_per_mac = Average(1 / CLOUD_MACS_PER_S)
        self.exit_share = [Average(0.3) for _ in head_macs]  # of the inputs that reach an exit

    def cloud_s(self, macs: int) -> float:
        return macs * self.cloud_s_per_mac.value

    def split(self, point: OperatingPoint, link: LinkEstimate) -> RouteEstimate:
        """Encode and send a bottleneck; what it encodes is at hand."""
        up_bytes = self.point_bytes[point].value + MAX_FRAMING_BYTES
        cloud_s = self.cloud_s(self.tail_macs[point.tap])
        device_s = self.encode_s[point.tap][point.width].value
        seconds = device_s + link.transfer_s(up_bytes) + cloud_s
        usd = self._prices.usd(up_bytes, cloud_s, device_s)
        return RouteEstimate("split", f"{self.points.name(point)} ({up_bytes:.0f} B)", seconds, usd, point)

    def offload(self, link: LinkEstimate) -> RouteEstimate:
        """Store and send the whole photo."""
        up_bytes = self.image_bytes.value + MAX_FRAMING_BYTES
        cloud_s, device_s = self.cloud_s(self.whole_macs), self.image_encode_s.value
        seconds = device_s + link.transfer_s(up_bytes) + cloud_s
        usd = self._prices.usd(up_bytes, cloud_s, device_s)
        return RouteEstimate("offload", f"whole image ({up_bytes:.0f} B)", seconds, usd)

    def options(self, passed: int, link: LinkEstimate | None, wanted: InferenceRequest) -> list[RouteEstimate]:
        """The ways on behind `passed` segments; without a link, running on is all there is.

        The image is at hand throughout, so what encodes it can still be sent behind any segment.
        """
        last = passed == len(self.segment_s)
        if link is None:
            return [] if last else [RouteEstimate("continue", "run on", self.segment_s[passed].value, 0.0)]
        ways = [] if wanted.pinned else [self.offload(link)]
        ways += [self.split(point, link) for point in wanted.points if self.points.after(point) in (0, passed)]
        deeper = any(self.points.after(point) > passed for point in wanted.points)
        return [*ways, self.run_on(passed, link, wanted)] if deeper or (not last and wanted.no_exit is None) else ways

    def run_on(self, passed: int, link: LinkEstimate, wanted: InferenceRequest) -> RouteEstimate:
        """The next segment, then, unless its exit answers, the best way behind it."""
        behind = self.options(passed + 1, link, wanted)
        share = 1.0 if wanted.no_exit else 1 - self.exit_share[passed].value
        device_s = self.segment_s[passed].value
        seconds = device_s + share * min(option.seconds for option in behind)
        usd = self._prices.usd(0, 0, device_s) + share * min(option.usd for option in behind)
        return RouteEstimate("continue", "run on", seconds, usd)
