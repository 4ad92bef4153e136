"""Layers shared: how many tokens a device may decide at which agreement, what crosses, what the cloud computes.

    the model's greedy answers to prompts --device's layers and exits--> who is sure, who is right
                                          --coded rows, layers behind--> what the cloud completes

Beside it CE-CoLLM's scheme in the same run: the same exits, believed by the probability of their choice; hidden states
of every token as 16-bit floats; every one of them through the cloud's layers. All positions of answers count, each with
the full model's own text before it. Perplexity is that of another text under what is chosen at each position.

Source: Jin and Wu, "CE-CoLLM" (ICWS 2025), for the baseline; Horton et al., "KV Prediction" (2024), for prefill.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from isthmus.cloud_service.language.model_runner import FullRunner
from isthmus.edge_agent.language.arms.handoff import point_of
from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.language.checkpoint.tokenizer import Tokenizer
from isthmus.models.language.handoff.bundle import HandoffBundle
from isthmus.models.language.handoff.confidence_head import ConfidenceHead
from isthmus.models.language.handoff.manifest import StatePoint, least_likely
from isthmus.models.language.torch.batch_invariance import chunks
from isthmus.models.language.torch.decoder import Decoder, Span
from isthmus.models.language.torch.kv_cache import KVCache
from isthmus.models.messages import Committed, Opening, Round
from isthmus.models.recipes.common.calibrate import interval
from isthmus.models.recipes.language.bundle import ASKING
from isthmus.models.recipes.language.confidence_head import ExitDecisions, decide
from isthmus.models.recipes.language.device_outputs import DeviceOutputs, observe
from isthmus.models.recipes.language.evaluate import SuffixOutputs, CodedStates, ApproximateKV, answered, chats, completed
from isthmus.models.recipes.language.exits import run_teacher
from isthmus.models.recipes.language.llama import Llama
from isthmus.models.recipes.language.corpus import Corpus
from tests.bench.language import layer_weights

CONFIDENCES = (
    *(round(0.3 + step / 20, 2) for step in range(10)), *(round(0.8 + step / 50, 2) for step in range(5)),
    *(round(0.9 + step / 100, 2) for step in range(10)),
)  # fmt: skip
SURER = (0.9, 0.95, 0.97, 0.98, 0.985, 0.99, 0.992, 0.994, 0.996, 0.998)  # for perplexity, which few wrong tokens spoil
NEAR = 1.02  # of the model's perplexity
OTHER_TOKENS = 64  # of a passage of another domain, behind its prompt
HALF_BYTES = 2  # CE-CoLLM's hidden states
FRAMING_BYTES = 4  # of our messages, a row

Row = dict[str, Any]


@dataclass(frozen=True)
class Costs:
    """Weights that a token meets: in the layers behind the cut, in all layers, in the output head, in the KV fill."""

    behind: float
    layers: float
    head: float
    fill: float

    @property
    def alone(self) -> float:
        """When the cloud makes a token by itself."""
        return self.layers + self.head

    def computed(self, asked: float, kind: str) -> float:
        """What the cloud computes where it is asked for this share of tokens, of what it would alone.

        Every row goes through its layers ("exact"), or those it is not asked for through the KV fill ("fill").
        """
        if kind == "fill":
            return (self.fill + asked * (self.behind + self.head)) / self.alone
        return (self.behind + asked * self.head) / self.alone


def costs(checkpoint: Checkpoint, depth: int) -> Costs:
    config = checkpoint.config
    layer, later = layer_weights(config), config.layers - depth
    fill = later * config.hidden * 2 * config.kv_heads * config.head_dim
    return Costs(later * layer, config.layers * layer, config.hidden * config.vocab, fill)


def judged(handoff: HandoffBundle, observed: DeviceOutputs) -> Tensor:
    """How likely right (E, N) the bundle's judges say that each exit's choice is."""
    judges = [ConfidenceHead.from_tensors(handoff.exit(index)) for index in range(len(handoff.depths))]
    features_ENF = observed.features_ENF.numpy()
    return torch.from_numpy(np.stack([judge.likely(features_NF) for judge, features_NF in zip(judges, features_ENF, strict=True)]))


@dataclass(frozen=True)
class Ways:
    """How rows come to the cloud; it may have a fill for those that it is not asked for."""

    model: Llama
    depth: int
    crossing: CodedStates
    point: StatePoint
    fill: ApproximateKV | None

    def completed(self, asked_N: Tensor) -> tuple[dict[str, SuffixOutputs], float]:
        """What is completed where the cloud is asked, with every row through its layers, and filled; bytes of a row."""
        traces, mean_bytes = self.crossing.at(self.point.context_rate, self.point.rate, asked_N)
        done = {"exact": completed(self.model, traces, self.depth)}
        if self.fill is not None:
            done["fill"] = completed(self.model, traces, self.depth, self.fill)
        return done, mean_bytes


def ours(confidence_EN: Tensor, test: DeviceOutputs, ways: Ways, price: Costs) -> list[Row]:
    """Our scheme at every threshold. How a row crosses depends on whether the cloud is asked."""
    rows = []
    for confidence in CONFIDENCES:
        each = decide(confidence_EN, test.right_EN, confidence)
        done, mean_bytes = ways.completed(test.answer_N & ~each.sure_N)
        rows.append(decided_row("ours", confidence, each, test, done, mean_bytes + FRAMING_BYTES, price))
    return rows


def decided_row(
    name: str, confidence: float, each: ExitDecisions, test: DeviceOutputs, done: Mapping[str, SuffixOutputs], bytes_a_row: float,
    price: Costs,
) -> Row:  # fmt: skip
    """A scheme at one threshold, over positions that decide tokens of answers."""
    here, full_N = test.answer_N, test.traces.top_NK[:, 0]
    each = each.at(here)
    row: Row = {"scheme": name, "confidence": confidence, "coverage": each.coverage, "agreement": each.agreement}
    row["interval"] = bounds(each.right_N[each.sure_N])
    for kind, found in done.items():
        whole_N = torch.where(each.sure_N, each.right_N, (found.chosen_N == full_N)[here])
        row[f"agreement of all, {kind}"] = float(whole_N.float().mean())
        row[f"cloud, {kind}"] = price.computed(1 - each.coverage, kind)
    row["bytes_a_token"] = bytes_a_row
    return row


def bounds(right_N: Tensor) -> list[float]:
    found = interval(right_N.numpy()) if len(right_N) else None
    return [found.low, found.high] if found else [0.0, 1.0]


def point_rows(ways: Ways, handoff: HandoffBundle, test: DeviceOutputs, exact: SuffixOutputs) -> list[Row]:
    """Every point, where exits decide as on a device: bytes of a row, and how many tokens coding makes others.

    lost: of all tokens; lost_asked: of those that the cloud is asked for, whose share is `asked`.
    """
    here, full_N = test.answer_N, test.traces.top_NK[:, 0]
    each = decide(judged(handoff, test), test.right_EN, least_likely(handoff.manifest.thresholds, ASKING))
    asked_N, exact_N = here & ~each.sure_N, exact.chosen_N == full_N
    rows = []
    for index, point in enumerate(handoff.manifest.points):
        done, mean_bytes = replace(ways, point=point, fill=None).completed(asked_N)
        right_N = done["exact"].chosen_N == full_N
        whole_N = torch.where(each.sure_N, each.right_N, right_N)[here]
        rows.append(
            {
                "point": index,
                "bytes": mean_bytes,
                "of_fp16": mean_bytes / HALF_BYTES / handoff.manifest.hidden,
                "agreement": float(whole_N.float().mean()),
                "interval": bounds(whole_N),
                "lost": share_lost(exact_N & asked_N, right_N & asked_N, here),
                "lost_asked": share_lost(exact_N, right_N, asked_N),
                "asked": float(asked_N.sum() / here.sum()),
                "positions": int(here.sum()),
            }
        )
    return rows


def share_lost(exact_N: Tensor, right_N: Tensor, here_N: Tensor) -> float:
    """How many fewer positions of some are right than from rows as such."""
    return float(exact_N[here_N].float().mean() - right_N[here_N].float().mean())


def passages(file: Path, tokenizer: Tokenizer, count: int, prompt: int) -> Corpus:
    """Passages of a plain text, the first `prompt` tokens of each a prompt."""
    tokens = prompt + OTHER_TOKENS
    ids = tokenizer.encode(file.read_text(encoding="utf-8")[: 10 * count * tokens])
    starts = np.linspace(0, len(ids) - tokens, count).astype(int).tolist()
    return Corpus.from_sequences([(ids[start : start + tokens], prompt) for start in starts])


def other_domain(
    model: Llama, checkpoint: Checkpoint, handoff: HandoffBundle, fill: ApproximateKV, texts: Corpus, point: StatePoint
) -> Row:
    """Perplexity on a text of another domain, and what the cloud computes."""
    exits = {depth: handoff.exit(index) for index, depth in enumerate(handoff.depths)}
    traces = run_teacher(model, texts, handoff.depths, torch.float32)
    test = observe(checkpoint, exits, traces, range(len(traces)))
    here, exact = test.answer_N, completed(model, traces, handoff.depth)
    ways = Ways(model, handoff.depth, CodedStates(model, test.traces, handoff.depth, handoff.state_codec), point, fill)
    confidence_EN = judged(handoff, test)
    base = float(torch.exp(-exact.next_N[here].mean()))
    rows, price = [], costs(checkpoint, handoff.depth)
    for confidence in SURER:
        each = decide(confidence_EN, test.right_EN, confidence)
        done, _ = ways.completed(here & ~each.sure_N)
        exit_N = test.next_EN.gather(0, each.exit_N[None])[0]
        told = each.at(here)
        row: Row = {"confidence": confidence, "coverage": told.coverage, "agreement": told.agreement}
        for kind, found in done.items():
            mixed_N = torch.where(each.sure_N, exit_N, found.next_N)[here]
            row[f"perplexity ratio, {kind}"] = float(torch.exp(-mixed_N.mean())) / base
            row[f"cloud, {kind}"] = price.computed(1 - told.coverage, kind)
        rows.append(row)
    return {"positions": int(here.sum()), "perplexity": base, "curve": rows}


def read(whole: FullRunner, prompt: Sequence[int], kept: int) -> tuple[KVCache, int, float]:
    """The service's own passes over a prompt: its state, the token that follows, seconds. `kept`: 0 for all layers."""
    text = whole.new_sequence(prompt, Opening(b"", b"", 0, (), 0, prefill_layers=kept))
    text.cache = whole.decoder.new_cache()
    started_s = time.perf_counter()
    text.begin(Round(len(prompt)), 0.0)
    committed = None
    while committed is None:
        (committed,) = whole.next_runner(text).run([(text, min(text.pending_tokens, whole.decoder.width))]).outcomes
    if not isinstance(committed, Committed):
        raise committed
    return text.cache, committed.tokens[0], time.perf_counter() - started_s


