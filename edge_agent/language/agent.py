"""Prompt to tokens: on the device alone, by the cloud alone, or drafted here and confirmed there.

    GenerationRequest -> edge:   the device's own model, nothing leaves it
        -> cloud:  prompt up, tokens down            (VerifyArm without a draft)
        -> verify: drafts up, confirmations down     (VerifyArm with one)
        -> handoff: exits here, coded rows up where none is sure    (HandoffArm)
        -> auto:   whichever of these keeps the quality and is best now    (Auto)

Knows nothing about text beyond the tokenizer it hands on, and nothing about HTTP.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial

from isthmus.edge_agent.config import LanguageConfig
from isthmus.edge_agent.language.arms.auto import Auto, LocalModel
from isthmus.edge_agent.language.arms.handoff import HandoffArm, HandoffSettings
from isthmus.edge_agent.language.arms.verify import SpeculationStats, VerifyArm
from isthmus.edge_agent.language.cloud_answer import ASKED, CloudAnswer
from isthmus.edge_agent.language.metrics import LanguageMetrics
from isthmus.edge_agent.language.replicas import Replicas
from isthmus.edge_agent.language.request import Arm, GenerationRequest, Summary, Token, edge_token
from isthmus.edge_agent.policy.arms import (
    ArmPlan,
    ConfidenceStats,
    HandoffEstimate,
    LocalEstimate,
    RoutingGoal,
    choose,
    level_for,
    offers,
)
from isthmus.edge_agent.policy.breaker import BreakerLimits
from isthmus.edge_agent.policy.speculation import Acceptance
from isthmus.edge_agent.transport.link import Link
from isthmus.models.errors import BundleError, InvalidInput
from isthmus.models.language.architecture import LlamaConfig
from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.language.drafts import Draft, LookupDraft, ModelDraft
from isthmus.models.language.handoff.bundle import HandoffBundle
from isthmus.models.language.handoff.manifest import HandoffManifest, OffloadLevel, StatePoint, least_likely
from isthmus.models.language.onnx.decoder import OnnxDecoder
from isthmus.models.language.onnx.exits import ExitingDecoder
from isthmus.models.language.sampling import Floats

# A stream that breaks says so at once, and others wait: one failure is enough, and probes come soon and often.
BREAKER = BreakerLimits(failures=1, first_s=0.25, last_s=2.0)

PRIOR_ACCEPTANCE = {8: 0.95, 4: 0.75}  # of drafts by a copy with so many bits, until its own are known
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
        handoff = HandoffBundle.open(config.handoff, checkpoint) if config.handoff else None
        if handoff and small is not checkpoint:
            raise InvalidInput("hand-off shares one model by layers: a device model of its own has no part in that")
        cuts = handoff.depths if handoff else ()
        decoder = OnnxDecoder(small, self.device_context, config.device_bits, config.threads, cuts)
        self._decoder, self._model = decoder, ModelDraft(decoder)
        self._shared: tuple[ExitingDecoder, HandoffBundle, HandoffSettings] | None = None  # what the arm handoff needs
        self._layers: HandoffEstimate | None = None  # what that is worth
        judge, self._levels = None, tuple[OffloadLevel, ...]()
        if handoff:
            exits = ExitingDecoder(handoff, small, decoder, config.threads)
            self._shared = exits, handoff, terms_of(handoff.manifest, config)
            self._layers = shared_of(handoff.manifest, self._shared[2], checkpoint.config)
            if found := handoff.local_model(config.device_bits):
                judge, self._levels = found
        self._device = threading.Lock()  # the device's model has one cache
        prior = 1 - self._levels[0].wrong if self._levels else PRIOR_ACCEPTANCE[config.device_bits]
        self._tempo = SpeculationStats(acceptance=Acceptance(prior))
        self._copy = LocalModel(self._logits, self.device_context, judge, ConfidenceStats(self._tempo.acceptance))
        for _ in range(WARM_UP_TOKENS):
            started_s = time.monotonic()
            decoder.extend([0])
            self._tempo.draft_s.observe(time.monotonic() - started_s)
        decoder.truncate(0)
        self._lookup_tempo = SpeculationStats()
        self._lookup_tempo.draft_s.observe(0.0)
        links = [self._link(target, checkpoint) for target in config.clouds]
        self.replicas = Replicas(links, checkpoint.fingerprint, config.wait_s)
        for link in links:
            link.wait_probed(config.connect_s)

    def arms(self) -> tuple[Arm, ...]:
        """Those that can be asked for: without a cloud only edge and auto, without a bundle of exits no handoff."""
        if not self.config.clouds:
            return ("auto", "edge")
        return ("auto", "edge", "cloud", "verify", *(("handoff",) if self._shared else ()))

    def generate(self, ask: GenerationRequest) -> Iterator[Token | Summary]:
        """Tokens as they are committed, and last a Summary. Closing it ends the cloud session. Raises IsthmusError."""
        ask = self._checked(ask)
        return self._counted(self._answered(ask))

    def close(self) -> None:
        """End the links."""
        self.replicas.close()

    def __enter__(self) -> LanguageAgent:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _link(self, target: str, checkpoint: Checkpoint) -> Link:
        return Link(target, checkpoint.fingerprint, (checkpoint.config.vocab,), self.config.tls, BREAKER)

    def _checked(self, ask: GenerationRequest) -> GenerationRequest:
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
        if ask.quality is not None and not 0 <= ask.quality <= 1:
            raise InvalidInput(f"quality is {ask.quality}, expected 0 to 1")
        return replace(ask, max_tokens=min(ask.max_tokens, room))

    def _answered(self, ask: GenerationRequest) -> Generator[Token | Summary, None, None]:
        if ask.arm == "edge" or not self.config.clouds:
            return self._edge(ask)
        if ask.arm == "handoff":
            return self._handover(ask)
        return self._auto(ask) if ask.arm == "auto" else self._with_cloud(ask)

    def _edge(self, ask: GenerationRequest) -> Generator[Token | Summary, None, None]:
        text, why = list(ask.prompt), ASKED if ask.arm == "edge" else "no cloud is configured"
        with self._device:
            for made in range(1, ask.max_tokens + 1):
                token = edge_token(self._logits(text), ask, len(text))
                text.append(token.id)
                yield token
                if token.id in self.tokenizer.eos_ids:
                    yield Summary("stop", len(ask.prompt), made, "edge", why)
                    return
        yield Summary("length", len(ask.prompt), ask.max_tokens, "edge", why)

    def _with_cloud(self, ask: GenerationRequest) -> Generator[Token | Summary, None, None]:
        with self._device_if_free() as mine:
            yield from told(ask, self._begun(ask, mine))

    def _handover(self, ask: GenerationRequest) -> Generator[Token | Summary, None, None]:
        with self._device:
            yield from told(ask, self._begun(ask, True))

    def _auto(self, ask: GenerationRequest) -> Generator[Token | Summary, None, None]:
        quality = self.config.quality if ask.quality is None else ask.quality
        wish = RoutingGoal(quality, self.config.objective, self.config.prices)
        with self._device_if_free() as mine:
            copy = self._copy if mine else None
            route, begin = partial(self._plan, wish), partial(self._begun, mine=mine)
            yield from told(ask, Auto(ask, self.tokenizer.eos_ids, copy, route, begin))

    @contextmanager
    def _device_if_free(self) -> Iterator[bool]:
        """Whether the device's model is this answer's: while another one has it, the cloud decodes alone."""
        mine = self._device.acquire(blocking=False)
        try:
            yield mine
        finally:
            if mine:
                self._device.release()

    def _begun(self, ask: GenerationRequest, mine: bool) -> CloudAnswer:
        """An answer by one of the cloud's arms. `mine`: it may use the device's model."""
        alone = partial(self._alone, ask) if mine and self.config.on_loss == "alone" else None
        if ask.arm == "handoff":
            assert self._shared is not None
            return HandoffArm(ask, self.tokenizer.eos_ids, self.replicas, *self._shared, alone)
        draft = self._draft(ask, mine)
        tempo = self._lookup_tempo if isinstance(draft, LookupDraft) else self._tempo
        layers = self.config.prefill_layers
        return VerifyArm(ask, self.tokenizer.eos_ids, self.replicas, tempo, draft, alone, layers)

    def _plan(self, wish: RoutingGoal, usable: bool, now: Arm | None) -> ArmPlan:
        """What the router says, by what is believed at present. `usable`: the device's copy can go on."""
        link = self.replicas.best() or next(iter(self.replicas))
        tempo = self._lookup_tempo if self.config.draft == "lookup" else self._tempo
        own = None
        if usable and wish.quality <= 0:
            own = LocalEstimate(likely=0, asked=0)
        elif usable and wish.quality < 1 and (level := level_for(self._levels, wish.quality)):
            own = self._copy.doubts.on(level)
        drafts = usable or self.config.draft == "lookup"
        layers = self._layers if usable else None
        found = offers(wish, tempo.pace(link), drafts, self._tempo.draft_s.value, own, layers)
        return choose(found, wish, now)

    def _draft(self, ask: GenerationRequest, mine: bool) -> Draft | None:
        if ask.arm == "verify" and self.config.draft == "lookup":
            return LookupDraft()
        fits = len(ask.prompt) < self.device_context  # beyond it, in mid-answer, the cloud goes on by itself
        return self._model if ask.arm == "verify" and mine and fits else None

    def _alone(self, ask: GenerationRequest, text: Sequence[int]) -> Token | None:
        if len(text) > self.device_context:
            return None
        return edge_token(self._logits(text), ask, len(text))

    def _logits(self, text: Sequence[int]) -> Floats:
        """Of the device's model behind a text; the time of single tokens is remembered."""
        started_s, known = time.monotonic(), self._decoder.length
        logits_V = self._model.logits(text)
        if self._decoder.length == known + 1:
            self._tempo.draft_s.observe(time.monotonic() - started_s)
        return logits_V

    def _counted(self, events: Generator[Token | Summary, None, None]) -> Iterator[Token | Summary]:
        if self._metrics is None:
            return events
        return self._metrics.watch(events)


