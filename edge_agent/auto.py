"""One answer made by several arms in turn, as the router has it.

    plan: edge -> the device's copy decides what its judge is sure of, the cloud is asked for single tokens
          else -> that arm, as long as the router finds nothing clearly better

Every arm begins from the text so far, and what a cloud still holds of it is not sent again. Knows nothing about how
arms work, nor about estimates.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace

from edge_agent.cloud_answer import CloudAnswer, Tally
from edge_agent.collaboration import Collaboration
from edge_agent.generation import Arm, Ask, Growing, Token, edge_token
from edge_agent.policy.routing import Doubts, Plan
from models.language.sampling import Floats

SPAN_TOKENS = 16  # after so many the router is asked again


@dataclass(frozen=True)
class Copy:
    """The device's own model: logits behind a text of at most `context` tokens, and a judge of what they choose.

    Without a judge all is taken as sure.
    """

    logits: Callable[[Sequence[int]], Floats]
    context: int
    judge: Callable[[Floats, Sequence[int]], float] | None
    doubts: Doubts = field(default_factory=Doubts)  # of the judge, over many answers


class Auto(Growing):
    """One answer. `tokens` yields it, once; `tally` is complete behind the last one."""

    def __init__(
        self,
        ask: Ask,
        eos_ids: frozenset[int],
        copy: Copy | None,
        route: Callable[[bool, Arm | None], Plan],
        begin: Callable[[Ask], CloudAnswer],
    ) -> None:
        """`copy` None: others have the device. `route` takes whether the copy can go on, and the arm at work.

        `begin` begins an answer, or the rest of one, by an arm of the cloud's.
        """
        super().__init__(ask, eos_ids)
        self._copy, self._route, self._begin = copy, route, begin
        self._ready: CloudAnswer | None = None  # that reads the prompt while the device does
        self.tally = Tally()

    def tokens(self) -> Generator[Token, None, None]:
        """Committed tokens. Raises IsthmusError as the arms do."""
        if self._copy is not None:
            self._copy.doubts.fade()
        plan = self._plan(None)
        self.tally.why = plan.why
        if plan.arm == "edge" and plan.asked * self._left >= 1:
            self._ready = self._begun("cloud", 1)
            if isinstance(self._ready, Collaboration):
                self._ready.prepare()
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

    def _plan(self, now: Arm | None) -> Plan:
        usable = self._copy is not None and len(self._text) < self._copy.context
        return self._route(usable, now)

    def _own(self, plan: Plan) -> Generator[Token, None, None]:
        """A few tokens of the device's copy, with what the cloud is asked for in between."""
        assert self._copy is not None
        for _ in range(min(SPAN_TOKENS, self._left, self._copy.context - len(self._text))):
            logits_V = self._copy.logits(self._text)
            likely = 1.0 if self._copy.judge is None else self._copy.judge(logits_V, self._text)
            self._copy.doubts.observe(likely)
            if likely >= plan.likely:
                yield self._took(edge_token(logits_V, self._ask, len(self._text)), "edge", plan.why)
            else:
                why = f"the device is {likely:.0%} sure of it, {plan.likely:.0%} needed"
                yield from self._part("cloud", 1, why)
            if self._finished:
                return

    def _others(self, plan: Plan) -> Generator[Token, None, Plan]:
        """Tokens of another arm, until there is a better one; the plan to go on by."""
        with closing(self._part(plan.arm, self._left, plan.why)) as tokens:
            for made, token in enumerate(tokens, 1):
                yield token
                if made % SPAN_TOKENS == 0 and (better := self._plan(plan.arm)).arm != plan.arm:
                    return better
        return plan

    def _part(self, arm: Arm, tokens: int, why: str) -> Generator[Token, None, None]:
        """At most so many tokens by an arm that needs the cloud."""
        if self._ready is not None and (arm, len(self._text)) == ("cloud", len(self._ask.prompt)) and tokens == 1:
            answer, self._ready = self._ready, None
        else:
            self.close()
            answer = self._begun(arm, tokens)
        asked_s, waited_s = time.monotonic(), 0.0
        try:
            with closing(answer.tokens()) as made:
                for token in made:
                    waited_s = waited_s or time.monotonic() - asked_s
                    alone = token.source == "edge" and answer.tally.degraded
                    yield self._took(token, "edge" if alone else arm, answer.tally.why if alone else why)
        finally:
            self._end(answer)
        if self._copy is not None and tokens == 1 and answer.tally.rtt_s is not None and not answer.tally.degraded:
            self._copy.doubts.overhead_s.observe(max(waited_s - answer.tally.rtt_s - answer.tally.cloud_s, 0.0))

    def _begun(self, arm: Arm, tokens: int) -> CloudAnswer:
        return self._begin(replace(self._ask, prompt=tuple(self._text), max_tokens=tokens, arm=arm))

    def _end(self, answer: CloudAnswer) -> None:
        answer.close()
        self.tally.add(answer.tally)

    def _took(self, token: Token, arm: Arm, why: str) -> Token:
        self._add(token)
        self.tally.count(arm, why)
        return token
