"""A hostile peer at the door of a language model: each bad message gets one clear line, others go on undisturbed."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.messages import Opening, Round, Sampling
from isthmus.protos import limits, wire_session
from isthmus.protos.isthmus.v1 import isthmus_pb2 as pb
from isthmus.protos.isthmus.v1 import isthmus_pb2_grpc as pb_grpc
from tests.bench.processes import CloudProcess
from tests.contract.conftest import LANGUAGE
from tests.contract.language_parts import CHATTER, Answer, language_agent, prompt_of

Status = grpc.StatusCode
Spoil = Callable[[pb.GenerateRequest], pb.GenerateRequest]
METHOD = "/isthmus.v1.Isthmus/Generate"
TEXT = tuple(range(10, 40))


@pytest.fixture(scope="module")
def cloud(tiny_llama: Path) -> Iterator[CloudProcess]:
    with CloudProcess(arguments=("--model", str(tiny_llama), *LANGUAGE)) as process:
        yield process


@pytest.fixture
def channel(cloud: CloudProcess) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(cloud.target, [("grpc.max_send_message_length", 64 << 20)]) as channel:
        yield channel


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> bytes:
    return Checkpoint.open(tiny_llama).fingerprint


def opening(model: bytes, tokens: tuple[int, ...] = TEXT, start: int = 0) -> pb.GenerateRequest:
    crc32 = wire_session.checksum(tokens)
    return wire_session.pack_opening(Opening(model, random.randbytes(16), start, tokens, crc32, Sampling()))


def a_round(base: int = len(TEXT), draft: tuple[int, ...] = ()) -> pb.GenerateRequest:
    return wire_session.pack_round(Round(base, draft))


def talk(channel: grpc.Channel, *messages: pb.GenerateRequest) -> list[pb.GenerateResponse]:
    """Everything that is answered until the service ends the stream that we half-closed."""
    return list(pb_grpc.IsthmusStub(channel).Generate(iter(messages), timeout=10))  # type: ignore[no-untyped-call]


def with_tokens(*tokens: int) -> Spoil:
    """Their checksum is true: what a liar sends, not a bad link."""

    def spoil(message: pb.GenerateRequest) -> pb.GenerateRequest:
        del message.open.tokens[:]
        message.open.tokens.extend(tokens)
        message.open.crc32 = wire_session.checksum(tokens)
        return message

    return spoil


def changed(**fields: object) -> Spoil:
    def spoil(message: pb.GenerateRequest) -> pb.GenerateRequest:
        for name, value in fields.items():
            setattr(message.open, name, value)
        return message

    return spoil


def garbage(count: int) -> tuple[int, ...]:
    dice = random.Random(0)
    return tuple(dice.randrange(1 << 32) for _ in range(count))


OPENINGS: dict[str, tuple[Spoil, Status, str]] = {
    "wrong version": (changed(wire_version=4), Status.FAILED_PRECONDITION, "wire version 4, this service reads 3"),
    "wrong model": (changed(model=bytes(8)), Status.NOT_FOUND, "0000000000000000"),
    "cut model": (changed(model=b"abc"), Status.INVALID_ARGUMENT, "model has 3 bytes, expected 8"),
    "cut session": (changed(session=b"abc"), Status.INVALID_ARGUMENT, "session has 3 bytes, expected 16"),
    "broken CRC": (changed(crc32=1), Status.DATA_LOSS, "CRC-32"),
    "held nowhere": (changed(start=7), Status.ABORTED, "7 tokens"),
    "start beyond reason": (changed(start=1 << 31), Status.OUT_OF_RANGE, "expected at most"),
    "no tokens": (with_tokens(), Status.INVALID_ARGUMENT, "no tokens"),
    "unknown token": (with_tokens(259), Status.INVALID_ARGUMENT, "vocabulary of 259"),
    "full context": (with_tokens(*[5] * 512), Status.INVALID_ARGUMENT, "context of 512"),
    "10,000 tokens": (with_tokens(*[5] * 10_000), Status.INVALID_ARGUMENT, "context of 512"),
    "400 of garbage": (with_tokens(*garbage(400)), Status.INVALID_ARGUMENT, "vocabulary"),
    "10,000 of garbage": (with_tokens(*garbage(10_000)), Status.INVALID_ARGUMENT, "context of 512"),
    "more than anything": (with_tokens(*[5] * (limits.MAX_TOKENS + 1)), Status.OUT_OF_RANGE, "expected at most"),
    "hot": (changed(temperature=9.0), Status.INVALID_ARGUMENT, "temperature"),
    "not a number": (changed(temperature=float("nan")), Status.INVALID_ARGUMENT, "temperature"),
    "no nucleus": (changed(top_p=-1.0), Status.INVALID_ARGUMENT, "top_p"),
    "large seed": (changed(seed=(1 << 64) - 1), Status.INVALID_ARGUMENT, "seed"),
    "many logprobs": (changed(logprobs=1 << 30), Status.INVALID_ARGUMENT, "logprobs"),
}
ROUNDS: dict[str, tuple[pb.GenerateRequest, Status, str]] = {
    "draft too long": (a_round(draft=(5,) * 65), Status.OUT_OF_RANGE, "65 tokens, expected at most 64"),
    "draft of another vocabulary": (a_round(draft=(5, 1 << 31)), Status.INVALID_ARGUMENT, "vocabulary of 259"),
    "base before the text": (a_round(base=0), Status.INVALID_ARGUMENT, "base is 0"),
    "base beyond reason": (a_round(base=(1 << 32) - 1), Status.INVALID_ARGUMENT, "base is 4294967295"),
    "neither": (pb.GenerateRequest(), Status.INVALID_ARGUMENT, "neither an opening nor a round"),
}


def check_error(response: pb.GenerateResponse, code: Status, words: str) -> None:
    assert response.error.code == code.value[0]
    check_line(response.error.message, words)


def check_line(line: str, words: str) -> None:
    assert words in line and "\n" not in line and "Traceback" not in line and "site-packages" not in line
    assert len(line) <= limits.MAX_ERROR_CHARACTERS


def refuse_openings(channel: grpc.Channel, model: bytes) -> None:
    """A bad opening answers for the rounds behind it too, and the next opening is as good as ever."""
    for spoil, code, words in OPENINGS.values():
        bad, *rest = talk(channel, spoil(opening(model)), a_round(), opening(model), a_round())
        check_error(bad, code, words)
        assert [len(response.tokens) for response in rest] == [1]


def refuse_rounds(channel: grpc.Channel, model: bytes) -> None:
    """A bad round is answered, and the session goes on."""
    for message, code, words in ROUNDS.values():
        responses = talk(channel, opening(model), message, a_round())
        errors = [response for response in responses if response.HasField("error")]
        assert len(responses) == 2 and len(errors) == 1
        check_error(errors[0], code, words)


def refuse_noise(channel: grpc.Channel, model: bytes) -> None:
    """Bytes that are no message at all end their own stream, with a reason."""
    dice = random.Random(1)
    send = channel.stream_stream(
        METHOD, request_serializer=bytes, response_deserializer=pb.GenerateResponse.FromString
    )  # fmt: skip
    for noise in (b"\xff" * 64, b"\x0a\xff\xff\xff\xff\x0f", *(b"\x0a\x7f" + dice.randbytes(100) for _ in range(4))):
        responses = list(send(iter([noise]), timeout=10))
        assert len(responses) == 1
        check_error(responses[0], Status.INVALID_ARGUMENT, "not a message")
        late = [opening(model).SerializeToString(), a_round().SerializeToString(), noise]
        answered = [response for response in send(iter(late), timeout=10) if not response.HasField("error")]
        assert [len(response.tokens) for response in answered] == [1], "what came before it counts"


@pytest.mark.parametrize("name", OPENINGS)
def test_a_bad_opening(channel: grpc.Channel, model: bytes, name: str) -> None:
    spoil, code, words = OPENINGS[name]
    responses = talk(channel, spoil(opening(model)), a_round())
    assert len(responses) == 1
    check_error(responses[0], code, words)


def test_a_round_before_its_opening(channel: grpc.Channel, model: bytes) -> None:
    bad, good = talk(channel, a_round(), opening(model), a_round())
    check_error(bad, Status.INVALID_ARGUMENT, "before its session was opened")
    assert len(good.tokens) == 1


def test_nothing_at_all(channel: grpc.Channel) -> None:
    assert talk(channel) == []


def test_bytes_that_are_no_message(channel: grpc.Channel, model: bytes) -> None:
    refuse_noise(channel, model)


def test_more_rounds_than_may_wait(channel: grpc.Channel, model: bytes) -> None:
    """Every one of a flood is answered: by a token, as stale behind those that were refused, or with a status."""
    flood = [a_round(base=len(TEXT) + index) for index in range(200)]
    responses = talk(channel, opening(model), *flood)
    errors = [response for response in responses if response.HasField("error")]
    assert len(responses) == len(flood) and errors
    for error in errors:
        check_error(error, Status.RESOURCE_EXHAUSTED, "waiting already")


def test_a_message_larger_than_any(channel: grpc.Channel, model: bytes) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        talk(channel, with_tokens(*[5] * (limits.MAX_MESSAGE_BYTES + 1))(opening(model)))
    assert caught.value.code() is Status.RESOURCE_EXHAUSTED


def test_others_go_on_while_a_peer_attacks(
    cloud: CloudProcess, channel: grpc.Channel, model: bytes, tiny_llama: Path
) -> None:
    """All of it over and over, beside an agent that asks for the same answer again and again."""
    attacks, failures = 0, list[BaseException]()
    done = threading.Event()

    def attack() -> None:
        nonlocal attacks
        while not done.is_set():
            try:
                refuse_openings(channel, model)
                refuse_rounds(channel, model)
                refuse_noise(channel, model)
            except BaseException as failure:
                failures.append(failure)
                return
            attacks += 1

    with language_agent(tiny_llama, cloud.target) as agent:
        prompt = prompt_of(agent, "one two three one two three one")
        expected = Answer(agent, prompt, 60, "cloud", CHATTER)
        attacker = threading.Thread(target=attack)
        attacker.start()
        answers: list[Answer] = []
        while len(answers) < 10 or (not attacks and attacker.is_alive()):
            answers.append(Answer(agent, prompt, 60, ("cloud", "verify")[len(answers) % 2], CHATTER))
        done.set()
        attacker.join()
    assert not failures and attacks > 0
    assert all(answer.ids == expected.ids and not answer.how.degraded for answer in answers)
    assert "Traceback" not in cloud.read_log()
