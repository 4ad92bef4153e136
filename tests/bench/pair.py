"""Measure routers between a device's model and another in the cloud: quality against calls, tokens and cloud FLOPs.

    tasks with right answers --both models--> whole answers   --routers--> accuracy
    prompts --cloud--> answers --device-----> its next tokens --routers--> share of the cloud's tokens

Heads are fitted on one half of the prompts and measured on the other, and the reverse: every prompt is measured, none
by a head that saw it. Whole answers: random, the prompt alone (its length), the query head, the mean log-probability of
the device's answer, the cascade's verifier, and an oracle. Tokens: random, the prompt (query by its first token), the
softmax, the confidence head, and spans: the cloud writes from a doubt on to the end of the sentence or line.

An interrupted run continues with the answers in --work.
"""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

from isthmus.models.language.architecture import LlamaConfig
from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.language.checkpoint.tokenizer import Message, Tokenizer
from isthmus.models.language.drafts import ModelDraft
from isthmus.models.language.flops import decoder_flops
from isthmus.models.language.onnx.decoder import OnnxDecoder
from isthmus.models.recipes.common.intervals import interval
from isthmus.models.recipes.language.answer_quality import is_right
from isthmus.models.recipes.language.answered import AnsweredPrompt, Question, answered_prompts
from isthmus.models.recipes.language.answers import answer_scores, query_scores, train_verifier
from isthmus.models.recipes.language.confidence_head import confidences, train_confidence_head
from isthmus.models.recipes.language.router import answer_choices
from isthmus.models.recipes.language.router_answers import Answer, Cloud, cloud_answers, open_cloud, read_prompts
from tests.bench.pair_curves import Outcome, auc_with_interval, by_answer, measure, thresholds
from tests.bench.pair_tasks import TaskQuestion, generated_tasks

QUALITIES = (0.9, 0.95, 0.97, 0.99)  # of the cloud's
LONGEST_TOKENS = 64  # of a device's answer to a task
CASCADE, HEAD = "cascade (verifier)", "token levels (confidence head)"
SENTENCE_END = re.compile(rb"[.!?\n]")

Doubles = NDArray[np.float64]
Bools = NDArray[np.bool_]
Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    device: str
    bits: int
    cloud: str
    work: Path
    resamples: int


def read_tasks(file: Path) -> list[TaskQuestion]:
    """Lines of JSON with "turns" and "reference"; the task is their "category"."""
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [
        TaskQuestion(str(each.get("category", file.stem)), str(each["turns"][0]), tuple(map(str, each["reference"])))
        for each in records
        if each.get("reference")
    ]


class CloudFlops:
    """What the cloud computes; in tokens where it is a service, whose sizes are not known."""

    def __init__(self, config: LlamaConfig | None) -> None:
        self._config = config

    def __call__(self, read: int, decided: int) -> float:
        """Of reading so many tokens and deciding as many as said."""
        if self._config is None:
            return float(read)
        return float(decoder_flops(self._config, 0, read, layers=self._config.layers, decided=decided))


