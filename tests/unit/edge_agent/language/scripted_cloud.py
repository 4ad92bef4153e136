"""A cloud at the seam of `Link`: its rounds are the service's own, its model a function, its network what a test says.

Nothing waits here and nothing runs beside: each look of the device moves messages and passes a little, by a seed.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from isthmus.cloud_service.language.sequence import TokenSequence
from isthmus.edge_agent.language.cloud_model import BoundModel, CloudModel
from isthmus.edge_agent.language.request import Source
from isthmus.edge_agent.language.tokenizer_cache import TokenizerCache
from isthmus.edge_agent.policy.estimates import LinkEstimate
from isthmus.edge_agent.transport.generate_stream import BeforeSending, Traffic, allow
from isthmus.models.errors import ContextGone, DeadlineExceeded, LinkDown
from isthmus.models.language.sampling import Floats, choose
from isthmus.models.messages import GREEDY, Committed, ModelInfo, Opening, Round, Sampling, TokenizerInfo
from isthmus.protos import wire_session

VOCAB, EOS = 11, 0
ENDS = frozenset({EOS})


def declared(name: str = "big", **changed: Any) -> ModelInfo:
    """What the clouds declare of the model that their brain is."""
    tokenizer = TokenizerInfo(bytes(32), 1, b"v" * 32)
    made = ModelInfo(b"themodel".ljust(32), name, VOCAB, 10_000, "bitwise", tokenizer, (EOS,), ("cloud", "verify"))
    return replace(made, **changed)


def bound(model: ModelInfo | None = None) -> CloudModel:
    """The cloud's model as an agent knows it once a cloud has answered."""
    made = CloudModel(None, None, TokenizerCache(Path("/dev/null/tokenizers")))
    made.bound = BoundModel(model or declared(), tokenizer=None)  # type: ignore[arg-type]
    return made


class Brain:
    """A language model whose next token depends on the last two, so that its texts repeat themselves."""

    def __init__(self, seed: int = 0, ends: bool = True) -> None:
        self._seed, self._ends = seed, ends
        self._known: dict[tuple[int, ...], Floats] = {}

    def logits(self, text: Sequence[int]) -> Floats:
        key = tuple(text[-2:])
        if key not in self._known:
            logits_V = np.random.default_rng([self._seed, *key]).standard_normal(VOCAB).astype(np.float32)
            logits_V[EOS] -= 0 if self._ends else 50
            self._known[key] = logits_V
        return self._known[key]

    def next(self, text: Sequence[int], sampling: Sampling = GREEDY) -> int:
        return choose(self.logits(text), sampling, len(text))

    def answer(self, prompt: Sequence[int], count: int, sampling: Sampling = GREEDY) -> list[int]:
        """What a plain loop over the model says."""
        text = list(prompt)
        while len(text) < len(prompt) + count and (len(text) == len(prompt) or text[-1] != EOS):
            text.append(self.next(text, sampling))
        return text[len(prompt) :]


class Cache:
    """The length of a key-value cache, which is all that `Text` asks of it."""

    def __init__(self) -> None:
        self.length = 0

    def truncate(self, length: int) -> None:
        assert length <= self.length
        self.length = length


@dataclass
class Cloud:
    """A link with a cloud behind it. `fault(n)` is raised instead of the n-th answer, counted over all conversations.

    After a failure it is left alone for `away` looks at its state.
    """

    brain: Brain
    target: str = "a"
    seed: int = 0
    rtt_s: float = 0.05
    step_s: float = 0.03
    width: int = 4  # rows of a pass
    context: int = 10_000
    away: float = 0
    living: bool = True
    fault: Callable[[int], Exception | None] = lambda answer: None
    texts: dict[bytes, TokenSequence] = field(default_factory=dict)
    talks: list[Talk] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    answers: int = 0
    alone: float = 0

    @property
    def state(self) -> str:
        if self.alone <= 0:
            return "closed"
        self.alone -= 1
        return "open"

    @property
    def estimate(self) -> LinkEstimate:
        return LinkEstimate(self.rtt_s, 1e6)

    def record_failure(self, reason: str) -> None:
        self.failures.append(reason)
        self.alone = self.away

    def alive(self, timeout_s: float) -> bool:
        return self.living

    def open_generate_stream(self, vocab: int, before_sending: BeforeSending) -> Talk:
        self.talks.append(Talk(self, random.Random(self.seed + len(self.talks)), before_sending))
        return self.talks[-1]

    def close(self) -> None:
        pass


