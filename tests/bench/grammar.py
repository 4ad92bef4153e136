"""Are answers what their JSON schema says, and what does a mask cost? The device's model, a thousand schemas.

Each answer is validated by the package `jsonschema`; one that max_tokens cut is counted apart. Then its tokens are
chosen again from logits at random, with the mask and without; the difference is timed, of this thread alone. Writes
`schemas`, `refused`, `ended`, `valid`, `cut`, `tokens`, `forced`, and of the time of a mask `median_ms` and `p99_ms`.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import jsonschema
import numpy as np
from rich.progress import track

from isthmus.edge_agent.config import LanguageConfig
from isthmus.edge_agent.language.agent import LanguageAgent
from isthmus.edge_agent.language.request import GenerationRequest, Token
from isthmus.models.errors import InvalidInput
from isthmus.models.language.checkpoint.tokenizer import Message
from isthmus.models.language.grammar import LastGrammars
from isthmus.models.language.processors import TokenChooser
from isthmus.models.messages import Grammar, Sampling
from tests.bench.schemas import Schema, Schemas

PROMPT = "Give an example as JSON."
TEMPERATURE = 0.8


class Bench:
    """Answers by one agent, counted."""

    def __init__(self, agent: LanguageAgent, tokens: int) -> None:
        self.agent, self.tokens, self.counts = agent, tokens, Counter[str]()
        self.grammars = LastGrammars()
        self.masked_s: list[float] = []
        self.invalid: list[dict[str, Any]] = []
        self.refused: list[str] = []
        self._prompt = tuple(agent.tokenizer.chat([Message("user", PROMPT)]))

    def run(self, schema: Schema, seed: int) -> None:
        """One schema."""
        sampling = Sampling(TEMPERATURE, 0.95, seed, grammar=Grammar("json_schema", json.dumps(schema)))
        request = GenerationRequest(self._prompt, self.tokens, "edge", sampling)
        self.counts["schemas"] += 1
        try:
            ids = [event.id for event in self.agent.generate(request) if isinstance(event, Token)]
        except InvalidInput as error:
            self.counts["refused"] += 1
            self.refused.append(f"{error}: {json.dumps(schema)}")
            return
        self.counts["tokens"] += len(ids)
        self._validate(schema, ids)
        self._time(sampling, ids)

    def _validate(self, schema: Schema, ids: Sequence[int]) -> None:
        tokenizer = self.agent.tokenizer
        if ids[-1] not in tokenizer.eos_ids:
            self.counts["cut"] += 1
            return
        self.counts["ended"] += 1
        text = tokenizer.decode(ids)
        try:
            validator = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
            validator.validate(json.loads(text))
            self.counts["valid"] += 1
        except (ValueError, jsonschema.ValidationError) as error:
            self.invalid.append({"schema": schema, "text": text, "error": str(error)[:200]})

    def _time(self, sampling: Sampling, ids: Sequence[int]) -> None:
        tokenizer, text = self.agent.tokenizer, list(self._prompt)
        masked = TokenChooser(
            sampling, len(text), lambda grammar: self.grammars.of(tokenizer).state(grammar, tokenizer.eos_ids)
        )
        plain = TokenChooser(Sampling())
        masked.sampling = replace(sampling, temperature=0.0)
        logits_V = np.random.default_rng(0).standard_normal(tokenizer.size).astype(np.float32)
        masked.forced(text)  # compiles
        for id_ in ids:
            started_s = time.thread_time()
            masked.choose(logits_V, text)
            between_s = time.thread_time()
            plain.choose(logits_V, text)
            self.masked_s.append(max(2 * between_s - started_s - time.thread_time(), 0.0))
            self.counts["forced"] += masked.forced(text) is not None
            text.append(id_)

    def summary(self) -> dict[str, Any]:
        """What was counted and timed."""
        masked_ms = 1000 * np.asarray(self.masked_s or [0.0])
        return {
            **{name: self.counts[name] for name in ("schemas", "refused", "ended", "valid", "cut", "tokens", "forced")},
            "median_ms": round(float(np.median(masked_ms)), 3),
            "p99_ms": round(float(np.quantile(masked_ms, 0.99)), 3),
            "invalid": self.invalid[:20],
            "refused_because": self.refused[:20],
        }


@click.command()
@click.option("--model", default="smollm2", show_default=True, help="Of the device.")
@click.option("--schemas", default=1000, show_default=True, help="How many.")
@click.option("--tokens", default=120, show_default=True, help="Of an answer, at most.")
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Where to write the figures."
)
def main(model: str, schemas: int, tokens: int, seed: int, json_path: Path | None) -> None:
    """Validate answers against schemas made anew."""
    source = Schemas(seed)
    with LanguageAgent(LanguageConfig(model, device_bits=4, threads=1)) as agent:
        bench = Bench(agent, tokens)
        for index in track(range(schemas), "schemas", disable=None):
            bench.run(source.next(), seed + index)
    found = bench.summary()
    click.echo(json.dumps(found, indent=2, ensure_ascii=False))
    if json_path:
        json_path.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
