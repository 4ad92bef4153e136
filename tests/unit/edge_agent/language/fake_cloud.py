"""A cloud that is a real gRPC server: it declares what a test says, sends its tokenizer, and counts up in tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import grpc

from isthmus.models.errors import ContextGone
from isthmus.models.language.checkpoint.tokenizer import Tokenizer
from isthmus.models.messages import Committed, Logprobs, ModelInfo, Opening, ServiceInfo, TokenizerInfo
from isthmus.protos import limits, wire_describe, wire_session
from isthmus.protos.isthmus.v1 import isthmus_pb2 as pb
from isthmus.protos.isthmus.v1 import isthmus_pb2_grpc as pb_grpc


def model_info(tokenizer: Tokenizer, name: str = "big", **changed: Any) -> ModelInfo:
    """A model of an engine, as its service declares it."""
    info = TokenizerInfo(tokenizer.fingerprint, len(tokenizer.to_bytes()), tokenizer.vocabulary)
    arms, ends = ("cloud", "verify"), tuple(sorted(tokenizer.eos_ids))
    model = ModelInfo(name.encode().ljust(32), name, tokenizer.size, 512, "engine", info, ends, arms)
    return replace(model, **changed)


class FakeCloud(pb_grpc.IsthmusServicer):
    """After a token comes the next one. `models` and `tokenizers` may be changed while it serves."""

    def __init__(self, *models: ModelInfo, tokenizers: Sequence[bytes] = (), port: int = 0) -> None:
        """`tokenizers`: what is sent to whoever asks for one, in parts."""
        self.models, self.tokenizers = models, tokenizers
        self.openings: list[Opening] = []
        self.fetches = 0
        self._server = grpc.server(ThreadPoolExecutor(8))
        pb_grpc.add_IsthmusServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{port}")
        self.target = f"127.0.0.1:{self.port}"
        self._server.start()

    def Describe(self, request: pb.DescribeRequest, context: Any) -> pb.DescribeResponse:
        return wire_describe.pack_service(ServiceInfo("0", limits.WIRE_VERSION, (), tuple(self.models)))

    def Tokenizer(self, request: pb.TokenizerRequest, context: Any) -> Iterator[pb.TokenizerPart]:
        self.fetches += 1
        if not self.tokenizers:
            context.abort(grpc.StatusCode.NOT_FOUND, "no model here has it")
        for data in self.tokenizers:
            yield pb.TokenizerPart(data=data)

    def Generate(self, requests: Iterator[pb.GenerateRequest], context: Any) -> Iterator[pb.GenerateResponse]:
        text: list[int] = []
        opening: Opening | None = None
        for message in requests:
            request = wire_session.unpack_generate(message)
            if isinstance(request, Opening):
                if request.model not in {model.fingerprint[: limits.BUNDLE_ID_BYTES] for model in self.models}:
                    context.abort(grpc.StatusCode.NOT_FOUND, "another model is here now")
                self.openings.append(opening := request)
                if request.start > len(text):
                    yield wire_session.pack_generate_error(ContextGone("a stream holds its own text"))
                text = [*text[: request.start], *request.tokens]
                continue
            assert opening is not None
            accepted = 0
            for drafted in request.draft:
                if drafted != text[-1] + 1:
                    break
                text.append(drafted)
                accepted += 1
            yield self._committed(opening, text, request.base, accepted)
            for _ in range(request.extend):
                yield self._committed(opening, text, len(text), 0, extension=True)

    def _committed(
        self, opening: Opening, text: list[int], base: int, accepted: int, extension: bool = False
    ) -> pb.GenerateResponse:
        text.append(text[-1] + 1)
        logprobs = () if opening.logprobs is None else (Logprobs(-0.25, ((text[-1], -0.25),) * opening.logprobs),)
        logprobs *= accepted + 1
        return wire_session.pack_committed(
            Committed(base, accepted, (text[-1],), extension, passes=1, logprobs=logprobs)
        )

    def stop(self) -> None:
        self._server.stop(None).wait()
