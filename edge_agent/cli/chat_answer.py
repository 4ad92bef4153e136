"""Statistics of one answer of the chat: tokens by source, times, bytes and cost."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from isthmus.edge_agent.cli.terminal_text import escape_control
from isthmus.edge_agent.language.detokenize import Outcome
from isthmus.edge_agent.language.request import Source
from isthmus.edge_agent.policy.prices import Prices


@dataclass(slots=True)
class ChatAnswer:
    """One answer as it grows. Times are in seconds since the question; `outcome` None: interrupted."""

    text: str = ""
    source_tokens: dict[Source, int] = field(default_factory=lambda: {"edge": 0, "draft": 0, "cloud": 0})
    first_s: float | None = None
    total_s: float = 0.0
    outcome: Outcome | None = None

    @property
    def tokens(self) -> int:
        return sum(self.source_tokens.values())

    @property
    def device_tokens(self) -> int:
        return self.source_tokens["edge"] + self.source_tokens["draft"]

    def statistics(self, prices: Prices) -> dict[str, Any]:
        """JSON fields. None: not known, as the answer ended before its summary."""
        return {
            "finish": self.outcome.finish if self.outcome else "interrupted",
            "tokens": self.tokens,
            "made": dict(self.source_tokens),
            "tokens_per_s": self.tokens / self.total_s if self.total_s > 0 else None,
            "first_token_ms": None if self.first_s is None else self.first_s * 1000,
            "device_share": self.device_tokens / self.tokens if self.tokens else None,
            **self._summary_fields(prices),
        }

    def _summary_fields(self, prices: Prices) -> dict[str, Any]:
        summary = self.outcome.summary if self.outcome else None
        if summary is None:
            return dict.fromkeys(
                ("bytes_up", "bytes_down", "rtt_ms", "usd", "arm", "why", "spans", "degraded", "device", "cloud")
            )
        return {
            "bytes_up": summary.bytes_up,
            "bytes_down": summary.bytes_down,
            "rtt_ms": None if summary.rtt_s is None else summary.rtt_s * 1000,
            "usd": prices.usd(summary.bytes_up, summary.cloud_s, self.total_s - summary.cloud_s),
            "arm": summary.arm,
            "why": summary.why,
            "spans": [asdict(span) for span in summary.spans],
            "degraded": summary.degraded,
            "device": asdict(summary.device),
            "cloud": asdict(summary.cloud),
        }


def status_line(statistics: dict[str, Any]) -> str:
    """The statistics of an answer in one line, without those that are not known."""
    forms = {
        "tokens": "{} tokens",
        "tokens_per_s": "{:.1f}/s",
        "first_token_ms": "first after {:.0f} ms",
        "device_share": "{:.0%} made on the device",
        "bytes_up": "{} B up",
        "bytes_down": "{} B down",
        "rtt_ms": "round trip {:.0f} ms",
        "usd": "${:.7f}",
        "arm": "{}",
    }
    parts = [form.format(statistics[name]) for name, form in forms.items() if statistics[name] is not None]
    if statistics["finish"] == "interrupted":
        parts.append("interrupted")
    if statistics["degraded"]:
        parts.append(f"DEGRADED: {escape_control(str(statistics['why']))}")
    elif statistics["arm"] == "auto":
        parts.append(escape_control(str(statistics["why"])))
    return " · ".join(parts)
