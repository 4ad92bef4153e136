"""What the router would do with a photo of a device on a link, before there is either: the planner's arithmetic.

    measure   the bundle's graphs on this machine -> Speeds, which can be kept and used on another machine
    expect    Speeds, a link, a cloud -> the ways that the agent's own router takes, and what they cost on average

The walk is that of an agent's photo: the same router, cost model and policy; where an exit would be asked for its
confidence, the share of photos that it answers on the calibration part takes its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
from pydantic import Field

from isthmus.edge_agent.config import EdgeConfig
from isthmus.edge_agent.cost_profiles import open_profile
from isthmus.edge_agent.ledger import Ledger
from isthmus.edge_agent.policy.estimates import LinkEstimate
from isthmus.edge_agent.policy.exits import RoutePlan
from isthmus.edge_agent.radio import Radio
from isthmus.edge_agent.vision.costs import Costs
from isthmus.edge_agent.vision.exit_rule import VOID, certified, exit_rule, exit_shares
from isthmus.edge_agent.vision.request import Overrides, RequestState, image_of, images_of, resolve_request
from isthmus.edge_agent.vision.router import Router, goal_of
from isthmus.edge_agent.vision.warm_up import warm_up
from isthmus.models.bundle.manifest import Part
from isthmus.models.messages import Codec, Payload
from isthmus.models.vision.bundle import Bundle
from isthmus.models.vision.certificates import runtime, void_because
from isthmus.models.vision.head import Head
from isthmus.models.vision.manifest import ImageForm, Manifest, Precision

NO_LINK = "no link"
DEVICE = "device alone"
WHOLE = "whole image"
UNSURE_K = np.zeros(1, np.float32)  # in place of an exit's probabilities: only how many exits have run counts
Seconds = Annotated[float, Field(gt=0, le=3600)]


class Speeds(Part):
    """Seconds of one run of each graph of a bundle at one precision, on an otherwise idle device."""

    segments_s: tuple[Seconds, ...]
    encode_s: tuple[tuple[Seconds, ...], ...]  # of each tap at each width, codec included
    image_encode_s: dict[ImageForm, Seconds]
    runtime: Annotated[str, Field(min_length=1, max_length=64)]  # that ran them, which certificates depend on

    def fits(self, manifest: Manifest) -> bool:
        """Whether it has a figure for every graph of the bundle."""
        widths = tuple(len(tap.widths) for tap in manifest.taps)
        return (
            len(self.segments_s) == len(manifest.segments)
            and tuple(map(len, self.encode_s)) == widths
            and all(each.form in self.image_encode_s for each in manifest.images)
        )


@dataclass(frozen=True, slots=True)
class Expectation:
    """Of a photo, on average. `ways`: the share of photos that each way answers. `agreement`: with the cloud's model.

    `way` sums up the plan, for a map: where the photos go that no exit answers, and whether exits are asked before.
    """

    way: str
    ways: Mapping[str, float]
    seconds: float
    up_bytes: float
    usd: float
    agreement: float
    why: str


def measure(bundle: Bundle, precision: Precision, threads: int) -> Speeds:
    """The speeds of this machine, by the agent's own warm-up. Seconds."""
    manifest = bundle.manifest
    config = EdgeConfig(bundle.folder)
    costs = Costs(manifest, open_profile(config.profile, config.prices), precision)
    head = Head(bundle, threads, precision)
    codecs = [bundle.codec(tap) for tap in range(len(manifest.taps))]
    blank_CHW = np.zeros((3, *manifest.preprocessing.crop), np.float32)
    warm_up(head, codecs, costs, blank_CHW)
    return Speeds(
        segments_s=tuple(each.value for each in costs.segment_s),
        encode_s=tuple(tuple(each.value for each in widths) for widths in costs.encode_s),
        image_encode_s={form: each.value for form, each in costs.image_encode_s.items()},
        runtime=runtime(),
    )


def expect(
    manifest: Manifest, speeds: Speeds, config: EdgeConfig, link: LinkEstimate | None, cloud_s: float | None
) -> Expectation:
    """What to expect of a photo. `cloud_s`: of the cloud for a whole photo; None for the agent's own assumption.

    Raises InvalidInput for a cost profile that cannot be read.
    """
    costs = costs_of(manifest, speeds, config, cloud_s)
    request = resolve_request(costs.points, manifest, config, None, Overrides())
    void = void_because(manifest, config.precision, speeds.runtime)
    if void and request.no_exit is None and config.mode != "edge":
        request = replace(request, no_exit=VOID.format(void))
    return Walk(manifest, costs, config).run(RequestState(request, config.deadline_s), link)


