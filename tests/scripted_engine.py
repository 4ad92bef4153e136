"""An engine over HTTP with real sockets, whose model is a function of the text, and whose faults are a script.

`python -m tests.scripted_engine PORT [DIALECT] [TOKEN_MS]` serves one until it is killed.
"""

from __future__ import annotations

import asyncio
import json
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from aiohttp import web

VOCAB, FIRST = 259, 3  # of tests.bench.tiny_llama: three marks, then the 256 bytes
END = 2
KEY = "sk-scripted-0123456789"
Fault = Literal[
    "", "slow", "cut", "hang", "oom", "vocab", "nan", "counts", "more", "json", "huge", "drip", "error", "empty", "none"
]


def next_token(ids: Sequence[int]) -> int:
    """What the model chooses after `ids`; the text ends about once in 200 tokens."""
    number = zlib.crc32(np.asarray(ids, "<u4").tobytes())
    return END if number % 200 == 0 else FIRST + 32 + number // 200 % 90


def answer_to(ids: Sequence[int], count: int) -> list[int]:
    """`count` tokens after `ids`; fewer where the text ends."""
    text = list(ids)
    for _ in range(count):
        text.append(next_token(text))
        if text[-1] == END:
            break
    return text[len(ids) :]


def likely(ids: Sequence[int], count: int) -> list[tuple[int, float]]:
    """The likeliest tokens after `ids` with their log-probabilities."""
    first = next_token(ids)
    return [((first + index) % VOCAB, -0.5 - index) for index in range(count)]