def halves(count: int) -> list[tuple[list[int], list[int]]]:
    """Two pairs of a training and a test half."""
    order = np.random.default_rng(0).permutation(count).tolist()
    first, second = order[: count // 2], order[count // 2 :]
    return [(first, second), (second, first)]


# --- whole answers


def answer_tasks(settings: Settings, cloud: Cloud, tasks: Sequence[TaskQuestion]) -> list[AnsweredPrompt]:
    """Both models' answers to all tasks that fit."""
    checkpoint = Checkpoint.open(settings.device)
    decoder = OnnxDecoder(checkpoint, 1024 + LONGEST_TOKENS, settings.bits, torch.get_num_threads())
    questions = [Question(each.prompt, each.references) for each in tasks]
    made = answered_prompts(
        settings.work / "answers.jsonl",
        ModelDraft(decoder).logits,
        checkpoint.tokenizer,
        cloud,
        questions,
        LONGEST_TOKENS,
    )
    return list(track(made, "answers to tasks", total=len(questions)))


def score_answers(answered: Sequence[AnsweredPrompt]) -> dict[str, Doubles]:
    """The score of each answer (P,) by each router; heads by the half that does not hold it."""
    count = len(answered)
    scores = {name: np.zeros(count) for name in ("query (first token)", CASCADE)}
    for training, test in halves(count):
        verifier = train_verifier([answered[index] for index in training])
        chosen = [answered[index] for index in test]
        scores["query (first token)"][test] = query_scores(verifier, chosen)
        scores[CASCADE][test] = answer_scores(verifier, chosen)
    last = np.array([each.device.checks[-1] for each in answered])
    return {
        "random": np.random.default_rng(1).random(count),
        "prompt alone (length)": -last[:, 3],
        **scores,
        "mean log-probability": last[:, 4],
    }


def measure_answers(
    answered: Sequence[AnsweredPrompt],
    tasks: Sequence[TaskQuestion],
    tokenizer: Tokenizer,
    flops: CloudFlops,
    times: int,
) -> Row:
    """Accuracies of both models by task, and what routers recover, over all tasks and over each that differs."""
    known = {each.prompt: each for each in tasks}
    names = np.array([known[each.prompt].task for each in answered])
    rights = [
        [is_right(side.text, known[each.prompt].references) for each in answered for side in (getattr(each, which),)]
        for which in ("device", "cloud")
    ]
    device_P, cloud_P = (np.array(each, np.float64) for each in rights)
    prompts = [len(tokenizer.chat([Message("user", each.prompt)])) for each in answered]
    tokens_P = np.array([each.cloud.generated for each in answered], np.float64)
    flops_P = np.array([flops(int(a + b - 1), int(b)) for a, b in zip(prompts, tokens_P, strict=True)])
    scores = {**score_answers(answered), "oracle": device_P - cloud_P}
    result: Row = {"tasks": {}, "auc": {}}
    for task in ["all", *sorted(set(names.tolist()))]:
        chosen_P = np.full(len(names), True) if task == "all" else names == task
        row = accuracies(device_P[chosen_P] > 0, cloud_P[chosen_P] > 0)
        outcomes = {
            name: by_answer(*(each[chosen_P] for each in (score_P, device_P, cloud_P, tokens_P, flops_P)))
            for name, score_P in scores.items()
        }
        result["tasks"][task] = {**row, **measure(outcomes, QUALITIES, times, CASCADE)}
    acceptable_P = np.array([each.acceptable for each in answered])
    for name, score_P in scores.items():
        if name != "oracle":
            result["auc"][name] = auc_with_interval(score_P, acceptable_P, times)
    return result


def accuracies(device_P: Bools, cloud_P: Bools) -> Row:
    """Of both alone, with intervals; `differs`: whether a paired test says that they do."""
    from scipy.stats import binomtest

    only_device, only_cloud = int((device_P & ~cloud_P).sum()), int((cloud_P & ~device_P).sum())
    changed = only_device + only_cloud
    p_value = float(binomtest(only_cloud, changed).pvalue) if changed else 1.0
    sides = {"device": device_P, "cloud": cloud_P}
    alone = {name: [(found := interval(each)).value, found.low, found.high] for name, each in sides.items()}
    return {"alone": alone, "only_cloud_right": only_cloud, "only_device_right": only_device, "p_differs": p_value}


# --- tokens


@dataclass(frozen=True)
class Tokens:
    """The device's choices at each token of the cloud's answers, of P answers that follow one another."""

    features_NF: Doubles
    right_N: Bools
    answer_N: NDArray[np.int64]
    ends_N: Bools  # whether the token ends a sentence or a line
    prompts_P: NDArray[np.int64]  # tokens of each prompt

    @property
    def starts_P(self) -> NDArray[np.int64]:
        return np.searchsorted(self.answer_N, np.arange(len(self.prompts_P)))


def token_choices(settings: Settings, cloud: Cloud, file: Path, every: int) -> Tokens:
    """The cloud's answers to a file's prompts and the device's choices in them."""
    checkpoint = Checkpoint.open(settings.device)
    answers = cloud_answers(settings.work / "cloud.jsonl", cloud, read_prompts(file, cloud.tokenizer)[::every])
    answers = [each for each in answers if each.tokens]
    longest = max(len(each.prompt) + len(each.tokens) for each in answers)
    decoder = OnnxDecoder(checkpoint, longest, settings.bits, torch.get_num_threads())
    found = [choices_of(settings.work / "choices", decoder, each) for each in track(answers, "tokens of the device")]
    ids = [id_ for each in answers for id_ in each.tokens]
    ends = {id_: bool(SENTENCE_END.search(cloud.tokenizer.token_bytes(id_))) for id_ in set(ids)}
    return Tokens(
        np.concatenate([features for features, _ in found]).astype(np.float64),
        np.concatenate([right for _, right in found]),
        np.repeat(np.arange(len(answers)), [len(each.tokens) for each in answers]),
        np.array([ends[id_] for id_ in ids]),
        np.array([len(each.prompt) for each in answers]),
    )


def choices_of(folder: Path, decoder: OnnxDecoder, answer: Answer) -> tuple[NDArray[np.float32], Bools]:
    """As `answer_choices`, kept in a file."""
    import hashlib

    folder.mkdir(exist_ok=True)
    path = folder / f"{hashlib.sha256(str(answer).encode()).hexdigest()[:16]}.npz"
    if not path.exists():
        features_NF, right_N = answer_choices(decoder, answer)
        np.savez(path.with_suffix(".part.npz"), features=features_NF, right=right_N)
        path.with_suffix(".part.npz").replace(path)
    kept = np.load(path)
    return kept["features"], kept["right"]


def head_confidence(tokens: Tokens) -> Doubles:
    """Confidence of each token by a head that was fitted on the other half of the answers."""
    confidence_N = np.zeros(len(tokens.right_N))
    for training, test in halves(len(tokens.prompts_P)):
        known_N, asked_N = np.isin(tokens.answer_N, training), np.isin(tokens.answer_N, test)
        features_NF = torch.from_numpy(tokens.features_NF.astype(np.float32))
        head = train_confidence_head(features_NF[known_N], torch.from_numpy(tokens.right_N[known_N]), 0)
        confidence_N[asked_N] = confidences(head, features_NF[asked_N]).numpy()
    return confidence_N


def spans(asked_N: Bools, tokens: Tokens) -> Bools:
    """The tokens that the cloud writes where each doubt is answered to the end of its sentence or line."""
    written_N, writing, before = np.zeros_like(asked_N), False, -1
    for place, answer in enumerate(tokens.answer_N.tolist()):
        writing = (writing and answer == before) or bool(asked_N[place])
        written_N[place] = writing
        writing, before = writing and not tokens.ends_N[place], answer
    return written_N


def token_outcome(
    tokens: Tokens, confidence_N: Doubles, flops: CloudFlops, write: Callable[[Bools], Bools] | None = None
) -> Outcome:
    """Tokens below a threshold are the cloud's; with `write` what that makes of them, in one call for each run."""
    columns: list[list[Doubles]] = [[], [], [], []]
    for threshold in thresholds(confidence_N):
        asked_N = confidence_N < threshold
        cloud_N = write(asked_N) if write else asked_N
        first_N = cloud_N & ~(np.append(False, cloud_N[:-1]) & np.append(False, np.diff(tokens.answer_N) == 0))
        for column, values_N in zip(
            columns, (cloud_N | tokens.right_N, first_N if write else asked_N, cloud_N), strict=False
        ):
            column.append(np.bincount(tokens.answer_N, values_N, len(tokens.prompts_P)))
        columns[3].append(cloud_flops(tokens, cloud_N, flops))
    right, calls, written, spent = (np.stack(column, 1) for column in columns)
    return Outcome(right, calls, written, spent, np.bincount(tokens.answer_N).astype(np.float64))


def cloud_flops(tokens: Tokens, cloud_N: Bools, flops: CloudFlops) -> Doubles:
    """For each answer (P,): its text is read up to the last token that the cloud decides, or not at all."""
    counts_P = np.bincount(tokens.answer_N, cloud_N, len(tokens.prompts_P))
    place_N = np.arange(len(cloud_N)) - tokens.starts_P[tokens.answer_N]
    last_P = np.zeros(len(tokens.prompts_P), np.int64)
    np.maximum.at(last_P, tokens.answer_N[cloud_N], place_N[cloud_N])
    pairs = zip(tokens.prompts_P.tolist(), last_P.tolist(), counts_P.tolist(), strict=True)
    return np.array([flops(prompt + last, int(count)) if count else 0.0 for prompt, last, count in pairs])


def measure_tokens(tokens: Tokens, flops: CloudFlops, times: int) -> Row:
    """What routers of tokens recover."""
    head_N, chance_N = head_confidence(tokens), np.random.default_rng(2).random(len(tokens.right_N))
    softmax_N, first_P = tokens.features_NF[:, 0], tokens.features_NF[tokens.starts_P, 0]
    outcomes = {
        "random": token_outcome(tokens, chance_N, flops),
        "prompt (first token)": token_outcome(tokens, first_P[tokens.answer_N], flops),
        "softmax": token_outcome(tokens, softmax_N, flops),
        HEAD: token_outcome(tokens, head_N, flops),
        "spans (confidence head)": token_outcome(tokens, head_N, flops, lambda asked_N: spans(asked_N, tokens)),
        "oracle": token_outcome(tokens, tokens.right_N.astype(np.float64), flops),
    }
    share_P = np.bincount(tokens.answer_N, tokens.right_N) / np.bincount(tokens.answer_N)
    return {
        "device_alone": float(tokens.right_N.mean()),
        "tokens": len(tokens.right_N),
        "correlation_of_prompts": float(np.corrcoef(first_P, share_P)[0, 1]) if len(first_P) > 2 else None,
        **measure(outcomes, QUALITIES, times, HEAD),
    }


# --- report


def pages(result: Row) -> list[Table]:
    found = []
    for meaning, row in result["quality"].items():
        title = meaning
        if "alone" in row:
            device, cloud = row["alone"]["device"], row["alone"]["cloud"]
            title += f": device {device[0]:.1%} [{device[1]:.1%}, {device[2]:.1%}], cloud {cloud[0]:.1%}"
            title += f" [{cloud[1]:.1%}, {cloud[2]:.1%}], p {row['p_differs']:.3f}"
        else:
            title += f": device alone {row['device_alone']:.1%}"
        page = Table("router", "APGR", "CPT(50)", "CPT(80)", "saved at no loss", "FLOPs at 0.97", title=title)
        for name, each in row["routers"].items():
            low_high = each["intervals"]["apgr"]
            apgr = "" if each["apgr"] is None else f"{each['apgr']:.3f} [{low_high[0]:.3f}, {low_high[1]:.3f}]"
            shares = ["" if each[key] is None else f"{each[key]:.1%}" for key in ("cpt50", "cpt80", "saved_at_no_loss")]
            page.add_row(name, apgr, *shares, f"{each['at']['0.97']['flops']:.1%}")
        found.append(page)
    return found


def plot(result: Row, file: Path) -> None:
    from matplotlib.figure import Figure

    shown = [(name, row) for name, row in result["quality"].items() if name in ("tokens", "tasks")]
    figure = Figure(figsize=(10, 4 * len(shown)), layout="constrained")
    panels = [(name, row, cost) for name, row in shown for cost in ("calls", "flops")]
    for index, (name, row, cost) in enumerate(panels):
        axes = figure.add_subplot(len(shown), 2, index + 1)
        for router, each in row["routers"].items():
            axes.plot(*(100 * np.array(each["curve"][key]) for key in (cost, "quality")), label=router)
        each_of = f"calls for 100 {'tokens' if name == 'tokens' else 'prompts'}"
        axes.set(xlabel=each_of if cost == "calls" else "cloud FLOPs, % of the cloud alone")
        axes.set(ylabel="tokens as the cloud's, %" if name == "tokens" else "right answers, %")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=6)
    figure.savefig(file, dpi=110)


