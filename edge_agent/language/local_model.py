"""The device's model as a resource that answers share: each call holds it alone, and nobody holds it between calls.

    LocalModel: the weights, some KV caches, a lock      LocalSession: one answer's calls, each with the whole text

There are several KV caches, so that answers that take turns do not read their texts again. Calls are served in order
of arrival, except that a long text is read in several calls, and after each of them short calls go first.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from isthmus.edge_agent.policy.speculation import SpeculationStats
from isthmus.models.errors import AnswerCancelled
from isthmus.models.language.drafts import ModelDraft, shared_length
from isthmus.models.language.onnx.decoder import OnnxDecoder
from isthmus.models.language.onnx.exits import Choice, ExitingDecoder
from isthmus.models.language.packing import Floats
from isthmus.models.language.processors import TokenChooser
from isthmus.models.messages import Processed

KV_CACHES = 4  # as many answers as keep their own
PIECE_TOKENS = 65  # of a text that are read in one call: a block of the decoder, and one token by itself
SHORT_TOKENS = 32  # a call that reads no more than that is short

Result = TypeVar("Result")


@dataclass
class Cache:
    """One KV cache of the model with what runs on it, whose it is, and the number of the call that last used it."""

    decoder: OnnxDecoder
    draft: ModelDraft
    exits: ExitingDecoder | None
    owner: LocalSession | None = None
    last_call: int = 0

    @property
    def processed(self) -> Processed:
        """What was computed with it."""
        return self.decoder.processed + Processed(flops=self.exits.flops if self.exits else 0)


class Turn(threading.Event):
    """Set when the lock is granted. `long`: it will be held for long."""

    def __init__(self, long: bool) -> None:
        super().__init__()
        self.long = long


class FairLock:
    """A lock that is granted in order of arrival: `threading.Lock` lets a busy thread take it again and again.

    When a long turn ends, those short ones go first that wait then: so none waits for two long turns, and each round of
    short turns is followed by a long one.
    """

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._held: Turn | None = None
        self._waiting: deque[Turn] = deque()

    def __enter__(self) -> None:
        self.acquire(long=False)

    @contextmanager
    def turn(self, long: bool) -> Iterator[None]:
        """Hold the lock for a short time, or for a long one."""
        self.acquire(long)
        try:
            yield
        finally:
            self.__exit__()

    def acquire(self, long: bool) -> None:
        turn = Turn(long)
        with self._mutex:
            if self._held is None:
                self._held = turn
                return
            self._waiting.append(turn)
        try:
            turn.wait()
        except BaseException:  # an interrupt: leave the queue, or pass on what was just granted
            with self._mutex:
                if not turn.is_set():
                    self._waiting.remove(turn)
                    raise
            self.__exit__()
            raise

    def __exit__(self, *exception: object) -> None:
        with self._mutex:
            if self._held is not None and self._held.long:
                self._waiting = deque(sorted(self._waiting, key=lambda turn: turn.long))
            self._held = self._waiting.popleft() if self._waiting else None
            if self._held is not None:
                self._held.set()


class LocalModel:
    """The model of the device, with exits where a handoff bundle is there. Safe to call from several threads."""

    def __init__(
        self, decoder: OnnxDecoder, exits: ExitingDecoder | None, stats: SpeculationStats, *, caches: int = KV_CACHES
    ) -> None:
        """`stats` learns what a single token takes. `caches`: KV caches at most, made when they are needed."""
        self.context = decoder.context
        self.lock = FairLock()
        self._stats = stats
        self._most = caches
        self._caches = [Cache(decoder, ModelDraft(decoder), exits)]
        self._calls = 0

    def warm_up(self, tokens: int) -> None:
        """Compile kernels, and learn what a token takes."""
        with self.lock:
            decoder = self._caches[0].decoder
            for _ in range(tokens):
                started_s = time.monotonic()
                decoder.extend([0])
                self._stats.draft_s.observe(time.monotonic() - started_s)
            decoder.truncate(0)

    def session(self, cancelled: threading.Event | None = None) -> LocalSession:
        """One answer's use of the model; close it when the answer ends. Calls end early when `cancelled` is set."""
        return LocalSession(self, cancelled)

    def cache_for(self, session: LocalSession, tokens: Sequence[int]) -> Cache:
        """The session's own KV cache, or the free one that shares most with `tokens`. Call it under the lock."""
        self._calls += 1
        cache = next((cache for cache in self._caches if cache.owner is session), None) or self._assign(tokens)
        cache.owner, cache.last_call = session, self._calls
        return cache

    def release(self, session: LocalSession) -> None:
        """The session's KV cache may go to others; what it holds stays until then."""
        for cache in self._caches:
            if cache.owner is session:
                cache.owner = None

    def embed(self, ids: Sequence[int]) -> Floats:
        """Embeddings (N, hidden) of tokens, which no KV cache is needed for."""
        return self._caches[0].decoder.embed(ids)

    def record_latency(self, seconds: float) -> None:
        """What a single token took."""
        self._stats.draft_s.observe(seconds)

    def _assign(self, tokens: Sequence[int]) -> Cache:
        free = [cache for cache in self._caches if cache.owner is None]
        if free:
            return max(free, key=lambda cache: (shared_length(cache.decoder.ids, tokens), -cache.last_call))
        if len(self._caches) < self._most:
            first = self._caches[0]
            decoder = first.decoder.fork()
            exits = first.exits.fork(decoder) if first.exits else None
            self._caches.append(Cache(decoder, ModelDraft(decoder), exits))
            return self._caches[-1]
        return min(self._caches, key=lambda cache: cache.last_call)


