"""Metrics of the audit of a bundle's exits."""

from __future__ import annotations

from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge

from isthmus.edge_agent.policy.audit import Audit

Result = Literal["agree", "differ", "sent", "skipped", "failed"]


class AuditMetrics:
    """One instance per agent; `model` is the bundle's name."""

    def __init__(self, registry: CollectorRegistry, model: str) -> None:
        results = Counter(
            "isthmus_edge_audited_photos",
            "Photos drawn by the audit. sent: no exit answered; skipped: the device was busy.",
            ["model", "result"],
            registry=registry,
        )
        self._results = {name: results.labels(model, name) for name in get_args(Result)}
        alarm = Gauge(
            "isthmus_edge_audit_alarm",
            "1 while exits differ from the cloud model more often than promised, or photos look unlike those before.",
            ["model"],
            registry=registry,
        )
        level = Gauge(
            "isthmus_edge_audit_level",
            "Thresholds given up by the audit: 0 for the owner's own, more for stricter ones.",
            ["model"],
            registry=registry,
        )
        drift = Gauge(
            "isthmus_edge_drift",
            "1 while photos look unlike those before, and not enough of them are audited yet.",
            ["model"],
            registry=registry,
        )
        drifts = Counter(
            "isthmus_edge_drifts", "Times that photos began to look unlike those before.", ["model"], registry=registry
        )
        share = Gauge("isthmus_edge_audit_share_ratio", "Share of photos drawn now.", ["model"], registry=registry)
        alarms = Counter("isthmus_edge_audit_alarms", "Alarms of the audit.", ["model"], registry=registry)
        renewals = Counter(
            "isthmus_edge_recalibrations", "New thresholds made from audited pairs.", ["model"], registry=registry
        )
        self._alarm, self._level, self._share = alarm.labels(model), level.labels(model), share.labels(model)
        self._drift, self._drifts = drift.labels(model), drifts.labels(model)
        self._alarms, self._renewals = alarms.labels(model), renewals.labels(model)

    def result(self, name: Result) -> None:
        """What became of a photo that was drawn."""
        self._results[name].inc()

    def alarmed(self) -> None:
        """An alarm began."""
        self._alarms.inc()

    def drifted(self) -> None:
        """Photos began to look unlike those before."""
        self._drifts.inc()

    def renewed(self) -> None:
        """Thresholds were made anew."""
        self._renewals.inc()

    def observe(self, audit: Audit) -> None:
        """Export where the audit stands."""
        self._alarm.set(audit.alarm)
        self._drift.set(audit.doubted)
        self._level.set(audit.level)
        self._share.set(audit.share)
