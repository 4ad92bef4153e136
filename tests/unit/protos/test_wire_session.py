from __future__ import annotations

import contextlib
import math
import re
import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import pytest
from google.protobuf.message import DecodeError, Message
from hypothesis import given
from hypothesis import strategies as st

from isthmus.models.errors import (
    ContextGone,
    InvalidInput,
    InvalidReply,
    IsthmusError,
    PayloadCorrupt,
    PayloadTooLarge,
    PeerError,
    UnsupportedVersion,
)
from isthmus.models.messages import (
    MAX_SEED,
    SESSION_BYTES,
    Committed,
    Grammar,
    Logprobs,
    Opening,
    Processed,
    Round,
    Sampling,
)
from isthmus.protos import limits, wire, wire_session
from isthmus.protos.isthmus.v1 import isthmus_pb2 as pb

GRPC_PREFIX_BYTES = 5
VOCAB = 49_152
MODEL = bytes(range(32))
TOKENS = (1, 4093, 198, 49_151, 0)
OPENING = Opening(
    model=MODEL[:8],
    session=bytes(range(100, 116)),
    start=0,
    tokens=TOKENS,
    crc32=wire_session.checksum(TOKENS),
    sampling=Sampling(0.7, 0.95, 1234),
    logprobs=3,
)
ROUND = Round(300, (10_000, 20_000, 30_000, 40_000), 16)
HANDOFF_OPENING = Opening(
    model=MODEL[:8],
    session=bytes(range(100, 116)),
    start=300,
    tokens=(),
    crc32=0x01234567,
    sampling=Sampling(0.7, 0.95, 1234),
    handoff=bytes(range(200, 208)),
    rate=2,
    context_rate=1,
    prefill_layers=20,
)
HANDOFF_ROUND = Round(300, (10_000, 20_000, 30_000), 1, (b"", b"\x01", bytes(range(40))), (1,))
COMMITTED = Committed(
    base=300,
    accepted=1,
    tokens=(31_337,),
    extension=True,
    queue_s=0.0015,
    compute_s=0.02,
    passes=2,
    held=128,
    logprobs=(Logprobs(-0.5, ((7, -0.5), (8, -1.5))), Logprobs(-2.0, ((9, -0.25), (31_337, -2.0)))),
)

M = TypeVar("M", bound=Message)


def sent(message: M) -> M:
    """What arrives at the other end."""
    return type(message).FromString(message.SerializeToString())


def test_opening_is_golden(golden: Callable[[str, bytes], None]) -> None:
    golden("generate_open_v3.bin", wire_session.pack_opening(OPENING).SerializeToString(deterministic=True))


def test_round_is_golden(golden: Callable[[str, bytes], None]) -> None:
    golden("generate_round_v3.bin", wire_session.pack_round(ROUND).SerializeToString(deterministic=True))


def test_a_handoff_is_golden(golden: Callable[[str, bytes], None]) -> None:
    opening, round_ = wire_session.pack_opening(HANDOFF_OPENING), wire_session.pack_round(HANDOFF_ROUND)
    golden("generate_open_handoff_v3.bin", opening.SerializeToString(deterministic=True))
    golden("generate_round_handoff_v3.bin", round_.SerializeToString(deterministic=True))


def test_committed_is_golden(golden: Callable[[str, bytes], None]) -> None:
    golden("generate_committed_v3.bin", wire_session.pack_committed(COMMITTED).SerializeToString(deterministic=True))


def test_error_is_golden(golden: Callable[[str, bytes], None]) -> None:
    message = wire_session.pack_generate_error(ContextGone("the first 12 tokens are not held"))
    golden("generate_error_v3.bin", message.SerializeToString(deterministic=True))


ids = st.integers(0, wire.UINT32)
samplings = st.builds(  # six decimals arrive exactly, though the wire carries float32
    Sampling,
    temperature=st.integers(0, 2_000_000).map(lambda millionths: millionths / 1e6),
    top_p=st.integers(1, 1_000_000).map(lambda millionths: millionths / 1e6),
    seed=st.integers(0, MAX_SEED),
)


