from __future__ import annotations

from isthmus.edge_agent.language.request import GenerationRequest
from isthmus.edge_agent.language.sequence import AnswerSequence

EOS = 0


def sequence(max_tokens: int = 3) -> AnswerSequence:
    return AnswerSequence(GenerationRequest((5, 6), max_tokens, "edge"), frozenset({EOS}))


def test_it_begins_with_the_prompt() -> None:
    fresh = sequence()
    assert (fresh.tokens, len(fresh), fresh.generated, fresh.remaining, fresh.finished) == ([5, 6], 2, 0, 3, False)
    assert fresh.finish == "length"


def test_it_ends_with_as_many_tokens_as_requested() -> None:
    grown = sequence()
    for token in (7, 8):
        grown.append(token)
        assert not grown.finished
    grown.append(9)
    assert (grown.tokens, grown.finished, grown.finish, grown.remaining) == ([5, 6, 7, 8, 9], True, "length", 0)


def test_it_ends_with_an_end_of_text_token() -> None:
    grown = sequence()
    grown.append(EOS)
    assert grown.finished and grown.finish == "stop" and grown.remaining == 2


def test_an_end_of_text_in_the_prompt_ends_nothing() -> None:
    fresh = AnswerSequence(GenerationRequest((5, EOS), 3, "edge"), frozenset({EOS}))
    assert not fresh.finished and fresh.finish == "length"


def test_the_request_is_not_changed() -> None:
    grown = sequence()
    grown.append(7)
    assert grown.request.prompt == (5, 6)
