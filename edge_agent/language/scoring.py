"""Log probabilities of a prompt's own tokens, which nobody generated.

The device's model computes them. Knows nothing about how they are formatted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from isthmus.edge_agent.language.request import GenerationRequest, Token
from isthmus.models.errors import ContextExceeded
from isthmus.models.language.sampling import logprobs

if TYPE_CHECKING:  # it brings ONNX Runtime
    from isthmus.edge_agent.language.local_model import LocalSession


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
