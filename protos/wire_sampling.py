"""Convert how tokens are chosen to and from the fields of an `Open`.

Every value from outside is validated here, before anything is allocated or compiled for it.
"""

from __future__ import annotations

from typing import TypedDict, cast

from isthmus.models.errors import InvalidInput, PayloadTooLarge
from isthmus.models.messages import MAX_LOGIT_BIASES, Grammar, GrammarKind, Sampling
from isthmus.protos import limits
from isthmus.protos.isthmus.v1 import isthmus_pb2 as pb


class ProcessorFields(TypedDict):
    """Fields of an `Open`; of a plain sampling they take no byte."""

    bias_tokens: list[int]
    biases: list[float]
    frequency_penalty: float
    presence_penalty: float
    grammar: pb.Grammar | None


def pack_processors(sampling: Sampling) -> ProcessorFields:
    """What is applied to logits before a token is chosen."""
    pairs, grammar = sorted(sampling.logit_bias), sampling.grammar
    return ProcessorFields(
        bias_tokens=[id_ for id_, _ in pairs],
        biases=[bias for _, bias in pairs],
        frequency_penalty=sampling.frequency_penalty,
        presence_penalty=sampling.presence_penalty,
        grammar=None if grammar is None else pb.Grammar(kind=grammar.kind, text=grammar.text),
    )


def unpack_sampling(message: pb.Open) -> Sampling:
    """Raises InvalidInput, PayloadTooLarge.

    Rounding undoes the wire's float32, so that a temperature of 1.1 stays 1.1: sampling depends on the exact value at
    both ends. Biases and penalties are float32 at both.
    """
    if len(message.bias_tokens) > MAX_LOGIT_BIASES:
        raise PayloadTooLarge(f"{len(message.bias_tokens)} biases of tokens, expected at most {MAX_LOGIT_BIASES}")
    if len(message.bias_tokens) != len(message.biases):
        raise InvalidInput(f"{len(message.bias_tokens)} tokens with {len(message.biases)} biases, expected as many")
    grammar = message.grammar
    return Sampling(
        temperature=round(message.temperature, 6),
        top_p=round(message.top_p, 6),
        seed=message.seed,
        logit_bias=tuple(zip(message.bias_tokens, message.biases, strict=True)),
        frequency_penalty=message.frequency_penalty,
        presence_penalty=message.presence_penalty,
        grammar=Grammar(cast(GrammarKind, grammar.kind), grammar.text) if message.HasField("grammar") else None,
    )


def check_answer_start(message: pb.Open, sampling: Sampling) -> None:
    """Raises InvalidInput for an answer that begins where it cannot, or a missing start where it is needed."""
    most = limits.MAX_TOKENS if message.handoff else message.start + len(message.tokens)
    if sampling.reads_answer and not 1 <= message.answer_start <= most:
        raise InvalidInput(f"answer_start is {message.answer_start}, expected 1 to {most}")
    if not sampling.reads_answer and message.answer_start:
        raise InvalidInput("answer_start without penalties or a grammar")
