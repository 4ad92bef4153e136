from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from functools import cache

import jsonschema
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from isthmus.models.errors import InvalidGrammar, InvalidInput
from isthmus.models.language.checkpoint.checkpoint import open_tokenizer
from isthmus.models.language.checkpoint.tokenizer import Tokenizer
from isthmus.models.language.grammar import MAX_COMPILED, Grammars, GrammarState, LastGrammars, json_rule
from isthmus.models.messages import MAX_GRAMMAR_BYTES, Grammar
from tests.bench.schemas import Schemas
from tests.bench.tiny_llama import write_tiny_llama

# Expressions that describe few texts: every one of them can be tried.
EXPRESSIONS = ("(ab|a|b)c?", "a{2,3}b", "x", "(foo|fob|ba)[01]", "é|ü?z", "(a|b){0,2}", "yes|no|none")
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def bytes_of(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """259 tokens: three marks, then a token for each byte."""
    return Tokenizer.open(write_tiny_llama(tmp_path_factory.mktemp("bytes") / "tiny"))


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    """SmolLM2's 49,152 tokens."""
    return open_tokenizer("smollm2")


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer of SentencePiece, whose texts begin with a space of their own."""
    return Tokenizer.open(write_tiny_llama(tmp_path_factory.mktemp("pieces") / "tiny", vocab="pieces"))


@cache
def grammars_of(tokenizer: Tokenizer) -> Grammars:
    """What is learnt of a tokenizer takes some tenths of a second."""
    return Grammars(tokenizer)


def state_of(tokenizer: Tokenizer, kind: str, text: str | dict[str, object] = "") -> GrammarState:
    grammar = Grammar(kind, text if isinstance(text, str) else json.dumps(text))  # type: ignore[arg-type]
    return grammars_of(tokenizer).state(grammar, tokenizer.eos_ids)


def walk(state: GrammarState, tokenizer: Tokenizer, seed: int, most: int = 200) -> tuple[list[int], bool]:
    """Random tokens that the grammar allows, and whether they came to an end."""
    rng, answer = random.Random(seed), list[int]()
    while len(answer) < most:
        token = state.forced(answer)
        if token is None:
            token = int(rng.choice(np.flatnonzero(state.mask(answer))))
        if token in tokenizer.eos_ids:
            return answer, True
        answer.append(token)
    return answer, False


def texts_of(expression: str, alphabet: str, longest: int) -> set[bytes]:
    """Every text of a regular expression, by trying all."""
    found, texts = set[bytes](), [""]
    for _ in range(longest + 1):
        found |= {text.encode() for text in texts if re.fullmatch(expression, text)}
        texts = [text + letter for text in texts for letter in alphabet]
    return found


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_a_mask_allows_exactly_what_can_still_become_a_text(bytes_of: Tokenizer, expression: str) -> None:
    texts = texts_of(expression, "".join(sorted({*expression} & {*"abcxyzfonesé üz01"})), 4)
    state, starts = state_of(bytes_of, "regex", expression), [b""]
    while starts:
        start = starts.pop()
        answer = [3 + byte for byte in start]  # ids of bytes follow those of the three marks
        following = {text[len(start)] for text in texts if text.startswith(start) and len(text) > len(start)}
        expected = {3 + byte for byte in following} | (set(bytes_of.eos_ids) if start in texts else set())
        assert set(np.flatnonzero(state.mask(answer)).tolist()) == expected, (expression, start)
        starts += [start + bytes([byte]) for byte in following]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10**6), asked=st.lists(st.floats(0, 1), max_size=8))
def test_what_a_state_says_depends_on_the_answer_alone(words: Tokenizer, seed: int, asked: list[float]) -> None:
    """However it was asked before: back and forth, other branches, tokens that are wrong."""
    grammars = grammars_of(words)
    grammar = Grammar("json_schema", json.dumps(PERSON))
    answer, _ = walk(grammars.state(grammar, words.eos_ids), words, seed)
    other, _ = walk(grammars.state(grammar, words.eos_ids), words, seed + 1)
    state = grammars.state(grammar, words.eos_ids)
    for share in [*asked, 1.0]:
        for part in (other[: int(share * len(other))], answer[: int(share * len(answer))]):
            fresh = grammars.state(grammar, words.eos_ids)
            assert state.forced(part) == fresh.forced(part)
            assert np.array_equal(state.mask(part), fresh.mask(part))
        with pytest.raises(InvalidInput, match="is not what its grammar allows"):
            state.mask([*answer, 5, 5, 5])


@pytest.mark.parametrize("seed", range(8))
def test_a_forced_token_is_the_only_one_and_the_tokenizers_own(words: Tokenizer, seed: int) -> None:
    state = grammars_of(words).state(Grammar("json_schema", json.dumps(PERSON)), words.eos_ids)
    answer, ended = walk(state, words, seed)
    assert ended and PERSON["required"] == list(json.loads(words.decode(answer)))
    forced = [index for index in range(len(answer)) if state.forced(answer[:index]) == answer[index]]
    assert len(forced) >= 6, "names of keys and separators"
    assert answer[:3] == words.encode('{"name":'), "as the tokenizer writes it"


def test_every_end_of_text_may_end_an_answer_and_nothing_else(words: Tokenizer) -> None:
    state = grammars_of(words).state(Grammar("regex", "ab?"), [2])
    assert not state.mask(())[[0, 2]].any()
    after = words.encode("a")
    assert state.mask(after)[2] and not state.mask(after)[0], "0 ends texts of the tokenizer, and not this answer"
    assert state.forced(words.encode("ab")) == 2


@pytest.mark.parametrize("seed", range(3))
def test_tokens_of_sentencepiece_follow_a_grammar_too(pieces: Tokenizer, seed: int) -> None:
    state = grammars_of(pieces).state(Grammar("json_schema", json.dumps(PERSON)), pieces.eos_ids)
    answer, ended = walk(state, pieces, seed, 600)
    text = b"".join(pieces.token_bytes(id_) for id_ in answer).decode()
    assert ended and list(json.loads(text)) == PERSON["required"]


def test_json_has_separators_without_a_choice(words: Tokenizer) -> None:
    """So that no model can write white space without end."""
    for seed in range(5):
        answer, ended = walk(state_of(words, "json_schema", {"type": "array", "items": {"type": "null"}}), words, seed)
        text = words.decode(answer)
        assert not ended or text == json.dumps(json.loads(text))


def test_a_schema_cannot_change_how_it_is_read(words: Tokenizer) -> None:
    loose = {"x-guidance": {"whitespace_flexible": True, "lenient": True}, "type": "object"}
    state = grammars_of(words).state(Grammar("json_schema", json.dumps(loose)), words.eos_ids)
    assert not state.mask(())[words.encode(" ")].any()


def test_any_json_object(words: Tokenizer) -> None:
    for seed in range(5):
        answer, ended = walk(state_of(words, "json_object"), words, seed)
        assert words.decode(answer).startswith("{")
        assert not ended or isinstance(json.loads(words.decode(answer)), dict)


def test_a_tool_call_within_free_text(words: Tokenizer) -> None:
    """A Lark grammar may name special tokens, and hold JSON schemas."""
    lark = "start: <|im_start|> call\ncall: " + json_rule(PERSON)
    answer, ended = walk(state_of(words, "lark", lark), words, 3)
    assert ended and words.special(answer[0])
    assert json.loads(words.decode(answer[1:]))["age"] <= 99


def test_answers_are_what_their_schema_says(words: Tokenizer) -> None:
    """Random tokens through schemas of many shapes; `tests.bench.grammar` has a thousand, and a model's tokens."""
    schemas, ended = Schemas(3), 0
    for seed in range(60):
        schema = schemas.next()
        answer, whole = walk(state_of(words, "json_schema", schema), words, seed, 150)
        if whole:
            jsonschema.Draft202012Validator(schema).validate(json.loads(words.decode(answer)))
        ended += whole
    assert ended >= 40


def test_what_a_schema_leaves_open_comes_to_an_end(words: Tokenizer) -> None:
    """Properties that it does not name, and digits without end: a small model writes them until it is cut."""
    schema = {"type": "object", "properties": {"count": {"type": "integer"}}, "required": ["count"]}
    state = state_of(words, "json_schema", schema)
    digits = words.encode('{"count": ' + 18 * "1")
    allowed = {bytes(words.token_bytes(int(id_))) for id_ in np.flatnonzero(state.mask(digits))}
    assert allowed == {b"}"}, "no further digit, and no other property"


HOSTILE = {
    "not json": ("json_schema", '{"type": '),
    "a list": ("json_schema", "[1]"),
    "a keyword that is not supported": ("json_schema", '{"type": "string", "not": {"const": "a"}}'),
    "a format that is not known": ("json_schema", '{"type": "string", "format": "zebra"}'),
    "a reference to nothing": ("json_schema", '{"$ref": "#/$defs/a"}'),
    "a reference elsewhere": ("json_schema", '{"$ref": "http://127.0.0.1:1/a"}'),
    "a reference to itself": ("json_schema", '{"$ref": "#"}'),
    "nested": ("json_schema", '{"items":' * 5000 + "{}" + "}" * 5000),
    "nested expression": ("regex", "(" * 5000 + "a" + ")" * 5000),
    "not an expression": ("regex", "a(b"),
    "look-ahead": ("regex", "(?=a)b"),
    "not a grammar": ("lark", "start ="),
    "rules that are missing": ("lark", "start: b"),
    "products of alternatives": (
        "json_schema",
        json.dumps({"allOf": [{"anyOf": [{"required": [f"{i} {j}"]} for j in range(9)]} for i in range(9)]}),
    ),
    "large numbers": ("json_schema", '{"type": "integer", "multipleOf": 99991, "minimum": 1, "maximum": 1e18}'),
    "nothing is valid": ("json_schema", '{"type": "integer", "minimum": 5, "maximum": 4}'),
    "false": ("json_schema", "false"),
}


@pytest.mark.parametrize(("kind", "text"), HOSTILE.values(), ids=HOSTILE)
def test_a_grammar_that_cannot_be_used_is_refused_in_one_line(words: Tokenizer, kind: str, text: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        state = grammars_of(words).state(Grammar(kind, text), words.eos_ids)  # type: ignore[arg-type]
        state.forced(())
        state.mask(())
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400


def test_a_grammar_that_takes_too_much_ends_its_answer(words: Tokenizer) -> None:
    with pytest.raises(InvalidInput, match="the grammar cannot go on: "):
        walk(state_of(words, "regex", "([a-z]*a[a-z]{200}|[0-9a-f]*b.{300})+"), words, 1, 3000)


IPV6 = "([0-9a-f]{1,4}:){7,7}[0-9a-f]{1,4}|([0-9a-f]{1,4}:){1,7}:|([0-9a-f]{1,4}:){1,6}(:[0-9a-f]{1,4}){1,6}"


@pytest.mark.parametrize(
    ("kind", "text", "fits"),
    [
        ("regex", IPV6, True),
        ("regex", r"[(]{300}\({300}[)(]{3,}", True),
        ("regex", "x*((a{1000}){1000}){1000}", False),
        ("regex", "x*((a{100,}b)(c{2,1000}[)])){11}", False),
        ("json_schema", '{"type": "string", "pattern": "^(a{101}){99,100}$"}', False),
        ("json_schema", '{"type": "string", "minLength": 5, "maxLength": 50000}', True),
        ("lark", "start: A~101 B\nA: C~100\nB: C\nC: /x/", False),
        ("lark", "start: /(a{1000}){1000}/", False),
    ],
)
def test_counts_within_counts_are_bounded(words: Tokenizer, kind: str, text: str, fits: bool) -> None:
    if fits:
        state_of(words, kind, text)
        return
    with pytest.raises(InvalidGrammar, match="repeats a part more than 4000 times"):
        state_of(words, kind, text)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: Grammar("yaml", "a"), "grammar kind 'yaml'"),  # type: ignore[arg-type]
        (lambda: Grammar("regex"), "needs a text"),
        (lambda: Grammar("json_object", "{}"), "has no text"),
        (lambda: Grammar("regex", "é" * MAX_GRAMMAR_BYTES), f"at most {MAX_GRAMMAR_BYTES}"),
        (lambda: Grammar("regex", "a\ud800"), "lone surrogate at character 1"),
    ],
)
def test_a_grammar_out_of_bounds_is_none(make: Callable[[], Grammar], expected: str) -> None:
    with pytest.raises(InvalidInput, match=re.escape(expected)):
        make()


