"""Grammars of answers: compiled once per tokenizer, then a mask of tokens after each text, and tokens that are forced.

    Grammar ── compile ──> template ── copy ──> GrammarState: answer's tokens -> mask, or the only token

What a state says is a function of the answer's tokens alone: it follows the text, forwards and back. Where the grammar
leaves one text only, its tokens are those that the tokenizer makes of it: they are forced, and no model is asked.

The library is llguidance: an Earley parser over lexemes that are derivatives of regular expressions. Whatever a grammar
holds, its size, its nesting and what compiling and each mask may compute are bounded. Knows no logits and no model.
"""

from __future__ import annotations

import json
import math
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import llguidance
import numpy as np
from numpy.typing import NDArray

from isthmus.models.errors import InvalidGrammar, InvalidInput
from isthmus.models.language.checkpoint.tokenizer import Tokenizer
from isthmus.models.language.drafts import shared_length
from isthmus.models.language.json_schemas import narrowed, read_schema
from isthmus.models.messages import Grammar

if TYPE_CHECKING:  # it is in the library's stubs alone
    from llguidance._lib import JsonCompileOptions

MAX_COMPILED = 32  # grammars of a tokenizer that are kept; an agent's tools are one
MAX_TOKENIZERS = 2
MAX_NESTING = 64  # levels of brackets in a schema or an expression: compiling recurses
MAX_REPEATS = 4_000  # of a part of a regular expression, by counts within counts
MAX_ERROR = 200  # characters of what the library says
# Separators without a choice: with one, a small model can write white space without end, and fewer tokens are forced.
JSON_OPTIONS: JsonCompileOptions = {
    "whitespace_flexible": False,
    "whitespace_pattern": None,
    "item_separator": ", ",
    "key_separator": ": ",
    "lenient": False,
    "coerce_one_of": True,
}
ANY_OBJECT = {"type": "object"}
BEFORE = "\x02"  # encoded before a text, whose first token would else begin with a space of its own
PARTS = re.compile(
    r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|(?P<open>\()|(?P<close>\))|\{(?:\d*,)?(?P<count>\d+),?\}", re.DOTALL
)
QUOTED = re.compile(r'"((?:\\.|[^"\\])*)"|/((?:\\.|[^/\\\n])+)/')  # strings of JSON and Lark, expressions of Lark
COUNTED = re.compile(r"[~.](\d{1,9})")

Mask = NDArray[np.bool_]
T = TypeVar("T")


class Grammars:
    """The compiled grammars of one tokenizer. Safe to call from several threads; one compiles at a time."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._vocabulary: llguidance.LLTokenizer | None = None
        self._compiled: OrderedDict[Grammar, llguidance.LLMatcher] = OrderedDict()

    def state(self, grammar: Grammar, end_ids: Collection[int]) -> GrammarState:
        """The state of an answer without tokens, which any of `end_ids` may end. Raises InvalidInput.

        The first state of a tokenizer takes some tenths of a second, that of a grammar milliseconds.
        """
        return GrammarState(partial(self._matcher, grammar), self._tokenizer, end_ids)

    def _matcher(self, grammar: Grammar, anew: bool) -> llguidance.LLMatcher:
        """At the start of an answer. What the library learns of a grammar is kept for the next, unless it is `anew`."""
        with self._lock:
            if anew:
                self._compiled.pop(grammar, None)
            if grammar not in self._compiled:
                self._compiled[grammar] = self._compile(grammar)
                if len(self._compiled) > MAX_COMPILED:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(grammar)
            return self._compiled[grammar].deep_copy()

    def _compile(self, grammar: Grammar) -> llguidance.LLMatcher:
        source = source_of(grammar)
        if self._vocabulary is None:
            words = llguidance.TokenizerWrapper(Words(self._tokenizer))
            self._vocabulary = llguidance.LLTokenizer(words, self._tokenizer.size, end_ids_of(self._tokenizer))
        matcher = llguidance.LLMatcher(self._vocabulary, source, log_level=0, limits=LIMITS)
        if matcher.is_error():
            raise InvalidGrammar(f"the {grammar.kind} grammar cannot be used: {one_line(matcher.get_error())}")
        return matcher


class LastGrammars:
    """The compiled grammars of a few tokenizers: of a device and its cloud there are two."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_tokenizer: OrderedDict[bytes, Grammars] = OrderedDict()

    def of(self, tokenizer: Tokenizer) -> Grammars:
        """Those of a tokenizer; after MAX_TOKENIZERS others they are compiled again."""
        with self._lock:
            name = tokenizer.fingerprint
            found = self._by_tokenizer[name] = self._by_tokenizer.get(name) or Grammars(tokenizer)
            self._by_tokenizer.move_to_end(name)
            if len(self._by_tokenizer) > MAX_TOKENIZERS:
                self._by_tokenizer.popitem(last=False)
            return found


