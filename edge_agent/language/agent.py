"""Prompt to tokens: by the local model, by the cloud's, or by both.

    GenerationRequest -> edge:    the local model; nothing leaves the device
                      -> cloud:   prompt up, tokens down
                      -> verify:  drafts up, accepted count and a correction down
                      -> handoff: exits here, coded hidden states up where none is confident
                      -> auto:    whichever of these keeps the quality and is best now

Knows nothing about text beyond the tokenizer that it hands on, and nothing about HTTP.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import replace

from isthmus.edge_agent.config import LanguageConfig
from isthmus.edge_agent.language.arms.handoff import HandoffSettings, estimate_of, settings_of
from isthmus.edge_agent.language.generation import Generation, Resources
from isthmus.edge_agent.language.local_model import LocalModel
from isthmus.edge_agent.language.metrics import LanguageMetrics
from isthmus.edge_agent.language.replicas import Replicas
from isthmus.edge_agent.language.request import GenerationRequest, Summary, Token
from isthmus.edge_agent.language.router import Router
from isthmus.edge_agent.language.text import TextInterface
from isthmus.edge_agent.lifetime import Lifetime
from isthmus.edge_agent.policy.arms import ARMS, Arm
from isthmus.edge_agent.policy.breaker import BreakerLimits
from isthmus.edge_agent.transport.language_link import LanguageLink
from isthmus.edge_agent.transport.link import HeldBundle
from isthmus.models.errors import AnswerCancelled, BundleError, ContextExceeded, InvalidInput
from isthmus.models.language.checkpoint.checkpoint import SMOLLM2, Checkpoint
from isthmus.models.language.handoff.bundle import HandoffBundle
from isthmus.models.language.onnx.decoder import OnnxDecoder
from isthmus.models.language.onnx.exits import ExitingDecoder
from isthmus.models.messages import Sampling

# A stream that breaks says so at once, and others wait: one failure is enough, and probes come soon and often.
BREAKER = BreakerLimits(failures=1, first_s=0.25, last_s=2.0)
WARM_UP_TOKENS = 8  # drafted before the first prompt, to compile kernels and to learn what a draft costs


class LanguageAgent(TextInterface):
    """One model on the device, and the clouds that hold the large one. Close it, or use it in `with`.

    Answers from several threads at once, in the process that made it: after a fork it raises AgentClosed, and the child
    makes an agent of its own.
    """

    def __init__(self, config: LanguageConfig, metrics: LanguageMetrics | None = None) -> None:
        """Raises BundleError, InvalidInput."""
        if not isinstance(config, LanguageConfig):
            raise InvalidInput(f"config is {type(config).__name__}, expected a LanguageConfig")
        self.config = config
        self._lifetime = Lifetime()
        checkpoint = Checkpoint.open(config.model)
        small = open_local(config, checkpoint)
        self.name = checkpoint.name
        self.aliases = (SMOLLM2,) if config.model == SMOLLM2 else ()
        self.sampling = checkpoint.sampling
        self.tokenizer = checkpoint.tokenizer
        self.device_context = min(config.context, small.config.context)
        self.context = checkpoint.config.context if config.clouds else self.device_context
        self._vocab = min(checkpoint.config.vocab, small.config.vocab)  # they may be padded differently
        self._metrics = metrics
        handoff = open_handoff(config, checkpoint)
        local_entry = handoff[0].local_model(config.device_bits) if handoff else None
        confidence_head, levels = local_entry or (None, ())
        estimate = estimate_of(handoff[0].manifest, handoff[1], checkpoint.config) if handoff else None
        router = Router(config, levels, estimate)
        decoder = OnnxDecoder(
            small, self.device_context, config.device_bits, config.threads, handoff[0].depths if handoff else ()
        )
        exits = ExitingDecoder(handoff[0], small, decoder, config.threads) if handoff else None
        local = LocalModel(decoder, exits, router.local, caches=2 * config.max_answers)
        local.warm_up(WARM_UP_TOKENS)
        links = [self._link(target, checkpoint) for target in config.clouds]
        self.replicas = Replicas(links, checkpoint.fingerprint, config.wait_s)
        eos_ids = self.tokenizer.eos_ids
        self._resources = Resources(config, eos_ids, local, self.replicas, router, confidence_head, handoff)
        for link in links:
            link.wait_probed(config.connect_s)

    def arms(self) -> tuple[Arm, ...]:
        """Those that can be requested: without a cloud only edge and auto, without a bundle of exits no handoff."""
        if not self.config.clouds:
            return ("auto", "edge")
        return ("auto", "edge", "cloud", "verify", *(("handoff",) if self._resources.handoff else ()))

    def arm_context(self, arm: Arm) -> int:
        """Tokens of prompt and answer together, by this arm."""
        return self.device_context if arm in ("edge", "handoff") else self.context

    def generate(
        self, request: GenerationRequest, cancelled: threading.Event | None = None
    ) -> Iterator[Token | Summary]:
        """Tokens as they are committed, and last a Summary. Closing it ends the cloud session.

        `cancelled`, set from another thread, ends a wait for the device's model or the cloud. Raises IsthmusError.
        """
        self._lifetime.check()
        events = self._stream_events(self._checked(request), cancelled)
        return events if self._metrics is None else self._metrics.watch(events)

    def close(self) -> None:
        """End the links. Later requests raise AgentClosed."""
        self._lifetime.closed = True
        self.replicas.close()

    def __enter__(self) -> LanguageAgent:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _link(self, target: str, checkpoint: Checkpoint) -> LanguageLink:
        match = HeldBundle(checkpoint.fingerprint)
        return LanguageLink(target, match, checkpoint.config.vocab, self.config.tls, BREAKER)

    def _checked(self, request: GenerationRequest) -> GenerationRequest:
        """The request, its answer no longer than the context leaves room for."""
        if not isinstance(request, GenerationRequest):
            raise InvalidInput(f"a request is a GenerationRequest, got {type(request).__name__}; `answer` takes text")
        if request.arm not in ARMS:
            raise InvalidInput(f"arm {request.arm!r} does not exist, there are {', '.join(ARMS)}")
        context = self.arm_context(request.arm)
        if request.arm not in self.arms():
            needs = "a cloud" if not self.config.clouds else "a bundle of exits"
            raise InvalidInput(f"arm {request.arm} needs {needs}, and none is configured")
        if not request.prompt:
            raise InvalidInput("the prompt has no tokens, at least one is needed")
        if not isinstance(request.max_tokens, int) or request.max_tokens < 1:
            raise InvalidInput(f"max_tokens is {request.max_tokens!r}, expected a whole number, at least 1")
        room = context - len(request.prompt)
        if room < 1:
            raise ContextExceeded(
                f"the prompt has {len(request.prompt)} tokens, arm {request.arm} holds {context} with the answer"
            )
        if not 0 <= min(request.prompt) <= max(request.prompt) < self._vocab:
            raise InvalidInput(f"a token of the prompt is outside of the vocabulary of {self._vocab}")
        if not isinstance(request.sampling, Sampling):
            raise InvalidInput(f"sampling is {type(request.sampling).__name__}, expected a Sampling")
        if request.quality is not None and not 0 <= request.quality <= 1:
            raise InvalidInput(f"quality is {request.quality}, expected 0 to 1")
        return replace(request, max_tokens=min(request.max_tokens, room))

    def _stream_events(
        self, request: GenerationRequest, cancelled: threading.Event | None
    ) -> Generator[Token | Summary, None, None]:
        """An answer's tokens and last its summary; however it ends, its sessions are remembered."""
        alone = request.arm == "auto" and not self.config.clouds
        if alone:
            request = replace(request, arm="edge")
        with closing(Generation(self._resources, request, cancelled)) as generation:
            if alone:
                generation.stats.reason = "no cloud is configured"
            try:
                with closing(generation.arm(request.arm).tokens()) as tokens:
                    yield from generation.stats.clock.pausing(tokens)
            except BaseException as error:  # closed by whoever reads it, or failed
                generation.close()
                if self._metrics:
                    closed = isinstance(error, (GeneratorExit, AnswerCancelled))
                    summary = generation.stats.summary(generation.sequence)
                    self._metrics.count_unfinished(summary, "closed" if closed else "failed")
                raise
            generation.close()  # counts what the streams carried
            yield generation.stats.summary(generation.sequence)


def open_local(config: LanguageConfig, checkpoint: Checkpoint) -> Checkpoint:
    """The device's model: one of its own, or the cloud's. Raises BundleError for another tokenizer."""
    if not config.device_model:
        return checkpoint
    small = Checkpoint.open(config.device_model)
    if small.tokenizer.vocabulary != checkpoint.tokenizer.vocabulary:
        raise BundleError(f"{small.name} has another tokenizer than {checkpoint.name}: its drafts would mean nothing")
    return small


def open_handoff(config: LanguageConfig, checkpoint: Checkpoint) -> tuple[HandoffBundle, HandoffSettings] | None:
    """The handoff bundle, and how to use it. Raises BundleError, InvalidInput."""
    if not config.handoff:
        return None
    handoff = HandoffBundle.open(config.handoff, checkpoint)
    if config.device_model:
        raise InvalidInput("handoff shares one model by layers: a device model of its own has no part in that")
    return handoff, settings_of(handoff.manifest, config)
