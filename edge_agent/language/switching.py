"""Asking again where a cloud is lost before the first token, and the device's model reads another vocabulary.

    tokenizer -> generate -> events        no cloud, nothing said yet: the device's tokenizer -> generate -> events

Within one vocabulary an agent goes on by itself; across two the prompt has to be encoded again, which is for those who
hold its text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

from isthmus.edge_agent.language.detokenize import AnswerEvent, close
from isthmus.edge_agent.policy.arms import Arm
from isthmus.models.errors import LinkError
from isthmus.models.language.checkpoint.tokenizer import Tokenizer

Generate = Callable[[Tokenizer], Iterator[AnswerEvent]]


class Encoding(Protocol):
    """A backend, as far as its tokenizers are concerned."""

    def tokenizer_for(self, arm: Arm) -> Tokenizer:
        """What encodes prompts for an arm now."""


def is_left_to_device(backend: Encoding, arm: Arm, tokenizer: Tokenizer, error: Exception) -> bool:
    """Whether a prompt encoded by `tokenizer`, whose answer failed, is to be encoded again for the device's model."""
    if arm != "auto" or not isinstance(error, LinkError):
        return False
    return backend.tokenizer_for(arm).vocabulary != tokenizer.vocabulary


def ask_again(backend: Encoding, arm: Arm, generate: Generate) -> Iterator[AnswerEvent]:
    """The events of `generate`, which is called at once, and once more where its answer is left to the device."""
    tokenizer = backend.tokenizer_for(arm)
    return switching(backend, arm, tokenizer, generate, generate(tokenizer))


def switching(
    backend: Encoding, arm: Arm, tokenizer: Tokenizer, generate: Generate, events: Iterator[AnswerEvent]
) -> Iterator[AnswerEvent]:
    """`events`, or those of `generate` with another tokenizer."""
    begun = False
    try:
        for event in events:
            begun = True
            yield event
    except LinkError as error:
        if begun or not is_left_to_device(backend, arm, tokenizer, error):
            raise
        yield from generate(backend.tokenizer_for(arm))
    finally:
        close(events)
