"""The agent's Prometheus metrics. The registry is passed in; labels are few and bounded; known ones start at zero."""

from __future__ import annotations

from importlib.metadata import version

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from isthmus.edge_agent.ledger import Ledger
from isthmus.edge_agent.policy.breaker import STATES
from isthmus.edge_agent.policy.budgets import PERIODS
from isthmus.edge_agent.vision.audit_metrics import AuditMetrics
from isthmus.edge_agent.vision.live import DROPPING
from isthmus.edge_agent.vision.replicas import Replicas
from isthmus.edge_agent.vision.result import Answer
from isthmus.edge_agent.vision.task_answers import Detections
from isthmus.models.errors import DeadlineExceeded, IsthmusError, LinkDown, OverBudget, PayloadTooLarge
from isthmus.models.vision.manifest import Manifest

LATENCY_BUCKETS = (0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 10)
CONFIDENCE_BUCKETS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 1.0)
SIZE_BUCKETS = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
ROUTES = ("exit", "split", "offload", "fallback")
LINK_GAUGES = (
    ("link_down_throughput_bytes_per_second", "Estimated downlink bandwidth; infinite until it is measured."),
    ("cloud_queue_seconds", "Estimated wait of a photo in the cloud before it is computed."),
    ("link_loss_ratio", "Share of requests that remained without a reply."),
    ("link_spread_ratio", "Relative standard deviation of the predicted transfer time."),
    ("link_age_seconds", "Time since the link was last measured; infinite before."),
)
REASONS = ("cloud_down", "deadline", "rejected", "too_large", "budget", "back_pressure")


class EdgeMetrics:
    """One instance per agent. Every metric name starts with isthmus_."""

    def __init__(self, registry: CollectorRegistry, manifest: Manifest) -> None:
        self._requests = RequestMetrics(registry, manifest)
        self._graphs = GraphMetrics(registry, manifest)
        self._link = LinkMetrics(registry)
        self._spend = SpendMetrics(registry)
        self.audit = AuditMetrics(registry, manifest.name)
        build = Gauge("isthmus_build_info", "Software version.", ["version"], registry=registry)
        build.labels(version("isthmus")).set(1)
        model_info = Gauge("isthmus_model_info", "Bundle in use.", ["model", "version"], registry=registry)
        model_info.labels(manifest.name, manifest.fingerprint[:12]).set(1)

    def answered(self, answer: Answer) -> None:
        """One photo was answered."""
        self._requests.answered(answer)
        self._graphs.answered(answer)
        self._link.sent.inc(answer.bytes_up)
        self._link.received.inc(answer.bytes_down)
        self._spend.usd.inc(answer.cost_usd)
        self._spend.joules.inc(answer.modelled_joules)

    def refused(self) -> None:
        """A photo could not be read."""
        self._requests.refused()

    def passed(self, exit_name: str, confidence: float) -> None:
        """One exit ran."""
        self._graphs.passed(exit_name, confidence)

    def encoded(self, size: int, tap: str, width: float, rate: int) -> None:
        """One latent was coded to `size` bytes at an operating point."""
        self._graphs.encoded(size, tap, width, rate)

    def degraded(self, reason: str) -> None:
        """One answer is below the owner's quality, for one of REASONS."""
        self._requests.degraded.labels(reason).inc()

    def certificates(self, void: bool) -> None:
        """Export whether the certificates of the exits are void."""
        self._graphs.void.set(void)

    def audited(self, up_bytes: int, down_bytes: int) -> None:
        """One photo was sent to be audited."""
        self._link.sent.inc(up_bytes)
        self._link.received.inc(down_bytes)

    def dropped(self, policy: str) -> None:
        """One photo of a live source was not answered, as `policy` of DROPPING says."""
        self._requests.dropped.labels(policy).inc()

    def late(self) -> None:
        """One reply of the cloud came after its deadline."""
        self._link.late.inc()

    def replicas(self, replicas: Replicas) -> None:
        """Export the clouds' states, and the estimates of the link that is used; nothing without one."""
        self._link.observe(replicas)

    def budgets(self, ledger: Ledger) -> None:
        """Export what the budgets have left."""
        self._spend.observe(ledger)


