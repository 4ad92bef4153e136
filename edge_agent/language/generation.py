"""One answer under way: the parts that its arms share, and the arm that a name stands for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from isthmus.edge_agent.config import LanguageConfig
from isthmus.edge_agent.language.arms.auto import AutoArm, LocalPredictor, RunningArm
from isthmus.edge_agent.language.arms.cascade import CascadeArm, DeviceDraft
from isthmus.edge_agent.language.arms.local import LocalArm
from isthmus.edge_agent.language.arms.remote import RemoteArm
from isthmus.edge_agent.language.arms.rounds import Rounds
from isthmus.edge_agent.language.arms.translated import TranslatedArm
from isthmus.edge_agent.language.arms.verify import VerifyArm
from isthmus.edge_agent.language.charges import FREE, Tariff
from isthmus.edge_agent.language.remote_query import RemoteQuery
from isthmus.edge_agent.language.remote_session import Fallback, MakeOpening, RemoteSession, token_opening
from isthmus.edge_agent.language.replicas import Replicas
from isthmus.edge_agent.language.request import GenerationRequest, Token
from isthmus.edge_agent.language.router import Router
from isthmus.edge_agent.language.sequence import AnswerSequence
from isthmus.edge_agent.language.stats import GenerationStats
from isthmus.edge_agent.policy.arms import Arm, ArmPlan
from isthmus.models.errors import ContextExceeded, InvalidInput, LinkDown
from isthmus.models.language.drafts import Draft, LookupDraft, PredictionDraft
from isthmus.models.language.grammar import Grammars, GrammarState
from isthmus.models.messages import Grammar

if TYPE_CHECKING:  # they bring ONNX Runtime, which a device without a model does without
    from isthmus.edge_agent.language.arms.handoff import HandoffArm, HandoffSettings
    from isthmus.edge_agent.language.local_model import LocalModel, LocalSession
    from isthmus.models.language.handoff.bundle import HandoffBundle


@dataclass(frozen=True)
class Resources:
    """What all answers of an agent share.

    `local`: None for a device without a model. `vocabulary`: of that model. `handoff`: None without its bundle.
    `grammars`: of the tokenizer with a vocabulary.
    """

    config: LanguageConfig
    local: LocalModel | None
    vocabulary: bytes
    replicas: Replicas
    router: Router
    handoff: tuple[HandoffBundle, HandoffSettings] | None
    grammars: Callable[[bytes], Grammars]
    tariff: Tariff = FREE


class Generation:
    """One answer's sequence and statistics, with sessions that are made when an arm needs them. Close it."""

    def __init__(
        self,
        resources: Resources,
        request: GenerationRequest,
        end_ids: frozenset[int],
        cancelled: threading.Event | None = None,
        *,
        replaceable: bool = False,
        free: bool = False,
        stats: GenerationStats | None = None,
    ) -> None:
        """`end_ids` end the answer. The device's model takes part where it reads the ids of the prompt.

        `replaceable`: where no cloud begins the answer, it is given up at once, for the device to give another. `free`:
        whole answers may be the cloud's alone where that is best. `stats`: of another generation that this is part of.
        """
        self.sequence = AnswerSequence(request, end_ids, self._open_state)
        self.stats = stats or GenerationStats()
        self._free = free
        self._other: Generation | None = None  # of the cloud, in its vocabulary
        self._resources = resources
        self._cancelled = cancelled
        self._replaceable = replaceable
        takes_part = request.vocabulary in (b"", resources.vocabulary)
        self._local = resources.local.session(cancelled) if resources.local and takes_part else None
        self._sessions: dict[bytes, RemoteSession] = {}

    def arm(self, name: Arm) -> RunningArm:
        """The arm of this name, to go on with the sequence."""
        match name:
            case "edge":
                return LocalArm(self.sequence, self._model)
            case "auto":
                return self._auto()
            case "handoff":
                return self._handoff()
            case "cascade":
                return self._cascade()
            case "verify" if (draft := self._draft()) is not None:
                router = self._resources.router
                speculation = router.predictions if self.sequence.request.prediction else router.drafts
                return VerifyArm(self.sequence, self._token_session(), self.stats, speculation, draft, self._fallback())
            case _:
                return self._remote(self._fallback())

    @property
    def answered(self) -> AnswerSequence:
        """The sequence that has the answer: that of the cloud's vocabulary once it has begun."""
        other = self._other.sequence if self._other else self.sequence
        return other if other.generated else self.sequence

    def close(self) -> None:
        """End sessions, remembered for the next turn, and leave the local model to others."""
        for session in self._sessions.values():
            session.close()
        self._sessions.clear()
        if self._local is not None:
            self._local.close()
            self.stats.device = self._local.processed

    def _remote(self, fallback: Fallback | None) -> RemoteArm:
        session = self._token_session()
        rounds = Rounds(session, self.sequence, self.stats, self._resources.router.local)
        return RemoteArm(self.sequence, session, rounds, fallback)

    def _auto(self) -> AutoArm:
        resources, router = self._resources, self._resources.router
        goal = router.goal(self.sequence.request.quality)
        bundle = router.bundles.for_cloud(resources.replicas.model)
        session = self._token_session()

        def route(usable: bool, now: Arm | None) -> ArmPlan:
            unread, remaining = len(self.sequence) - session.held, self.sequence.remaining
            return router.plan(goal, resources.replicas, usable, now, bundle=bundle, unread=unread, remaining=remaining)

        return AutoArm(
            self.sequence,
            self.stats,
            LocalPredictor(self._model, bundle.head if bundle else None, router.confidence),
            RemoteQuery(session, self.sequence, self.stats, router.local),
            route,
            self.arm,
            self._fallback(),
        )

    def _handoff(self) -> HandoffArm:
        from isthmus.edge_agent.language.arms.handoff import HandoffArm, handoff_opening

        assert self._resources.handoff is not None  # checked before the answer begins
        handoff, settings = self._resources.handoff
        session = self._session(handoff.fingerprint, handoff_opening(self.sequence, handoff, settings))
        return HandoffArm(self.sequence, session, self.stats, self._model, handoff, settings, self._fallback())

    def _cascade(self) -> CascadeArm:
        resources, router = self._resources, self._resources.router
        goal, draft = router.goal(self.sequence.request.quality), DeviceDraft(self.sequence, self._model)
        bundle = router.bundles.for_answers(resources.replicas.model)
        assert bundle is not None and bundle.verifier is not None  # checked before the answer begins
        plan = router.plan_answer(
            goal, resources.replicas, bundle, cloud_alone=self._free, prompt=len(self.sequence.request.prompt)
        )
        cloud = partial(self._cloud_answer, draft)
        return CascadeArm(self.sequence, self.stats, draft, bundle.verifier, plan, cloud)

    def _cloud_answer(self, draft: DeviceDraft) -> RunningArm:
        """The cloud in the device's place; where there is none, the draft. Raises ContextExceeded."""
        alone = self._resources.config.on_loss == "alone"
        bound = self._resources.replicas.cloud.bound
        if bound is None or bound.info.tokenizer.vocabulary == self._resources.vocabulary:
            return self._remote(partial(self._draft_or_alone, draft) if alone else None)
        request, info = self.sequence.request, bound.info
        if request.encode is None:
            raise InvalidInput(f"the prompt has no `encode`, which arm cascade needs for the vocabulary of {info.name}")
        prompt = tuple(request.encode(bound.tokenizer))
        if (room := info.context - len(prompt)) < 1:
            raise ContextExceeded(
                f"the prompt has {len(prompt)} tokens, the cloud holds {info.context} with the answer"
            )
        request = replace(
            request,
            prompt=prompt,
            arm="cloud",
            max_tokens=min(request.max_tokens, room),
            vocabulary=info.tokenizer.vocabulary,
        )
        self._other = Generation(
            self._resources, request, frozenset(info.end_ids), self._cancelled, replaceable=alone, stats=self.stats
        )
        next_token = partial(draft.next, self.sequence.tokens)
        return TranslatedArm(self.sequence, self.stats, self._other, bound.tokenizer, next_token if alone else None)

    def _draft_or_alone(self, draft: DeviceDraft, tokens: Sequence[int]) -> Token | None:
        return draft.next(tokens) or self._decode_alone(tokens)

    def _token_session(self) -> RemoteSession:
        return self._session(b"", token_opening(self.sequence, self._resources.config.prefill_layers))

    def _session(self, kind: bytes, opening: MakeOpening) -> RemoteSession:
        """The answer's session of a kind, which all its arms share."""
        if kind not in self._sessions:
            replicas = self._resources.replicas
            session = RemoteSession(
                replicas, self.sequence, self.stats, opening, kind, self._cancelled, tariff=self._resources.tariff
            )
            self._sessions[kind] = session
        return self._sessions[kind]

    def _draft(self) -> Draft | None:
        if prediction := self.sequence.request.prediction:
            return PredictionDraft(prediction, len(self.sequence.request.prompt))
        if self._resources.config.draft == "lookup":
            return LookupDraft()
        return self._local if self._local is not None and len(self.sequence) < self._local.context else None

    def _fallback(self) -> Fallback | None:
        if self._replaceable:
            return self._give_up
        alone = self._local is not None and self._resources.config.on_loss == "alone"
        return self._decode_alone if alone else None

    def _give_up(self, tokens: Sequence[int]) -> None:
        """Raises LinkDown unless the cloud has begun: then it is waited for."""
        if not self.sequence.generated:
            raise LinkDown("no cloud answers")

    def _decode_alone(self, tokens: Sequence[int]) -> Token | None:
        if len(tokens) > self._model.context:
            return None
        return self.sequence.forced(tokens) or self.sequence.choose(self._model.logits(tokens), tokens)

    def _open_state(self, grammar: Grammar) -> GrammarState:
        return self._resources.grammars(self.sequence.request.vocabulary).state(grammar, self.sequence.end_ids)

    @property
    def _model(self) -> LocalSession:
        assert self._local is not None  # checked before the answer begins
        return self._local
