"""Is `verify` token for token what `cloud` gives? Two real processes, every kind of draft, restarts in mid-answer.

Each prompt is answered by `cloud` and then by `verify`; several prompts at once share the cloud's batches, the first
ones run alone. The drafts: the device's model with 8- and with 4-bit weights, prompt lookup, random tokens, always
wrong, wrong every third token, always right, an end of text at every place. The cloud is killed and started again
while answers are under way; the device waits for it and goes on from the tokens it has.

Writes `prompts`, `tokens`, `mismatches` (tokens), `restarts`, `bytes_per_round`, `cloud_passes_per_token`. Can be
interrupted: finished prompts are kept beside the JSON file and not run again.
"""

from __future__ import annotations

import json
import platform
import queue
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO

import click
from rich.progress import Progress

from isthmus.edge_agent.language.agent import BREAKER
from isthmus.edge_agent.language.arms.remote import RemoteArm
from isthmus.edge_agent.language.arms.rounds import Rounds
from isthmus.edge_agent.language.arms.verify import VerifyArm
from isthmus.edge_agent.language.cloud_model import CloudModel, ReplicaMatch
from isthmus.edge_agent.language.remote_session import RemoteSession, token_opening
from isthmus.edge_agent.language.replicas import Replicas
from isthmus.edge_agent.language.request import GenerationRequest
from isthmus.edge_agent.language.sequence import AnswerSequence
from isthmus.edge_agent.language.stats import GenerationStats
from isthmus.edge_agent.language.tokenizer_cache import TokenizerCache, cache_folder
from isthmus.edge_agent.policy.speculation import SpeculationStats
from isthmus.edge_agent.transport.language_link import LanguageLink
from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.language.drafts import Draft, LookupDraft, ModelDraft
from isthmus.models.language.onnx.decoder import OnnxDecoder
from isthmus.models.messages import Sampling
from tests.bench.processes import CloudProcess
from tests.bench.prompts import RandomDraft, ScriptedDraft, load_prompts, sparing, stubborn

SCRIPTED = ("random", "wrong", "wrong-third", "right", "end-of-text")
MODELS = {"model-8bit": 8, "model-4bit": 4}
ALONE = 12  # prompts, of a quarter at most, that run by themselves before the batches are mixed
LONGEST_TOKENS = 700
WAIT_S = 120.0  # a cloud that was killed needs to load its model again


@dataclass
class Case:
    """One prompt, answered twice."""

    prompt: int
    draft: str
    alone: bool
    tokens: int
    mismatches: int
    rounds: int
    passes: int
    round_bytes: int
    accepted: int
    rejected: int
    reopened: bool


