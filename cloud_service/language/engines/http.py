"""An engine over HTTP: one client with deadlines, whose errors are translated here and nowhere else.

    connection refused, broken, silent; 401, 403, 404, 502, 504   EngineDown
    429, 503                                                      Overloaded, with the server's Retry-After
    any other status, an answer that cannot be right              EngineFault

Closing a stream, or cancelling a call, closes its connection, by which a server knows to compute no more of it. A key
is in a header, and never in an error: what the server says is shortened, and the key taken out.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import aiohttp

from isthmus.cloud_service.byte_budget import ByteBudget
from isthmus.cloud_service.language.engines.answers import parse
from isthmus.cloud_service.language.engines.dialect import MODELS, Call, Dialect, Probe, read_models
from isthmus.cloud_service.language.engines.events import MAX_EVENT_BYTES, EventSplitter
from isthmus.cloud_service.language.engines.metrics import RequestMetrics
from isthmus.cloud_service.language.engines.protocol import Choice, EngineIdentity
from isthmus.models.errors import EngineDown, EngineFault, IsthmusError, Overloaded
from isthmus.models.messages import Logprobs, Sampling

CONNECT_S = 5.0
PING_S = 5.0
SILENCE_S = 120.0  # without a byte, or without a token: a long prompt after many others takes as long
CLOSING_S = 1.0  # for the end of a stream after its last token; then the connection is not used again
MAX_RETRY_S = 600.0
MAX_LIST_BYTES = 4 << 20  # of models: a provider lists some hundreds
POSITION_BYTES = 4096  # of an answer, for each position: twenty likely tokens with their text
ID_BYTES = 16  # of an id in an answer
LARGE_BODY_BYTES = 256 << 10  # parsing more takes the event loop some milliseconds
T = TypeVar("T")
SHOWN = 200  # characters of what a server says


class HttpEngine:
    """Speaks `dialect` to the server at `url`. Needs a running event loop; `close` it in the same."""

    def __init__(
        self,
        url: str,
        dialect: Dialect | None,
        metrics: RequestMetrics,
        budget: ByteBudget,
        *,
        probe: Probe | None = None,
        model: str | None = None,
        key: str = "",
        silence_s: float = SILENCE_S,
    ) -> None:
        """`probe` finds the dialect out where it is None. `model`: which of the server's. `budget`: of its answers."""
        self._url, self._model, self._key = url.rstrip("/"), model, key
        self._dialect, self._probe = dialect, probe
        self._metrics, self._budget = metrics, budget
        self._silence_s = silence_s
        self._name = model or ""
        self._client: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        """Close every connection."""
        if self._client is not None:
            await self._client.close()

    async def identity(self) -> EngineIdentity:
        found = await self._models()
        self._name = found.name
        if self._probe is not None:
            self._dialect = await self._probed(self._probe)
        spoken = self._spoken
        return replace(found, scores=spoken.scores, logprobs=spoken.logprobs, processors=spoken.processors)

    async def ping(self) -> None:
        try:
            async with self._request(self._spoken.ping, PING_S) as response:
                await self._body(response, MAX_LIST_BYTES)
            found = await self._models()
        except (EngineFault, Overloaded) as error:  # of its health, and not of a request
            raise EngineDown(str(error)) from error
        if found.name != self._name:
            raise EngineDown(f"the engine holds {found.name} now, and no longer {self._name}")

    async def tokens_of(self, text: str) -> list[int] | None:
        call = self._spoken.tokens_call(self._name, text)
        return None if call is None else await self._ask(call, MAX_LIST_BYTES, self._spoken.read_tokens)

    async def stream(
        self, ids: Sequence[int], sampling: Sampling, limit: int, top: int | None
    ) -> AsyncGenerator[Choice, None]:
        call, reader = self._spoken.stream_call(self._name, ids, sampling, limit, top)
        events = EventSplitter(MAX_EVENT_BYTES + ID_BYTES * len(ids))  # the first one may repeat the prompt
        started_s = seen_s = time.monotonic()
        count = 0
        async with self._request(call) as response:
            async for chunk in response.content.iter_any():
                for event in events.push(chunk):
                    for choice in reader.read(event):
                        count += 1
                        if count > limit:
                            raise EngineFault(f"the engine sent more than the {limit} tokens asked for")
                        seen_s = time.monotonic()
                        if count == 1:
                            self._metrics.first_token(seen_s - started_s)
                        yield choice
                if reader.finished:
                    if not count:
                        raise EngineFault("the engine ended an answer without a token")
                    await self._finish(response)
                    return
                if time.monotonic() - seen_s > self._silence_s:
                    raise EngineDown(f"the engine sent no token for {self._silence_s:.0f} s")
            raise EngineDown("the engine ended an answer in the middle")

    async def score(self, ids: Sequence[int], start: int, top: int | None) -> list[Choice]:
        call = self._spoken.score_call(self._name, ids, start, top)
        read = partial(self._spoken.read_scores, ids=ids, start=start, top=top)
        return await self._ask(call, MAX_LIST_BYTES + POSITION_BYTES * len(ids), read)

    async def prompt_logprobs(self, ids: Sequence[int], start: int, top: int) -> list[Logprobs]:
        call = self._spoken.score_call(self._name, ids, start, top)
        read = partial(self._spoken.read_prompt, ids=ids, start=start, top=top)
        return await self._ask(call, MAX_LIST_BYTES + POSITION_BYTES * len(ids), read)

    @property
    def _spoken(self) -> Dialect:
        assert self._dialect is not None  # `identity` comes first
        return self._dialect

    async def _models(self) -> EngineIdentity:
        """The model to use among those that it lists."""
        return await self._ask(Call(MODELS), MAX_LIST_BYTES, partial(read_models, chosen_name=self._model), PING_S)

    async def _probed(self, probe: Probe) -> Dialect:
        """The dialect of a server, which may refuse the probe."""
        try:
            return await self._ask(probe.call(self._name), MAX_LIST_BYTES, probe.dialect)
        except EngineFault:
            return probe.dialect(None)

    async def _ask(
        self, call: Call, limit_bytes: int, read: Callable[[dict[str, Any]], T], timeout_s: float | None = None
    ) -> T:
        """One request with one JSON object as its answer, all of which is there within `timeout_s`, or `silence_s`."""
        async with self._request(call, timeout_s or self._silence_s) as response:
            raw = await self._body(response, limit_bytes)
            if len(raw) <= LARGE_BODY_BYTES:
                return read(parse(raw))
            return await asyncio.get_running_loop().run_in_executor(None, lambda: read(parse(raw)))

    @contextlib.asynccontextmanager
    async def _request(self, call: Call, timeout_s: float | None = None) -> AsyncIterator[aiohttp.ClientResponse]:
        """A response with status 200; what fails, and what is raised while it is read, is counted."""
        method, data = ("GET", None) if call.body is None else ("POST", json.dumps(call.body, separators=(",", ":")))
        headers = {"Content-Type": "application/json"} if data else {}
        timeout = aiohttp.ClientTimeout(timeout_s, sock_connect=CONNECT_S, sock_read=self._silence_s)
        try:
            async with asyncio.timeout(timeout_s or self._silence_s):  # interim responses may come without end
                begun = await self._session().request(
                    method, self._url + call.path, data=data, headers=headers, timeout=timeout, allow_redirects=False
                )
            async with begun as response:
                if response.status != 200:
                    raise self._refusal(response, await self._excerpt(response))
                yield response
        except IsthmusError as error:
            self._metrics.failed(error)
            raise
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            translated = translate(error, timeout_s or self._silence_s)
            self._metrics.failed(translated)
            raise translated from error

    def _session(self) -> aiohttp.ClientSession:
        if self._client is None:
            headers = {"Accept-Encoding": "identity", "User-Agent": "isthmus"}
            if self._key:
                headers["Authorization"] = f"Bearer {self._key}"
            self._client = aiohttp.ClientSession(
                headers=headers,
                connector=aiohttp.TCPConnector(limit=0),  # whoever asks has a place already
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
            )
        return self._client

    async def _body(self, response: aiohttp.ClientResponse, limit_bytes: int) -> bytes:
        """The whole body, counted in the budget while it is read. Raises EngineFault for one of more bytes."""
        raw = bytearray()
        try:
            async for chunk in response.content.iter_any():
                self._budget.take(len(chunk))
                raw += chunk
                if len(raw) > limit_bytes:
                    raise EngineFault(f"the engine sent an answer of more than {limit_bytes} bytes")
        finally:
            self._budget.give(len(raw))
        return bytes(raw)

    async def _finish(self, response: aiohttp.ClientResponse) -> None:
        """Read what follows the last token, so that the connection can be used again."""
        with contextlib.suppress(TimeoutError, aiohttp.ClientError):
            async with asyncio.timeout(CLOSING_S):
                while await response.content.readany():
                    pass

    async def _excerpt(self, response: aiohttp.ClientResponse) -> str:
        """The first words of what a server says of an error, in one line and without the key."""
        text = (await response.content.read(4 * SHOWN)).decode(errors="replace")
        if self._key:
            text = without_key(text, self._key)
        return " ".join(ascii(text)[1:-1].replace("\\n", " ").split())[:SHOWN]

    def _refusal(self, response: aiohttp.ClientResponse, text: str) -> IsthmusError:
        """The error of a status."""
        status = response.status
        match status:
            case 401 | 403:
                what = "refuses the key of this service" if self._key else "asks for a key"
                return EngineDown(f"the engine {what} (HTTP {status})")
            case 404:
                return EngineDown("the engine holds no such model, or speaks another dialect (HTTP 404)")
            case 429 | 503:
                retry_s = retry_after(response.headers.get("Retry-After", ""))
                return Overloaded(f"the engine has no room (HTTP {status})", retry_s)
            case 502 | 504:
                return EngineDown(f"what is before the engine does not reach it (HTTP {status})")
        return EngineFault(f"the engine refused a request (HTTP {status}): {text}")


