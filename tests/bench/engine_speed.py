"""Tokens a second and time to first token of an engine asked directly, and through the cloud service.

Each prompt is answered both ways, one after the other, in alternating order. A number before each question makes it new
to the engine's cache of prefixes; numbers have as many digits, so that prompts are equally long.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np

from isthmus.edge_agent import LanguageAgent, LanguageConfig
from isthmus.edge_agent.language.request import GenerationRequest, Token
from isthmus.models.language.checkpoint.tokenizer import Message, Tokenizer

RESAMPLES = 2000


@dataclass(frozen=True)
class Timing:
    """One answer: seconds until its first token and until its last."""

    first_s: float
    total_s: float
    tokens: int

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.total_s


def timed(tokens: Iterator[int], started_s: float) -> Timing:
    times = [time.monotonic() - started_s for _ in tokens]
    return Timing(times[0], times[-1], len(times))


def ask_directly(client: httpx.Client, model: str, prompt: Sequence[int], tokens: int) -> Timing:
    """By the engine's own API, as vLLM documents it."""
    body = {"model": model, "prompt": list(prompt), "max_tokens": tokens, "temperature": 0, "stream": True}
    started_s = time.monotonic()

    def stream() -> Iterator[int]:
        with client.stream("POST", "/v1/completions", json={**body, "return_token_ids": True}) as response:
            response.raise_for_status()
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    choices = json.loads(line[6:])["choices"]
                    yield from choices[0]["token_ids"] if choices else ()

    return timed(stream(), started_s)


def ask_service(agent: LanguageAgent, prompt: Sequence[int], tokens: int) -> Timing:
    """By an agent, whose arm is `cloud`."""
    started_s = time.monotonic()
    events = agent.generate(GenerationRequest(tuple(prompt), tokens, "cloud"))
    return timed((event.id for event in events if isinstance(event, Token)), started_s)


def questions(texts: Sequence[str], tokenizer: Tokenizer, longest: int) -> Iterator[tuple[list[int], list[int]]]:
    """Pairs of new prompts of equal length."""
    numbers = random.Random(0)
    for text in texts:
        first, second = (
            tokenizer.chat([Message("user", f"Question {numbers.randrange(10**5, 10**6)}: {text}")]) for _ in range(2)
        )
        if len(first) == len(second) <= longest:
            yield first, second


def compare(
    url: str, target: str, model: str, prompts: Sequence[tuple[list[int], list[int]]], tokens: int
) -> dict[str, Any]:
    """Both ways for each pair of prompts; ratios with 95 % intervals over prompts."""
    pairs: list[tuple[Timing, Timing]] = []
    with (
        httpx.Client(base_url=url, timeout=300, trust_env=False) as client,
        LanguageAgent(LanguageConfig(clouds=(target,), connect_s=60)) as agent,
    ):
        ask_directly(client, model, prompts[0][0], tokens), ask_service(agent, prompts[0][1], tokens)  # kernels
        for index, (first, second) in enumerate(prompts[1:]):
            if index % 2:
                direct = ask_directly(client, model, first, tokens)
                service = ask_service(agent, second, tokens)
            else:
                service = ask_service(agent, first, tokens)
                direct = ask_directly(client, model, second, tokens)
            pairs.append((direct, service))
    return summarise(pairs)


def summarise(pairs: Sequence[tuple[Timing, Timing]]) -> dict[str, Any]:
    """Medians both ways, and the median of the pairs' ratios."""
    speed = [service.tokens_per_s / direct.tokens_per_s for direct, service in pairs]
    first = [service.first_s / direct.first_s for direct, service in pairs]
    return {
        "prompts": len(pairs),
        "tokens": sum(direct.tokens + service.tokens for direct, service in pairs),
        "direct_tokens_per_s": statistics.median(direct.tokens_per_s for direct, _ in pairs),
        "service_tokens_per_s": statistics.median(service.tokens_per_s for _, service in pairs),
        "tokens_per_s_ratio": ratio(speed),
        "direct_first_s": statistics.median(direct.first_s for direct, _ in pairs),
        "service_first_s": statistics.median(service.first_s for _, service in pairs),
        "first_token_ratio": ratio(first),
    }


def ratio(values: Sequence[float]) -> dict[str, float]:
    """The median with its 95 % bootstrap interval over prompts."""
    draws = np.random.default_rng(0).choice(np.asarray(values), (RESAMPLES, len(values)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    return {"median": statistics.median(values), "low": float(low), "high": float(high)}