class Walk:
    """The mean of what photos meet on their way through the exits and beyond."""

    def __init__(self, manifest: Manifest, costs: Costs, config: EdgeConfig) -> None:
        self._costs, self._config, self._head = costs, config, manifest.heads[config.precision]
        self._rule = exit_rule(self._head, config.epsilon, config.promise, config.among)
        best = certified(self._head, config.epsilon, config.promise, config.among)
        self._shares, self._exit_agreement = exit_shares(self._head, best), best.agreement if best else 0.0
        costs.expect_exits(self._shares)
        self._router = Router(costs, [each.name for each in self._head.exits], Ledger(), Radio())
        self._reach, self._passed_s = 1.0, 0.0  # share of photos that are not answered yet; seconds until here
        self._seconds = self._bytes = self._usd = self._agreement = 0.0
        self._ways: dict[str, float] = {}

    def run(self, state: RequestState, link: LinkEstimate | None) -> Expectation:
        step = self._next(state, link)
        first = step.why
        while step.route == "continue":
            self._run_segment(state)
            step = self._next(state, link)
        way = self._end(step, state, link)
        if way != DEVICE and len(self._ways) > 1:
            way = f"exits, then {way}"
        return Expectation(way, self._ways, self._seconds, self._bytes, self._usd, self._agreement, first)

    def _next(self, state: RequestState, link: LinkEstimate | None) -> RoutePlan:
        goal = goal_of(self._config, self._rule.confidence(len(state.exits)))
        return self._router.next(state, self._config.mode, goal, link, None if link else NO_LINK)

    def _run_segment(self, state: RequestState) -> None:
        """The next segment; its exit answers its share, and is not sure of the photos that are left."""
        passed = len(state.exits)
        segment_s = self._costs.segment_s[passed].value
        self._passed_s += segment_s
        state.started_s, state.deadline_s = state.started_s - segment_s, state.deadline_s - segment_s
        state.exits.append(UNSURE_K)
        state.score = 0.0
        if state.request.no_exit is None and self._config.mode != "edge":
            self._take(self._head.exits[passed].name, self._shares[passed], self._passed_s, self._exit_agreement)

    def _take(self, way: str, share: float, seconds: float, agreement: float) -> None:
        """This share of the photos that are left are answered here."""
        taken = self._reach * share
        self._ways[way] = self._ways.get(way, 0.0) + taken
        self._seconds += taken * seconds
        self._agreement += taken * agreement
        self._reach -= taken

    def _end(self, step: RoutePlan, state: RequestState, link: LinkEstimate | None) -> str:
        """The photos that are left go the way of the last step. Returns its name."""
        left, costs = self._reach, self._costs
        if link is None or step.route not in ("split", "offload"):
            last = self._head.exits[max(len(state.exits) - 1, 0)]
            self._take(last.name, 1.0, self._passed_s, last.agreement)
            return DEVICE
        if step.point is None:
            image = None if self._config.mode == "offload" else state.image
            route, size, name = costs.offload(link, image=image), costs.bytes_of(image), WHOLE
        else:
            route, size = costs.split(step.point, link), costs.point_bytes[step.point]
            name = costs.points.name(step.point)
        self._take(name, 1.0, self._passed_s + route.seconds, route.agreement)
        self._bytes += left * size.value
        self._usd += left * route.usd
        return name


def costs_of(manifest: Manifest, speeds: Speeds, config: EdgeConfig, cloud_s: float | None) -> Costs:
    """The agent's cost model, as if the device had measured these speeds and the cloud had answered."""
    costs = Costs(manifest, open_profile(config.profile, config.prices), config.precision)
    costs.send_whole_as(image_of(costs.points, config), images_of(costs.points, config))
    for segment_s, found in zip(costs.segment_s, speeds.segments_s, strict=True):
        segment_s.calibrate(found)
    for widths, founds in zip(costs.encode_s, speeds.encode_s, strict=True):
        for encode_s, found in zip(widths, founds, strict=True):
            encode_s.calibrate(found)
    for form, seconds in speeds.image_encode_s.items():
        costs.image_encode_s[form].observe(seconds)
    if cloud_s is not None:
        costs.record_cloud(Payload(Codec.IMAGE, 0, 0, b""), cloud_s)
    return costs
