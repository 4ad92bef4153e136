from __future__ import annotations

from isthmus.edge_agent.cli.chat_answer import ChatAnswer, status_line
from isthmus.edge_agent.language.detokenize import Outcome
from isthmus.edge_agent.language.request import Summary
from isthmus.edge_agent.policy.prices import Prices


def test_statistics_of_an_interrupted_answer_are_those_that_the_device_knows() -> None:
    answer = ChatAnswer("abc", {"edge": 1, "draft": 1, "cloud": 2}, first_s=0.5, total_s=2.0)
    known = {name: value for name, value in answer.statistics(Prices()).items() if value is not None}
    assert known == {
        "finish": "interrupted",
        "tokens": 4,
        "made": {"edge": 1, "draft": 1, "cloud": 2},
        "tokens_per_s": 2.0,
        "first_token_ms": 500.0,
        "device_share": 0.5,
    }


def test_the_cost_is_that_of_bytes_cloud_time_and_device_time() -> None:
    summary = Summary("stop", 5, 4, "cloud", "requested", bytes_up=100, cloud_s=0.5)
    answer = ChatAnswer(total_s=2.0, outcome=Outcome("stop", 4, 0, summary))
    prices = Prices()
    statistics = answer.statistics(prices)
    assert statistics["usd"] == prices.usd(100, 0.5, 1.5)
    assert (statistics["finish"], statistics["arm"], statistics["rtt_ms"]) == ("stop", "cloud", None)


def test_the_status_line_says_why_an_answer_is_degraded_or_took_an_arm() -> None:
    statistics: dict[str, object] = dict.fromkeys(
        ("tokens_per_s", "first_token_ms", "device_share", "bytes_up", "bytes_down", "rtt_ms", "usd", "arm")
    )
    line = status_line(
        {**statistics, "tokens": 3, "finish": "length", "degraded": True, "why": "the cloud \x1bwas lost"}
    )
    assert line == "3 tokens · DEGRADED: the cloud \\x1bwas lost"
    line = status_line(
        {**statistics, "tokens": 3, "finish": "length", "degraded": False, "arm": "auto", "why": "fastest"}
    )
    assert line == "3 tokens · auto · fastest"