class LocalSession:
    """One answer's use of the device's model, which is held for single calls only.

    Each call takes the whole text: another answer may have had the KV cache since the last one. Calls raise
    AnswerCancelled once the answer is given up.
    """

    def __init__(self, model: LocalModel, cancelled: threading.Event | None) -> None:
        self.context = model.context
        self._model = model
        self._cancelled = cancelled
        self._tokens = 0  # of the last text that was read
        self.processed = Processed()

    def logits(self, tokens: Sequence[int]) -> Floats:
        """Logits (vocab,) after `tokens`. Raises InvalidInput when there are more than the context holds."""
        return self._read(tokens, self._logits)

    def all_logits(self, tokens: Sequence[int]) -> Iterator[Floats]:
        """Logits (N, vocab) after each of `tokens`, some of them at a time: between them others have their turn."""
        for start in range(0, len(tokens), PIECE_TOKENS):
            with self._model.lock.turn(long=True):
                self._check_cancelled()
                decoder = self._model.cache_for(self, tokens).decoder
                known = min(shared_length(decoder.ids, tokens), start)
                decoder.truncate(known)
                rows_NV = decoder.extend_all(tokens[known : start + PIECE_TOKENS])
            yield rows_NV[start - known :]

    def next(self, text: Sequence[int], chooser: TokenChooser) -> tuple[int, float] | None:
        """A draft token and its confidence; None where the context is full."""
        return self._read(text, lambda cache, part: cache.draft.next(part, chooser))

    def exit(self, tokens: Sequence[int], likely: float) -> Choice:
        """The choice of the first exit that is at least so likely right, or else of the last. Raises InvalidInput."""
        return self._read(tokens, lambda cache, part: exits_of(cache).choose(part, likely))

    def hidden_states(self, tokens: Sequence[int], start: int) -> Floats:
        """Hidden states (N, hidden) at the cut of all `tokens` from position `start` on."""
        return self._read(tokens, lambda cache, part: exits_of(cache).hidden_states(part, start))

    def embed(self, ids: Sequence[int]) -> Floats:
        """Embeddings (N, hidden) of tokens."""
        return self._model.embed(ids)

    def close(self) -> None:
        """Leave the KV cache to others."""
        with self._model.lock:
            self._model.release(self)

    def _read(self, tokens: Sequence[int], read: Callable[[Cache, Sequence[int]], Result]) -> Result:
        """`read` of the whole text, in pieces where much of it is new: between them others have their turn.

        When another answer has taken the cache in between, the rest is read at once, so that it comes to an end.
        """
        reached = 0
        while True:
            with self._model.lock.turn(long=len(tokens) - self._tokens > SHORT_TOKENS):
                self._check_cancelled()
                cache = self._model.cache_for(self, tokens)
                known = shared_length(cache.decoder.ids, tokens)
                reached = known + PIECE_TOKENS if known >= reached else len(tokens)
                part = tokens[:reached] if len(tokens) <= self.context else tokens
                before = cache.processed
                try:
                    result = read(cache, part)
                finally:
                    self.processed += cache.processed - before
                self._tokens = len(part)
                if len(part) == len(tokens):
                    return result

    def _check_cancelled(self) -> None:
        if self._cancelled is not None and self._cancelled.is_set():
            raise AnswerCancelled("the answer was given up")

    def _logits(self, cache: Cache, tokens: Sequence[int]) -> Floats:
        started_s, known = time.monotonic(), cache.decoder.length
        logits_V = cache.draft.logits(tokens)
        if cache.decoder.length == known + 1:
            self._model.record_latency(time.monotonic() - started_s)
        return logits_V


def exits_of(cache: Cache) -> ExitingDecoder:
    assert cache.exits is not None  # the arm handoff exists where there are exits
    return cache.exits