@click.command(
    epilog="Example: python -m tests.bench.pair --device smollm2 --bits 4 --prompts FILE --json runs/pair.json"
)
@click.option("--device", default="smollm2", show_default=True)
@click.option("--bits", default="8", show_default=True, type=click.Choice(["4", "8"]), help="Of the device's weights.")
@click.option("--cloud", default="smollm2", show_default=True, help="A model, or HOST:PORT of a cloud service.")
@click.option("--prompts", type=click.Path(path_type=Path, exists=True), help="For tokens: as Spec-Bench's.")
@click.option("--every", default=1, show_default=True, type=click.IntRange(1), help="Use every N-th prompt, by length.")
@click.option(
    "--tasks", "task_files", multiple=True, type=click.Path(path_type=Path, exists=True),
    help="Questions with references, as Spec-Bench's; repeatable.",
)  # fmt: skip
@click.option("--n", default=60, type=click.IntRange(0), show_default=True, help="Generated questions of each task.")
@click.option("--resamples", default=1000, show_default=True, type=click.IntRange(10))
@click.option("--quick", is_flag=True, help="Four questions of each task, 20 resamples.")
@click.option("--work", type=click.Path(path_type=Path), default=Path("runs/pair"), show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), required=True)
@click.option("--plot", "plot_file", type=click.Path(path_type=Path))
def main(
    device: str, bits: str, cloud: str, prompts: Path | None, every: int, task_files: tuple[Path, ...], n: int,
    resamples: int, quick: bool, work: Path, json_file: Path, plot_file: Path | None,
) -> None:  # fmt: skip
    """Measure every router on a pair of models."""
    n, resamples = (4, 20) if quick else (n, resamples)
    work.mkdir(parents=True, exist_ok=True)
    settings = Settings(device, int(bits), cloud, work, resamples)
    tasks = [*generated_tasks(n), *(each for file in task_files for each in read_tasks(file))]
    quality: Row = {}
    result: Row = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "pair": {"device": device, "bits": int(bits), "cloud": cloud},
        "quality": quality,
    }
    with open_cloud(cloud) as opened:
        flops = CloudFlops(Checkpoint.open(cloud).config if opened.identity.weights else None)
        if tasks:
            answered = answer_tasks(settings, opened, tasks)
            found = measure_answers(answered, tasks, opened.tokenizer, flops, resamples)
            result["auc_of_acceptable_answers"] = found["auc"]
            quality["tasks"] = found["tasks"].pop("all")
            quality.update({f"task {name}": row for name, row in found["tasks"].items()})
        if prompts is not None:
            quality["tokens"] = measure_tokens(token_choices(settings, opened, prompts, every), flops, resamples)
    json_file.parent.mkdir(parents=True, exist_ok=True)
    json_file.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    for page in pages(result):
        Console().print(page)
    if plot_file:
        plot(result, plot_file)


if __name__ == "__main__":
    main()