class Talk:
    """A conversation. `truth` says of each position where the token that was told first came from."""

    def __init__(self, cloud: Cloud, random_: random.Random, before_sending: BeforeSending = allow) -> None:
        self._cloud, self._random, self._before_sending = cloud, random_, before_sending
        self._messages: deque[Any] = deque()
        self._text: TokenSequence | None = None
        self._held = 0
        self._ready: deque[tuple[Committed | ContextGone, dict[int, Source]]] = deque()
        self._failure: LinkDown | None = None
        self.truth: dict[int, Source] = {}
        self.openings: list[Opening] = []
        self.rounds: list[Round] = []
        self.closed = self.retired = self.due = False
        self.bytes_up = self.bytes_down = self.opening_bytes = 0

    def open(self, opening: Opening) -> None:
        self._before_sending(Traffic(self.bytes_up + 1, 0, len(self.rounds), 0, 0))
        self.openings.append(opening)
        self._put(wire_session.pack_opening(opening))
        self.opening_bytes += 1

    def send(self, round_: Round) -> None:
        assert self.openings and not self.closed
        tokens = 1 + len(round_.draft) + round_.extend
        self._before_sending(Traffic(self.bytes_up + 1, 0, len(self.rounds) + 1, 1 + round_.extend, tokens))
        self.rounds.append(round_)
        self._put(wire_session.pack_round(round_))

    @property
    def answered(self) -> bool:
        """Now and then, a step later."""
        if self._random.random() < 0.5:
            self._step()
        return bool(self._ready)

    def poll(self) -> Committed | None:
        self._check()
        for _ in range(self._random.randrange(4)):
            self._step()
        return self._deliver(patient=False) if self._ready and self._random.random() < 0.5 else None

    def receive(self) -> Committed:
        self._check()
        while not self._ready and self._step():
            pass
        assert self._ready, "the device waits for what it has not asked"
        committed = self._deliver(patient=True)
        assert committed is not None
        return committed

    def close(self) -> None:
        assert not self.closed
        self.closed = True

    def _put(self, message: Any) -> None:
        self._check()
        if self.retired:
            raise ContextGone("the stream was idle and is closed")
        self._messages.append(wire_session.unpack_generate(message))
        self.bytes_up += 1

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _step(self) -> bool:
        """A message arrives, or a pass is computed; False when there is neither."""
        work = self._text.scheduled if self._text else None
        may_arrive = self._messages and (work is None or work.extension)
        if may_arrive and (work is None or self._random.random() < 0.5):
            self._arrive(self._messages.popleft())
        elif work is not None:
            self._pass()
        else:
            return False
        return True

    def _arrive(self, message: Opening | Round) -> None:
        if isinstance(message, Opening):
            self._open(message)
        elif self._text is not None:
            self._text.scheduled = None
            committed = self._text.begin(message, 0.0)
            if committed is not None:
                self._tell(committed, {})

    def _open(self, opening: Opening) -> None:
        former = self._cloud.texts.pop(opening.session, None)
        kept = former.tokens[: opening.start] if former else []
        tokens = [*kept, *opening.tokens]
        if len(kept) < opening.start or wire_session.checksum(tokens) != opening.crc32:
            self._text = None
            self._ready.append((ContextGone("not held here"), {}))
            return
        self._text = TokenSequence(tokens, opening, ENDS, self._cloud.context)
        self._text.cache = Cache()  # type: ignore[assignment]
        self._cloud.texts[opening.session] = self._text

    def _pass(self) -> None:
        text, brain = self._text, self._cloud.brain
        assert text is not None and text.scheduled is not None and text.cache is not None
        work, length, start = text.scheduled, len(text.tokens), text.cache.length
        count = min(text.pending_tokens, self._random.randint(1, self._cloud.width))
        fed, decides = [*text.tokens, *work.draft], text.needs_logits(count)
        text.next_ids(count)
        text.cache.length += count
        logits = [brain.logits(fed[: start + row + 1]) for row in range(count)]
        committed = text.complete_step(np.stack(logits) if decides else None, count, self._cloud.step_s)
        if committed is None:
            return
        new = range(length, len(text.tokens))
        self._tell(committed, {place: "draft" if place < length + work.matched else "cloud" for place in new})
        text.next_extension(0.0)

    def _tell(self, committed: Committed, truth: dict[int, Source]) -> None:
        self._ready.append((wire_session.unpack_committed(wire_session.pack_committed(committed), VOCAB), truth))

    def _deliver(self, patient: bool) -> Committed | None:
        fault = self._cloud.fault(self._cloud.answers)
        if isinstance(fault, DeadlineExceeded) and not patient:
            return None
        self._cloud.answers += 1
        if fault is not None:
            self._fail(fault)
        answer, truth = self._ready.popleft()
        self.bytes_down += 1
        if isinstance(answer, ContextGone):
            raise answer
        self.truth = truth | self.truth
        return answer

    def _fail(self, fault: Exception) -> None:
        if isinstance(fault, LinkDown):
            self._failure = fault
        if isinstance(fault, ContextGone):  # the session was opened elsewhere, and rounds under way are dropped
            self._cloud.texts.clear()
            self._text = None
            self._ready.clear()
            self._messages.clear()
        raise fault
