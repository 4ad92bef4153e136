"""The arm `cascade`: the device answers whole, a verifier accepts its answer, or the whole answer is the cloud's.

    prompt -> first token -> score of the prompt too low -----------------------> the cloud answers
                          -> the device's answer -> its score too low, at any time -> the cloud answers
                                                 -> all its tokens at once

Nothing is committed before the device's answer is accepted; what was drafted is dropped otherwise. While no cloud can
be used the draft is finished, and is the answer. Knows nothing about vocabularies, nor how the cloud answers.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING

from isthmus.edge_agent.language.arms.auto import RunningArm
from isthmus.edge_agent.language.request import Token
from isthmus.edge_agent.language.sequence import AnswerSequence
from isthmus.edge_agent.language.stats import GenerationStats
from isthmus.edge_agent.policy.whole_answers import AnswerPlan
from isthmus.models.language.router.answers import CUT, ENDED, RUNNING, AnswerFeatures, AnswerVerifier, is_due

if TYPE_CHECKING:  # it brings ONNX Runtime
    from isthmus.edge_agent.language.local_model import LocalSession

TOO_LONG = "the prompt is longer than the device's model holds"


class DeviceDraft:
    """The device's answer as it grows, not committed. `room`: tokens that the device's context leaves for it."""

    def __init__(self, sequence: AnswerSequence, local: LocalSession) -> None:
        self._local, self._request = local, sequence.request
        self.room = max(local.context - len(sequence), 0)
        self._sequence = sequence.fork(min(sequence.request.max_tokens, self.room))
        self.features = AnswerFeatures(len(sequence))
        self.tokens: list[Token] = []

    @property
    def state(self) -> float:
        """RUNNING, ENDED, or CUT at its longest."""
        if not self._sequence.finished:
            return RUNNING
        return ENDED if self._sequence.finish == "stop" else CUT

    @property
    def is_short(self) -> bool:
        """Whether it was cut by the device's context, before the length that was requested."""
        return self.state == CUT and self.room < self._request.max_tokens

    def extend(self) -> Token:
        """One more token."""
        logits_V = self._local.logits(self._sequence.tokens)
        token = self._sequence.choose(logits_V, self._sequence.tokens)
        self.features.add(logits_V, token.id)
        self._sequence.append(token.id)
        self.tokens.append(token)
        return token

    def next(self, text: Sequence[int]) -> Token | None:
        """The token after `text`, which is there or generated now; None at its end, or where the text is another."""
        if list(text) != self._sequence.tokens[: len(text)]:
            return None
        place = len(text) - len(self._request.prompt)
        if place < len(self.tokens):
            return self.tokens[place]
        return self.extend() if self.room and self.state == RUNNING else None


class CascadeArm:
    """One answer, which is the device's or the cloud's as a whole."""

    def __init__(
        self,
        sequence: AnswerSequence,
        stats: GenerationStats,
        draft: DeviceDraft,
        verifier: AnswerVerifier,
        plan: AnswerPlan,
        cloud: Callable[[], RunningArm],
    ) -> None:
        """`cloud` answers in the device's place, with `draft` as its fallback."""
        self._sequence, self._stats, self._draft = sequence, stats, draft
        self._verifier, self._plan, self._cloud = verifier, plan, cloud

    def tokens(self) -> Generator[Token, None, None]:
        """Committed tokens. Raises IsthmusError as the cloud's arm does."""
        self._stats.reason = self._plan.why
        refusal = self._refusal()
        if refusal is None:
            yield from self._commit_draft()
            return
        self._stats.reason = f"{refusal} ({self._plan.why})"
        with closing(self._cloud().tokens()) as tokens:
            for token in tokens:
                self._stats.count_token("edge" if self._stats.fell_back else "cloud", self._stats.why)
                yield token

    def _refusal(self) -> str | None:
        """Why the cloud is to answer; None once the draft is accepted, or may be committed as it grows."""
        draft, plan = self._draft, self._plan
        if not draft.room:
            return TOO_LONG
        if plan.way == "cloud":
            return "the cloud answers alone"
        if plan.way == "edge":
            return None
        draft.extend()
        score = self._verifier.query_score(draft.features)
        if score < plan.query:
            return f"the prompt scored {score:.0%}, {plan.query:.0%} needed"
        return self._verify() if plan.way == "cascade" else None

    def _verify(self) -> str | None:
        """Finish the draft, unless it is refused before: then why."""
        draft, least = self._draft, self._plan.accept
        while True:
            if is_due(len(draft.tokens), draft.state):
                score = self._verifier.running_score(draft.features, draft.state)
                if score < least:
                    return (
                        f"the device's answer scored {score:.0%} after {len(draft.tokens)} tokens, {least:.0%} needed"
                    )
            if draft.state != RUNNING:
                return "the device's answer fills its context" if draft.is_short else None
            draft.extend()

    def _commit_draft(self) -> Generator[Token, None, None]:
        """The draft's tokens, and those that are not there yet as they come."""
        while not self._sequence.finished and (token := self._draft.next(self._sequence.tokens)) is not None:
            self._sequence.append(token.id)
            self._stats.count_token("edge", self._plan.why)
            yield token
        self._sequence.finished = True  # at the device's context too
