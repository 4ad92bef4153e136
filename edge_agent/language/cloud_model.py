"""The cloud's language model: which one an agent uses, who holds it, and its tokenizer.

    Describe of a replica -> chosen by name, or by the device's vocabulary
                          -> the one that the other replicas hold, or the first
                          -> its tokenizer: the device's own, from the cache, or fetched

A model is known by what the service declares of it; no weight of it is ever here. When no replica holds it any more, as
after a rolling update, the next one that answers decides again. Knows nothing about gRPC.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from isthmus.edge_agent.language.tokenizer_cache import TokenizerCache
from isthmus.edge_agent.transport.prober import FetchTokenizer
from isthmus.models.errors import InvalidReply, PeerError, UnknownBundle
from isthmus.models.language.checkpoint.tokenizer import Tokenizer
from isthmus.models.messages import ModelInfo, ServiceInfo, TokenizerInfo

REFETCH_S = 60.0  # until a cloud that sent an unusable tokenizer is asked for it again
MAX_NAME = 100
MAX_PROBLEM = 300  # characters of why a cloud holds none


class OwnModel(Protocol):
    """The device's own model, as far as the choice depends on it."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def fingerprint(self) -> bytes:
        """Of its weights."""


@dataclass(frozen=True, slots=True)
class BoundModel:
    """The model that an agent uses, and its tokenizer."""

    info: ModelInfo
    tokenizer: Tokenizer


class CloudModel:
    """What the links of one agent share. Safe to call from several threads."""

    def __init__(self, name: str | None, own: OwnModel | None, cache: TokenizerCache) -> None:
        """`name`: of the model, None for the only one, or the one that suits the device's `own`."""
        self._name, self._own, self._cache = name, own, cache
        self._lock = threading.Lock()
        self._holders: dict[str, bytes] = {}  # replicas that may be used, and the fingerprints of what they hold
        self._problems: dict[str, str] = {}  # replicas that answer, and cannot serve this agent
        self.bound: BoundModel | None = None

    @property
    def info(self) -> ModelInfo | None:
        """What is declared of the model; None until a replica has answered."""
        bound = self.bound
        return bound.info if bound else None

    @property
    def problems(self) -> dict[str, str]:
        """By replica: why one that answers cannot be used."""
        with self._lock:
            return dict(self._problems)

    def check(self, target: str, service: ServiceInfo, fetch: FetchTokenizer) -> None:
        """Use a replica. Raises UnknownBundle, InvalidReply, and as `fetch`."""
        try:
            model = self._choose(service.models, service.problems)
            with self._lock:
                self._refuse_another(target, model)
            tokenizer = self._tokenizer(model, fetch)
            check_sizes(model, tokenizer)
            with self._lock:
                self._refuse_another(target, model)
                self._holders[target] = model.fingerprint
                self.bound = BoundModel(model, tokenizer)
                self._problems.pop(target, None)
        except PeerError as error:
            with self._lock:
                self._problems[target] = str(error)
            raise

    def lost(self, target: str) -> None:
        """A replica cannot be used until it is checked again."""
        with self._lock:
            self._holders.pop(target, None)

    def _choose(self, models: Sequence[ModelInfo], problems: Sequence[str]) -> ModelInfo:
        """The model of a replica that this agent means. Raises UnknownBundle where there is none, or several."""
        found = [model for model in models if self._name in (None, model.name)]
        if not found and models:
            raise UnknownBundle(f"the cloud holds no language model {self._name!r}, it holds {names(models)}")
        if not found:
            why = f" now: {printable(problems[0][:MAX_PROBLEM])}" if problems else ""
            raise UnknownBundle(f"the cloud holds no language model{why}")
        bound, own = self.info, self._own
        if bound is not None:
            found = [model for model in found if model.fingerprint == bound.fingerprint] or found
        if own is not None and len(found) > 1:
            found = [model for model in found if model.tokenizer.vocabulary == own.tokenizer.vocabulary] or found
        if own is not None and len(found) > 1:
            found = [model for model in found if model.fingerprint == own.fingerprint] or found
        if len(found) > 1:
            raise UnknownBundle(f"the cloud holds several language models, name one by --cloud-model: {names(found)}")
        return found[0]

    def _refuse_another(self, target: str, model: ModelInfo) -> None:
        """Raises UnknownBundle while other replicas hold another model."""
        bound = self.info
        if bound is None or bound.fingerprint == model.fingerprint:
            return
        other = next(
            (each for each, held in self._holders.items() if each != target and held == bound.fingerprint), None
        )
        if other is not None:
            raise UnknownBundle(
                f"the cloud holds {described(model)}, and cloud {other} {described(bound)}:"
                " replicas are to hold the same model"
            )

    def _tokenizer(self, model: ModelInfo, fetch: FetchTokenizer) -> Tokenizer:
        bound, declared = self.bound, model.tokenizer
        if self._own is not None and self._own.tokenizer.fingerprint == declared.sha256:
            return self._own.tokenizer
        if bound is not None and bound.info.tokenizer == declared:
            return bound.tokenizer
        return self._cache.get(declared, fetch)


class ReplicaMatch:
    """What the link of one replica asks for: the model at that replica."""

    def __init__(self, cloud: CloudModel, target: str) -> None:
        self._cloud, self._target = cloud, target
        self._unusable: tuple[bytes, float, str] | None = None  # a tokenizer: which, until when, and why

    def check(self, info: ServiceInfo, fetch: FetchTokenizer) -> None:
        """Raises IsthmusError where the replica cannot serve the agent.

        A tokenizer that proved unusable is not fetched again at once: it may be large, and probes are frequent.
        """
        fetched: list[bytes] = []

        def fetch_once(chosen: TokenizerInfo) -> bytes:
            if self._unusable is not None and self._unusable[0] == chosen.sha256:
                _, until_s, reason = self._unusable
                if time.monotonic() < until_s:
                    raise InvalidReply(reason)
            fetched.append(chosen.sha256)
            return fetch(chosen)

        try:
            self._cloud.check(self._target, info, fetch_once)
        except InvalidReply as error:
            if fetched:
                self._unusable = fetched[0], time.monotonic() + REFETCH_S, str(error)
            raise

    def lost(self) -> None:
        """The replica cannot be used until it is checked again."""
        self._cloud.lost(self._target)


def check_sizes(model: ModelInfo, tokenizer: Tokenizer) -> None:
    """Raises InvalidReply for a tokenizer that has more ids than the model."""
    if tokenizer.size > model.vocab:
        raise InvalidReply(f"the tokenizer of {label(model)} has {tokenizer.size} tokens, the model {model.vocab}")


def names(models: Sequence[ModelInfo]) -> str:
    return ", ".join(map(label, models))


def described(model: ModelInfo) -> str:
    return f"{label(model)} {model.fingerprint.hex()[:12]}"


def label(model: ModelInfo) -> str:
    """A model's name for a line of text."""
    return printable(model.name[:MAX_NAME])


def printable(text: str) -> str:
    """What comes from outside, in one line and without control characters."""
    return "".join(char if char.isprintable() else "?" for char in text)
