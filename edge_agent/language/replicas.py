"""The replicas that hold the cloud's model: which to use now, and which sessions they may still hold.

Sessions in the cloud are caches; the tokens, which count, are here.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from isthmus.edge_agent.language.cloud_model import CloudModel, label
from isthmus.edge_agent.language.sequence import AnswerSequence
from isthmus.edge_agent.transport.language_link import LanguageLink
from isthmus.models.errors import AnswerCancelled, LinkDown, PeerError
from isthmus.models.language.drafts import shared_length
from isthmus.models.messages import SESSION_BYTES, ModelInfo

MAX_IDLE_SESSIONS = 32  # remembered for the next turn of their chats
MIN_REUSED_TOKENS = 16  # a shorter common prefix is not worth a session of its own
POLL_S = 0.02


@dataclass
class SessionHandle:
    """A session in the cloud: its id and kind, at which replica, and how many of `tokens` that should hold."""

    session: bytes
    target: str = ""
    held: int = 0
    tokens: tuple[int, ...] = ()
    kind: bytes = b""


class Replicas:
    """Links in order of preference; one that fails goes to the end."""

    def __init__(self, links: Sequence[LanguageLink], cloud: CloudModel, wait_s: float) -> None:
        """`cloud`: the model that they hold. `wait_s`: how long to wait for a replica when nothing else can answer."""
        self.cloud = cloud
        self._links = list(links)
        self._wait_s = wait_s
        self._idle: list[SessionHandle] = []
        self._lock = threading.Lock()

    def __bool__(self) -> bool:
        return bool(self._links)

    def __iter__(self) -> Iterator[LanguageLink]:
        return iter(self._links)

    @property
    def model(self) -> ModelInfo | None:
        """What is declared of the model that they hold; None until one has answered."""
        return self.cloud.info

    def best(
        self, besides: Collection[LanguageLink] = (), sequence: AnswerSequence | None = None
    ) -> LanguageLink | None:
        """The first whose breaker is not open, and which is none of `besides`; None where `sequence` needs others."""
        if sequence is not None and not self._serve(sequence):
            return None
        return next((link for link in self._links if link.state != "open" and link not in besides), None)

    def pin(self, sequence: AnswerSequence) -> ModelInfo:
        """The model that decides tokens of an answer, from now on no other one. Raises LinkDown."""
        model = self.model
        if model is None or not self._serve(sequence):
            raise LinkDown("the cloud's model was replaced in mid-answer")
        sequence.cloud_model = model.fingerprint
        return model

    def _serve(self, sequence: AnswerSequence) -> bool:
        """Whether the model can continue an answer: it reads its ids, ends it alike, and began it or begins it."""
        model, request = self.model, sequence.request
        if model is None or request.vocabulary not in (b"", model.tokenizer.vocabulary):
            return False
        processors = request.sampling.processors
        alone = bool(processors) or request.sampling.temperature > 0  # an engine chooses so by itself only
        if model.numerics == "engine" and alone and request.arm not in ("cloud", "cascade"):
            return False
        if not set(processors) <= set(model.processors):
            return False
        begins = not sequence.generated or not sequence.cloud_model
        return sequence.ends_at(model.end_ids) and (begins or sequence.cloud_model == model.fingerprint)

    def record_failure(self, link: LanguageLink, error: Exception) -> None:
        """Prefer the others from now on, and this one only after it answers a probe."""
        link.record_failure(str(error))
        with self._lock:
            self._links = [*(other for other in self._links if other is not link), link]

    def wait(self, cancelled: threading.Event, sequence: AnswerSequence | None = None) -> LanguageLink:
        """Wait for a replica that can go on with `sequence`.

        Raises LinkDown after `wait_s`, AnswerCancelled when `cancelled` is set.
        """
        until_s = time.monotonic() + self._wait_s
        while (link := self.best(sequence=sequence)) is None:
            if time.monotonic() > until_s:
                raise LinkDown(self._nobody())
            if cancelled.wait(POLL_S):
                raise AnswerCancelled("the answer was given up")
        return link

    def wait_model(self, cancelled: threading.Event) -> None:
        """Wait until a replica has said what it holds.

        Raises LinkDown after `wait_s`, PeerError as soon as every replica has answered and none can be used,
        AnswerCancelled when `cancelled` is set.
        """
        until_s = time.monotonic() + self._wait_s
        while self.model is None:
            if len(problems := self.cloud.problems) == len(self._links):
                raise PeerError(described(problems))
            if time.monotonic() > until_s:
                raise LinkDown(self._nobody())
            if cancelled.wait(POLL_S):
                raise AnswerCancelled("the answer was given up")

    def _nobody(self) -> str:
        """Why nobody goes on with an answer."""
        text, problems = f"no cloud answered within {self._wait_s:.0f} s", self.cloud.problems
        if problems:
            text += f"; {described(problems)}"
        elif self.best() is not None and self.model is not None:
            text = f"the cloud now holds {label(self.model)}, which cannot go on with this answer"
        return text

    def acquire(self, prompt: Sequence[int], kind: bytes = b"") -> SessionHandle:
        """The idle session of this kind that shares most with `prompt`, for one answer alone, or a new one."""
        with self._lock:
            handles = [handle for handle in self._idle if handle.kind == kind]
            best = max(handles, key=lambda handle: shared_length(handle.tokens, prompt), default=None)
            held = shared_length(best.tokens, prompt[:-1]) if best is not None else 0
            if best is None or held < MIN_REUSED_TOKENS:
                return SessionHandle(secrets.token_bytes(SESSION_BYTES), kind=kind)
            self._idle.remove(best)
            best.held = held
            return best

    def release(self, handle: SessionHandle, tokens: Sequence[int]) -> None:
        """Remember a session after its answer, for the next turn."""
        if handle.held:
            handle.tokens = tuple(tokens[: handle.held])
            with self._lock:
                self._idle = [*self._idle[1 - MAX_IDLE_SESSIONS :], handle]

    def close(self) -> None:
        """Close every link."""
        for link in self._links:
            link.close()


def described(problems: Mapping[str, str]) -> str:
    """What is wrong with replicas, for a person."""
    return "; ".join(f"cloud {target}: {problem}" for target, problem in problems.items())
