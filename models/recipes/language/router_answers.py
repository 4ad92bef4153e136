"""The cloud's own greedy answers to prompts, which are all that a router learns of its model.

    prompts --checkpoint, run here | service HOST:PORT, arm cloud--> answers, one line of JSON each, kept in a file

An interrupted run continues after the last finished batch.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import track

from isthmus.models.errors import InvalidInput, LinkDown
from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.language.checkpoint.tokenizer import Message, Tokenizer
from isthmus.models.language.router.manifest import CloudIdentity
from isthmus.models.recipes.common.json_lines import read_lines
from isthmus.models.recipes.language.corpus import generate
from isthmus.models.recipes.language.llama import Llama
from isthmus.models.recipes.language.prompts import ANSWER_TOKENS, LONGEST_PROMPT, first_turn, prompt_records

BATCH_TOKENS = 32 * 300  # of a batch's prompts, with padding
MOST_BATCH = 32  # prompts
AT_ONCE = 4  # prompts that a service answers at the same time
CONNECT_S, WAIT_S = 30.0, 60.0  # for a service, at first and in mid-answer
SERVICE = re.compile(r"[^/\\\s]+:[0-9]{1,5}")

Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """A prompt's tokens, and those of the cloud's greedy answer: as far as the end of the text, or ANSWER_TOKENS."""

    prompt: Ids
    tokens: Ids


class Cloud(Protocol):
    """The model in the cloud, as far as its choices show it."""

    @property
    def identity(self) -> CloudIdentity: ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    def answers(self, prompts: Sequence[Ids]) -> list[list[int]]:
        """Greedy answers to a batch of prompts. Raises IsthmusError."""


class LocalCloud:
    """A checkpoint, run here."""

    def __init__(self, source: str) -> None:
        """Raises BundleError."""
        self._checkpoint = Checkpoint.open(source)
        self._model: Llama | None = None
        self.tokenizer = self._checkpoint.tokenizer
        weights, tokenizer = self._checkpoint.fingerprint.hex(), self.tokenizer.fingerprint.hex()
        self.identity = CloudIdentity(name=self._checkpoint.name, tokenizer=tokenizer, weights=weights)

    def answers(self, prompts: Sequence[Ids]) -> list[list[int]]:
        """As Cloud.answers; the weights are loaded for the first batch."""
        self._model = self._model or Llama.load(self._checkpoint)
        generator = torch.Generator().manual_seed(0)
        greedy = [0.0] * len(prompts)
        return generate(self._model, prompts, ANSWER_TOKENS, self.tokenizer.eos_ids, generator, greedy)


class ServiceCloud:
    """A running service, asked as a device asks it."""

    def __init__(self, agent: Any) -> None:
        """`agent`: a LanguageAgent without a model of its own. Raises LinkDown, PeerError while no cloud answers."""
        self._agent, self._request = agent, importlib.import_module("isthmus.edge_agent.language.request")
        self.tokenizer: Tokenizer = agent.tokenizer_for("cloud")
        info = agent.replicas.model
        weights = info.fingerprint.hex() if info.numerics == "bitwise" else None  # an engine declares no weights
        self.identity = CloudIdentity(name=info.name, tokenizer=info.tokenizer.sha256.hex(), weights=weights)

    def answers(self, prompts: Sequence[Ids]) -> list[list[int]]:
        """As Cloud.answers, several at once."""
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(self._answer, prompts))

    def _answer(self, prompt: Ids) -> list[int]:
        request = self._request.GenerationRequest(prompt, ANSWER_TOKENS, "cloud")
        events = list(self._agent.generate(request))
        if events[-1].degraded:
            raise LinkDown("the cloud was lost in mid-answer")
        return [token.id for token in events[:-1]]


@contextmanager
def open_cloud(source: str) -> Iterator[Cloud]:
    """`source`: a checkpoint as Checkpoint.open takes it, or HOST:PORT of a cloud service.

    Raises BundleError, LinkDown, PeerError.
    """
    if Path(source).exists() or not SERVICE.fullmatch(source):
        yield LocalCloud(source)
        return
    # By name: the rooms of the device are no part of models, and only this recipe asks a service.
    config = importlib.import_module("isthmus.edge_agent.config").LanguageConfig(
        clouds=(source,), connect_s=CONNECT_S, wait_s=WAIT_S, on_loss="wait"
    )
    with importlib.import_module("isthmus.edge_agent.language.agent").LanguageAgent(config) as agent:
        yield ServiceCloud(agent)


def read_prompts(file: Path, tokenizer: Tokenizer) -> list[Ids]:
    """Token ids of a file's prompts, each once, as a chat's first message; by length.

    Lines of JSON with "turns", as in Spec-Bench, or plain lines. Raises InvalidInput.
    """
    texts = dict.fromkeys(first_turn(record) for _, record in prompt_records(file))
    prompts = (tuple(tokenizer.chat([Message("user", text)])) for text in texts)
    return sorted((prompt for prompt in prompts if len(prompt) <= LONGEST_PROMPT), key=len)


def cloud_answers(file: Path, cloud: Cloud, prompts: Sequence[Ids]) -> list[Answer]:
    """An answer to each prompt, of those in `file` or made now and added to it. Raises IsthmusError."""
    known = read_answers(file)
    missing = [prompt for prompt in prompts if prompt not in known]
    for batch in track(batches(missing), "answers of the cloud", console=Console(stderr=True)):
        made = [Answer(*pair) for pair in zip(batch, map(tuple, cloud.answers(batch)), strict=True)]
        known |= {answer.prompt: answer for answer in made}
        with file.open("a", encoding="utf-8") as lines:
            lines.write("".join(json.dumps(asdict(answer)) + "\n" for answer in made))
    return [known[prompt] for prompt in prompts]


def read_answers(file: Path) -> dict[Ids, Answer]:
    """Answers by prompt; an interrupted run may leave half a line. Raises InvalidInput for another file."""
    try:
        found = [Answer(**{name: tuple(map(int, ids)) for name, ids in line.items()}) for line in read_lines(file)]
    except (ValueError, TypeError, AttributeError) as error:
        raise InvalidInput(f"{file}: not the answers of a router recipe: {error}") from error
    return {answer.prompt: answer for answer in found}


def batches(prompts: Sequence[Ids]) -> list[list[Ids]]:
    """Prompts in batches of at most MOST_BATCH, and of BATCH_TOKENS with padding."""
    made: list[list[Ids]] = []
    for prompt in prompts:
        if made and len(made[-1]) < MOST_BATCH and (len(made[-1]) + 1) * len(prompt) <= BATCH_TOKENS:
            made[-1].append(prompt)
        else:
            made.append([prompt])
    return made
