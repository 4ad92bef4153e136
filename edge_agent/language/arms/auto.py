"""One answer made by several arms in turn, as the router has it.

    plan: edge -> the device's copy decides what its judge is sure of, the cloud is asked for single tokens;
                  while it works the copy goes on behind its own choice, in vain if the cloud's is another
          else -> that arm, as long as the router finds nothing clearly better

Every arm begins from the text so far, and what a cloud still holds of it is not sent again. Knows nothing about how
arms work, nor about estimates.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace

from isthmus.edge_agent.language.cloud_answer import CloudAnswer, GenerationStats
from isthmus.edge_agent.language.request import AnswerSequence, Arm, GenerationRequest, Token, edge_token
from isthmus.edge_agent.policy.arms import ArmPlan, ConfidenceStats
from isthmus.models.language.sampling import Floats

SPAN_TOKENS = 16  # after so many the router is asked again
MAX_AHEAD = 32  # tokens behind one that the cloud has not decided yet


@dataclass(frozen=True)
class LocalModel:
    """The device's own model: logits behind a text of at most `context` tokens, and a judge of what they choose.

    Without a judge all is taken as sure.
    """

    logits: Callable[[Sequence[int]], Floats]
    context: int
    judge: Callable[[Floats, Sequence[int]], float] | None
    doubts: ConfidenceStats = field(default_factory=ConfidenceStats)  # of the judge, over many answers


class Auto(AnswerSequence):
    """One answer. `tokens` yields it, once; `tally` is complete behind the last one."""

    def __init__(
        self,
        ask: GenerationRequest,
        eos_ids: frozenset[int],
        copy: LocalModel | None,
        route: Callable[[bool, Arm | None], ArmPlan],
        begin: Callable[[GenerationRequest], CloudAnswer],
    ) -> None:
        """`copy` None: others have the device. `route` takes whether the copy can go on, and the arm at work.

        `begin` begins an answer, or the rest of one, by an arm of the cloud's.
        """
        super().__init__(ask, eos_ids)
        self._copy, self._route, self._begin = copy, route, begin
        self._ready: CloudAnswer | None = None  # that was asked for the token behind so many of the text
        self._ready_for = 0
        self.tally = GenerationStats()

    def tokens(self) -> Generator[Token, None, None]:
        """Committed tokens. Raises IsthmusError as the arms do."""
        if self._copy is not None:
            self._copy.doubts.fade()
        plan = self._plan(None)
        self.tally.why = plan.why
        if plan.arm == "edge" and plan.asked * self._left >= 1:
            self._prepare()  # the cloud reads the prompt while the device does
        try:
            while not self._finished:
                if plan.arm == "edge":
                    yield from self._own(plan)
                    plan = self._plan("edge")
                else:
                    plan = yield from self._others(plan)
        finally:
            self.close()

    def close(self) -> None:
        """End what was prepared and not wanted; arms that took their turn have ended already."""
        if self._ready is not None:
            self._end(self._ready)
            self._ready = None

    def _plan(self, now: Arm | None) -> ArmPlan:
        usable = self._copy is not None and len(self._text) < self._copy.context
        return self._route(usable, now)

    def _own(self, plan: ArmPlan) -> Generator[Token, None, None]:
        """A few tokens of the device's copy, with what the cloud is asked for in between."""
        assert self._copy is not None
        until = min(len(self._text) + SPAN_TOKENS, self._copy.context)
        made, started_s = self._made, time.monotonic()
        while len(self._text) < until and not self._finished:
            choice, likely = self._choice(self._text)
            self._learn(likely)
            if likely >= plan.likely:
                yield self._took(choice, "edge", plan.why)
            else:
                yield from self._asked(choice, likely, plan)
        if made:  # the first span reads the prompt
            self._copy.doubts.took(time.monotonic() - started_s, (self._made - made) * plan.reckoned_s)

    def _choice(self, text: Sequence[int]) -> tuple[Token, float]:
        """The copy's next token, and how likely right that is."""
        assert self._copy is not None
        logits_V = self._copy.logits(text)
        likely = 1.0 if self._copy.judge is None else self._copy.judge(logits_V, text)
        return edge_token(logits_V, self._ask, len(text)), likely

    def _learn(self, likely: float) -> None:
        """How sure the judge is of a token of this answer."""
        assert self._copy is not None
        if self._copy.judge is not None:
            self._copy.doubts.observe(likely)

    def _asked(self, guess: Token, likely: float, plan: ArmPlan) -> Generator[Token, None, None]:
        """The cloud's next token; if that is `guess`, also what the device decided behind it meanwhile."""
        assert self._copy is not None
        asked_s, fresh = time.monotonic(), self._ready is None or self._ready_for != len(self._text)
        if fresh:
            self._prepare()
        assert self._ready is not None
        ahead, ahead_s = self._look_ahead(guess, plan.likely)
        answer, self._ready = self._ready, None
        made = list(self._by(answer, "cloud", f"the device is {likely:.0%} sure of it, {plan.likely:.0%} needed"))
        waited_s = time.monotonic() - asked_s
        yield from made
        right = [token.id for token in made] == [guess.id]
        if fresh and answer.tally.rtt_s is not None and not answer.tally.degraded:
            expected_s = max(answer.tally.rtt_s + answer.tally.cloud_s, ahead_s)
            self._copy.doubts.answered(right, max(waited_s - expected_s, 0.0))
        for token, sure in ahead if right else ():
            self._learn(sure)
            yield self._took(token, "edge", plan.why)

    def _prepare(self) -> None:
        """Ask the cloud for the next token."""
        self.close()
        self._ready, self._ready_for = self._begun("cloud", 1), len(self._text)
        self._ready.prepare()

    def _look_ahead(self, guess: Token, least: float) -> tuple[list[tuple[Token, float]], float]:
        """What the copy is sure of behind `guess`, and how sure, until the cloud has answered; seconds spent on it."""
        assert self._copy is not None and self._ready is not None
        text, found, spent_s = [*self._text, guess.id], list[tuple[Token, float]](), 0.0
        room = min(self._left - 1, self._copy.context - len(text), MAX_AHEAD)
        while len(found) < room and text[-1] not in self._eos_ids and not self._ready.answered:
            started_s = time.monotonic()
            token, likely = self._choice(text)
            if likely < least:
                break
            spent_s += time.monotonic() - started_s
            found.append((token, likely))
            text.append(token.id)
        return found, spent_s

    def _others(self, plan: ArmPlan) -> Generator[Token, None, ArmPlan]:
        """Tokens of another arm, until there is a better one; the plan to go on by."""
        self.close()
        with closing(self._by(self._begun(plan.arm, self._left), plan.arm, plan.why)) as tokens:
            for made, token in enumerate(tokens, 1):
                yield token
                if made % SPAN_TOKENS == 0 and (better := self._plan(plan.arm)).arm != plan.arm:
                    return better
        return plan

    def _by(self, answer: CloudAnswer, arm: Arm, why: str) -> Generator[Token, None, None]:
        """The tokens of an answer by an arm that needs the cloud; it ends with them."""
        try:
            with closing(answer.tokens()) as made:
                for token in made:
                    alone = token.source == "edge" and answer.tally.degraded
                    yield self._took(token, "edge" if alone else arm, answer.tally.why if alone else why)
        finally:
            self._end(answer)

    def _begun(self, arm: Arm, tokens: int) -> CloudAnswer:
        return self._begin(replace(self._ask, prompt=tuple(self._text), max_tokens=tokens, arm=arm))

    def _end(self, answer: CloudAnswer) -> None:
        answer.close()
        self.tally.add(answer.tally)

    def _took(self, token: Token, arm: Arm, why: str) -> Token:
        self._add(token)
        self.tally.count(arm, why)
        return token
