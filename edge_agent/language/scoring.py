"""Log probabilities of a prompt's own tokens, which nobody generated.

The device's model computes them, or the cloud's where it offers that. Knows nothing about how they are formatted.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING

from isthmus.edge_agent.language.cloud_model import label
from isthmus.edge_agent.language.remote_session import RemoteSession, token_opening
from isthmus.edge_agent.language.request import GenerationRequest, Token, cloud_token
from isthmus.edge_agent.language.sequence import AnswerSequence
from isthmus.edge_agent.language.stats import GenerationStats
from isthmus.models.errors import ContextExceeded, ContextGone, InvalidInput, InvalidReply
from isthmus.models.language.sampling import logprobs
from isthmus.models.messages import Committed, Round
from isthmus.protos.limits import MAX_SCORED

if TYPE_CHECKING:
    from isthmus.edge_agent.language.generation import Resources
    from isthmus.edge_agent.language.local_model import LocalSession  # it brings ONNX Runtime


def score_locally(session: LocalSession, request: GenerationRequest) -> list[Token]:
    """The prompt's tokens; the first, which nothing precedes, has no log probability. Raises ContextExceeded."""
    prompt, top = request.prompt, request.top_logprobs or 0
    if len(prompt) > session.context:
        raise ContextExceeded(f"the prompt has {len(prompt)} tokens, arm edge holds {session.context}")
    tokens = [Token(prompt[0], "edge")]
    for rows_NV in session.all_logits(prompt[:-1]):
        following: Sequence[int] = prompt[len(tokens) : len(tokens) + len(rows_NV)]
        tokens += [
            Token(id_, "edge", *logprobs(row_V, id_, top)) for row_V, id_ in zip(rows_NV, following, strict=True)
        ]
    return tokens


def score_remotely(resources: Resources, request: GenerationRequest, cancelled: threading.Event) -> list[Token]:
    """The same by the cloud's model, whose ids the prompt has. Raises InvalidInput, and as RemoteSession.tokens."""
    replicas, prompt = resources.replicas, request.prompt
    replicas.wait_model(cancelled)
    info = replicas.model
    assert info is not None  # it was waited for
    if not info.scores:
        raise InvalidInput(f"{label(info)} in the cloud gives no log probabilities of prompts")
    if request.vocabulary not in (b"", info.tokenizer.vocabulary):
        raise InvalidInput(f"the prompt was encoded by another tokenizer than {label(info)} has: encode it again")
    if not 0 <= min(prompt) <= max(prompt) < info.vocab:
        raise InvalidInput(f"a token of the prompt is outside of the vocabulary of {info.vocab}")
    if len(prompt) > info.context:
        raise ContextExceeded(f"the prompt has {len(prompt)} tokens, arm cloud holds {info.context}")
    first = GenerationRequest(prompt[:1], 1, "cloud", top_logprobs=request.top_logprobs or 0)
    sequence = AnswerSequence(first, frozenset(info.end_ids))
    opening = token_opening(sequence, 0)
    session = RemoteSession(
        replicas, sequence, GenerationStats(), opening, cancelled=cancelled, tariff=resources.tariff
    )
    with closing(session):
        return RemoteScoring(prompt, session, sequence).tokens()


class RemoteScoring:
    """Log probabilities of one prompt by the cloud's model: by one replica after another, from the first token on."""

    def __init__(self, prompt: Sequence[int], session: RemoteSession, sequence: AnswerSequence) -> None:
        """`sequence`: begins with the prompt's first token, and takes the others as they are scored."""
        self._prompt, self._session, self._sequence = prompt, session, sequence

    def tokens(self) -> list[Token]:
        """The prompt's tokens; the first has no log probability. Raises as RemoteSession.tokens."""
        scored = self._session.tokens(self._remote, None, lambda: len(self._sequence) == len(self._prompt))
        try:
            return [Token(self._prompt[0], "cloud"), *scored]
        finally:
            self._session.disconnect()

    def _remote(self) -> Iterator[Token]:
        self._session.open()
        while (length := len(self._sequence)) < len(self._prompt):
            part = tuple(self._prompt[length : length + MAX_SCORED])
            committed = self._reply(Round(length, part, score=True))
            if (committed.base, committed.accepted, len(committed.logprobs)) != (length, len(part), len(part)):
                raise InvalidReply("the cloud scored another text than it was sent")
            self._sequence.tokens += part  # the end of a text within a prompt ends nothing
            self._session.held = len(self._sequence)
            yield from (cloud_token(id_, "cloud", row) for id_, row in zip(part, committed.logprobs, strict=True))

    def _reply(self, round_: Round) -> Committed:
        self._session.send(round_)
        while True:
            try:
                return self._session.receive()
            except ContextGone:
                self._session.reopen()
                self._session.send(round_)
