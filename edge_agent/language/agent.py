"""Prompt to tokens: by the device's model, by the cloud's, or by both.

    GenerationRequest -> edge:    the device's model; nothing leaves the device
                      -> cloud:   prompt up, tokens down
                      -> verify:  drafts up, accepted count and a correction down
                      -> handoff: exits here, coded hidden states up where none is confident
                      -> cascade: the device's whole answer, or the cloud's where that is not good enough
                      -> auto:    whichever of these keeps the quality and is best now

Either side may be absent. Knows nothing about text beyond the tokenizers that it hands on, and nothing about HTTP.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from isthmus.edge_agent.config import LanguageConfig
from isthmus.edge_agent.cost_profiles import open_profile
from isthmus.edge_agent.language.available import NO_CLOUD, Sides
from isthmus.edge_agent.language.charges import Tariff
from isthmus.edge_agent.language.cloud_model import CloudModel, ReplicaMatch, label
from isthmus.edge_agent.language.generation import Generation, Resources
from isthmus.edge_agent.language.metrics import LanguageMetrics
from isthmus.edge_agent.language.replicas import Replicas
from isthmus.edge_agent.language.request import GenerationRequest, Summary, Token
from isthmus.edge_agent.language.router import Router
from isthmus.edge_agent.language.scoring import score_locally, score_remotely
from isthmus.edge_agent.language.text import TextInterface
from isthmus.edge_agent.language.tokenizer_cache import TokenizerCache, cache_folder
from isthmus.edge_agent.ledger import Ledger, default_path
from isthmus.edge_agent.lifetime import Lifetime
from isthmus.edge_agent.policy.arms import ARMS, Arm
from isthmus.edge_agent.policy.breaker import BreakerLimits
from isthmus.edge_agent.policy.exploration import ProbeSchedule
from isthmus.edge_agent.radio import probe_charge
from isthmus.edge_agent.transport.language_link import LanguageLink
from isthmus.models.errors import AnswerCancelled, ContextExceeded, InvalidInput
from isthmus.models.language.checkpoint.tokenizer import Tokenizer
from isthmus.models.language.grammar import Grammars, LastGrammars
from isthmus.models.language.router.manifest import best_quality
from isthmus.models.messages import Sampling

if TYPE_CHECKING:
    from isthmus.edge_agent.language.device_model import DeviceModel

# A stream that breaks says so at once, and others wait: one failure is enough, and probes come soon and often.
BREAKER = BreakerLimits(failures=1, first_s=0.25, last_s=2.0)
log = logging.getLogger("isthmus.edge")
UNKNOWN_NAME = "cloud"  # of the model, until a cloud has answered


class LanguageAgent(TextInterface):
    """One model on the device, the clouds that hold another, or both. Close it, or use it in `with`.

    Answers from several threads at once, in the process that made it: after a fork it raises AgentClosed, and the child
    makes an agent of its own.
    """

    def __init__(self, config: LanguageConfig, metrics: LanguageMetrics | None = None) -> None:
        """Raises BundleError, InvalidInput."""
        if not isinstance(config, LanguageConfig):
            raise InvalidInput(f"config is {type(config).__name__}, expected a LanguageConfig")
        self.config = config
        self.ledger = Ledger(config.budgets.budgets, config.ledger or default_path())
        profile = open_profile(config.profile, config.prices)
        tariff = Tariff(self.ledger, profile)
        self._probe_charge = probe_charge(self.ledger, profile, tariff.radio)
        self._lifetime = Lifetime()
        self._metrics = metrics
        self._device = device = open_device(config)
        self._grammars = LastGrammars()
        router, local = Router(config, prices=profile.prices), None
        if device is not None:
            weights = device.fingerprint if device.handoff else b""
            router = Router(config, device.routers, device.estimate, weights, profile.prices)
            local = device.start(router.local)
        self._cloud = CloudModel(config.cloud_model, device, TokenizerCache(cache_folder("tokenizers")))
        links = [self._link(target) for target in config.clouds]
        self.replicas = Replicas(links, self._cloud, config.wait_s)
        self._resources = Resources(
            config=config,
            local=local,
            vocabulary=device.tokenizer.vocabulary if device else b"",
            replicas=self.replicas,
            router=router,
            handoff=device.handoff if device else None,
            grammars=self._grammars_of,
            tariff=tariff,
        )
        until_s = time.monotonic() + config.connect_s
        for link in links:
            link.wait_probed(max(until_s - time.monotonic(), 0.0))

    @property
    def name(self) -> str:
        """Of the device's model, or of the cloud's where there is no other."""
        return self._device.name if self._device else self.cloud_name or self.config.cloud_model or UNKNOWN_NAME

    @property
    def has_model(self) -> bool:
        """Whether there is a model on the device."""
        return self._device is not None

    @property
    def ready(self) -> bool:
        """Whether prompts can be encoded: by the device's tokenizer, or by that of a cloud that has answered."""
        return self.has_model or self._cloud.bound is not None

    @property
    def cloud_name(self) -> str | None:
        """Of the cloud's model; None until a cloud has answered."""
        model = self._cloud.info
        return label(model) if model else None

    @property
    def aliases(self) -> tuple[str, ...]:
        """Other names of the model: the cloud's is one."""
        own = self._device.aliases if self._device else ()
        return own if self.cloud_name in (None, self.name) else (*own, self.cloud_name)

    @property
    def tokenizer(self) -> Tokenizer:
        """What encodes prompts for the arm auto."""
        return self.tokenizer_for("auto")

    @property
    def context(self) -> int:
        """Tokens of prompt and answer together, by the arm auto."""
        return self.arm_context("auto")

    @property
    def device_context(self) -> int:
        """Tokens that the device's model holds; 0 without one."""
        return self._device.context if self._device else 0

    def arms(self) -> tuple[Arm, ...]:
        """Those that can be requested: what the device can do, and what the cloud's model is known to serve."""
        return self._sides.arms()

    def arm_context(self, arm: Arm) -> int:
        """Tokens of prompt and answer together, by this arm."""
        device, model = self._device, self._cloud.info
        if device is not None and (arm in ("edge", "handoff") or not self.config.clouds):
            return device.context
        if device is not None and not self._cloud_tokens(arm):
            routed = arm == "cascade" or self._sides.routes_answers
            return max(device.context, model.context) if model and routed else device.context
        if model is not None:
            return model.context
        return device.model_context if device else 0

    def tokenizer_for(self, arm: Arm) -> Tokenizer:
        """What encodes prompts for an arm: the cloud's tokenizer, unless a device of another vocabulary answers.

        Without a model on the device this waits for a cloud. Raises InvalidInput, and as Replicas.wait_model.
        """
        if (refusal := self._sides.refusal("edge")) is not None:
            if arm == "edge":
                raise InvalidInput(refusal)
            self.replicas.wait_model(threading.Event())
        bound = self._cloud.bound
        if self._device is None or (bound is not None and self._cloud_tokens(arm)):
            assert bound is not None  # it was waited for
            return bound.tokenizer
        return self._device.tokenizer

    def status(self) -> dict[str, Any]:
        """What /v1/status says of prompts: the models, and the router bundle of both or why there is none."""
        model, bundles = self._cloud.info, self._resources.router.bundles
        bundle = bundles.for_cloud(model)
        missing = self._device is not None and model is not None and bundle is None
        return {
            "model": self._device.name if self._device else None,
            "cloud_model": self.cloud_name,
            "router": bundle.manifest.name if bundle else None,
            "router_problem": bundles.missing(model) if missing and model is not None else None,
            "router_quality": best_quality(bundle.levels) if bundle else None,
        }

    def generate(
        self, request: GenerationRequest, cancelled: threading.Event | None = None
    ) -> Iterator[Token | Summary]:
        """Tokens as they are committed, and last a Summary. Closing it ends the cloud session.

        `cancelled`, set from another thread, ends a wait for the device's model or the cloud. Raises IsthmusError.
        """
        self._lifetime.check()
        events = self._stream_events(*self._checked(request, cancelled), cancelled)
        return events if self._metrics is None else self._metrics.watch(events)

    def score(self, request: GenerationRequest, cancelled: threading.Event | None = None) -> list[Token]:
        """The prompt's tokens with log probabilities, of which the first has none. Raises IsthmusError.

        By the device's model (`edge`, `auto` with one), or by the cloud's (`cloud`, `verify`, `auto` without).
        """
        self._lifetime.check()
        check_values(replace(request, max_tokens=1))
        local, device = self._resources.local, self._device
        if request.arm in ("cloud", "verify") or (request.arm == "auto" and device is None):
            if refusal := self._sides.refusal("cloud"):
                raise InvalidInput(refusal)
            return score_remotely(self._resources, request, cancelled or threading.Event())
        if request.arm not in ("edge", "auto") or local is None or device is None:
            raise InvalidInput(f"arm {request.arm} has no log probabilities of prompts, the arms edge and cloud have")
        if request.vocabulary not in (b"", device.tokenizer.vocabulary):
            raise InvalidInput("the prompt was encoded by another tokenizer than arm edge has: encode it again")
        if not 0 <= min(request.prompt) <= max(request.prompt) < device.vocab:
            raise InvalidInput(f"a token of the prompt is outside of the vocabulary of {device.vocab}")
        with closing(local.session(cancelled)) as session:
            return score_locally(session, request)

    def close(self) -> None:
        """End the links. Later requests raise AgentClosed."""
        self._lifetime.closed = True
        self.replicas.close()
        self.ledger.close()

    def __enter__(self) -> LanguageAgent:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _link(self, target: str) -> LanguageLink:
        probes = ProbeSchedule(self.config.probe_bytes_per_hour / len(self.config.clouds), self._probe_charge)
        return LanguageLink(target, ReplicaMatch(self._cloud, target), self.config.tls, BREAKER, probes=probes)

    def _grammars_of(self, vocabulary: bytes) -> Grammars:
        """Of a tokenizer that reads the ids of an answer: the cloud's, or the device's own."""
        bound, device = self._cloud.bound, self._device
        own = device is not None and vocabulary in (b"", device.tokenizer.vocabulary)
        tokenizer = device.tokenizer if device is not None and own else bound.tokenizer if bound else None
        assert tokenizer is not None  # the prompt was encoded by one of them
        return self._grammars.of(tokenizer)

    @property
    def _sides(self) -> Sides:
        return Sides(self.config, self._device, self._cloud.info)

    def _cloud_tokens(self, arm: Arm) -> bool:
        """Whether an arm's ids are of the cloud's vocabulary. Where the device's is another, one side answers alone."""
        if self._sides.one_vocabulary:
            return True
        if arm == "auto":
            return self.replicas.best() is not None and not self._sides.routes_answers
        return arm in ("cloud", "verify")

    def _checked(
        self, request: GenerationRequest, cancelled: threading.Event | None
    ) -> tuple[GenerationRequest, str | None]:
        """The request with the arm that answers it, and why that is not the one requested; None: it is.

        Its answer is no longer than the context leaves room for.
        """
        if not isinstance(request, GenerationRequest):
            raise InvalidInput(f"a request is a GenerationRequest, got {type(request).__name__}; `answer` takes text")
        if request.arm not in ARMS:
            raise InvalidInput(f"arm {request.arm!r} does not exist, there are {', '.join(ARMS)}")
        check_values(request)
        if self._device is None and request.arm != "edge":
            self.replicas.wait_model(cancelled or threading.Event())
        sides = self._sides
        if refusal := sides.refusal(request.arm):
            raise InvalidInput(refusal)
        request = replace(request, vocabulary=request.vocabulary or self.tokenizer_for(request.arm).vocabulary)
        arm, reason = sides.resolve(request)
        if refusal := sides.sampling_refusal(arm, request.sampling):
            raise InvalidInput(refusal)
        context = self.arm_context(arm)
        room = context - len(request.prompt)
        if room < 1:
            raise ContextExceeded(
                f"the prompt has {len(request.prompt)} tokens, arm {arm} holds {context} with the answer"
            )
        vocab = sides.vocab(arm, request.vocabulary)
        if not 0 <= min(request.prompt) <= max(request.prompt) < vocab:
            raise InvalidInput(f"a token of the prompt is outside of the vocabulary of {vocab}")
        if (id_ := max((id_ for id_, _ in request.sampling.logit_bias), default=0)) >= vocab:
            raise InvalidInput(f"logit_bias names token {id_}, outside of the vocabulary of {vocab}")
        return replace(request, arm=arm, max_tokens=min(request.max_tokens, room)), reason

    def _stream_events(
        self, request: GenerationRequest, reason: str | None, cancelled: threading.Event | None
    ) -> Generator[Token | Summary, None, None]:
        """An answer's tokens and last its summary; however it ends, its sessions are remembered."""
        end_ids = self._sides.end_ids(request)
        other = not self._sides.one_vocabulary and reason is not None and request.arm == "cloud"
        made = Generation(self._resources, request, end_ids, cancelled, replaceable=other, free=reason is not None)
        with closing(made) as generation:
            generation.stats.reason = reason or generation.stats.reason
            generation.stats.degraded = reason == NO_CLOUD
            try:
                with closing(generation.arm(request.arm).tokens()) as tokens:
                    yield from generation.stats.clock.pausing(tokens)
            except BaseException as error:  # closed by whoever reads it, or failed
                generation.close()
                if self._metrics:
                    closed = isinstance(error, (GeneratorExit, AnswerCancelled))
                    summary = replace(generation.stats.summary(generation.answered), arm=request.arm)
                    self._metrics.count_unfinished(summary, "closed" if closed else "failed")
                raise
            generation.close()  # counts what the streams carried
            yield replace(generation.stats.summary(generation.answered), arm=request.arm)


def check_values(request: GenerationRequest) -> None:
    """Raises InvalidInput for what no arm can answer."""
    if not request.prompt:
        raise InvalidInput("the prompt has no tokens, at least one is needed")
    if not isinstance(request.max_tokens, int) or request.max_tokens < 1:
        raise InvalidInput(f"max_tokens is {request.max_tokens!r}, expected a whole number, at least 1")
    if not isinstance(request.sampling, Sampling):
        raise InvalidInput(f"sampling is {type(request.sampling).__name__}, expected a Sampling")
    if request.quality is not None and not 0 <= request.quality <= 1:
        raise InvalidInput(f"quality is {request.quality}, expected 0 to 1")


def open_device(config: LanguageConfig) -> DeviceModel | None:
    """The device's own model; None where none is configured. Raises BundleError, InvalidInput."""
    if config.model is None:
        if not config.clouds:
            raise InvalidInput("an agent for prompts needs a model, a cloud, or both, and none is configured")
        if config.handoff is not None:
            raise InvalidInput("a handoff bundle belongs to the device's model, and none is configured")
        return None
    from isthmus.edge_agent.language.device_model import DeviceModel  # brings ONNX Runtime

    return DeviceModel(config, config.model)