class GrammarState:
    """Where an answer is in its grammar. It follows whatever answer it is asked about, not from several threads.

    Methods raise InvalidInput where the answer has left the grammar, or the grammar takes too much to go on.
    """

    def __init__(
        self, matcher: Callable[[bool], llguidance.LLMatcher], tokenizer: Tokenizer, end_ids: Collection[int]
    ) -> None:
        """`matcher` gives one at the start of an answer, and takes whether it has to be without a past."""
        self._new_matcher, self._matcher = matcher, matcher(False)
        self._size, self._all_ends, self._ends = tokenizer.size, end_ids_of(tokenizer), sorted(end_ids)
        self._tokens: list[int] = []  # that the matcher has taken

    def forced(self, answer: Sequence[int]) -> int | None:
        """The only token that may follow; None where there are several."""
        return self._asked(answer, self._forced)

    def mask(self, answer: Sequence[int]) -> Mask:
        """Which tokens (size,) may follow; at least one."""
        return self._asked(answer, self._mask)

    def _asked(self, answer: Sequence[int], ask: Callable[[], T]) -> T:
        """What `ask` says after `answer`; of a library that is full of other answers, once more without them."""
        for anew in (False, True):
            if anew:
                self._matcher, self._tokens = self._new_matcher(True), []
            if self._follow(answer):
                said = ask()
                if not self._matcher.is_error():
                    return said
            elif not self._matcher.is_error():
                raise InvalidInput(f"token {len(self._tokens)} of the answer is not what its grammar allows")
        raise InvalidInput(f"the grammar cannot go on: {one_line(self._matcher.get_error())}")

    def _forced(self) -> int | None:
        if self._matcher.is_stopped():
            return self._ends[0]
        return next(iter(self._matcher.compute_ff_tokens()), None)

    def _mask(self) -> Mask:
        if self._matcher.is_stopped():
            mask_V = np.zeros(self._size, np.bool_)
            mask_V[self._ends] = True
            return mask_V
        raw = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        mask_V = np.unpackbits(raw, count=self._size, bitorder="little").view(np.bool_)
        mask_V[self._all_ends] = False
        mask_V[self._ends] = self._matcher.is_accepting()
        if not (mask_V.any() or self._matcher.is_error()):
            raise InvalidInput("the grammar allows no token here: this vocabulary has none for its text")
        return mask_V

    def _follow(self, answer: Sequence[int]) -> bool:
        """Take the matcher to the end of `answer`, by the shortest way; False where the grammar does not allow it."""
        known = self._tokens
        common = shared_length(known, answer)
        if common < len(known):
            self._matcher.rollback(len(known) - common)
            del known[common:]
        fresh = list(answer[common:])
        taken = self._matcher.try_consume_tokens(fresh) if fresh else 0
        known += fresh[:taken]
        return taken == len(fresh)


