"""What the router is compared with, each on the same bundle, photos and world.

    single arms   one way for every photo
    baselines     rules of other systems; where a rule needs an estimate it gets the true value, in its favour
    oracle        for each photo the fastest way among those that answer as the cloud's model does

SPINN (Laskaridis et al., MobiCom 2020): threshold and cut are chosen together for the link and the load of the moment,
the fastest of those whose accuracy, measured beforehand, is within a tolerance. Sedna (KubeEdge, `CrossEntropy`): a
photo is hard, and sent whole, if one less the normalised entropy of the device's answer is below 0.5. Groundlight: a
fixed confidence of 0.9. Neurosurgeon (Kang et al., ASPLOS 2017): no exits; the fastest cut for the link at the start.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from isthmus.edge_agent.policy.exits import OperatingPoint
from isthmus.models.vision.manifest import Manifest
from tests.bench.router_recording import Recording
from tests.bench.router_simulation import arrivals
from tests.bench.router_world import FRAMING_BYTES, REPLY_BYTES, Outcome, Walk, World, way_name

SPINN_TOLERANCE = 0.005  # of accuracy, as much as the router's epsilon
SPINN_THRESHOLDS = (0.6, 0.7, 0.8, 0.9, 0.95, 2.0)
SEDNA_THRESHOLD, FIXED_THRESHOLD = 0.5, 0.9
WHOLE = "jpeg 75"  # what a rule sends that knows nothing but whole photos

Rule = Callable[[World, int, float], Walk]


def single_arms(recording: Recording, manifest: Manifest) -> dict[str, Walk]:
    """Every way by its name."""
    after = [tap.after for tap in manifest.architecture.taps]
    exits = range(1, recording.exits_NEK.shape[1] + 1)
    walks = [Walk(segments) for segments in exits]
    walks += [Walk(after[point.tap], point) for point in recording.points]
    walks += [Walk(0, form) for form in recording.images]
    return {walk_name(walk): walk for walk in walks}


def walk_name(walk: Walk) -> str:
    return f"exit{walk.segments - 1}" if walk.way is None else way_name(walk.way)


def follow(world: World, rule: Rule, photos: int, period_s: float) -> list[Outcome]:
    """A stream of photos, one at a time, by a rule."""
    now_s, found = 0.0, []
    for photo, arrives_s in arrivals(world, photos, period_s):
        now_s = max(now_s, arrives_s)
        found.append(world.walk(photo, rule(world, photo, now_s), now_s))
        now_s += found[-1].seconds
    return found


def always(walk: Walk) -> Rule:
    """A single arm."""
    return lambda world, photo, now_s: walk


def oracle(arms: Mapping[str, Walk]) -> Rule:
    """The fastest for this photo of those that agree with the cloud's model."""

    def choose(world: World, photo: int, now_s: float) -> Walk:
        wanted = world.recording.cloud_N[photo]
        outcomes = [(world.walk(photo, walk, now_s), walk) for walk in arms.values()]
        right = [(found.seconds, index) for index, (found, _) in enumerate(outcomes) if found.answer == wanted]
        return outcomes[min(right)[1]][1] if right else min(outcomes, key=lambda each: each[0].seconds)[1]

    return choose


def baselines(recording: Recording, manifest: Manifest, world: World) -> dict[str, Rule]:
    """The rules of others in this world, by name."""
    cuts = best_points(manifest)
    exits = recording.exits_NEK.shape[1]
    entropy_N = -(recording.exits_NEK[:, -1] * np.log(np.maximum(recording.exits_NEK[:, -1], 1e-12))).sum(1)
    sure_N = 1 - entropy_N / np.log(recording.exits_NEK.shape[2])
    return {
        "SPINN": spinn(recording, manifest, cuts),
        "Sedna": edge_or_whole(sure_N >= SEDNA_THRESHOLD, exits),
        "fixed confidence": edge_or_whole(recording.exits_NEK[:, -1].max(1) >= FIXED_THRESHOLD, exits),
        "Neurosurgeon": neurosurgeon(manifest, cuts, exits, world),
    }


def best_points(manifest: Manifest) -> list[OperatingPoint]:
    """Of each tap the full width's last rate: these systems know one quality of a cut."""
    return [
        OperatingPoint(index, len(tap.widths) - 1, len(tap.widths[-1].rates) - 1)
        for index, tap in enumerate(manifest.taps)
    ]