class Bench:
    """Answers prompts through one link."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        target: str,
        tokens: int,
        sampling: Sampling,
        models: Mapping[str, int] = MODELS,
        wait_s: float = WAIT_S,
    ) -> None:
        """`models`: drafts by the device's model, and the bits of its weights. `wait_s`: for a cloud that was lost."""
        self.checkpoint, self.tokens, self.sampling = checkpoint, tokens, sampling
        cloud = CloudModel(None, checkpoint, TokenizerCache(cache_folder("tokenizers")))
        link = LanguageLink(target, ReplicaMatch(cloud, target), None, BREAKER)
        link.wait_probed(10.0)
        self.replicas = Replicas([link], cloud, wait_s)
        self.models = {name: ModelDraft(OnnxDecoder(checkpoint, 2048, bits, 1)) for name, bits in models.items()}
        self.tempos = {name: sparing() for name in MODELS}
        self.locks = {name: threading.Lock() for name in MODELS}

    def answer(
        self, prompt: tuple[int, ...], draft: Draft | None, speculation: SpeculationStats
    ) -> tuple[list[int], GenerationStats]:
        request = GenerationRequest(prompt, self.tokens, "verify" if draft else "cloud", self.sampling)
        sequence, stats = AnswerSequence(request, self.checkpoint.tokenizer.eos_ids), GenerationStats()
        session = RemoteSession(self.replicas, sequence, stats, token_opening(sequence, 0))
        arm: VerifyArm | RemoteArm
        if draft is None:
            arm = RemoteArm(sequence, session, Rounds(session, sequence, stats, speculation), None)
        else:
            arm = VerifyArm(sequence, session, stats, speculation, draft, None)
        with closing(session):
            return [token.id for token in arm.tokens()], stats

    def case(self, index: int, prompt: tuple[int, ...], name: str, alone: bool) -> Case:
        expected, first = self.answer(prompt, None, SpeculationStats())
        if name in self.models:
            with self.locks[name]:
                found, stats = self.answer(prompt, self.models[name], self.tempos[name])
        else:
            found, stats = self.answer(prompt, self.draft(name, expected, len(prompt), index), stubborn_for(name))
        wrong = sum(a != b for a, b in zip(expected, found, strict=False)) + abs(len(expected) - len(found))
        round_bytes = stats.bytes_up + stats.bytes_down - stats.opening_bytes
        reopened = "went on" in stats.why or "went on" in first.why
        return Case(
            index, name, alone, len(found), wrong, stats.rounds, stats.passes, round_bytes, stats.accepted,
            stats.rejected, reopened,
        )  # fmt: skip

    def draft(self, name: str, expected: list[int], prompt_tokens: int, seed: int) -> Draft:
        eos = min(self.checkpoint.tokenizer.eos_ids)
        if name == "lookup":
            return LookupDraft()
        if name == "random":
            return RandomDraft(self.checkpoint.config.vocab, seed)
        every = {"right": 0, "wrong": 1, "wrong-third": 3, "end-of-text": 1}[name]
        return ScriptedDraft(expected, prompt_tokens, every, eos if name == "end-of-text" else 5)


def stubborn_for(name: str) -> SpeculationStats:
    speculation = stubborn()
    if name == "lookup":
        speculation.draft_s.value = 0.0
    return speculation


def jobs(
    prompts: list[tuple[int, ...]], names: Sequence[str] = (*MODELS, "lookup", *SCRIPTED)
) -> Iterator[tuple[int, tuple[int, ...], str, bool]]:
    for index, prompt in enumerate(prompts):
        alone = index < lonely(len(prompts))
        yield index, prompt, ("model-8bit" if alone else names[index % len(names)]), alone