class SpendMetrics:
    """What answers cost by the profile, and what the budgets have left."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.usd = Counter(
            "isthmus_edge_spent_usd", "US dollars spent on photos, by the cost profile.", registry=registry
        )
        self.joules = Counter(
            "isthmus_edge_modelled_joules",
            "Energy spent on photos, by the cost profile's model; never measured.",
            registry=registry,
        )
        self._left = Gauge(
            "isthmus_edge_budget_left_ratio",
            "What may be spent of a budget now, as a share of what may be spent at once.",
            ["amount", "period"],
            registry=registry,
        )

    def observe(self, ledger: Ledger) -> None:
        for bucket in ledger.buckets():
            left = self._left.labels(bucket.budget.amount, PERIODS[bucket.budget.period_s])
            left.set(max(bucket.level, 0.0) / bucket.budget.capacity)


class RequestMetrics:
    """Photos and their answers."""

    def __init__(self, registry: CollectorRegistry, manifest: Manifest) -> None:
        self._model = manifest.name
        self._requests = Counter(
            "isthmus_edge_requests", "Photos by route of the answer.", ["route", "outcome", "model"], registry=registry
        )
        self._duration = Histogram(
            "isthmus_edge_request_duration_seconds",
            "Time from photo to answer.",
            ["route"],
            buckets=LATENCY_BUCKETS,
            registry=registry,
        )
        self._exits = Counter("isthmus_edge_exits", "Answers by exit.", ["model", "exit"], registry=registry)
        self._missing = Counter(
            "isthmus_edge_missing_answers", "Tasks not answered, for lack of a cloud.", ["task"], registry=registry
        )
        self._boxes = Counter(
            "isthmus_edge_boxes", "Boxes in answers to tasks that detect.", ["model", "task"], registry=registry
        )
        self.degraded = Counter(
            "isthmus_edge_degraded_responses", "Answers below the owner's quality.", ["reason"], registry=registry
        )
        self.dropped = Counter(
            "isthmus_edge_dropped_photos",
            "Photos of a live source that were not answered, since more came than there was room for.",
            ["policy"],
            registry=registry,
        )
        self._start_at_zero(manifest)

    def answered(self, answer: Answer) -> None:
        for task in answer.missing:
            self._missing.labels(task).inc()
        for name, found in answer.answers.items():
            if isinstance(found, Detections):
                self._boxes.labels(self._model, name).inc(len(found))
        self._requests.labels(answer.route, "ok", self._model).inc()
        self._duration.labels(answer.route).observe(answer.stage_ms["total"] / 1000)
        if answer.exit is not None:
            self._exits.labels(self._model, answer.exit).inc()

    def refused(self) -> None:
        self._requests.labels("exit", "error", self._model).inc()

    def _start_at_zero(self, manifest: Manifest) -> None:
        for route in ROUTES:
            self._requests.labels(route, "ok", self._model)
            self._duration.labels(route)
        self._requests.labels("exit", "error", self._model)
        for exit_ in manifest.heads["fp32"].exits:  # exits have the same names at every precision
            self._exits.labels(self._model, exit_.name)
        answered = all(exit_.answers for exit_ in manifest.heads["fp32"].exits)
        for task in manifest.tasks[answered:]:  # every exit answers the first, or none anything
            self._missing.labels(task.name)
        for task in manifest.tasks:
            if task.kind == "detect":
                self._boxes.labels(self._model, task.name)
        for reason in REASONS:
            self.degraded.labels(reason)
        for policy in DROPPING:
            self.dropped.labels(policy)


class GraphMetrics:
    """What the graphs and codecs of the bundle compute."""

    def __init__(self, registry: CollectorRegistry, manifest: Manifest) -> None:
        self._model = manifest.name
        self._confidence = Histogram(
            "isthmus_edge_exit_confidence_ratio",
            "Confidence of each exit that ran.",
            ["model", "exit"],
            buckets=CONFIDENCE_BUCKETS,
            registry=registry,
        )
        self._size = Histogram(
            "isthmus_edge_bottleneck_size_bytes",
            "Entropy-coded size of a latent, without framing.",
            ["model"],
            buckets=SIZE_BUCKETS,
            registry=registry,
        )
        self._points = Counter(
            "isthmus_edge_bottlenecks",
            "Latents encoded, by operating point.",
            ["model", "tap", "width", "rate"],
            registry=registry,
        )
        self.void = Gauge(
            "isthmus_edge_certificates_void",
            "Whether the certificates of the exits are void, so that none answers early.",
            registry=registry,
        )
        self._stages = {
            "head": stage("head", "Time of trunk and exits.", registry),
            "encode": stage("encode", "Time of encoder and entropy coder, or of the image codec.", registry),
        }
        self._start_at_zero(manifest)

    def answered(self, answer: Answer) -> None:
        for name, family in self._stages.items():
            if name in answer.stage_ms:
                family.labels(self._model).observe(answer.stage_ms[name] / 1000)

    def passed(self, exit_name: str, confidence: float) -> None:
        self._confidence.labels(self._model, exit_name).observe(confidence)

    def encoded(self, size: int, tap: str, width: float, rate: int) -> None:
        self._size.labels(self._model).observe(size)
        self._points.labels(self._model, tap, f"{width:g}", rate).inc()

    def _start_at_zero(self, manifest: Manifest) -> None:
        for exit_ in manifest.heads["fp32"].exits:
            self._confidence.labels(self._model, exit_.name)
        for tap in manifest.taps:
            for width in tap.widths:
                for rate in range(len(width.rates)):
                    self._points.labels(self._model, tap.name, f"{width.width:g}", rate)
        for family in (self._size, *self._stages.values()):
            family.labels(self._model)


class LinkMetrics:
    """The connections to the clouds."""

    def __init__(self, registry: CollectorRegistry) -> None:
        bytes_ = Counter(
            "isthmus_edge_offload_bytes", "Message bytes, gRPC prefix included.", ["direction"], registry=registry
        )
        self.sent, self.received = bytes_.labels("sent"), bytes_.labels("received")
        self.late = Counter("isthmus_edge_late_responses", "Cloud replies after their deadline.", registry=registry)
        self._breaker = Gauge(
            "isthmus_edge_circuit_breaker_state",
            "1 for the state of the cloud that is used, else 0; open while none can be.",
            ["state"],
            registry=registry,
        )
        self._clouds = Gauge(
            "isthmus_edge_clouds", "Clouds in each state of their circuit breakers.", ["state"], registry=registry
        )
        self._rtt = Gauge("isthmus_edge_link_rtt_seconds", "Estimated round trip.", registry=registry)
        self._more = [Gauge(f"isthmus_edge_{name}", text, registry=registry) for name, text in LINK_GAUGES]
        self._changes = Gauge(
            "isthmus_edge_link_changes", "Lasting changes of the link that were noticed.", registry=registry
        )
        self._throughput = Gauge(
            "isthmus_edge_link_throughput_bytes_per_second", "Estimated uplink bandwidth.", registry=registry
        )

    def observe(self, replicas: Replicas) -> None:
        link = replicas.current
        if link is None:
            return
        states, state, estimate = [each.state for each in replicas], link.state, link.estimate
        for name in STATES:
            self._breaker.labels(name).set(name == state)
            self._clouds.labels(name).set(states.count(name))
        for gauge, value in zip(
            self._more,
            (estimate.down_bytes_per_s, estimate.queue_s, estimate.loss, estimate.spread, estimate.age_s),
            strict=True,
        ):
            gauge.set(value)
        self._changes.set(link.changes)
        self._rtt.set(estimate.rtt_s)
        self._throughput.set(estimate.bytes_per_s)


def stage(name: str, text: str, registry: CollectorRegistry) -> Histogram:
    """A histogram of the seconds that one stage of a request takes."""
    full = f"isthmus_edge_{name}_duration_seconds"
    return Histogram(full, text, ["model"], buckets=LATENCY_BUCKETS, registry=registry)


def degraded_reason(error: IsthmusError) -> str:
    """The label, one of REASONS, under which isthmus_edge_degraded_responses_total counts an error of the cloud."""
    if isinstance(error, DeadlineExceeded):
        return "deadline"
    if isinstance(error, OverBudget):
        return "budget"
    if isinstance(error, PayloadTooLarge):
        return "too_large"
    return "cloud_down" if isinstance(error, LinkDown) else "rejected"
