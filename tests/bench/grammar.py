"""Are answers what their JSON schema says, and what does a mask cost? The device's model, a thousand schemas.

With --chance tokens are drawn from those that the grammar allows, each as likely as the others, and no model is run: a
harder test of the grammar in a tenth of the time. Each answer is validated by the package `jsonschema`; one that
max_tokens cut is counted apart. Then its tokens are chosen again from logits at random, with the mask and without; the
difference is timed, of this thread alone. Writes `schemas`, `refused`, `ended`, `valid`, `cut`, `tokens`, `forced`, and
of the time of a mask `median_ms` and `p99_ms`.
"""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
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
from isthmus.models.language.checkpoint.checkpoint import open_tokenizer
from isthmus.models.language.checkpoint.tokenizer import Message, Tokenizer
from isthmus.models.language.grammar import LastGrammars
from isthmus.models.language.processors import TokenChooser
from isthmus.models.messages import Grammar, Sampling
from tests.bench.schemas import Schema, Schemas

PROMPT = "Give an example as JSON."
TEMPERATURE = 0.8
FORMATS = jsonschema.FormatChecker()  # its own `time` is that of draft 3, without an offset
TIME = re.compile(r"([01]\d|2[0-3]):[0-5]\d:([0-5]\d|60)(\.\d+)?([zZ]|[+-]([01]\d|2[0-3]):[0-5]\d)", re.ASCII)


@FORMATS.checks("time")
def is_time(value: object) -> bool:
    """As RFC 3339 has it, which draft 2020-12 refers to."""
    return not isinstance(value, str) or TIME.fullmatch(value) is not None


class Bench:
    """Answers by one agent, or by chance, counted."""

    def __init__(self, tokenizer: Tokenizer, agent: LanguageAgent | None, tokens: int) -> None:
        """`agent`: None for tokens by chance."""
        self.tokenizer, self.agent, self.tokens, self.counts = tokenizer, agent, tokens, Counter[str]()
        self.grammars = LastGrammars()
        self.masked_s: list[float] = []
        self.invalid: list[dict[str, Any]] = []
        self.refused: list[str] = []
        self._prompt = tuple(tokenizer.chat([Message("user", PROMPT)]))

    def run(self, schema: Schema, seed: int) -> None:
        """One schema."""
        sampling = Sampling(TEMPERATURE, 0.95, seed, grammar=Grammar("json_schema", json.dumps(schema)))
        self.counts["schemas"] += 1
        try:
            ids = self._by_chance(sampling) if self.agent is None else self._by_model(self.agent, sampling)
        except InvalidInput as error:
            self.counts["refused"] += 1
            self.refused.append(f"{error}: {json.dumps(schema)}")
            return
        self.counts["tokens"] += len(ids)
        self._validate(schema, ids)
        self._time(sampling, ids)

    def _by_model(self, agent: LanguageAgent, sampling: Sampling) -> list[int]:
        request = GenerationRequest(self._prompt, self.tokens, "edge", sampling)
        return [event.id for event in agent.generate(request) if isinstance(event, Token)]

    def _by_chance(self, sampling: Sampling) -> list[int]:
        """Tokens drawn alike from the allowed ones."""
        even_V, text = np.zeros(self.tokenizer.size, np.float32), list(self._prompt)
        chooser = self._chooser(replace(sampling, temperature=1.0, top_p=1.0))
        for _ in range(self.tokens):
            forced = chooser.forced(text)
            text.append(chooser.choose(even_V, text) if forced is None else forced)
            if text[-1] in self.tokenizer.eos_ids:
                break
        return text[len(self._prompt) :]

    def _chooser(self, sampling: Sampling) -> TokenChooser:
        tokenizer = self.tokenizer
        return TokenChooser(
            sampling, len(self._prompt), lambda grammar: self.grammars.of(tokenizer).state(grammar, tokenizer.eos_ids)
        )

    def _validate(self, schema: Schema, ids: Sequence[int]) -> None:
        tokenizer = self.tokenizer
        if ids[-1] not in tokenizer.eos_ids:
            self.counts["cut"] += 1
            return
        self.counts["ended"] += 1
        text = tokenizer.decode(ids)
        try:
            jsonschema.Draft202012Validator(schema, format_checker=FORMATS).validate(json.loads(text))
            self.counts["valid"] += 1
        except (ValueError, jsonschema.ValidationError) as error:
            self.invalid.append({"schema": schema, "text": text, "error": str(error)[:200]})

    def _time(self, sampling: Sampling, ids: Sequence[int]) -> None:
        text, plain = list(self._prompt), TokenChooser(Sampling())
        masked = self._chooser(replace(sampling, temperature=0.0))
        logits_V = np.random.default_rng(0).standard_normal(self.tokenizer.size).astype(np.float32)
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
@click.option("--chance", is_flag=True, help="Draw allowed tokens instead of running the model.")
@click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Where to write the figures."
)
def main(model: str, schemas: int, tokens: int, seed: int, chance: bool, json_path: Path | None) -> None:
    """Validate answers against schemas made anew."""
    source = Schemas(seed)
    with ExitStack() as stack:
        config = LanguageConfig(model, device_bits=4, threads=1)
        agent = None if chance else stack.enter_context(LanguageAgent(config))
        bench = Bench(open_tokenizer(model) if agent is None else agent.tokenizer, agent, tokens)
        for index in track(range(schemas), "schemas", disable=None):
            bench.run(source.next(), seed + index)
    found = bench.summary()
    click.echo(json.dumps(found, indent=2, ensure_ascii=False))
    if json_path:
        json_path.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