@st.composite
def openings(draw: st.DrawFn) -> Opening:
    start = draw(st.sampled_from([0, 0, 1, 77]))
    handoff = draw(st.sampled_from([b"", MODEL]))
    tokens = () if handoff else tuple(draw(st.lists(ids, min_size=0 if start else 1, max_size=50)))
    return Opening(
        model=draw(st.binary(min_size=32, max_size=32)),
        session=draw(st.binary(min_size=SESSION_BYTES, max_size=SESSION_BYTES)),
        start=start,
        tokens=tokens,
        crc32=draw(ids) if start else wire_session.checksum(tokens),
        sampling=draw(samplings),
        logprobs=draw(st.none() | st.integers(0, limits.MAX_LOGPROBS)),
        handoff=handoff,
        rate=draw(ids) if handoff else 0,
        context_rate=draw(ids) if handoff else 0,
        prefill_layers=draw(st.integers(0, 40)),
    )


@given(opening=openings())
def test_an_opening_arrives_as_it_was_sent(opening: Opening) -> None:
    arrived = wire_session.unpack_generate(sent(wire_session.pack_opening(opening)))
    assert isinstance(arrived, Opening)
    assert arrived.model == opening.model[: limits.BUNDLE_ID_BYTES]
    assert arrived.handoff == opening.handoff[: limits.BUNDLE_ID_BYTES]
    for name in (
        "session",
        "start",
        "tokens",
        "crc32",
        "sampling",
        "logprobs",
        "rate",
        "context_rate",
        "prefill_layers",
    ):
        assert getattr(arrived, name) == getattr(opening, name)


@given(
    base=st.integers(1, limits.MAX_TOKENS),
    draft=st.lists(ids, max_size=limits.MAX_DRAFT).map(tuple),
    extend=st.integers(0, limits.MAX_TOKENS),
)
def test_a_round_arrives_as_it_was_sent(base: int, draft: tuple[int, ...], extend: int) -> None:
    round_ = Round(base, draft, extend)
    scored = Round(base, (*draft, 1), score=True)
    assert wire_session.unpack_generate(sent(wire_session.pack_round(scored))) == scored
    assert wire_session.unpack_generate(sent(wire_session.pack_round(round_))) == round_


@given(
    base=st.integers(0, limits.MAX_TOKENS - limits.MAX_STATES),
    sent_rows=st.lists(st.tuples(ids, st.binary(max_size=40)), min_size=1, max_size=20),
    extend=st.integers(0, 1),
)
def test_states_arrive_as_they_were_sent(base: int, sent_rows: list[tuple[int, bytes]], extend: int) -> None:
    draft, states = zip(*sent_rows, strict=True)
    decided = tuple(index for index, state in enumerate(states) if len(state) % 2)
    round_ = Round(base, draft, extend, states, decided)
    assert wire_session.unpack_generate(sent(wire_session.pack_round(round_))) == round_


tokens = st.integers(0, VOCAB - 1)
floats = st.floats(-1000, 0, width=32)
rows = st.builds(Logprobs, own=floats, top=st.lists(st.tuples(tokens, floats), max_size=limits.MAX_LOGPROBS).map(tuple))


@st.composite
def commits(draw: st.DrawFn) -> Committed:
    accepted = draw(st.integers(0, limits.MAX_DRAFT))
    own = tuple(draw(st.lists(tokens, max_size=4)))
    return Committed(
        base=draw(ids),
        accepted=accepted,
        tokens=own,
        extension=draw(st.booleans()),
        queue_s=draw(ids) / 1e6,
        compute_s=draw(ids) / 1e6,
        passes=draw(ids),
        held=draw(ids),
        logprobs=tuple(draw(st.lists(rows, max_size=min(accepted + len(own), 3)))),
        processed=Processed(draw(ids), draw(st.integers(0, (1 << 64) - 1)), draw(ids)),
    )


@given(committed=commits())
def test_what_was_committed_arrives_as_it_was_sent(committed: Committed) -> None:
    assert wire_session.unpack_committed(sent(wire_session.pack_committed(committed)), VOCAB) == committed


