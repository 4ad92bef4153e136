"""Convert isthmus.models.messages to and from the protobuf messages of `Generate`.

    Opening, Round -> pack_opening, pack_round -> GenerateRequest ~~~ unpack_generate -> Opening or Round
    Committed -> pack_committed -> GenerateResponse ~~~ unpack_committed -> Committed or an error

Every message from outside is validated here, before anything is allocated for it.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from isthmus.models.errors import (
    InvalidInput,
    InvalidReply,
    PayloadCorrupt,
    PayloadTooLarge,
    PeerError,
    UnsupportedVersion,
)
from isthmus.models.messages import SESSION_BYTES, Committed, Logprobs, Opening, Processed, Round
from isthmus.protos import limits
from isthmus.protos.isthmus.v1 import isthmus_pb2 as pb
from isthmus.protos.wire import MICROSECONDS, microseconds, pack_failure, unpack_failure
from isthmus.protos.wire_sampling import check_answer_start, pack_processors, unpack_sampling


def pack_opening(opening: Opening) -> pb.GenerateRequest:
    sampling = opening.sampling
    return pb.GenerateRequest(
        open=pb.Open(
            wire_version=limits.WIRE_VERSION,
            model=opening.model[: limits.BUNDLE_ID_BYTES],
            session=opening.session,
            start=opening.start,
            tokens=opening.tokens,
            crc32=opening.crc32,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed,
            logprobs=0 if opening.logprobs is None else opening.logprobs + 1,
            handoff=int.from_bytes(opening.handoff[: limits.BUNDLE_ID_BYTES], "little"),
            rate=opening.rate,
            context_rate=opening.context_rate,
            kept=opening.prefill_layers,
            **pack_processors(sampling),
            answer_start=opening.answer_start,
        )
    )


def pack_round(round_: Round) -> pb.GenerateRequest:
    message = pb.Round(
        base=round_.base,
        draft=round_.draft,
        extend=round_.extend,
        states=round_.states,
        decided=round_.decoded_from,
        score=round_.score,
    )
    if round_.states:
        message.crc32 = states_checksum(message)
    return pb.GenerateRequest(round=message)


def unpack_generate(message: pb.GenerateRequest) -> Opening | Round:
    """Raises UnsupportedVersion, InvalidInput, PayloadTooLarge or PayloadCorrupt, each naming what was expected."""
    kind = message.WhichOneof("kind")
    if kind == "open":
        return unpack_opening(message.open)
    if kind == "round":
        return unpack_round(message.round)
    raise InvalidInput("the message is neither an opening nor a round")


def unpack_opening(message: pb.Open) -> Opening:
    if message.wire_version != limits.WIRE_VERSION:
        raise UnsupportedVersion(f"wire version {message.wire_version}, this service reads {limits.WIRE_VERSION}")
    if len(message.model) != limits.BUNDLE_ID_BYTES:
        raise InvalidInput(f"model has {len(message.model)} bytes, expected {limits.BUNDLE_ID_BYTES}")
    if len(message.session) != SESSION_BYTES:
        raise InvalidInput(f"session has {len(message.session)} bytes, expected {SESSION_BYTES}")
    total = message.start + len(message.tokens)
    if message.handoff and message.tokens:
        raise InvalidInput(f"{len(message.tokens)} tokens without hidden states in a handoff session, expected none")
    if not message.handoff and (message.rate or message.context_rate):
        raise InvalidInput("a rate of hidden states without a handoff bundle")
    if not message.handoff and not total:
        raise InvalidInput("the session has no tokens, expected at least 1")
    if total > limits.MAX_TOKENS:
        raise PayloadTooLarge(f"the session has {total} tokens, expected at most {limits.MAX_TOKENS}")
    if not message.start and (found := checksum(message.tokens)) != message.crc32:
        raise PayloadCorrupt(f"CRC-32 of the tokens is {found:08x}, the opening says {message.crc32:08x}")
    if message.logprobs > limits.MAX_LOGPROBS + 1:
        raise InvalidInput(f"logprobs is {message.logprobs - 1}, expected at most {limits.MAX_LOGPROBS}")
    sampling = unpack_sampling(message)
    check_answer_start(message, sampling)
    return Opening(
        model=message.model,
        session=message.session,
        start=message.start,
        tokens=tuple(message.tokens),
        crc32=message.crc32,
        sampling=sampling,
        logprobs=message.logprobs - 1 if message.logprobs else None,
        handoff=message.handoff.to_bytes(limits.BUNDLE_ID_BYTES, "little") if message.handoff else b"",
        rate=message.rate,
        context_rate=message.context_rate,
        prefill_layers=message.kept,
        answer_start=message.answer_start,
    )


def unpack_round(message: pb.Round) -> Round:
    if message.states:
        return unpack_states(message)
    if message.crc32:
        raise PayloadCorrupt("the round has a CRC-32 of hidden states and no hidden states")
    if message.decided:
        raise InvalidInput("the round has `decided` indices and no hidden states")
    most = limits.MAX_SCORED if message.score else limits.MAX_DRAFT
    if len(message.draft) > most:
        raise PayloadTooLarge(f"the draft has {len(message.draft)} tokens, expected at most {most}")
    if message.score and (message.extend or not message.draft):
        raise InvalidInput(
            f"a scored round has {len(message.draft)} tokens and extend {message.extend}, expected tokens and no extend"
        )
    if not 1 <= message.base <= limits.MAX_TOKENS:
        raise InvalidInput(f"base is {message.base}, expected 1 to {limits.MAX_TOKENS}")
    if message.extend > limits.MAX_TOKENS:
        raise InvalidInput(f"extend is {message.extend}, expected at most {limits.MAX_TOKENS}")
    return Round(message.base, tuple(message.draft), message.extend, score=message.score)


def unpack_states(message: pb.Round) -> Round:
    """A round of a handoff session. The session itself checks the bundle's own limit on the size of a state."""
    count = len(message.states)
    if message.score:
        raise InvalidInput("a round of hidden states cannot be scored")
    if count > limits.MAX_STATES:
        raise PayloadTooLarge(f"the round has {count} states, expected at most {limits.MAX_STATES}")
    if len(message.draft) != count:
        raise InvalidInput(
            f"the round has {len(message.draft)} tokens and {count} states, expected as many states as tokens"
        )
    if (size := max(map(len, message.states))) > limits.MAX_STATE_BYTES:
        raise PayloadTooLarge(f"a state has {size} bytes, expected at most {limits.MAX_STATE_BYTES}")
    if message.base + count > limits.MAX_TOKENS:
        raise InvalidInput(f"the round ends at position {message.base + count}, expected at most {limits.MAX_TOKENS}")
    if message.extend > 1:
        raise InvalidInput(f"extend is {message.extend}, expected 0 or 1 with states")
    if len(message.decided) > count or any(index >= after for index, after in pairwise([*message.decided, count])):
        raise InvalidInput(f"decided has {len(message.decided)} indices, expected rising ones below {count}")
    if (found := states_checksum(message)) != message.crc32:
        raise PayloadCorrupt(f"CRC-32 of the states is {found:08x}, the round says {message.crc32:08x}")
    return Round(message.base, tuple(message.draft), message.extend, tuple(message.states), tuple(message.decided))