def terms_of(manifest: HandoffManifest, config: LanguageConfig) -> HandoffSettings:
    """When exits are believed and how rows cross, as the owner wants it. Raises InvalidInput."""
    likely = least_likely(manifest.thresholds, config.agreement)
    return HandoffSettings(likely, point_of(manifest, config.state_point), config.fill)


def point_of(manifest: HandoffManifest, index: int | None) -> StatePoint:
    """How rows cross; None: the cheapest point that loses little. Raises InvalidInput for one that does not exist."""
    points = manifest.points
    if index is None:
        least = max(point.agreement for point in points) - LOST_TO_CODING
        return next(point for point in points if point.agreement >= least)
    if not 0 <= index < len(points):
        raise InvalidInput(f"point {index} does not exist, there are 0 to {len(points) - 1}")
    return points[index]


def shared_of(manifest: HandoffManifest, terms: HandoffSettings, config: LlamaConfig) -> HandoffEstimate:
    """What layers shared are worth on these terms, as the bundle measured it."""
    found = min(manifest.thresholds, key=lambda threshold: abs(threshold.confidence - terms.likely))
    decided = found.coverage if terms.likely <= 1 else 0.0
    right = decided * found.agreement + (1 - decided) * terms.point.agreement
    return HandoffEstimate(right, 1 - decided, 1 - manifest.depth / config.layers, terms.point.mean_bytes)


def told(ask: GenerationRequest, answer: CloudAnswer | Auto) -> Generator[Token | Summary, None, None]:
    """An answer's tokens and last its summary; however it ends, its session is remembered."""
    made = 0
    try:
        with closing(answer.tokens()) as tokens:
            for token in tokens:
                made += 1
                yield token
        yield summary(ask, answer, made)
    finally:
        answer.close()


def summary(ask: GenerationRequest, answer: CloudAnswer | Auto, made: int) -> Summary:
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
        spans=tuple(tally.spans),
    )