def test_an_error_arrives_as_an_error() -> None:
    with pytest.raises(ContextGone, match="12 tokens are not held"):
        wire_session.unpack_committed(
            sent(wire_session.pack_generate_error(ContextGone("12 tokens are not held"))), VOCAB
        )


def test_corruption_on_the_way_up_is_no_fault_of_the_caller() -> None:
    with pytest.raises(PeerError, match="CRC-32"):
        wire_session.unpack_committed(sent(wire_session.pack_generate_error(PayloadCorrupt("CRC-32"))), VOCAB)


def test_a_fault_of_the_service_keeps_its_secrets() -> None:
    message = wire_session.pack_generate_error(KeyError("/srv/secret"))
    assert "secret" not in message.error.message
    assert message.error.code == 13


def test_the_checksum_is_the_crc_that_the_contract_describes() -> None:
    assert OPENING.crc32 == zlib.crc32(b"".join(token.to_bytes(4, "little") for token in TOKENS))


def test_the_checksum_of_states_is_the_crc_that_the_contract_describes() -> None:
    numbers = b"".join(number.to_bytes(4, "little") for number in (300, 1, 10_000, 20_000, 30_000, 1))
    states = b"".join(len(state).to_bytes(4, "little") + state for state in HANDOFF_ROUND.states)
    assert wire_session.pack_round(HANDOFF_ROUND).round.crc32 == zlib.crc32(numbers + states)


def test_a_round_without_states_has_no_checksum() -> None:
    assert wire_session.pack_round(ROUND).round.crc32 == 0


NAN, INF = math.nan, math.inf
BAD_OPENINGS: dict[str, tuple[dict[str, Any], type[IsthmusError], str]] = {
    "no version": ({"wire_version": 0}, UnsupportedVersion, "wire version 0, this service reads 3"),
    "next version": ({"wire_version": 4}, UnsupportedVersion, "wire version 4, this service reads 3"),
    "no model": ({"model": b""}, InvalidInput, "model has 0 bytes, expected 8"),
    "whole fingerprint": ({"model": MODEL}, InvalidInput, "model has 32 bytes, expected 8"),
    "no session": ({"session": b""}, InvalidInput, "session has 0 bytes, expected 16"),
    "long session": ({"session": bytes(17)}, InvalidInput, "session has 17 bytes, expected 16"),
    "no tokens": ({"tokens": []}, InvalidInput, "the session has no tokens, expected at least 1"),
    "huge start": ({"start": wire.UINT32}, PayloadTooLarge, "4294967300 tokens, expected at most 262144"),
    "too many tokens": ({"tokens": [0] * (limits.MAX_TOKENS + 1)}, PayloadTooLarge, "262145 tokens, expected at most"),
    "too many together": ({"start": limits.MAX_TOKENS - 4}, PayloadTooLarge, "262145 tokens"),
    "other token": ({"tokens": [1, 4093, 198, 49_151, 1]}, PayloadCorrupt, "CRC-32 of the tokens is"),
    "other order": ({"tokens": [4093, 1, 198, 49_151, 0]}, PayloadCorrupt, "CRC-32"),
    "no checksum": ({"crc32": 0}, PayloadCorrupt, "the opening says 00000000"),
    "temperature NaN": ({"temperature": NAN}, InvalidInput, "temperature is nan, expected 0 to 2"),
    "temperature infinite": ({"temperature": INF}, InvalidInput, "temperature is inf, expected 0 to 2"),
    "temperature negative": ({"temperature": -0.5}, InvalidInput, "temperature is -0.5, expected 0 to 2"),
    "temperature wild": ({"temperature": 2.5}, InvalidInput, "temperature is 2.5, expected 0 to 2"),
    "top_p NaN": ({"top_p": NAN}, InvalidInput, "top_p is nan, expected above 0, at most 1"),
    "top_p infinite": ({"top_p": -INF}, InvalidInput, "top_p is -inf, expected above 0"),
    "top_p zero": ({"top_p": 0.0}, InvalidInput, "top_p is 0.0, expected above 0"),
    "top_p above one": ({"top_p": 1.5}, InvalidInput, "top_p is 1.5, expected above 0, at most 1"),
    "seed too large": ({"seed": MAX_SEED + 1}, InvalidInput, f"seed is {MAX_SEED + 1}, expected 0 to {MAX_SEED}"),
    "many logprobs": ({"logprobs": 22}, InvalidInput, "logprobs is 21, expected at most 20"),
    "tokens of a handoff": (
        {"handoff": 7},
        InvalidInput,
        "5 tokens without hidden states in a handoff session, expected none",
    ),
    "rate of nothing": ({"rate": 1}, InvalidInput, "without a handoff bundle"),
    "context's rate of nothing": ({"context_rate": 1}, InvalidInput, "without a handoff bundle"),
    "huge start of a handoff": (
        {"handoff": 7, "tokens": [], "start": limits.MAX_TOKENS + 1},
        PayloadTooLarge,
        "262145 tokens, expected at most",
    ),
    "checksum of no tokens": ({"handoff": 7, "tokens": []}, PayloadCorrupt, "CRC-32 of the tokens is 00000000"),
}