def without_key(text: str, key: str) -> str:
    """`text` without `key`, and without the beginning of it that the end of `text` may be."""
    begun = next((size for size in range(len(key) - 1, 0, -1) if text.endswith(key[:size])), 0)
    return text[: len(text) - begun].replace(key, "…")


def retry_after(text: str) -> float:
    """Seconds of a Retry-After header; 0 for none, or for a date."""
    return min(float(text), MAX_RETRY_S) if text.isascii() and text.isdecimal() and len(text) < 10 else 0.0


def translate(error: Exception, silence_s: float) -> IsthmusError:
    """What an error of the client means."""
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        return EngineDown(f"the engine cannot be reached within {CONNECT_S:.0f} s")
    if isinstance(error, TimeoutError):
        return EngineDown(f"the engine did not answer within {silence_s:.0f} s")
    if isinstance(error, aiohttp.ClientSSLError):
        return EngineDown("the engine's certificate is not one that this service trusts")
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return EngineDown("the engine's host name is not known")
    if isinstance(error, aiohttp.ClientConnectorError):
        why = os.strerror(error.os_error.errno) if error.os_error.errno else "no connection"
        return EngineDown(f"the engine does not answer ({why.lower()})")
    if isinstance(error, aiohttp.ClientConnectionError | aiohttp.ClientPayloadError | OSError):
        return EngineDown("the connection to the engine broke")
    return EngineFault(f"the engine does not speak HTTP as expected ({type(error).__name__})")
