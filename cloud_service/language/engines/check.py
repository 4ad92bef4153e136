"""The check at start: does an engine choose the same when it scores a text as when it streams it?

It also warms the engine up. Greedy choices of two ways of computing differ where two tokens are about equally likely.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Coroutine, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from isthmus.cloud_service.language.engines.protocol import Engine
from isthmus.models.errors import EngineDown, EngineFault
from isthmus.models.language.checkpoint.tokenizer import Tokenizer
from isthmus.models.messages import GREEDY, Grammar, Processor, Sampling

T = TypeVar("T")
ANSWER = 128  # tokens that are streamed at most after each text
AT_ONCE = 4
TEXT = "The 3 quick brown føxes\n  jump over 漢字 — déjà vu 😀 {x: 1}!"
TOPICS = (
    "a lighthouse keeper who repairs clocks",
    "how rain forms over a mountain range",
    "three ways to sort a list of numbers in Python",
    "the history of the printing press in Europe",
    "a recipe for bread without yeast",
    "why the sky is blue and the sunset is red",
    "an argument between two chess players",
    "what a compiler does with a loop",
    "a letter from a sailor to his sister",
    "the rules of a card game for four players",
    "how bees find their way back to the hive",
    "a dialogue between a doctor and a patient",
    "the differences between a river and a canal",
    "a speech at the opening of a small library",
    "how to plan a garden for a dry summer",
    "the first day of a new teacher at a school",
)
PROBE_TOKENS = 16
PROBES: dict[Processor, tuple[Grammar, str]] = {  # a grammar, and what its texts begin with
    "regex": (Grammar("regex", "7{3}[xy]"), "777[xy]$"),
    "json_schema": (Grammar("json_schema", '{"enum": ["abc"]}'), '"abc"$'),
    "json_object": (Grammar("json_object"), "[{]"),
}
STARTS = ("Here is a text about {}:\n\n", "{}. Once", "Question: tell me about {}.\nAnswer:", "1. {}:\n2.")


async def check_tokenizer(engine: Engine, tokenizer: Tokenizer) -> None:
    """Raises EngineDown when the engine makes other ids of a text than `tokenizer`."""
    theirs = await engine.tokens_of(TEXT)
    ours = tokenizer.encode(TEXT)
    if theirs is None:
        return
    pairs = zip(reversed(ours), reversed(theirs), strict=False)  # one of them may begin with a beginning of text
    if abs(len(ours) - len(theirs)) > 1 or any(own != other for own, other in pairs):
        raise EngineDown(
            "the engine has another tokenizer than --engine-tokenizer: "
            f"of a test sentence it makes {len(theirs)} tokens that begin {theirs[:4]}, here {len(ours)}, {ours[:4]}"
        )


async def compare(engine: Engine, tokenizer: Tokenizer, tokens: int, context: int) -> tuple[int, int]:
    """How many tokens were both streamed and scored, about `tokens`, and at how many another one was chosen."""
    compared = mismatched = 0
    texts = [start.format(topic) for start in STARTS for topic in TOPICS]
    while texts and compared < tokens:
        answer = min(ANSWER, max(tokens - compared, 1))
        batch, texts = texts[:AT_ONCE], texts[AT_ONCE:]
        found = await at_once([compare_one(engine, tokenizer.encode(text), answer, context) for text in batch])
        compared += sum(tokens for tokens, _ in found)
        mismatched += sum(different for _, different in found)
    return compared, mismatched


async def applied(engine: Engine, tokenizer: Tokenizer, processors: Sequence[Processor]) -> tuple[Processor, ...]:
    """Those of `processors` that the engine applies: a server may ignore or refuse a field that it does not know."""
    return tuple(
        [name for name in processors if name not in PROBES or await keeps_to(engine, tokenizer, *PROBES[name])]
    )


async def keeps_to(engine: Engine, tokenizer: Tokenizer, grammar: Grammar, expected: str) -> bool:
    """Whether the text that the engine writes by a grammar is as `expected`, a regular expression."""
    streamed = engine.stream(tokenizer.encode(TEXT), Sampling(grammar=grammar), PROBE_TOKENS, None)
    try:
        async with aclosing(streamed) as choices:
            ids = [choice.token async for choice in choices]
    except EngineFault:  # it refuses the field
        return False
    return (
        re.match(expected, tokenizer.decode([id_ for id_ in ids if id_ not in tokenizer.eos_ids]).strip()) is not None
    )


async def at_once(parts: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """What all of them return. The first that fails ends the others, and its error is raised."""
    tasks = [asyncio.create_task(part) for part in parts]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()
        return [task.result() for task in tasks]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def compare_one(engine: Engine, prompt: Sequence[int], answer: int, context: int) -> tuple[int, int]:
    """Of one text: tokens compared, and those that differ."""
    prompt = list(prompt[: context // 2])
    streamed = []
    async with aclosing(engine.stream(prompt, GREEDY, min(answer, context - len(prompt) - 1), None)) as choices:
        async for choice in choices:
            streamed.append(choice.token)
    if not streamed:
        return 0, 0
    scored = await engine.score([*prompt, *streamed], len(prompt), None)
    return len(streamed), sum(own != other.token for own, other in zip(streamed, scored, strict=False))