@pytest.mark.parametrize(("fields", "kind", "words"), BAD_OPENINGS.values(), ids=BAD_OPENINGS.keys())
def test_a_bad_field_of_an_opening_is_refused_by_name(
    fields: dict[str, Any], kind: type[IsthmusError], words: str
) -> None:
    message = wire_session.pack_opening(OPENING)
    for name, value in fields.items():
        if name == "tokens":
            message.open.tokens[:] = value
        else:
            setattr(message.open, name, value)
    with pytest.raises(kind) as caught:
        wire_session.unpack_generate(message)
    assert type(caught.value) is kind
    assert words in str(caught.value)


BAD_ROUNDS: dict[str, tuple[pb.Round, type[IsthmusError], str]] = {
    "no base": (pb.Round(draft=[1]), InvalidInput, "base is 0, expected 1 to 262144"),
    "huge base": (pb.Round(base=limits.MAX_TOKENS + 1), InvalidInput, "base is 262145, expected 1 to 262144"),
    "huge extend": (pb.Round(base=1, extend=wire.UINT32), InvalidInput, "extend is 4294967295, expected at most"),
    "long draft": (
        pb.Round(base=1, draft=[1] * (limits.MAX_DRAFT + 1)),
        PayloadTooLarge,
        "the draft has 65 tokens, expected at most 64",
    ),
    "long scored text": (
        pb.Round(base=1, draft=[1] * (limits.MAX_SCORED + 1), score=True),
        PayloadTooLarge,
        "the draft has 513 tokens, expected at most 512",
    ),
    "scoring nothing": (pb.Round(base=1, score=True), InvalidInput, "a scored round has 0 tokens and extend 0"),
    "scoring and more": (pb.Round(base=1, draft=[1], extend=1, score=True), InvalidInput, "has 1 tokens and extend 1"),
    "checksum of nothing": (
        pb.Round(base=1, crc32=1),
        PayloadCorrupt,
        "a CRC-32 of hidden states and no hidden states",
    ),
    "deciding nothing": (pb.Round(base=1, decided=[0]), InvalidInput, "`decided` indices and no hidden states"),
}


def handed(**fields: Any) -> pb.Round:
    """A round of two states, with a true checksum unless given another."""
    message = pb.Round(**{"base": 0, "draft": [5, 6], "states": [b"ab", b"c"], "extend": 1, **fields})
    if "crc32" not in fields:
        message.crc32 = wire_session.states_checksum(message)
    return message