def lonely(prompts: int) -> int:
    return min(ALONE, prompts // 4)


class Restartable(Protocol):
    """A process that can be killed, and started again."""

    def kill(self) -> None: ...

    def start(self) -> object: ...


class Killer(threading.Thread):
    """Kills a process and starts it again, `restarts` times over the run."""

    def __init__(self, cloud: Restartable, done: list[Case], total: int, restarts: int) -> None:
        super().__init__(daemon=True)
        self._cloud, self._done = cloud, done
        alone = lonely(total)
        self._at = [alone + (total - alone) * (step + 1) // (restarts + 1) for step in range(restarts)]
        self.count = 0

    def run(self) -> None:
        for at in self._at:
            while len(self._done) < at:
                time.sleep(0.005)
            self._cloud.kill()
            self.count += 1
            self._cloud.start()


def run(bench: Bench, todo: list[Any], workers: int, keep: Any, cases: list[Case]) -> None:
    """The lonely prompts first, then the others on `workers` threads."""
    failures: list[BaseException] = []
    for batch, threads in (([job for job in todo if job[3]], 1), ([job for job in todo if not job[3]], workers)):
        waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for job in batch:
            waiting.put(job)

        def work(waiting: queue.SimpleQueue[Any] = waiting) -> None:
            while not failures:
                try:
                    job = waiting.get_nowait()
                except queue.Empty:
                    return
                try:
                    case = bench.case(*job)
                except BaseException as error:
                    failures.append(error)
                    return
                cases.append(case)
                keep(case)

        crew = [threading.Thread(target=work) for _ in range(threads)]
        for thread in crew:
            thread.start()
        for thread in crew:
            thread.join()
    if failures:
        raise failures[0]


def finished(partial: Path, settings: dict[str, Any]) -> list[Case]:
    """The cases of an interrupted run with the same settings."""
    lines = partial.read_text().splitlines() if partial.exists() else []
    return [Case(**row["case"]) for row in map(json.loads, lines) if row["settings"] == settings]


def record(log: TextIO, settings: dict[str, Any], case: Case) -> None:
    """Keep a case for a later run, should this one be interrupted."""
    log.write(json.dumps({"settings": settings, "case": asdict(case)}) + "\n")
    log.flush()


def report(cases: list[Case], restarts: int, settings: dict[str, Any]) -> dict[str, Any]:
    rounds = sum(case.rounds for case in cases)
    alone = [case for case in cases if case.alone]
    by_draft = {
        name: {
            "prompts": len(rows := [case for case in cases if case.draft == name]),
            "tokens": sum(case.tokens for case in rows),
            "mismatches": sum(case.mismatches for case in rows),
            "rounds": sum(case.rounds for case in rows),
            "acceptance": ratio(sum(c.accepted for c in rows), sum(c.accepted + c.rejected for c in rows)),
        }
        for name in sorted({case.draft for case in cases})
    }
    return {
        **settings,
        "prompts": len(cases),
        "tokens": sum(case.tokens for case in cases),
        "mismatches": sum(case.mismatches for case in cases),
        "restarts": restarts,
        "answers_with_a_restart": sum(case.reopened for case in cases),
        "bytes_per_round": ratio(sum(case.round_bytes for case in cases), rounds),
        "cloud_passes_per_token": ratio(sum(case.passes for case in alone), sum(case.tokens for case in alone)),
        "cloud_passes_per_token_is": "of prompts alone, drafts by the 8-bit copy, reading the prompt not counted",
        "by_draft": by_draft,
        "machine": f"{platform.machine()}; device and cloud share it",
    }


def ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


@click.command(epilog="Example: python -m tests.bench.lossless --n 300 --tokens 64 --json runs/lossless.json")
@click.option("--prompts", type=click.Path(path_type=Path, exists=True), help="Spec-Bench JSON lines, or text lines.")
@click.option("--n", default=16, type=click.IntRange(1), show_default=True)
@click.option("--tokens", default=32, type=click.IntRange(2), show_default=True, help="Of each answer, at most.")
@click.option("--model", default="smollm2", show_default=True)
@click.option("--dtype", default="bfloat16", show_default=True)
@click.option("--temperature", default=0.0, show_default=True)
@click.option("--workers", default=6, show_default=True, help="Answers at once.")
@click.option("--restarts", default=2, show_default=True, help="How often the cloud is killed.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), required=True)
def main(
    prompts: Path | None,
    n: int,
    tokens: int,
    model: str,
    dtype: str,
    temperature: float,
    workers: int,
    restarts: int,
    json_file: Path,
) -> None:
    """Compare `verify` with `cloud`, token by token."""
    checkpoint = Checkpoint.open(model)
    todo = list(jobs(load_prompts(prompts, checkpoint.tokenizer, n, LONGEST_TOKENS)))
    settings = {"model": checkpoint.name, "dtype": dtype, "temperature": temperature, "max_tokens": tokens}
    partial = json_file.with_suffix(".partial")
    json_file.parent.mkdir(parents=True, exist_ok=True)
    cases = finished(partial, settings)
    done = {case.prompt for case in cases}
    arguments = ("--model", model, "--dtype", dtype)
    with CloudProcess(arguments=arguments) as cloud, Progress() as bar, partial.open("a") as log:
        task = bar.add_task("prompts", total=n, completed=len(done))

        def keep(case: Case) -> None:
            record(log, settings, case)
            bar.advance(task)

        bench = Bench(checkpoint, cloud.target, tokens, Sampling(temperature, seed=7))
        killer = Killer(cloud, cases, n, restarts)
        killer.start()
        run(bench, [job for job in todo if job[0] not in done], workers, keep, cases)
        killer.join()
        bench.replicas.close()
    result = report(sorted(cases, key=lambda case: case.prompt), killer.count, settings)
    json_file.write_text(json.dumps(result, indent=1) + "\n")
    partial.unlink()
    click.echo(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