class Words:
    """A tokenizer as llguidance asks for it: the bytes of each token, special ones marked, and an encoder of bytes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._before = BEFORE if tokenizer.leading_spaces else ""
        self._skipped = len(tokenizer.encode(self._before, special=False))
        self.special_token_ids = [id_ for id_ in range(tokenizer.size) if tokenizer.special(id_)]
        self._bytes = [tokenizer.token_bytes(id_) for id_ in range(tokenizer.size)]
        self.tokens = list(self._bytes)
        for id_ in self.special_token_ids:
            self.tokens[id_] = b"\xff" + (tokenizer.written([id_]) or b"<|%d|>" % id_)
        self.bos_token_id = None
        self.eos_token_id = end_ids_of(tokenizer)[0]
        self._longest: dict[bytes, int] = {}

    def __call__(self, raw: bytes) -> list[int]:
        """Its own tokens of UTF-8, or, of a text that it would change, the longest ones."""
        ids = self._tokenizer.encode(self._before + raw.decode(errors="replace"), special=False)[self._skipped :]
        return ids if b"".join(self._bytes[id_] for id_ in ids) == raw else self._greedy(raw)

    def _greedy(self, raw: bytes) -> list[int]:
        if not self._longest:
            self._longest = {word: id_ for id_, word in reversed(list(enumerate(self._bytes))) if word}
        ids, start = list[int](), 0
        while start < len(raw):
            stops = range(len(raw), start, -1)
            stop = next((stop for stop in stops if raw[start:stop] in self._longest), None)
            if stop is None:
                break
            ids.append(self._longest[raw[start:stop]])
            start = stop
        return ids


# Hostile grammars within these take 0.4 s for a mask, most fail at once; those of published tools stay far below.
LIMITS = llguidance.LLParserLimits(
    max_items_in_row=2000,
    initial_lexer_fuel=200_000,
    step_lexer_fuel=20_000,
    step_max_items=20_000,
    max_lexer_states=10_000,
    max_grammar_size=20_000,
    verbose_errors=False,
)


def end_ids_of(tokenizer: Tokenizer) -> list[int]:
    """Tokens that end a text; the library asks for one."""
    return sorted(tokenizer.eos_ids) or [tokenizer.size - 1]


def source_of(grammar: Grammar) -> str:
    """A grammar as llguidance reads it. Raises InvalidGrammar for what is no JSON, or nested too deep."""
    check_nesting(grammar.text)
    check_repeats(grammar)
    match grammar.kind:
        case "regex":
            return llguidance.LLMatcher.grammar_from_regex(grammar.text)
        case "lark":
            return llguidance.LLMatcher.grammar_from_lark(grammar.text)
        case "json_object":
            schema: object = ANY_OBJECT
        case "json_schema":
            schema = narrowed(read_schema(grammar.text))
    return llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=JSON_OPTIONS)


def json_rule(schema: object) -> str:
    """What stands for a JSON value of `schema` in a Lark grammar, with the separators and bounds of all JSON here."""
    schema = narrowed(schema)
    return "%json " + json.dumps({**schema, "x-guidance": JSON_OPTIONS} if isinstance(schema, dict) else schema)


def check_nesting(text: str) -> None:
    """Raises InvalidGrammar for more than MAX_NESTING brackets within each other, wherever they are."""
    depth = 0
    for character in text:
        if character in "([{":
            depth += 1
            if depth > MAX_NESTING:
                raise InvalidGrammar(f"the grammar nests more than {MAX_NESTING} brackets")
        elif character in ")]}":
            depth = max(depth - 1, 0)


def check_repeats(grammar: Grammar) -> None:
    """Raises InvalidGrammar for counted repetitions within each other, `(a{9}){9}`, that make more than MAX_REPEATS.

    Their derivatives are as large as the product of the counts, and no limit of the library counts that. Between rules
    of a Lark grammar, `a~9`, every product may come about.
    """
    texts, between = [grammar.text], 1
    if grammar.kind != "regex":
        texts = [found[1] or found[2] or "" for found in QUOTED.finditer(grammar.text)]
    if grammar.kind == "lark":
        between = math.prod(max(int(found[1]), 1) for found in COUNTED.finditer(grammar.text))
    if between * max(map(repeats, texts), default=1) > MAX_REPEATS:
        raise InvalidGrammar(f"the grammar repeats a part more than {MAX_REPEATS} times by counts within each other")


def repeats(expression: str) -> int:
    """How often the counts of a regular expression repeat a part of it at most."""
    most, last = [1], 1  # of each group that is open, and of the last that was closed
    for part in PARTS.finditer(expression):
        if part["open"]:
            most.append(1)
        elif part["close"]:
            last = most.pop() if len(most) > 1 else most[0]
            most[-1] = max(most[-1], last)
        elif part["count"]:
            inner = last if expression[part.start() - 1] == ")" else 1
            most[-1] = max(most[-1], inner * int(part["count"][:9]))
    return max(most)


def one_line(text: str) -> str:
    """What the library says, in one line and short."""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())[:MAX_ERROR]