TOO_MANY = limits.MAX_STATES + 1
BAD_ROUNDS |= {
    "scored states": (handed(score=True), InvalidInput, "a round of hidden states cannot be scored"),
    "too many states": (
        handed(draft=[1] * TOO_MANY, states=[b""] * TOO_MANY),
        PayloadTooLarge,
        "the round has 257 states, expected at most 256",
    ),
    "more tokens than states": (
        handed(draft=[5, 6, 7]),
        InvalidInput,
        "3 tokens and 2 states, expected as many states as tokens",
    ),
    "more states than tokens": (
        handed(draft=[5]),
        InvalidInput,
        "1 tokens and 2 states, expected as many states as tokens",
    ),
    "large state": (
        handed(states=[b"", bytes(limits.MAX_STATE_BYTES + 1)]),
        PayloadTooLarge,
        "a state has 4097 bytes, expected at most 4096",
    ),
    "states beyond": (handed(base=limits.MAX_TOKENS - 1), InvalidInput, "ends at position 262145, expected at most"),
    "states at a wild base": (handed(base=wire.UINT32), InvalidInput, "ends at position 4294967297"),
    "many tokens asked": (handed(extend=2), InvalidInput, "extend is 2, expected 0 or 1 with states"),
    "decided beyond": (handed(decided=[2]), InvalidInput, "decided has 1 indices, expected rising ones below 2"),
    "decided twice": (handed(decided=[1, 1]), InvalidInput, "decided has 2 indices, expected rising ones below 2"),
    "decided backwards": (handed(decided=[1, 0]), InvalidInput, "expected rising ones below 2"),
    "no checksum of states": (handed(crc32=0), PayloadCorrupt, "the round says 00000000"),
    "wrong checksum of states": (handed(crc32=1), PayloadCorrupt, "the round says 00000001"),
}


@pytest.mark.parametrize(
    "change",
    [
        {"base": 1},
        {"extend": 0},
        {"draft": [6, 5]},
        {"decided": [0]},
        {"states": [b"a", b"bc"]},
        {"states": [b"ab", b"d"]},
    ],
    ids=str,
)
def test_the_checksum_covers_all_of_a_round(change: dict[str, Any]) -> None:
    with pytest.raises(PayloadCorrupt, match="CRC-32 of the states"):
        wire_session.unpack_round(handed(**{**change, "crc32": handed().crc32}))


def test_the_rounds_that_those_are_bent_from_is_good() -> None:
    assert wire_session.unpack_round(handed()) == Round(0, (5, 6), 1, (b"ab", b"c"))
    assert wire_session.unpack_round(handed(decided=[0, 1])).decoded_from == (0, 1)


@pytest.mark.parametrize(("message", "kind", "words"), BAD_ROUNDS.values(), ids=BAD_ROUNDS.keys())
def test_a_bad_field_of_a_round_is_refused_by_name(message: pb.Round, kind: type[IsthmusError], words: str) -> None:
    with pytest.raises(kind) as caught:
        wire_session.unpack_generate(pb.GenerateRequest(round=message))
    assert words in str(caught.value)


def test_a_message_of_neither_kind_is_refused() -> None:
    with pytest.raises(InvalidInput, match="neither an opening nor a round"):
        wire_session.unpack_generate(pb.GenerateRequest())


def row(own: float = -1.0, tokens: tuple[int, ...] = (1,), values: tuple[float, ...] = (-1.0,)) -> pb.GenerateResponse:
    return pb.GenerateResponse(base=9, tokens=[1], logprobs=[pb.Logprobs(own=own, tokens=tokens, values=values)])


BAD_RESPONSES: dict[str, tuple[pb.GenerateResponse, str]] = {
    "token outside": (pb.GenerateResponse(tokens=[VOCAB]), "outside the vocabulary of 49152"),
    "accepted too many": (pb.GenerateResponse(accepted=limits.MAX_SCORED + 1), "more tokens than a round allows"),
    "committed too many": (
        pb.GenerateResponse(tokens=[0] * (limits.MAX_TOKENS + 1)),
        "more tokens than a round allows",
    ),
    "logprobs of no token": (
        pb.GenerateResponse(logprobs=[pb.Logprobs(own=-1)]),
        "more log probabilities than committed tokens",
    ),
    "more ids than values": (row(tokens=(1, 2)), "log probabilities of unknown tokens"),
    "more values than ids": (row(values=(-1.0, -2.0)), "log probabilities of unknown tokens"),
    "id outside": (row(tokens=(VOCAB,)), "log probabilities of unknown tokens"),
    "wild number of ids": (row(tokens=(1,) * 21, values=(-1.0,) * 21), "log probabilities of unknown tokens"),
    "own NaN": (row(own=NAN), "not log probabilities"),
    "own infinite": (row(own=-INF), "not log probabilities"),
    "own positive": (row(own=0.5), "not log probabilities"),
    "value NaN": (row(values=(NAN,)), "not log probabilities"),
    "value positive": (row(values=(INF,)), "not log probabilities"),
}


