"""Whether the engine can be used: brought up when it comes, checked at start, declared, and found lost when it goes.

    lost ── it answers ──> identity, tokenizer, the check at start ──> declared ── no answer, or another model ──> lost

An engine that comes back as it was, is declared again without the check.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace

from isthmus.cloud_service.language.engines.check import applied, check_tokenizer, compare
from isthmus.cloud_service.language.engines.metrics import RequestMetrics
from isthmus.cloud_service.language.engines.protocol import Engine, EngineIdentity
from isthmus.models.errors import EngineDown, EngineFault, Overloaded
from isthmus.models.language.checkpoint.tokenizer import Tokenizer
from isthmus.models.messages import CloudArm, ModelInfo, TokenizerInfo, describe_model
from isthmus.protos.limits import MAX_TOKENS

RETRY_S = 2.0  # between two tries to reach a lost engine
PING_INTERVAL_S = 5.0
PINGS = 2  # in a row without an answer, until it is lost
PING_AGAIN_S = 0.5
FAILED = "this service failed while it examined the engine"
MAX_MISMATCH = 0.05  # of the compared tokens: more is no rounding, but another text than was sent


@dataclass(frozen=True, slots=True)
class WatchSettings:
    """`context` 0: what the engine says. `check_tokens` 0: no check at start."""

    where: str  # for the log
    context: int = 0
    check_tokens: int = 2000
    retry_s: float = RETRY_S
    ping_s: float = PING_INTERVAL_S


class Watch:
    """`info` is the model while it can be used, `problem` why not. `on_lost` is called with the problem."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, metrics: RequestMetrics, settings: WatchSettings) -> None:
        self.info: ModelInfo | None = None
        self.problem = "the engine was not reached yet"
        self.logprobs = False
        self.on_lost: Callable[[str], None] = lambda problem: None
        self.tokenizer = tokenizer
        self._engine, self._metrics, self._settings = engine, metrics, settings
        self._suspected = asyncio.Event()
        self._known: tuple[EngineIdentity, ModelInfo] | None = None  # as it was declared last
        self._logged: dict[bool, str] = {}  # since it was declared last, by whether it was lost

    @property
    def described(self) -> str:
        """In words, for the log."""
        return f"what the engine at {self._settings.where} holds"

    def suspect(self) -> None:
        """A request has not been answered: see whether the engine is lost."""
        self._suspected.set()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            try:
                await self._bring_up()
                await self._until_lost()
            except (EngineDown, EngineFault, Overloaded) as error:
                self._lose(str(error))
            except Exception:  # a fault of the service, which goes on without the engine
                if self.problem != FAILED:
                    self._metrics.log_failure(FAILED)
                self._lose(FAILED)
            await asyncio.sleep(self._settings.retry_s)

    async def _bring_up(self) -> None:
        identity = await self._engine.identity()
        await self._engine.ping()
        if self._known is None or self._known[0] != identity:
            self.problem = "the engine is there, and checked before it is used"
            self._known = identity, await self._examine(identity)
        self.info, self.logprobs, self.problem = self._known[1], identity.logprobs, ""
        self._suspected.clear()
        self._metrics.up(True)
        self._logged.clear()
        self._log(f"the engine at {self._settings.where} is used: {describe_model(self.info)}")

    async def _examine(self, identity: EngineIdentity) -> ModelInfo:
        """What is declared of the model. Raises EngineDown when the tokenizer or the context is not known."""
        context = min(self._settings.context or identity.context, MAX_TOKENS)
        if not context:
            raise EngineDown("the engine does not say how long a context it holds: give --engine-context")
        await check_tokenizer(self._engine, self.tokenizer)
        compared = mismatched = 0
        if identity.scores and self._settings.check_tokens:
            self._log(f"the engine at {self._settings.where} is checked over {self._settings.check_tokens} tokens")
            tokens = self._settings.check_tokens
            compared, mismatched = await compare(self._engine, self.tokenizer, tokens, context)
        self._metrics.compared(compared, mismatched)
        verifies = identity.scores and mismatched <= MAX_MISMATCH * compared
        processors = identity.processors
        if self._settings.check_tokens:
            processors = await applied(self._engine, self.tokenizer, processors)
        found = declare(identity.name, self.tokenizer, context, verifies, (compared, mismatched))
        return replace(found, processors=processors, scores=identity.scores and identity.logprobs)

    async def _until_lost(self) -> None:
        """Raises EngineDown when it is."""
        failures = 0
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PING_AGAIN_S if failures else self._settings.ping_s):
                    await self._suspected.wait()
            self._suspected.clear()
            try:
                await self._engine.ping()
                failures = 0
            except EngineDown:
                failures += 1
                if failures >= PINGS:
                    raise

    def _lose(self, problem: str) -> None:
        self.info, self.problem = None, problem
        self._metrics.up(False)
        self.on_lost(problem)
        retry = f"it is tried again every {self._settings.retry_s:.0f} s, and the rest is served meanwhile"
        self._log(f"the engine at {self._settings.where} cannot be used: {problem}; {retry}", lost=True)

    def _log(self, text: str, *, lost: bool = False) -> None:
        """Once for each change; an engine that fails its check again and again is one."""
        if text != self._logged.get(lost):
            self._logged[lost] = text
            self._metrics.log_state(text, lost=lost)


def declare(name: str, tokenizer: Tokenizer, context: int, verifies: bool, check: tuple[int, int]) -> ModelInfo:
    """The model as devices see it. Engines that declare the same are replicas of each other."""
    shown = name.rstrip("/").rpartition("/")[2] if name.startswith("/") else name  # of a path only the folder's name
    same = json.dumps(["engine", shown, tokenizer.vocabulary.hex(), tokenizer.size, context])
    arms: tuple[CloudArm, ...] = ("cloud", "verify") if verifies else ("cloud",)
    return ModelInfo(
        fingerprint=hashlib.sha256(same.encode()).digest(),
        name=shown,
        vocab=tokenizer.size,
        context=context,
        numerics="engine",
        tokenizer=TokenizerInfo(tokenizer.fingerprint, len(tokenizer.to_bytes()), tokenizer.vocabulary),
        end_ids=tuple(sorted(tokenizer.eos_ids)),
        arms=arms,
        compared=check[0],
        mismatched=check[1],
    )
