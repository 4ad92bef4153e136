"""Whether an answer is right, and whether a device's answer is as good as the cloud's.

With a reference, an answer is right or wrong: the number that it ends with, or the words that it has to contain.
Without one, the cloud's answer is the reference, and the measure is how many words both have in common.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

SIMILAR = 0.5  # F1 of words, from which two answers count as saying the same
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
WORD = re.compile(r"[^\W_]+")
FINAL = "####"  # before the number of a reference, in the format of GSM8K


def words(text: str) -> list[str]:
    """Its words in small letters, without punctuation."""
    return WORD.findall(text.lower())


def last_number(text: str) -> float | None:
    """The last number of a text."""
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def is_right(answer: str, references: Sequence[str]) -> bool:
    """Whether an answer contains one of the references as whole words; of a number, whether it is the last one.

    Of a reference in the format of GSM8K only the number after #### counts.
    """
    for reference in references:
        expected = reference.rpartition(FINAL)[2].strip()
        if NUMBER.fullmatch(expected):
            if last_number(answer) == float(expected.replace(",", "")):
                return True
        elif f" {' '.join(words(expected))} " in f" {' '.join(words(answer))} ":
            return True
    return False


def similarity(one: str, other: str) -> float:
    """F1 of the words of two answers; 1 where both have none."""
    left, right = Counter(words(one)), Counter(words(other))
    if not left or not right:
        return float(left == right)
    shared = (left & right).total()
    return 2 * shared / (left.total() + right.total())


def is_acceptable(device: str, cloud: str, references: Sequence[str]) -> bool:
    """Whether the device's answer is no worse than the cloud's: right, or both wrong; without a reference, similar."""
    if references:
        return is_right(device, references) or not is_right(cloud, references)
    return similarity(device, cloud) >= SIMILAR
