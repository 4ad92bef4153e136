"""Prompt to tokens: on the device alone, by the cloud alone, or drafted here and confirmed there.

    Ask -> edge:   the device's own model, nothing leaves it
        -> cloud:  prompt up, tokens down            (Collaboration without a draft)
        -> verify: drafts up, confirmations down     (Collaboration with one)
        -> handoff: exits here, coded rows up where none is sure    (Handover)

Knows nothing about text beyond the tokenizer it hands on, and nothing about HTTP.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial

from edge_agent.cloud_answer import CloudAnswer
from edge_agent.collaboration import Collaboration, Tempo
from edge_agent.config import LanguageConfig
from edge_agent.generation import Arm, Ask, Summary, Token
from edge_agent.handover import NEVER, Handover, Terms
from edge_agent.language_metrics import LanguageMetrics
from edge_agent.link import Link
from edge_agent.policy.breaker import BreakerLimits
from edge_agent.policy.drafting import Acceptance
from edge_agent.replicas import Replicas
from models.errors import BundleError, InvalidInput
from models.language.checkpoint import Checkpoint
from models.language.drafts import Draft, LookupDraft, ModelDraft
from models.language.handoff import Handoff
from models.language.handoff_manifest import HandoffManifest
from models.language.onnx_decoder import OnnxDecoder
from models.language.onnx_exits import ExitingDecoder
from models.language.sampling import Floats, choose, logprobs

# A stream that breaks says so at once, and others wait: one failure is enough, and probes come soon and often.
BREAKER = BreakerLimits(failures=1, first_s=0.25, last_s=2.0)

PRIOR_ACCEPTANCE = {8: 0.9, 4: 0.7}  # of drafts by a copy with so many bits, until its own are known
LOST_TO_CODING = 0.005  # of the cloud's choices, at most, when nobody says at which rate rows cross
WARM_UP_TOKENS = 8  # drafted before the first prompt, to compile kernels and to learn what a draft costs


class LanguageAgent:
    """One model on the device, and the clouds that hold the large one. Answers from several threads at once."""

    def __init__(self, config: LanguageConfig, metrics: LanguageMetrics | None = None) -> None:
        """Raises BundleError, InvalidInput."""
        self.config = config
        checkpoint = Checkpoint.open(config.model)
        small = Checkpoint.open(config.device_model) if config.device_model else checkpoint
        if small.tokenizer.fingerprint != checkpoint.tokenizer.fingerprint:
            raise BundleError(
                f"{small.name} has another tokenizer than {checkpoint.name}: its drafts would mean nothing"
            )
        self.name = checkpoint.name
        self.tokenizer = checkpoint.tokenizer
        self.device_context = min(config.context, small.config.context)
        self.context = checkpoint.config.context if config.clouds else self.device_context
        self._vocab = min(checkpoint.config.vocab, small.config.vocab)  # they may be padded differently
        self._metrics = metrics
        self._handoff = Handoff.open(config.handoff, checkpoint) if config.handoff else None
        if self._handoff and small is not checkpoint:
            raise InvalidInput("hand-off shares one model by layers: a device model of its own has no part in that")
        cuts = self._handoff.depths if self._handoff else ()
        decoder = OnnxDecoder(small, self.device_context, config.device_bits, config.threads, cuts)
        self._model = ModelDraft(decoder)
        self._exits = ExitingDecoder(self._handoff, small, decoder, config.threads) if self._handoff else None
        self._device = threading.Lock()  # the device's model has one cache
        self._tempo = Tempo(acceptance=Acceptance(PRIOR_ACCEPTANCE[config.device_bits]))
        for _ in range(WARM_UP_TOKENS):
            started_s = time.monotonic()
            decoder.extend([0])
            self._tempo.draft_s.observe(time.monotonic() - started_s)
        decoder.truncate(0)
        self._lookup_tempo = Tempo()
        self._lookup_tempo.draft_s.observe(0.0)
        links = [self._link(target, checkpoint) for target in config.clouds]
        self.replicas = Replicas(links, checkpoint.fingerprint, config.wait_s)
        for link in links:
            link.wait_probed(config.connect_s)

    def arms(self) -> tuple[Arm, ...]:
        """Those that can be asked for: without a cloud only edge, without a bundle of exits no handoff."""
        if not self.config.clouds:
            return ("edge",)
        return ("edge", "cloud", "verify", "handoff") if self._handoff else ("edge", "cloud", "verify")

    def generate(self, ask: Ask) -> Iterator[Token | Summary]:
        """Tokens as they are committed, and last a Summary. Closing it ends the cloud session. Raises IsthmusError."""
        ask = self._checked(ask)
        if ask.arm == "edge":
            return self._counted(self._edge(ask))
        if ask.arm == "handoff":
            return self._counted(self._handover(ask))
        return self._counted(self._with_cloud(ask))

    def close(self) -> None:
        """End the links."""
        self.replicas.close()

    def __enter__(self) -> LanguageAgent:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _link(self, target: str, checkpoint: Checkpoint) -> Link:
        return Link(target, checkpoint.fingerprint, (checkpoint.config.vocab,), self.config.tls, BREAKER)

    def _checked(self, ask: Ask) -> Ask:
        """The ask, its answer no longer than the context leaves room for."""
        context = self.device_context if ask.arm in ("edge", "handoff") else self.context
        if ask.arm not in self.arms():
            needs = "a cloud" if not self.config.clouds else "a bundle of exits"
            raise InvalidInput(f"arm {ask.arm} needs {needs}, and none is configured")
        if not ask.prompt:
            raise InvalidInput("the prompt has no tokens, at least one is needed")
        if ask.max_tokens < 1:
            raise InvalidInput(f"max_tokens is {ask.max_tokens}, expected at least 1")
        room = context - len(ask.prompt)
        if room < 1:
            raise InvalidInput(
                f"the prompt has {len(ask.prompt)} tokens, arm {ask.arm} holds {context} with the answer"
            )
        if not 0 <= min(ask.prompt) <= max(ask.prompt) < self._vocab:
            raise InvalidInput(f"a token of the prompt is outside of the vocabulary of {self._vocab}")
        return replace(ask, max_tokens=min(ask.max_tokens, room))

    def _edge(self, ask: Ask) -> Generator[Token | Summary, None, None]:
        text = list(ask.prompt)
        with self._device:
            for made in range(1, ask.max_tokens + 1):
                token = edge_token(self._model.logits(text), ask, len(text))
                text.append(token.id)
                yield token
                if token.id in self.tokenizer.eos_ids:
                    yield Summary("stop", len(ask.prompt), made, "edge", "asked for")
                    return
        yield Summary("length", len(ask.prompt), ask.max_tokens, "edge", "asked for")

    def _with_cloud(self, ask: Ask) -> Generator[Token | Summary, None, None]:
        mine = self._device.acquire(blocking=False)  # while another answer has it, the cloud decodes alone
        answer = None
        try:
            draft, tempo = self._draft(ask, mine)
            alone = partial(self._alone, ask) if mine and self.config.on_loss == "alone" else None
            answer = Collaboration(ask, self.tokenizer.eos_ids, self.replicas, tempo, draft, alone)
            made = 0
            with closing(answer.tokens()) as tokens:
                for token in tokens:
                    made += 1
                    yield token
            yield summary(ask, answer, made)
        finally:
            if answer is not None:
                answer.close()
            if mine:
                self._device.release()

    def _handover(self, ask: Ask) -> Generator[Token | Summary, None, None]:
        assert self._handoff is not None and self._exits is not None
        with self._device:
            terms = terms_of(self._handoff.manifest, self.config)
            wait = self.config.on_loss == "wait"
            eos_ids = self.tokenizer.eos_ids
            answer = Handover(ask, eos_ids, self.replicas, self._exits, self._handoff, terms, wait)
            try:
                made = 0
                with closing(answer.tokens()) as tokens:
                    for token in tokens:
                        made += 1
                        yield token
                yield summary(ask, answer, made)
            finally:
                answer.close()

    def _draft(self, ask: Ask, mine: bool) -> tuple[Draft | None, Tempo]:
        if ask.arm == "verify" and self.config.draft == "lookup":
            return LookupDraft(), self._lookup_tempo
        fits = len(ask.prompt) < self.device_context  # beyond it, in mid-answer, the cloud goes on by itself
        if ask.arm == "verify" and self.config.draft == "model" and mine and fits:
            return self._model, self._tempo
        return None, self._tempo

    def _alone(self, ask: Ask, text: Sequence[int]) -> Token | None:
        if len(text) > self.device_context:
            return None
        return edge_token(self._model.logits(text), ask, len(text))

    def _counted(self, events: Generator[Token | Summary, None, None]) -> Iterator[Token | Summary]:
        if self._metrics is None:
            return events
        return self._metrics.watch(events)


def edge_token(logits_V: Floats, ask: Ask, position: int) -> Token:
    """A token that the device decides by itself."""
    id_ = choose(logits_V, ask.sampling, position)
    if ask.top_logprobs is None:
        return Token(id_, "edge")
    return Token(id_, "edge", *logprobs(logits_V, id_, ask.top_logprobs))


def terms_of(manifest: HandoffManifest, config: LanguageConfig) -> Terms:
    """When exits are believed and how rows cross, as the owner wants it. Raises InvalidInput for a rate that is not."""
    good = [threshold.confidence for threshold in manifest.thresholds if threshold.agreement >= config.agreement]
    if config.state_rate is not None and not 0 <= config.state_rate < len(manifest.rates):
        raise InvalidInput(f"rate {config.state_rate} does not exist, there are 0 to {len(manifest.rates) - 1}")
    best = max(rate.agreement for rate in manifest.rates)
    near = [index for index, rate in enumerate(manifest.rates) if rate.agreement >= best - LOST_TO_CODING]
    return Terms(min(good, default=NEVER), min(near) if config.state_rate is None else config.state_rate, config.fill)


def summary(ask: Ask, answer: CloudAnswer, made: int) -> Summary:
    tally = answer.tally
    return Summary(
        finish=answer.finish,
        prompt_tokens=len(ask.prompt),
        tokens=made,
        arm=ask.arm,
        why=tally.why,
        accepted=tally.accepted,
        rejected=tally.rejected,
        rounds=tally.rounds,
        passes=tally.passes,
        prefill_passes=tally.prefill_passes,
        opening_bytes=tally.opening_bytes,
        cached=min(tally.cached, len(ask.prompt)),
        bytes_up=tally.bytes_up,
        bytes_down=tally.bytes_down,
        rtt_s=tally.rtt_s,
        cloud_s=tally.cloud_s,
        degraded=tally.degraded,
    )