def test_grammars_are_compiled_once_and_forgotten_in_turn(bytes_of: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    grammars, compiled = Grammars(bytes_of), list[str]()
    compile_one = grammars._compile
    monkeypatch.setattr(grammars, "_compile", lambda grammar: compiled.append(grammar.text) or compile_one(grammar))
    for text in ["a", "b", "a", *(f"c{index}" for index in range(MAX_COMPILED - 1)), "a", "b"]:
        grammars.state(Grammar("regex", text), bytes_of.eos_ids)
    assert compiled[:2] == ["a", "b"] and compiled.count("a") == 1 and compiled.count("b") == 2


def test_a_grammar_full_of_other_answers_begins_anew(words: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The states of a grammar share what the library has learnt of it, which is bounded."""
    import llguidance

    monkeypatch.setattr("isthmus.models.language.grammar.LIMITS", llguidance.LLParserLimits(max_lexer_states=2000))
    grammars, grammar = Grammars(words), Grammar("regex", "[a-z ]{3,200}[0-9]{1,3}")
    first = grammars.state(grammar, words.eos_ids)
    expected = first.mask(()).copy()
    for seed in range(40):
        answer, _ = walk(grammars.state(grammar, words.eos_ids), words, seed, 60)
        assert np.array_equal(first.mask(()), expected), seed
    assert first.mask(answer[:5]).any()


def test_a_few_tokenizers_have_grammars(bytes_of: Tokenizer, words: Tokenizer, pieces: Tokenizer) -> None:
    held = LastGrammars()
    first = held.of(bytes_of)
    assert held.of(words) is held.of(words) and held.of(bytes_of) is first
    held.of(pieces)
    assert held.of(bytes_of) is first and held.of(pieces) is held.of(pieces)