def following(whole: FullRunner, cache: KVCache, ids: Sequence[int]) -> list[int]:
    """What the model chooses behind each of the tokens that follow."""
    chosen, decoder = list[int](), whole.decoder
    for count in chunks(len(ids), decoder.width):
        part = ids[len(chosen) : len(chosen) + count]
        x_NH = decoder.forward(decoder.embed(part), [Span(cache, cache.length, count)])
        chosen += decoder.logits(x_NH)[:count].argmax(-1).tolist()
    return chosen


def prefill_rows(checkpoint: Checkpoint, handoff: HandoffBundle, texts: Corpus) -> list[Row]:
    """Prompts that keep so many layers beside prompts that keep all, in turns: the time, and what is chosen behind."""
    whole = FullRunner(Decoder.load(checkpoint), frozenset(), [handoff])
    layers = checkpoint.config.layers
    kept = range(handoff.depth, layers, max((layers - handoff.depth) // 3, 1))
    ratios: dict[int, list[float]] = {each: [] for each in kept}
    same: dict[int, list[bool]] = {each: [] for each in kept}
    bounds_S = [0, *texts.ends_S.tolist()]
    for index, (start, end) in enumerate(track(list(pairwise(bounds_S)), "reading prompts")):
        answer = int(texts.answers_S[index])
        prompt, after = texts.ids_N[start:answer].tolist(), texts.ids_N[answer : end - 1].tolist()
        cache, first, exact_s = read(whole, prompt, 0)
        exactly = [first, *following(whole, cache, after)]
        for each in kept:
            cache, first, seconds = read(whole, prompt, each)
            ratios[each].append(seconds / exact_s)
            chosen = [first, *following(whole, cache, after)]
            same[each] += [ours == theirs for ours, theirs in zip(chosen, exactly, strict=True)]
    return [
        {
            "kept": each,
            "time_ratio": statistics.median(ratios[each]),
            "quartiles": np.quantile(ratios[each], [0.25, 0.75]).tolist(),
            "prompts": len(ratios[each]),
            "prompt_tokens": int(texts.answers_S[0]),
            "agreement": float(np.mean(same[each])),
            "interval": bounds(torch.tensor(same[each])),
            "positions": len(same[each]),
        }
        for each in kept
    ]


def best(rows: list[Row], agreement: float) -> Row | None:
    """The row of most coverage at this agreement."""
    return max((row for row in rows if row["agreement"] >= agreement), key=lambda row: row["coverage"], default=None)


def table(bundle: str, result: Row) -> Table:
    heads = ("scheme", "from", "device", "agreement", "of all", "cloud", "of all, fill", "cloud, fill", "B/token")
    page = Table(*heads, title=f"{bundle}: cut behind layer {result['depth']}")
    for name, rows in result["curves"].items():
        for agreement in (0.9, 0.95, 0.97, 0.98, 0.99):
            row = best(rows, agreement)
            if row is not None:
                page.add_row(
                    name, f"{row['confidence']:.2f}", f"{row['coverage']:.1%}", f"{row['agreement']:.1%}",
                    f"{row['agreement of all, exact']:.1%}", f"{row['cloud, exact']:.1%}",
                    f"{row['agreement of all, fill']:.1%}" if "cloud, fill" in row else "",
                    f"{row['cloud, fill']:.1%}" if "cloud, fill" in row else "", f"{row['bytes_a_token']:.0f}",
                )  # fmt: skip
    return page


def plot(results: Mapping[str, Row], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for index, result in enumerate(results.values()):
        cut = f"cut behind layer {result['depth']}"
        for name, rows in result["curves"].items():
            style = {"marker": ".", "color": f"C{index}", "linestyle": "-" if name == "ours" else ":"}
            sure = [row for row in rows if row["coverage"]]
            x, y = [100 * row["coverage"] for row in sure], [100 * row["agreement"] for row in sure]
            left.plot(x, y, label=f"{name}, {cut}", **style)
            x, y = ([100 * row[f"{what}, exact"] for row in rows] for what in ("cloud", "agreement of all"))
            right.plot(x, y, label=f"{name}, {cut}", **style)
    left.set(xlabel="tokens decided on the device, %", ylabel="of those as the full model, %", ylim=(80, 100.5))
    right.set(xlabel="the cloud's computation, % of making all tokens itself", ylabel="all tokens as the full model, %")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(file, dpi=110)


@dataclass(frozen=True)
class Asked:
    """What every bundle is measured on: the model's answers to prompts, and prompts of another domain."""

    answers: Corpus
    others: list[Corpus]
    other_name: str


def measured(folder: Path, checkpoint: Checkpoint, llama: Llama, asked: Asked, point: int | None) -> Row:
    """All figures of a bundle."""
    handoff = HandoffBundle.open(folder, checkpoint)
    traces = run_teacher(llama, asked.answers, handoff.depths)
    exits = {depth: handoff.exit(index) for index, depth in enumerate(handoff.depths)}
    test = observe(checkpoint, exits, traces, range(len(traces)))
    weight_LOH, bias_LO = handoff.kv_fill()
    fill = ApproximateKV(torch.from_numpy(weight_LOH), torch.from_numpy(bias_LO))
    exact = completed(llama, test.traces, handoff.depth)
    chosen = point_of(handoff.manifest, point)
    ways = Ways(llama, handoff.depth, CodedStates(llama, test.traces, handoff.depth, handoff.state_codec), chosen, fill)
    price, fp16_bytes = costs(checkpoint, handoff.depth), HALF_BYTES * checkpoint.config.hidden
    softmax_EN, done = test.features_ENF[:, :, 0].exp(), {"exact": exact}
    return {
        "depth": handoff.depth,
        "exits": handoff.depths,
        "answers": len(traces),
        "positions": int(test.answer_N.sum()),
        "exit_agreement": test.right_EN[:, test.answer_N].float().mean(1).tolist(),
        "rows_agreement": float((exact.chosen_N == traces.top_NK[:, 0])[test.answer_N].float().mean()),
        "points": point_rows(ways, handoff, test, exact),
        "curves": {
            "ours": ours(judged(handoff, test), test, ways, price),
            "CE-CoLLM": [
                decided_row("CE-CoLLM", confidence, each, test, done, fp16_bytes, price)
                for confidence in CONFIDENCES
                for each in [decide(softmax_EN, test.right_EN, confidence)]
            ],
        },
        "other": {
            "text": asked.other_name,
            **other_domain(llama, checkpoint, handoff, fill, asked.others[0], chosen),
        },
        "prefill": {
            "text": asked.other_name,
            "rows": [row for texts in asked.others for row in prefill_rows(checkpoint, handoff, texts)],
        },
    }


@click.command(
    epilog="Example: python -m tests.bench.handoff --prompts p.jsonl --other text.txt --json runs/handoff.json"
)
@click.option(
    "--bundle", "bundles", multiple=True, type=click.Path(path_type=Path), show_default=True,
    default=(Path("models/zoo/smollm2"), Path("models/zoo/smollm2-25")),
)  # fmt: skip
@click.option("--model", default="smollm2", show_default=True)
@click.option("--prompts", type=click.Path(path_type=Path, exists=True), required=True, help="As Spec-Bench's.")
@click.option("--other", type=click.Path(path_type=Path, exists=True), required=True, help="Plain text.")
@click.option("--every", default=4, show_default=True, type=click.IntRange(1), help="So manyth prompt, by length.")
@click.option("--passages", "count", default=40, show_default=True, type=click.IntRange(1), help="Of the other text.")
@click.option(
    "--prompt-tokens", "lengths", multiple=True, default=(256, 512), show_default=True, type=click.IntRange(1),
    help="How long prompts of the other text are.",
)  # fmt: skip
@click.option("--point", type=click.IntRange(0), help="How rows are coded in ours.  [default: as on a device]")
@click.option("--work", type=click.Path(path_type=Path), default=Path("runs/handoff"), show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), required=True)
@click.option("--plot", "plot_file", type=click.Path(path_type=Path))
def main(
    bundles: tuple[Path, ...], model: str, prompts: Path, other: Path, every: int, count: int, lengths: tuple[int, ...],
    point: int | None, work: Path, json_file: Path, plot_file: Path | None,
) -> None:  # fmt: skip
    """Measure exits, hidden states and KV fill of hand-off bundles beside CE-CoLLM's scheme."""
    work.mkdir(parents=True, exist_ok=True)
    checkpoint = Checkpoint.open(model)
    prompt_chats = chats(prompts, checkpoint.tokenizer, every)
    llama = Llama.load(checkpoint)
    _, answers = answered(work, llama, checkpoint.tokenizer.eos_ids, prompt_chats)
    asked = Asked(answers, [passages(other, checkpoint.tokenizer, count, length) for length in lengths], other.name)
    results = {folder.name: measured(folder, checkpoint, llama, asked, point) for folder in bundles}
    json_file.parent.mkdir(parents=True, exist_ok=True)
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    json_file.write_text(json.dumps({"machine": machine, "bundles": results}, indent=1) + "\n", encoding="utf-8")
    console = Console()
    for name, result in results.items():
        console.print(table(name, result))
        near = [row for row in result["other"]["curve"] if row["perplexity ratio, exact"] <= NEAR]
        for row in sorted(near, key=lambda row: -row["coverage"])[:1]:
            console.print(
                f"{name}, from {row['confidence']}: perplexity {row['perplexity ratio, exact']:.3f} of the model's on"
                f" {other.name}, {row['coverage']:.1%} of tokens decided, the cloud computes {row['cloud, exact']:.1%}"
            )
        for row in result["points"]:
            console.print(
                f"{name}, point {row['point']}: {row['bytes']:.0f} B, {row['of_fp16']:.2f} of fp16,"
                f" {row['lost']:+.2%} of tokens lost, {row['lost_asked']:+.2%} of the {row['asked']:.0%} asked for"
            )
        for row in result["prefill"]["rows"]:
            console.print(
                f"{name}, KV fill of {row['prompt_tokens']} tokens, {row['kept']} layers kept:"
                f" {row['time_ratio']:.2f} of the time, {row['agreement']:.1%} agreement on {other.name}"
                f" (n={row['positions']})"
            )
    if plot_file:
        plot(results, plot_file)


if __name__ == "__main__":
    main()