def edge_or_whole(sure_N: NDArray[np.bool_], exits: int) -> Rule:
    """The device's own model first; the whole photo where that is not sure."""
    return lambda world, photo, now_s: Walk(exits) if sure_N[photo] else Walk(exits, WHOLE)


def seconds(world: World, walk: Walk, now_s: float) -> float:
    """Expected by who knows the link, the cloud and every mean."""
    stages, found = world.recording.stages, world.at(now_s)
    total = world.device * (mean(stages.decode) + sum(mean(each) for each in stages.segments[: walk.segments]))
    if walk.way is None:
        return total
    if isinstance(walk.way, str):
        size, cloud_s, encode_s = world.recording.images[walk.way], stages.cloud_image, stages.image_encode[walk.way]
    else:
        size, cloud_s = world.recording.points[walk.way], stages.cloud_tap[walk.way.tap]
        encode_s = stages.encode[walk.way.tap][walk.way.width]
    if not found.mbit:
        return float("inf")
    sent_bytes = float(size.bytes_N.mean()) + FRAMING_BYTES + REPLY_BYTES
    return (
        total
        + world.device * mean(encode_s)
        + found.rtt_s
        + 8e-6 * sent_bytes / found.mbit
        + found.cloud * mean(cloud_s)
    )


def mean(samples: Sequence[float]) -> float:
    return sum(samples) / len(samples)


def spinn(recording: Recording, manifest: Manifest, cuts: Sequence[OperatingPoint]) -> Rule:
    """Exits before the cut answer from a threshold; the others are sent at the cut, or end at the last exit."""
    after = [tap.after for tap in manifest.architecture.taps]
    exits = recording.exits_NEK.shape[1]
    ends = [Walk(after[point.tap], point) for point in cuts] + [Walk(exits)]
    needed = (recording.cloud_N == recording.labels_N).mean() - SPINN_TOLERANCE
    plans = []
    for end, threshold in itertools.product(ends, SPINN_THRESHOLDS):
        taken_N = exits_taken(recording, end.segments - (end.way is None), threshold)
        if accuracy(recording, taken_N, end) >= needed:
            plans.append((end, taken_N))
    return partial(spinn_choice, plans or [(ends[0], exits_taken(recording, 0, 2.0))])


def spinn_choice(plans: Sequence[tuple[Walk, NDArray[np.int64]]], world: World, photo: int, now_s: float) -> Walk:
    def expected(plan: tuple[Walk, NDArray[np.int64]]) -> float:
        end, taken_N = plan
        early = sum(
            float((taken_N == segments).mean()) * seconds(world, Walk(segments), now_s)
            for segments in range(1, end.segments + 1)
        )
        return early + float((taken_N == 0).mean()) * seconds(world, end, now_s)

    end, taken_N = min(plans, key=expected)
    return Walk(int(taken_N[photo])) if taken_N[photo] else end


def exits_taken(recording: Recording, exits: int, threshold: float) -> NDArray[np.int64]:
    """Segments run by the photos that one of the first `exits` exits answers, 0 for the others."""
    sure_NE = recording.exits_NEK[:, :exits].max(2) >= threshold
    return np.where(sure_NE.any(1), sure_NE.argmax(1) + 1, 0) if exits else np.zeros(len(recording), np.int64)


def accuracy(recording: Recording, taken_N: NDArray[np.int64], end: Walk) -> float:
    answers_NE = recording.exits_NEK.argmax(2)
    rest_N = answers_NE[:, -1] if end.way is None else recording.points[end.way].answer_N  # type: ignore[index]
    answer_N = np.where(taken_N > 0, answers_NE[np.arange(len(taken_N)), np.maximum(taken_N, 1) - 1], rest_N)
    return float((answer_N == recording.labels_N).mean())


def neurosurgeon(manifest: Manifest, cuts: Sequence[OperatingPoint], exits: int, world: World) -> Rule:
    after = [tap.after for tap in manifest.architecture.taps]
    walks = [Walk(exits), Walk(0, WHOLE)] + [Walk(after[point.tap], point) for point in cuts]
    return always(min(walks, key=lambda walk: seconds(world, walk, 0.0)))