@dataclass
class ScriptedEngine:
    """`fault` of each request from now on, after `good` good tokens. `status`: of each request, if not 200."""

    dialect: str = "vllm"
    fault: Fault = ""
    good: int = 3
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    key: str = ""
    models: list[str] = field(default_factory=lambda: ["tiny"])
    context: int | None = 512
    token_s: float = 0.0
    scores: bool = True
    mismatch_every: int = 0  # of scored positions
    healthy: bool = True
    requests: list[dict[str, Any]] = field(default_factory=list)
    running: int = 0
    abandoned: int = 0  # requests whose client left
    port: int = 0

    async def start(self, port: int = 0) -> ScriptedEngine:
        app = web.Application(client_max_size=16 << 20)
        app.router.add_get("/health", self.health)
        app.router.add_get("/v1/models", self.list_models)
        app.router.add_post("/v1/completions", self.complete)
        app.router.add_post("/generate", self.complete)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", port or self.port)
        await site.start()
        self.port = self._runner.addresses[0][1]
        return self

    async def stop(self) -> None:
        """As if it were killed: connections break, the port is closed."""
        await self._runner.cleanup()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def health(self, request: web.Request) -> web.Response:
        if self.fault == "hang":
            await asyncio.sleep(60)
        return self.refused(request) or web.Response(status=200 if self.healthy else 503)

    async def list_models(self, request: web.Request) -> web.Response:
        cards = [{"id": name, "object": "model", "max_model_len": self.context} for name in self.models]
        return self.refused(request) or web.json_response({"object": "list", "data": cards})

    def refused(self, request: web.Request) -> web.Response | None:
        given = request.headers.get("Authorization", "")
        if self.key and given != f"Bearer {self.key}":
            return web.json_response({"error": f"wrong key: {given}"}, status=401)
        if self.status != 200:
            return web.json_response({"error": f"no, {given}"}, status=self.status, headers=self.headers)
        return None

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.requests.append(body)
        if (refusal := self.refused(request)) is not None:
            return refusal
        if self.fault == "oom" and self.good == 0:
            return web.json_response({"error": {"message": "CUDA out of memory"}}, status=500)
        self.running += 1
        try:
            return await (self.stream(request, body) if body.get("stream") else self.whole(body))
        except (asyncio.CancelledError, ConnectionError):
            self.abandoned += 1
            raise
        finally:
            self.running -= 1

    async def whole(self, body: dict[str, Any]) -> web.Response:
        if self.fault == "hang":
            await asyncio.sleep(60)
        if self.fault == "json":
            return web.Response(body=b'{"choices": [', content_type="application/json")
        if self.fault == "huge":
            return web.Response(body=b" " * (16 << 20), content_type="application/json")
        answer = spoken(self, body).whole(body)
        return web.Response(text=json.dumps(answer), content_type="application/json")

    async def stream(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        speaker = spoken(self, body)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        tokens = answer_to(speaker.ids, speaker.limit)
        for index in range(len(tokens)):
            if self.token_s or self.fault == "slow":
                await asyncio.sleep(self.token_s or 0.02)
            if index == self.good and self.fault:
                broken = await self.break_off(response, request)
                if broken:
                    return response
            event = speaker.event(tokens[: index + 1], last=index == len(tokens) - 1)
            await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        if self.fault == "more":
            event = speaker.event([*tokens, 50], last=True)
            await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        if self.dialect != "sglang" or self.fault != "cut":
            await response.write(b"data: [DONE]\n\n")
        return response

    async def break_off(self, response: web.StreamResponse, request: web.Request) -> bool:
        """Fail in the middle; whether the answer ends here."""
        match self.fault:
            case "hang":
                await asyncio.sleep(60)
            case "cut":
                assert request.transport is not None
                request.transport.abort()
                return True
            case "oom" | "error":
                await response.write(b'data: {"error": {"message": "CUDA out of memory"}}\n\n')
                return True
            case "json":
                await response.write(b"data: {\n\n")
            case "huge":
                await response.write(b"data: " + b"a" * (2 << 20))
            case "drip":
                while True:
                    await response.write(b": still here\n\n")
                    await asyncio.sleep(0.01)
            case "empty":
                return True
            case "none":
                await response.write(
                    b'data: {"choices": [{"token_ids": [], "text": "", "finish_reason": "length"}]}\n\n'
                )
                return True
        return False


@dataclass
class Speaker:
    """One request in the dialect of vLLM."""

    engine: ScriptedEngine
    ids: list[int]
    limit: int
    top: int | None

    def token(self, id_: int, index: int) -> int:
        return VOCAB if self.engine.fault == "vocab" and index >= self.engine.good else id_

    def value(self, value: float) -> float:
        return float("nan") if self.engine.fault == "nan" else value

    def choice(self, ids: list[int], tokens: Sequence[int], last: bool) -> dict[str, Any]:
        """`tokens` after `ids`."""
        found: dict[str, Any] = {"index": 0, "text": "", "token_ids": list(tokens)}
        found["finish_reason"] = None if not last else "stop" if tokens[-1] == END else "length"
        if self.top is not None:
            before = [[*ids, *tokens[:index]] for index in range(len(tokens))]
            rows = [likely(text, self.top) for text in before]
            found["logprobs"] = {
                "tokens": [f"token_id:{id_}" for id_ in tokens],
                "token_logprobs": [self.value(likely(text, 1)[0][1]) for text in before],
                "top_logprobs": [{f"token_id:{id_}": self.value(value) for id_, value in row} for row in rows],
            }
        return found

    def event(self, tokens: Sequence[int], last: bool) -> dict[str, Any]:
        before = [*self.ids, *tokens[:-1]]
        return {"choices": [self.choice(before, [self.token(tokens[-1], len(tokens) - 1)], last)]}

    def whole(self, body: dict[str, Any]) -> dict[str, Any]:
        if isinstance(body["prompt"], str) and "prompt_logprobs" not in body:
            ids = [FIRST + byte for byte in body["prompt"].encode()]
            return {"choices": [{**self.choice(ids, [50], True), "prompt_token_ids": ids}]}
        choice = self.choice(self.ids, answer_to(self.ids, 1), True)
        if "prompt_logprobs" in body and self.engine.scores:
            rows = [self.scored(index) for index in range(1, len(self.ids))]
            choice["prompt_logprobs"] = [None, *rows][: len(self.ids) - (self.engine.fault == "counts")]
        return {"choices": [choice]}

    def scored(self, index: int) -> dict[str, Any]:
        pairs = [*likely(self.ids[:index], self.top or 2)]
        if self.engine.mismatch_every and index % self.engine.mismatch_every == 0:
            pairs[0], pairs[1] = (pairs[0][0], pairs[1][1]), (pairs[1][0], pairs[0][1])
        own = dict(pairs).get(self.ids[index], -20.0)
        entries = {self.ids[index]: own, **dict(pairs)}
        if self.engine.fault == "vocab":
            entries[VOCAB] = -0.1
        return {str(id_): {"logprob": self.value(value)} for id_, value in entries.items()}


class SglangSpeaker(Speaker):
    """In the dialect of SGLang, whose events repeat all tokens."""

    def rows(self, ids: list[int], tokens: Sequence[int]) -> dict[str, Any]:
        before = [[*ids, *tokens[:index]] for index in range(len(tokens))]
        return {
            "output_token_logprobs": [
                [self.value(likely(text, 1)[0][1]), id_, None] for text, id_ in zip(before, tokens, strict=True)
            ],
            "output_top_logprobs": [
                [[self.value(value), id_, None] for id_, value in likely(text, self.top or 0)] for text in before
            ],
        }

    def event(self, tokens: Sequence[int], last: bool) -> dict[str, Any]:
        spoken = [self.token(id_, index) for index, id_ in enumerate(tokens)]
        reason = {"type": "stop", "matched": END} if tokens[-1] == END else {"type": "length"}
        meta: dict[str, Any] = {"completion_tokens": len(tokens), "finish_reason": reason if last else None}
        if self.top is not None:
            meta.update(self.rows(self.ids, tokens))
        return {"text": "", "output_ids": spoken, "meta_info": meta}

    def whole(self, body: dict[str, Any]) -> dict[str, Any]:
        if "text" in body:
            ids = [FIRST + byte for byte in body["text"].encode()]
            rows: list[Any] = [[None if index == 0 else -1.0, id_, None] for index, id_ in enumerate(ids)]
            return {"output_ids": [50], "meta_info": {"input_token_logprobs": rows}}
        tokens = answer_to(self.ids, 1)
        start = body["logprob_start_len"]
        rows, own = [None], [[None, self.ids[start], None]]
        for index in range(start + 1, len(self.ids)):
            entries = self.scored(index)
            rows.append([[entry["logprob"], int(id_), None] for id_, entry in entries.items()])
            own.append([entries[str(self.ids[index])]["logprob"], self.ids[index], None])
        if self.engine.fault == "counts":
            rows.pop()
        meta = {"completion_tokens": 1, "finish_reason": {"type": "length"}, "input_top_logprobs": rows}
        meta["input_token_logprobs"] = own
        return {"output_ids": tokens, "meta_info": {**meta, **self.rows(self.ids, tokens)}}


class TextSpeaker(Speaker):
    """In text alone: the bytes of the answer."""

    def event(self, tokens: Sequence[int], last: bool) -> dict[str, Any]:
        ended = tokens[-1] == END
        text = "" if ended else chr(tokens[-1] - FIRST)
        reason = None if not last else "stop" if ended else "length"
        return {"choices": [{"index": 0, "text": text, "finish_reason": reason}]}

    def whole(self, body: dict[str, Any]) -> dict[str, Any]:
        return {"choices": [{"index": 0, "text": "x", "finish_reason": "length"}]}


def spoken(engine: ScriptedEngine, body: dict[str, Any]) -> Speaker:
    if engine.dialect == "sglang":
        params = body["sampling_params"]
        top = body.get("top_logprobs_num") if body.get("return_logprob") else None
        return SglangSpeaker(engine, body.get("input_ids", []), params["max_new_tokens"], top)
    if engine.dialect == "openai":
        prompt = body["prompt"] if isinstance(body["prompt"], str) else ""
        return TextSpeaker(engine, [FIRST + byte for byte in prompt.encode()], body["max_tokens"], None)
    prompt = body["prompt"] if isinstance(body["prompt"], list) else []
    return Speaker(engine, prompt, body["max_tokens"], body.get("logprobs"))


async def main(port: int, dialect: str = "vllm", token_ms: str = "0") -> None:
    engine = await ScriptedEngine(dialect, token_s=float(token_ms) / 1000).start(port)
    print(engine.url, flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), *sys.argv[2:]))
