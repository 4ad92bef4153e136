"""Predicted latency, bytes and cost of each route, from the bundle's figures and from measurements."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from isthmus.edge_agent.config import MAX_DEADLINE_S
from isthmus.edge_agent.policy.averages import DeviceLoad, GraphLatency, GuardedAverage
from isthmus.edge_agent.policy.budgets import Spend
from isthmus.edge_agent.policy.estimates import LinkEstimate
from isthmus.edge_agent.policy.exits import FREE, Goal, Limits, OperatingPoint, RouteEstimate, best_way
from isthmus.edge_agent.policy.prices import CostProfile, Weights
from isthmus.edge_agent.vision.operating_points import OperatingPoints
from isthmus.edge_agent.vision.request import InferenceRequest
from isthmus.models.messages import Codec, Payload
from isthmus.models.vision.manifest import ImageForm, ImageWay, Manifest, Precision
from isthmus.models.vision.outputs import most_bytes, usual_bytes
from isthmus.protos.limits import MAX_ERROR_CHARACTERS, MAX_FRAMING_BYTES

CLOUD_MACS_PER_S = 20e9  # prior for the cloud's speed, replaced by the first reply
DEVICE_MACS_PER_S = 10e9  # prior for the device's speed
IMAGE_BYTES_PER_PIXEL = 0.1  # prior for a compressed photo
IMAGE_ENCODE_S: dict[ImageForm, float] = {"jpeg": 0.002, "webp": 0.015, "png": 0.027}  # priors for a whole photo
QUICKEST = Goal("fastest", 2.0, Weights(1.0, 0.0, 0.0, 0.0))  # by seconds alone
COMPUTE_SPREAD = 0.25  # relative standard deviation of computing on either side
REPLY_FRAMING_BYTES = 32  # of an answer: what is around it
EXIT_SHARE = 0.3  # prior, replaced by the bundle's figure
SHARE_WEIGHT = 0.02  # of one photo: a share is estimated from noughts and ones


class Known(NamedTuple):
    """What is known of an operating point, looked up once; its averages go on."""

    name: str
    bytes: GuardedAverage
    encode_s: GraphLatency
    macs: int  # of the cloud
    agreement: float
    right: float
    after: int  # segments that must run first


class Reply(NamedTuple):
    """Of the cloud: its bytes, the seconds that it computed, and those that the device waited for it."""

    bytes: int
    cloud_s: float
    waited_s: float


class Ahead(NamedTuple):
    """What a way that sends takes: seconds to encode, bytes up, seconds in the cloud, and modelled joules of the reply
    and the radio's tail.
    """

    encode_s: float
    up_bytes: float
    cloud_s: float
    radio_j: float


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

    def __init__(self, manifest: Manifest, profile: CostProfile, precision: Precision = "fp32") -> None:
        self._profile, self._prices = profile, profile.prices
        self._exits = manifest.heads[precision].exits
        usual, most = (sum(map(each, manifest.tasks)) for each in (usual_bytes, most_bytes))
        self.reply_bytes = float(usual + REPLY_FRAMING_BYTES)  # of an answer to every task
        self._most_reply_bytes = max(most, MAX_ERROR_CHARACTERS) + float(REPLY_FRAMING_BYTES)
        height, width = manifest.preprocessing.crop
        head_macs = [segment.macs for segment in manifest.segments]
        self.whole_macs = sum(head_macs) + manifest.tail_macs
        self.tail_macs = [tap.tail_macs for tap in manifest.taps]
        prices = profile.prices
        self._usd = (  # a byte up, a second of the cloud, a second of the device, a reply
            prices.usd(1, 0, 0),
            prices.usd(0, 1, 0),
            prices.usd(0, 0, 1),
            prices.usd(0, 0, 0, self.reply_bytes),
        )
        load = DeviceLoad()
        self.segment_s = [GraphLatency(macs / DEVICE_MACS_PER_S, load) for macs in head_macs]
        self.encode_s = [
            [GraphLatency(width.encoder_macs / DEVICE_MACS_PER_S, load) for width in tap.widths]
            for tap in manifest.taps
        ]
        self.image_encode_s = {form: GuardedAverage(seconds) for form, seconds in IMAGE_ENCODE_S.items()}
        self.image_bytes = GuardedAverage(height * width * IMAGE_BYTES_PER_PIXEL)
        self._image: ImageWay | None = None
        self._images: dict[ImageWay, GuardedAverage] = {}  # bytes of each that may be sent
        self.points = OperatingPoints(manifest)
        self.point_bytes = {point: GuardedAverage(rate.mean_bytes) for point, rate in self.points.figures.items()}
        self._known = {
            point: Known(
                self.points.name(point),
                self.point_bytes[point],
                self.encode_s[point.tap][point.width],
                self.tail_macs[point.tap],
                rate.agreement,
                rate.accuracy,
                self.points.after(point),
            )
            for point, rate in self.points.figures.items()
        }
        self._split_s_per_mac, self._image_s_per_mac = (GuardedAverage(1 / CLOUD_MACS_PER_S) for _ in range(2))
        self.cloud_s_per_mac = {Codec.BOTTLENECK: self._split_s_per_mac, Codec.IMAGE: self._image_s_per_mac}
        self.exit_share = [ExitShare(EXIT_SHARE) for _ in head_macs]

    def expect_exits(self, shares: Sequence[float]) -> None:
        """Before the first photo: the share of the photos reaching each exit that the bundle says it answers."""
        self.exit_share = [ExitShare(share) for share in shares]

    def cloud_s(self, codec: Codec, tap: int = 0) -> float:
        """Predicted seconds that the cloud computes for a whole image or a bottleneck; without its queue."""
        return self._macs(codec, tap) * self.cloud_s_per_mac[codec].value

    def record_cloud(self, payload: Payload, seconds: float) -> None:
        """Record how long the cloud computed for a payload.

        Images and bottlenecks are decoded in other ways, and are averaged apart; a cloud that has had only one of the
        two is taken to be as quick at the other.
        """
        self.cloud_s_per_mac[payload.codec].observe(seconds / max(self._macs(payload.codec, payload.tap), 1))
        for average in self.cloud_s_per_mac.values():
            if not average.measured:
                average.value = self.cloud_s_per_mac[payload.codec].value

    def _macs(self, codec: Codec, tap: int) -> int:
        return self.whole_macs if codec is Codec.IMAGE else self.tail_macs[tap]

    def margin(self, left_s: float) -> Spend:
        """What is reserved for a message beyond what a route is predicted to take.

        The cloud and the wait may take all the time that is left, and the reply may be an error.
        """
        wait_s = min(max(left_s, 0.0), MAX_DEADLINE_S)
        return Spend(
            self._most_reply_bytes - self.reply_bytes,
            self._prices.usd(0, wait_s, 0),
            wait_s * self._profile.energy.idle_w,
            0.0,
        )

    def reserve(self, up_bytes: float, left_s: float, since_s: float) -> Spend:
        """An upper bound of what a message of so many bytes takes of the budgets, with its reply within `left_s`."""
        margin, energy = self.margin(left_s), self._profile.energy
        reply_bytes = self._most_reply_bytes
        usd = self._prices.usd(up_bytes, 0, 0, reply_bytes) + margin.usd
        joules = energy.radio_j(up_bytes, reply_bytes, since_s) + margin.joules
        return Spend(up_bytes + reply_bytes, usd, joules, 1.0)

    def spent(self, up_bytes: float, reply: Reply, since_s: float) -> Spend:
        """What a message that was answered took of the budgets."""
        energy = self._profile.energy
        usd = self._prices.usd(up_bytes, reply.cloud_s, 0, reply.bytes)
        joules = energy.radio_j(up_bytes, reply.bytes, since_s) + reply.waited_s * energy.idle_w
        return Spend(up_bytes + reply.bytes, usd, joules, 1.0)

    def own(self, device_s: float) -> Spend:
        """What the device's own computation takes; no budget limits it."""
        return Spend(0.0, self._prices.usd(0, 0, device_s), device_s * self._profile.energy.compute_w, 0.0)

    def split(self, point: OperatingPoint, link: LinkEstimate, radio_j: float = 0.0) -> RouteEstimate:
        """Encode a bottleneck and send it. The segments before it have run already."""
        known = self._known[point]
        up_bytes = known.bytes.value + MAX_FRAMING_BYTES
        ahead = Ahead(known.encode_s.value, up_bytes, known.macs * self._split_s_per_mac.value, radio_j)
        return self._sent("split", known.name, ahead, link, point, known.agreement, known.right)

    def offload(self, link: LinkEstimate, radio_j: float = 0.0, image: ImageWay | None = None) -> RouteEstimate:
        """Compress and send the whole photo."""
        image = image or self._image
        up_bytes = self.bytes_of(image).value + MAX_FRAMING_BYTES
        encode_s = self.image_encode_s[image.form if image else "jpeg"].value
        ahead = Ahead(encode_s, up_bytes, self.whole_macs * self._image_s_per_mac.value, radio_j)
        agreement, right = (image.agreement, image.accuracy) if image else (1.0, None)
        return self._sent("offload", "whole image", ahead, link, None, agreement, right)

    def send_whole_as(self, image: ImageWay, others: Sequence[ImageWay] = ()) -> None:
        """Whole photos are sent so, or as one of the others; sizes are the bundle's until some are measured."""
        self._image, self._images = image, {each: GuardedAverage(each.mean_bytes) for each in (image, *others)}
        self.image_bytes = self._images[image]

    def bytes_of(self, image: ImageWay | None) -> GuardedAverage:
        """The size of whole photos sent so."""
        return self.image_bytes if image is None else self._images.get(image, self.image_bytes)

    def best_image(self, link: LinkEstimate, goal: Goal) -> ImageWay | None:
        """How a whole photo costs least by the goal: time and bytes against agreement. The cloud's part is alike."""
        weights, best, least = goal.scale, self._image, math.inf
        energy = self._profile.energy
        for image, size in self._images.items():
            encode_s = self.image_encode_s[image.form].value
            seconds = encode_s + link.transfer_s(size.value)
            usd = size.value * self._usd[0] + encode_s * self._usd[2]
            joules = size.value * energy.up_j_per_byte + encode_s * energy.compute_w
            if (cost := weights.cost(seconds, usd, joules, image.agreement)) < least:
                best, least = image, cost
        return best

    def _sent(
        self,
        route: Literal["split", "offload"],
        way: str,
        ahead: Ahead,
        link: LinkEstimate,
        point: OperatingPoint | None,
        agreement: float,
        right: float | None,
    ) -> RouteEstimate:
        """A way that sends one message."""
        device_s, up_bytes, cloud_s, radio_j = ahead
        transfer_s = link.transfer_s(up_bytes)
        wait_s = transfer_s + link.queue_s + cloud_s
        per_byte, per_cloud_s, per_device_s, reply = self._usd
        usd = up_bytes * per_byte + cloud_s * per_cloud_s + device_s * per_device_s + reply
        energy = self._profile.energy
        joules = device_s * energy.compute_w + wait_s * energy.idle_w + up_bytes * energy.up_j_per_byte + radio_j
        size = up_bytes + self.reply_bytes
        spread_s = math.hypot(link.spread * transfer_s, COMPUTE_SPREAD * (device_s + cloud_s))
        return RouteEstimate(
            route, way, device_s + wait_s, usd, point, size, joules, 1.0, agreement, right, spread_s, up_bytes
        )  # fmt: skip

    def routes(
        self,
        passed: int,
        link: LinkEstimate | None,
        request: InferenceRequest,
        goal: Goal = QUICKEST,
        limits: Limits = FREE,
        image: ImageWay | None = None,
    ) -> list[RouteEstimate]:
        """The routes open to `request` after `passed` segments. Without a link that is only the next segment.

        `image`: how the photo is sent whole, where `best_image` has said so already. A tap that encodes the image
        itself stays available after any segment.
        """
        if link is None:
            return [] if passed == len(self.segment_s) else [self._segment(passed)]
        radio_j = self._profile.energy.radio_j(0, self.reply_bytes, limits.since_s)
        sent: dict[int, list[RouteEstimate]] = {0: []}
        if request.whole and not request.forced_split:
            sent[0].append(self.offload(link, radio_j, image or self.best_image(link, goal)))
        for point in request.points:
            after = self._known[point].after
            if not after or after >= passed:
                sent.setdefault(after, []).append(self.split(point, link, radio_j))
        return self._routes(passed, sent, request, goal, limits)

    def _routes(
        self,
        passed: int,
        sent: Mapping[int, list[RouteEstimate]],
        request: InferenceRequest,
        goal: Goal,
        limits: Limits,
    ) -> list[RouteEstimate]:
        """`sent`: the ways that send, by the number of segments that must run first; 0 for any."""
        routes = [*sent[0], *sent[passed]] if passed and passed in sent else list(sent[0])
        if max(sent) > passed or (passed < len(self.segment_s) and request.no_exit is None):
            rest = limits._replace(left_s=limits.left_s - self.segment_s[passed].value)
            later = best_way(self._routes(passed + 1, sent, request, goal, rest), goal, rest)
            routes.append(self._continued(passed, request, later))
        return routes

    def continue_route(self, passed: int, link: LinkEstimate, request: InferenceRequest) -> RouteEstimate:
        """Run the next segment, then take the best route after it unless its exit answers."""
        return self._continued(passed, request, best_way(self.routes(passed + 1, link, request), QUICKEST, FREE))

    def _segment(self, passed: int) -> RouteEstimate:
        """The next segment of the head alone."""
        device_s, energy = self.segment_s[passed].value, self._profile.energy
        usd = self._prices.usd(0, 0, device_s)
        exit_ = self._exits[passed]
        return RouteEstimate(
            "continue", "continue", device_s, usd, joules=device_s * energy.compute_w, agreement=exit_.agreement,
            right=exit_.accuracy,
        )  # fmt: skip

    def _continued(self, passed: int, request: InferenceRequest, later: RouteEstimate | None) -> RouteEstimate:
        """The next segment, and `later` for the share of inputs that its exit does not answer."""
        segment = self._segment(passed)
        if later is None:
            return segment
        answered = 0.0 if request.no_exit else self.exit_share[passed].value
        share = 1 - answered
        return RouteEstimate(
            "continue",
            "continue",
            segment.seconds + share * later.seconds,
            segment.usd + share * later.usd,
            None,
            share * later.bytes,
            segment.joules + share * later.joules,
            share * later.calls,
            later.agreement,  # an exit that answers keeps the promise as well
            later.right,
            share * later.spread_s,
        )
