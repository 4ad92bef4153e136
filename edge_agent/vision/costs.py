"""Predicted latency, bytes and cost of each route, from the bundle's figures and from measurements."""

from __future__ import annotations

from collections.abc import Sequence

from isthmus.edge_agent.policy.estimates import DeviceLoad, GraphLatency, GuardedAverage, LinkEstimate
from isthmus.edge_agent.policy.exits import OperatingPoint, RouteEstimate
from isthmus.edge_agent.policy.prices import Prices
from isthmus.edge_agent.vision.operating_points import OperatingPoints
from isthmus.edge_agent.vision.request import InferenceRequest
from isthmus.models.messages import Codec, Payload
from isthmus.models.vision.manifest import Manifest
from isthmus.protos.limits import MAX_FRAMING_BYTES

CLOUD_MACS_PER_S = 20e9  # prior for the cloud's speed, replaced by the first reply
DEVICE_MACS_PER_S = 10e9  # prior for the device's speed
IMAGE_BYTES_PER_PIXEL = 0.1  # prior for a compressed photo
IMAGE_ENCODE_S = 0.005
EXIT_SHARE = 0.3  # prior, replaced by the bundle's figure
SHARE_WEIGHT = 0.02  # of one photo: a share is estimated from noughts and ones


class ExitShare:
    """Share of the inputs reaching an exit that it answers: what was expected, moved little by each input.

    Were it replaced by the first inputs, a few hard ones would let whole images pass for the fastest way; exits would
    then be asked no more, and the mistake would stay.
    """

    def __init__(self, expected: float) -> None:
        self.value = expected

    def observe(self, answered: bool) -> None:
        self.value += SHARE_WEIGHT * (answered - self.value)


class Costs:
    """Running averages, shared by all requests of an agent. A race between threads may lose one observation."""

    def __init__(self, manifest: Manifest, prices: Prices) -> None:
        self._prices = prices
        height, width = manifest.preprocessing.crop
        head_macs = [segment.macs for segment in manifest.segments]
        self.whole_macs = sum(head_macs) + manifest.tail_macs
        self.tail_macs = [tap.tail_macs for tap in manifest.taps]
        load = DeviceLoad()
        self.segment_s = [GraphLatency(macs / DEVICE_MACS_PER_S, load) for macs in head_macs]
        self.encode_s = [
            [GraphLatency(width.encoder_macs / DEVICE_MACS_PER_S, load) for width in tap.widths]
            for tap in manifest.taps
        ]
        self.image_encode_s = GuardedAverage(IMAGE_ENCODE_S)
        self.image_bytes = GuardedAverage(height * width * IMAGE_BYTES_PER_PIXEL)
        self.points = OperatingPoints(manifest)
        self.point_bytes = {point: GuardedAverage(rate.mean_bytes) for point, rate in self.points.figures.items()}
        self.cloud_s_per_mac = GuardedAverage(1 / CLOUD_MACS_PER_S)
        self.exit_share = [ExitShare(EXIT_SHARE) for _ in head_macs]

    def expect_exits(self, shares: Sequence[float]) -> None:
        """Before the first photo: the share of the photos reaching each exit that the bundle says it answers."""
        self.exit_share = [ExitShare(share) for share in shares]

    def cloud_s(self, macs: int) -> float:
        """Predicted seconds in the cloud, queue included, for `macs` multiply-accumulates."""
        return macs * self.cloud_s_per_mac.value

    def record_cloud(self, payload: Payload, seconds: float) -> None:
        """Record what the cloud spent on a payload, queue included."""
        self.cloud_s_per_mac.observe(seconds / max(self._macs(payload), 1))

    def payload_s(self, payload: Payload) -> float:
        """Predicted seconds of the cloud for a payload, queue included."""
        return self.cloud_s(self._macs(payload))

    def _macs(self, payload: Payload) -> int:
        return self.whole_macs if payload.codec is Codec.IMAGE else self.tail_macs[payload.tap]

    def split(self, point: OperatingPoint, link: LinkEstimate) -> RouteEstimate:
        """Encode a bottleneck and send it. The segments before it have run already."""
        up_bytes = self.point_bytes[point].value + MAX_FRAMING_BYTES
        cloud_s = self.cloud_s(self.tail_macs[point.tap])
        device_s = self.encode_s[point.tap][point.width].value
        seconds = device_s + link.transfer_s(up_bytes) + cloud_s
        usd = self._prices.usd(up_bytes, cloud_s, device_s)
        return RouteEstimate("split", f"{self.points.name(point)} ({up_bytes:.0f} B)", seconds, usd, point)

    def offload(self, link: LinkEstimate) -> RouteEstimate:
        """Compress and send the whole photo."""
        up_bytes = self.image_bytes.value + MAX_FRAMING_BYTES
        cloud_s, device_s = self.cloud_s(self.whole_macs), self.image_encode_s.value
        seconds = device_s + link.transfer_s(up_bytes) + cloud_s
        usd = self._prices.usd(up_bytes, cloud_s, device_s)
        return RouteEstimate("offload", f"whole image ({up_bytes:.0f} B)", seconds, usd)

    def routes(self, passed: int, link: LinkEstimate | None, request: InferenceRequest) -> list[RouteEstimate]:
        """The routes open to `request` after `passed` segments. Without a link that is only the next segment.

        A tap that encodes the image itself stays available after any segment.
        """
        last = passed == len(self.segment_s)
        if link is None:
            return [] if last else [RouteEstimate("continue", "continue", self.segment_s[passed].value, 0.0)]
        routes = [] if request.forced_split else [self.offload(link)]
        routes += [self.split(point, link) for point in request.points if self.points.after(point) in (0, passed)]
        deeper = any(self.points.after(point) > passed for point in request.points)
        if deeper or (not last and request.no_exit is None):
            routes.append(self.continue_route(passed, link, request))
        return routes

    def continue_route(self, passed: int, link: LinkEstimate, request: InferenceRequest) -> RouteEstimate:
        """Run the next segment, then take the best route after it unless its exit answers."""
        later = self.routes(passed + 1, link, request)
        share = 1.0 if request.no_exit else 1 - self.exit_share[passed].value
        device_s = self.segment_s[passed].value
        seconds = device_s + share * min(route.seconds for route in later)
        usd = self._prices.usd(0, 0, device_s) + share * min(route.usd for route in later)
        return RouteEstimate("continue", "continue", seconds, usd)
