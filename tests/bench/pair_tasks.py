"""Questions with right answers, made from templates: short enough for small models, and each with one answer.

    arithmetic   sums, differences and products of small numbers; the number is the answer
    problems     word problems of two steps; the last number of the answer counts
    retrieval    a list of facts and a question about one of them; the answer has to contain its word
    copy         a line to repeat

Real sets come from a file: Spec-Bench has 80 word problems with references (GSM8K), and 80 translations.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Greta", "Hugo", "Ida", "Jonas")
THINGS = ("apples", "books", "coins", "marbles", "pencils", "shells", "stamps", "tickets")
COLOURS = ("red", "blue", "green", "yellow", "black", "white", "orange", "purple")
OBJECTS = ("key", "hat", "bicycle", "umbrella", "lamp", "guitar")
WORDS = ("river", "stone", "cloud", "garden", "mirror", "silver", "window", "candle", "forest", "bridge")


@dataclass(frozen=True, slots=True)
class TaskQuestion:
    """A question of a task; any of the references is right."""

    task: str
    prompt: str
    references: tuple[str, ...]


def arithmetic(chance: random.Random) -> tuple[str, str]:
    sign, most = chance.choice((("+", 60), ("-", 60), ("*", 12)))
    one, other = sorted((chance.randint(2, most), chance.randint(2, most)), reverse=True)
    result = {"+": one + other, "-": one - other, "*": one * other}[sign]
    return f"What is {one} {sign} {other}? Answer with the number only.", str(result)


def problem(chance: random.Random) -> tuple[str, str]:
    name, friend = chance.sample(NAMES, 2)
    thing, had, got = chance.choice(THINGS), chance.randint(5, 30), chance.randint(2, 12)
    gone = chance.randint(1, had + got - 1)
    text = (
        f"{name} has {had} {thing}. {friend} gives {name} {got} more {thing}. Then {name} loses {gone} {thing}."
        f" How many {thing} does {name} have now?"
    )
    return text, str(had + got - gone)


def retrieval(chance: random.Random) -> tuple[str, str]:
    names, colours, thing = chance.sample(NAMES, 4), chance.sample(COLOURS, 4), chance.choice(OBJECTS)
    facts = " ".join(f"{name} has a {colour} {thing}." for name, colour in zip(names, colours, strict=True))
    index = chance.randrange(4)
    return f"{facts} What colour is {names[index]}'s {thing}? Answer with one word.", colours[index]


def copy(chance: random.Random) -> tuple[str, str]:
    line = " ".join(chance.sample(WORDS, 5))
    return f"Repeat exactly these words: {line}", line


TASKS = {"arithmetic": arithmetic, "problems": problem, "retrieval": retrieval, "copy": copy}


def generated_tasks(each: int, seed: int = 0) -> list[TaskQuestion]:
    """So many different questions of each task."""
    made: dict[str, TaskQuestion] = {}
    for task, make in TASKS.items():
        chance, wanted = random.Random(f"{task} {seed}"), len(made) + each
        while len(made) < wanted:
            prompt, answer = make(chance)
            made.setdefault(prompt, TaskQuestion(task, prompt, (answer,)))
    return list(made.values())
