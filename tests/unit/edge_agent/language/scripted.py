"""A generation backend that generates a text given by the test, in place of a LanguageAgent."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle

import tokenizers
from tokenizers import AddedToken, decoders, models

from isthmus.edge_agent.language.request import GenerationRequest, Source, Summary, Token
from isthmus.edge_agent.policy.arms import Arm
from isthmus.models.language.checkpoint.chat_template import ChatTemplate
from isthmus.models.language.checkpoint.generation import UNSTATED
from isthmus.models.language.checkpoint.token_text import BYTES
from isthmus.models.language.checkpoint.tokenizer import Tokenizer
from isthmus.models.messages import Sampling

END = 256
TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def byte_tokenizer() -> Tokenizer:
    """Each byte is the token of its value; 256 ends a text."""
    backend = tokenizers.Tokenizer(models.BPE(vocab={char: byte for char, byte in BYTES.items()}, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|im_end|>", special=True)])
    return Tokenizer(backend, merges=[], eos_ids=[END], template=ChatTemplate(TEMPLATE, {}))


@dataclass
class ScriptedBackend:
    """Generates `text` byte by byte, then ends it or raises `error`. Waits `pause_s` before each token."""

    text: str = "Hello"
    sources: Sequence[Source] = ("edge",)
    cloud: bool = True
    error: Exception | None = None
    pause_s: float = 0.0
    endless: bool = False
    name: str = "tiny"
    aliases: tuple[str, ...] = ()
    sampling: Sampling = UNSTATED
    context: int = 200
    device_context: int | None = None
    tokenizer: Tokenizer = field(default_factory=byte_tokenizer)
    requests: list[GenerationRequest] = field(default_factory=list)
    threads: set[int] = field(default_factory=set)
    started: threading.Event = field(default_factory=threading.Event)
    closed: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.tokenizer.sampling = self.sampling

    def tokenizer_for(self, arm: Arm) -> Tokenizer:
        return self.tokenizer

    def arms(self) -> tuple[Arm, ...]:
        return ("auto", "edge", "cloud", "verify") if self.cloud else ("auto", "edge")

    def arm_context(self, arm: Arm) -> int:
        return self.device_context or self.context if arm == "edge" else self.context

    def score(self, request: GenerationRequest, cancelled: threading.Event | None = None) -> list[Token]:
        first, *rest = request.prompt
        return [Token(first, "edge"), *(self._token(id, "edge", request.top_logprobs) for id in rest)]

    def generate(
        self, request: GenerationRequest, cancelled: threading.Event | None = None
    ) -> Iterator[Token | Summary]:
        self.requests.append(request)
        self.closed.clear()
        try:
            yield from self._events(request)
        finally:
            self.threads.add(threading.get_ident())
            self.closed.set()

    def _events(self, request: GenerationRequest) -> Iterator[Token | Summary]:
        data = self.text.encode()
        ids = cycle(data) if self.endless else iter([*data, END])
        count = 0
        finish = "length"
        for (id, source), _ in zip(zip(ids, cycle(self.sources)), range(request.max_tokens), strict=False):
            self.started.set()
            time.sleep(self.pause_s)
            count += 1
            yield self._token(id, source, request.top_logprobs)
            if id == END:
                finish = "stop"
        if self.error:
            raise self.error
        drafts = cycle(self.sources)
        accepted = sum(next(drafts) == "draft" for _ in range(count))
        yield Summary(
            finish,  # type: ignore[arg-type]
            prompt_tokens=len(request.prompt),
            tokens=count,
            arm=request.arm,
            why="as scripted",
            accepted=accepted,
            rejected=2,
            rounds=3,
            cached=1,
            bytes_up=40,
            bytes_down=50,
            rtt_s=0.025,
            cloud_s=0.5,
        )

    def _token(self, id: int, source: Source, top: int | None) -> Token:
        if top is None:
            return Token(id, source)
        return Token(id, source, -0.5, tuple((97 + rank, -0.5 - rank) for rank in range(top)))