def pack_committed(committed: Committed) -> pb.GenerateResponse:
    rows = [
        pb.Logprobs(own=row.own, tokens=[id_ for id_, _ in row.top], values=[value for _, value in row.top])
        for row in committed.logprobs
    ]
    message = pb.GenerateResponse(
        base=committed.base,
        accepted=committed.accepted,
        tokens=committed.tokens,
        extension=committed.extension,
        queue_us=microseconds(committed.queue_s),
        compute_us=microseconds(committed.compute_s),
        passes=committed.passes,
        held=committed.held,
        logprobs=rows,
        processed=committed.processed.tokens,
        repeated=committed.processed.repeated,
        flops=committed.processed.flops,
    )
    message.crc32 = reply_checksum(message)
    return message


def pack_generate_error(error: Exception) -> pb.GenerateResponse:
    message = pb.GenerateResponse(error=pack_failure(error))
    message.crc32 = reply_checksum(message)
    return message


def unpack_committed(message: pb.GenerateResponse, vocab: int) -> Committed:
    """Raises the error that the response carries, or InvalidReply for tokens that the model does not have.

    What the device sent was whole: a service that found it corrupt is at fault, or the way there, and not the caller.
    """
    if (found := reply_checksum(message)) != message.crc32:
        raise InvalidReply(f"CRC-32 of the reply is {found:08x}, the reply says {message.crc32:08x}")
    if message.HasField("error"):
        error = unpack_failure(message.error)
        raise PeerError(str(error)) if isinstance(error, PayloadCorrupt) else error
    if message.accepted > limits.MAX_SCORED or len(message.tokens) > limits.MAX_TOKENS:
        raise InvalidReply("the cloud committed more tokens than a round allows")
    if any(id_ >= vocab for id_ in message.tokens):
        raise InvalidReply(f"the cloud sent a token outside the vocabulary of {vocab}")
    if len(message.logprobs) > message.accepted + len(message.tokens):
        raise InvalidReply("the cloud sent more log probabilities than committed tokens")
    return Committed(
        base=message.base,
        accepted=message.accepted,
        tokens=tuple(message.tokens),
        extension=message.extension,
        queue_s=message.queue_us / MICROSECONDS,
        compute_s=message.compute_us / MICROSECONDS,
        passes=message.passes,
        held=message.held,
        logprobs=tuple(unpack_logprobs(row, vocab) for row in message.logprobs),
        processed=Processed(message.processed, message.flops, message.repeated),
    )


def unpack_logprobs(row: pb.Logprobs, vocab: int) -> Logprobs:
    values = [row.own, *row.values]
    if not len(row.tokens) == len(row.values) <= limits.MAX_LOGPROBS or any(id_ >= vocab for id_ in row.tokens):
        raise InvalidReply("the cloud sent log probabilities of unknown tokens")
    if not all(math.isfinite(value) and value <= 1e-3 for value in values):
        raise InvalidReply("the cloud sent values that are not log probabilities")
    return Logprobs(row.own, tuple(zip(row.tokens, row.values, strict=True)))


def checksum(tokens: Sequence[int]) -> int:
    """CRC-32 of token ids, each as little-endian uint32."""
    return zlib.crc32(np.asarray(tokens, "<u4").tobytes())


def reply_checksum(message: pb.GenerateResponse) -> int:
    """CRC-32 over every field of a reply that a text depends on."""
    numbers = [message.base, message.accepted, message.extension, message.queue_us, message.compute_us, message.passes]
    error = message.error
    numbers += [message.held, error.code, error.retry_ms, len(message.tokens), *message.tokens]
    values: list[float] = []
    for row in message.logprobs:
        numbers += [len(row.tokens), *row.tokens]
        values += [row.own, *row.values]
    crc = zlib.crc32(np.asarray(values, "<f4").tobytes(), checksum(numbers))
    return zlib.crc32(error.message.encode(), crc)


def states_checksum(message: pb.Round) -> int:
    """CRC-32 of base, extend, draft, decided, then each state's size and bytes; integers as little-endian uint32."""
    crc = checksum([message.base, message.extend, *message.draft, *message.decided])
    for state in message.states:
        crc = zlib.crc32(state, zlib.crc32(struct.pack("<I", len(state)), crc))
    return crc