@pytest.mark.parametrize(("message", "words"), BAD_RESPONSES.values(), ids=BAD_RESPONSES.keys())
def test_a_response_that_cannot_be_true_is_refused(message: pb.GenerateResponse, words: str) -> None:
    with pytest.raises(InvalidReply, match=words):
        wire_session.unpack_committed(with_checksum(message), VOCAB)


def test_the_response_that_those_are_bent_from_is_good() -> None:
    assert wire_session.unpack_committed(with_checksum(row()), VOCAB).logprobs == (Logprobs(-1.0, ((1, -1.0),)),)


def with_checksum(message: pb.GenerateResponse) -> pb.GenerateResponse:
    message.crc32 = wire_session.reply_checksum(message)
    return message


REPLIES = [wire_session.pack_committed(COMMITTED), wire_session.pack_generate_error(ContextGone("12 are not held"))]


@given(st.sampled_from(REPLIES), st.data())
def test_no_flipped_bit_of_a_reply_is_believed(message: pb.GenerateResponse, data: st.DataObject) -> None:
    flipped = bytearray(message.SerializeToString())
    bit = data.draw(st.integers(0, 8 * len(flipped) - 1))
    flipped[bit // 8] ^= 1 << bit % 8
    with contextlib.suppress(DecodeError), pytest.raises(InvalidReply, match="CRC-32"):
        wire_session.unpack_committed(pb.GenerateResponse.FromString(bytes(flipped)), VOCAB)


@given(st.binary(max_size=120))
def test_arbitrary_bytes_are_a_message_or_an_error_of_ours(data: bytes) -> None:
    try:
        arrived = wire_session.unpack_generate(pb.GenerateRequest.FromString(data))
    except (IsthmusError, DecodeError):
        return
    assert isinstance(arrived, Opening | Round)


GOOD = [wire_session.pack_opening(opening).SerializeToString() for opening in (OPENING, HANDOFF_OPENING)]
GOOD += [wire_session.pack_round(round_).SerializeToString() for round_ in (ROUND, HANDOFF_ROUND)]


@given(st.sampled_from(GOOD), st.integers(0, 8 * 100), st.integers(0, 8 * 100))
def test_flipped_bits_are_a_message_within_limits_or_an_error_of_ours(good: bytes, first: int, second: int) -> None:
    data = bytearray(good)
    for bit in (first, second):
        data[bit // 8 % len(data)] ^= 1 << bit % 8
    try:
        arrived = wire_session.unpack_generate(pb.GenerateRequest.FromString(bytes(data)))
    except (IsthmusError, DecodeError):
        return
    if isinstance(arrived, Opening):
        assert arrived.start or wire_session.checksum(arrived.tokens) == arrived.crc32
        assert len(arrived.session) == SESSION_BYTES
        assert not (arrived.handoff and arrived.tokens)
    elif arrived.states:
        assert len(arrived.states) == len(arrived.draft) <= limits.MAX_STATES
        assert arrived.base + len(arrived.states) <= limits.MAX_TOKENS
    else:
        assert 1 <= arrived.base <= limits.MAX_TOKENS
        assert len(arrived.draft) <= (limits.MAX_SCORED if arrived.score else limits.MAX_DRAFT)


def test_a_round_of_8_drafts_and_its_answer_are_at_most_200_bytes() -> None:
    up = wire_session.pack_round(Round(8191, tuple(range(40_000, 40_008)), 0)).ByteSize()
    committed = Committed(8191, 8, (49_151,), False, 0.100001, 0.300001, 3, 8191)
    down = wire_session.pack_committed(committed).ByteSize()
    assert up + down + 2 * GRPC_PREFIX_BYTES <= 200


def test_a_round_of_one_state_is_at_most_32_bytes_of_framing_and_its_answer_40() -> None:
    state = bytes(200)
    up = wire_session.pack_round(Round(8191, (49_151,), 1, (state,))).ByteSize()
    down = wire_session.pack_committed(Committed(8191, 0, (49_151,), False, 0.100001, 0.300001, 3, 8191)).ByteSize()
    assert up - len(state) <= limits.MAX_FRAMING_BYTES
    assert down <= 40


MASKED_OPENING = replace(
    OPENING,
    sampling=Sampling(
        0.7, 0.95, 1234, ((3, -100.0), (49_151, 0.5)), 0.25, -1.5, Grammar("json_schema", '{"type": "null"}')
    ),
    answer_start=4,
)


def test_opening_with_processors_is_golden(golden: Callable[[str, bytes], None]) -> None:
    golden(
        "generate_open_masked_v3.bin", wire_session.pack_opening(MASKED_OPENING).SerializeToString(deterministic=True)
    )


def test_processors_arrive() -> None:
    assert wire_session.unpack_generate(sent(wire_session.pack_opening(MASKED_OPENING))) == MASKED_OPENING


@given(
    biases=st.dictionaries(st.integers(0, VOCAB), st.floats(-100, 100, width=32), max_size=20),
    frequency=st.floats(-2, 2),
    presence=st.floats(-2, 2),
)
def test_biases_and_penalties_are_the_same_float32_at_both_ends(
    biases: dict[int, float], frequency: float, presence: float
) -> None:
    sampling = Sampling(0.0, 1.0, 0, tuple(sorted(biases.items())), frequency, presence)
    opening = replace(OPENING, sampling=sampling, answer_start=int(sampling.reads_answer))
    if sampling.reads_answer and not (np.float32(frequency) or np.float32(presence)):
        return  # underflows to no penalty, with which an answer has no start
    found = wire_session.unpack_generate(sent(wire_session.pack_opening(opening)))
    assert isinstance(found, Opening)
    assert found.sampling.logit_bias == sampling.logit_bias
    for ours, theirs in ((frequency, found.sampling.frequency_penalty), (presence, found.sampling.presence_penalty)):
        assert np.float32(ours) == np.float32(theirs)


HOSTILE_PROCESSORS: dict[str, tuple[dict[str, Any], str]] = {
    "too many biases": (
        {"bias_tokens": [*range(301)], "biases": [0.0] * 301},
        "301 biases of tokens, expected at most 300",
    ),
    "fewer biases than tokens": ({"bias_tokens": [1, 2], "biases": [0.5]}, "2 tokens with 1 biases"),
    "a token twice": ({"bias_tokens": [1, 1], "biases": [0.5, 0.5]}, "names a token twice"),
    "a bias that is no number": ({"bias_tokens": [1], "biases": [math.nan]}, "logit_bias of token 1 is nan"),
    "a large bias": ({"bias_tokens": [1], "biases": [101.0]}, "expected -100 to 100"),
    "a large penalty": ({"frequency_penalty": 2.5, "answer_start": 1}, "frequency_penalty is 2.5"),
    "a penalty that is no number": ({"presence_penalty": math.inf, "answer_start": 1}, "presence_penalty is inf"),
    "an unknown kind": ({"grammar": pb.Grammar(kind="yaml", text="a"), "answer_start": 1}, "grammar kind 'yaml'"),
    "a long grammar": ({"grammar": pb.Grammar(kind="lark", text="a" * 65_537), "answer_start": 1}, "has 65537 bytes"),
    "no start": ({"grammar": pb.Grammar(kind="json_object")}, "answer_start is 0, expected 1 to 5"),
    "a start beyond the end": ({"presence_penalty": 1.0, "answer_start": 6}, "answer_start is 6, expected 1 to 5"),
    "a start of nothing": ({"answer_start": 1}, "answer_start without penalties or a grammar"),
}


@pytest.mark.parametrize(("fields", "message"), HOSTILE_PROCESSORS.values(), ids=HOSTILE_PROCESSORS)
def test_processors_out_of_bounds_are_refused(fields: dict[str, Any], message: str) -> None:
    opening = wire_session.pack_opening(OPENING)
    opening.open.MergeFrom(pb.Open(**fields))
    with pytest.raises((InvalidInput, PayloadTooLarge), match=re.escape(message)):
        wire_session.unpack_generate(sent(opening))
