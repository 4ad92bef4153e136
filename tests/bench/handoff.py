"""Measure the handoff: share and agreement of tokens decoded from exits, bytes sent, computation in the cloud.

    the model's greedy answers to prompts --device's layers and exits--> confidence and choice of each exit
                                          --coded hidden states, upper layers--> the cloud's choice

The baseline in the same run is CE-CoLLM's scheme: the same exits with the probability of their choice as confidence,
hidden states of every token as 16-bit floats, all of them run through the cloud's layers. All positions of answers
count, each with the full model's own text before it. Perplexity is measured on another text, under the distribution
that each position's token is decoded from.

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
from isthmus.models.language.flops import layer_weights
from isthmus.models.language.handoff.bundle import HandoffBundle
from isthmus.models.language.handoff.confidence_head import ConfidenceHead
from isthmus.models.language.handoff.manifest import StatePoint, least_likely
from isthmus.models.language.processors import TokenChooser
from isthmus.models.language.torch.batch_invariance import chunks
from isthmus.models.language.torch.decoder import Decoder, Span
from isthmus.models.language.torch.kv_cache import KVCache
from isthmus.models.messages import GREEDY, Committed, Opening, Round
from isthmus.models.recipes.common.intervals import interval
from isthmus.models.recipes.language.confidence_head import ExitDecisions, decide
from isthmus.models.recipes.language.corpus import Corpus
from isthmus.models.recipes.language.device_outputs import DeviceOutputs, run_device
from isthmus.models.recipes.language.llama import Llama
from isthmus.models.recipes.language.prompts import greedy_answers, load_prompts
from isthmus.models.recipes.language.scores import TARGET_AGREEMENT
from isthmus.models.recipes.language.suffix import ApproximateKV, CodedStates, SuffixOutputs, run_suffix
from isthmus.models.recipes.language.teacher import run_teacher

CONFIDENCES = (
    *(round(0.3 + step / 20, 2) for step in range(10)), *(round(0.8 + step / 50, 2) for step in range(5)),
    *(round(0.9 + step / 100, 2) for step in range(10)),
)  # fmt: skip
PERPLEXITY_THRESHOLDS = (
    0.9,
    0.95,
    0.97,
    0.98,
    0.985,
    0.99,
    0.992,
    0.994,
    0.996,
    0.998,
)  # a few wrong tokens dominate it
NEAR = 1.02  # ratio to the model's perplexity
OTHER_TOKENS = 64  # of a passage of another domain, after its prompt
HALF_BYTES = 2  # a value of CE-CoLLM's hidden states
FRAMING_BYTES = 4  # of our messages, for a hidden state

Row = dict[str, Any]


@dataclass(frozen=True)
class Costs:
    """Weights read for a token: by the upper layers, by all layers, by the output head, by the KV fill."""

    upper: float
    layers: float
    head: float
    fill: float

    @property
    def cloud_only(self) -> float:
        """For a token that the cloud decodes without the device."""
        return self.layers + self.head

    def cloud_share(self, offloaded: float, kind: str) -> float:
        """The cloud's computation at this offload rate, relative to decoding all tokens itself.

        All hidden states go through the upper layers ("exact"), or those of other tokens through the KV fill ("fill").
        """
        if kind == "fill":
            return (self.fill + offloaded * (self.upper + self.head)) / self.cloud_only
        return (self.upper + offloaded * self.head) / self.cloud_only


def costs(checkpoint: Checkpoint, depth: int) -> Costs:
    config = checkpoint.config
    layer, later = layer_weights(config), config.layers - depth
    fill = later * config.hidden * 2 * config.kv_heads * config.head_dim
    return Costs(later * layer, config.layers * layer, config.hidden * config.vocab, fill)


def exit_confidences(handoff: HandoffBundle, outputs: DeviceOutputs) -> Tensor:
    """The confidences (E, N) of the bundle's exits."""
    heads = [ConfidenceHead.from_tensors(handoff.exit(index)) for index in range(len(handoff.depths))]
    features_ENF = outputs.features_ENF.numpy()
    pairs = zip(heads, features_ENF, strict=True)
    return torch.from_numpy(np.stack([head.predict(features_NF) for head, features_NF in pairs]))


@dataclass(frozen=True)
class CloudSide:
    """How hidden states are coded, and whether those of other than offloaded tokens are filled."""

    model: Llama
    depth: int
    coded: CodedStates
    point: StatePoint
    fill: ApproximateKV | None

    def run(self, offloaded_N: Tensor) -> tuple[dict[str, SuffixOutputs], float]:
        """Outputs of the upper layers by kind, "exact" and "fill", and the mean bytes of a hidden state."""
        teacher, mean_bytes = self.coded.at_rates(self.point.context_rate, self.point.rate, offloaded_N)
        done = {"exact": run_suffix(self.model, teacher, self.depth)}
        if self.fill is not None:
            done["fill"] = run_suffix(self.model, teacher, self.depth, self.fill)
        return done, mean_bytes


def our_curve(confidence_EN: Tensor, test: DeviceOutputs, cloud: CloudSide, price: Costs) -> list[Row]:
    """Our scheme at every threshold. The rate of a hidden state depends on whether its token is offloaded."""
    rows = []
    for confidence in CONFIDENCES:
        each = decide(confidence_EN, test.right_EN, confidence)
        done, mean_bytes = cloud.run(test.answer_N & ~each.sure_N)
        rows.append(threshold_row("ours", confidence, each, test, done, mean_bytes + FRAMING_BYTES, price))
    return rows


def threshold_row(
    name: str, confidence: float, each: ExitDecisions, test: DeviceOutputs, done: Mapping[str, SuffixOutputs],
    state_bytes: float, price: Costs,
) -> Row:  # fmt: skip
    """A scheme at one threshold, over the tokens of answers."""
    here, full_N = test.answer_N, test.teacher.top_NK[:, 0]
    each = each.select(here)
    row: Row = {"scheme": name, "confidence": confidence, "coverage": each.coverage, "agreement": each.agreement}
    row["interval"] = bounds(each.right_N[each.sure_N])
    for kind, found in done.items():
        whole_N = torch.where(each.sure_N, each.right_N, (found.chosen_N == full_N)[here])
        row[f"agreement of all, {kind}"] = float(whole_N.float().mean())
        row[f"cloud, {kind}"] = price.cloud_share(1 - each.coverage, kind)
    row["bytes_a_token"] = state_bytes
    return row


def bounds(right_N: Tensor) -> list[float]:
    found = interval(right_N.numpy()) if len(right_N) else None
    return [found.low, found.high] if found else [0.0, 1.0]


def point_rows(cloud: CloudSide, handoff: HandoffBundle, test: DeviceOutputs, exact: SuffixOutputs) -> list[Row]:
    """Every operating point at the device's own threshold: bytes of a hidden state, and the agreement lost by coding.

    lost: over all tokens. lost_asked: over offloaded tokens. asked: the offload rate.
    """
    here, full_N = test.answer_N, test.teacher.top_NK[:, 0]
    threshold = least_likely(handoff.manifest.thresholds, TARGET_AGREEMENT)
    each = decide(exit_confidences(handoff, test), test.right_EN, threshold)
    offloaded_N, exact_N = here & ~each.sure_N, exact.chosen_N == full_N
    rows = []
    for index, point in enumerate(handoff.manifest.points):
        done, mean_bytes = replace(cloud, point=point, fill=None).run(offloaded_N)
        right_N = done["exact"].chosen_N == full_N
        whole_N = torch.where(each.sure_N, each.right_N, right_N)[here]
        rows.append(
            {
                "point": index,
                "bytes": mean_bytes,
                "of_fp16": mean_bytes / HALF_BYTES / handoff.manifest.hidden,
                "agreement": float(whole_N.float().mean()),
                "interval": bounds(whole_N),
                "lost": agreement_lost(exact_N & offloaded_N, right_N & offloaded_N, here),
                "lost_asked": agreement_lost(exact_N, right_N, offloaded_N),
                "asked": float(offloaded_N.sum() / here.sum()),
                "positions": int(here.sum()),
            }
        )
    return rows


def agreement_lost(exact_N: Tensor, right_N: Tensor, here_N: Tensor) -> float:
    """How much less often the chosen positions are right than with uncoded hidden states."""
    return float(exact_N[here_N].float().mean() - right_N[here_N].float().mean())


def passages(file: Path, tokenizer: Tokenizer, count: int, prompt: int) -> Corpus:
    """Passages of a plain text, the first `prompt` tokens of each a prompt."""
    tokens = prompt + OTHER_TOKENS
    ids = tokenizer.encode(file.read_text(encoding="utf-8")[: 10 * count * tokens])
    starts = np.linspace(0, len(ids) - tokens, count).astype(int).tolist()
    return Corpus.from_sequences([(ids[start : start + tokens], prompt) for start in starts])


def other_domain(
    model: Llama, checkpoint: Checkpoint, handoff: HandoffBundle, fill: ApproximateKV, corpus: Corpus, point: StatePoint
) -> Row:
    """Perplexity on a text of another domain, and the cloud's computation."""
    exits = {depth: handoff.exit(index) for index, depth in enumerate(handoff.depths)}
    teacher = run_teacher(model, corpus, handoff.depths, torch.float32)
    test = run_device(checkpoint, exits, teacher, range(len(teacher)))
    here, exact = test.answer_N, run_suffix(model, teacher, handoff.depth)
    coded = CodedStates(model, test.teacher, handoff.depth, handoff.state_codec)
    cloud = CloudSide(model, handoff.depth, coded, point, fill)
    confidence_EN = exit_confidences(handoff, test)
    base = float(torch.exp(-exact.next_N[here].mean()))
    rows, price = [], costs(checkpoint, handoff.depth)
    for confidence in PERPLEXITY_THRESHOLDS:
        each = decide(confidence_EN, test.right_EN, confidence)
        done, _ = cloud.run(here & ~each.sure_N)
        exit_N = test.next_EN.gather(0, each.exit_N[None])[0]
        on_device = each.select(here)
        row: Row = {"confidence": confidence, "coverage": on_device.coverage, "agreement": on_device.agreement}
        for kind, found in done.items():
            mixed_N = torch.where(each.sure_N, exit_N, found.next_N)[here]
            row[f"perplexity ratio, {kind}"] = float(torch.exp(-mixed_N.mean())) / base
            row[f"cloud, {kind}"] = price.cloud_share(1 - on_device.coverage, kind)
        rows.append(row)
    return {"positions": int(here.sum()), "perplexity": base, "curve": rows}


def prefill(runner: FullRunner, prompt: Sequence[int], prefill_layers: int) -> tuple[KVCache, int, float]:
    """Prefill as in the service: the KV cache, the next token, seconds. `prefill_layers`: 0 for all layers."""
    opening = Opening(b"", b"", 0, (), 0, prefill_layers=prefill_layers)
    text = runner.new_sequence(prompt, opening, TokenChooser(GREEDY))
    text.cache = runner.decoder.new_cache()
    started_s = time.perf_counter()
    text.begin(Round(len(prompt)), 0.0)
    committed = None
    while committed is None:
        (committed,) = runner.next_runner(text).run([(text, min(text.pending_tokens, runner.decoder.width))]).outcomes
    if not isinstance(committed, Committed):
        raise committed
    return text.cache, committed.tokens[0], time.perf_counter() - started_s


def choices_after(runner: FullRunner, cache: KVCache, ids: Sequence[int]) -> list[int]:
    """The model's choice after each of the following tokens."""
    chosen, decoder = list[int](), runner.decoder
    for count in chunks(len(ids), decoder.width):
        part = ids[len(chosen) : len(chosen) + count]
        x_NH = decoder.forward(decoder.embed(part), [Span(cache, cache.length, count)])
        chosen += decoder.logits(x_NH)[:count].argmax(-1).tolist()
    return chosen


def prefill_rows(checkpoint: Checkpoint, handoff: HandoffBundle, corpus: Corpus) -> list[Row]:
    """Prefill with KV fill next to exact prefill, in turns: the ratio of times, and the agreement of later choices."""
    runner = FullRunner(Decoder.load(checkpoint), frozenset(), [handoff])
    layers = checkpoint.config.layers
    prefill_layers = range(handoff.depth, layers, max((layers - handoff.depth) // 3, 1))
    ratios: dict[int, list[float]] = {each: [] for each in prefill_layers}
    same: dict[int, list[bool]] = {each: [] for each in prefill_layers}
    bounds_S = [0, *corpus.ends_S.tolist()]
    for index, (start, end) in enumerate(track(list(pairwise(bounds_S)), "reading prompts")):
        answer = int(corpus.answers_S[index])
        prompt, after = corpus.ids_N[start:answer].tolist(), corpus.ids_N[answer : end - 1].tolist()
        cache, first, exact_s = prefill(runner, prompt, 0)
        exact_choices = [first, *choices_after(runner, cache, after)]
        for each in prefill_layers:
            cache, first, seconds = prefill(runner, prompt, each)
            ratios[each].append(seconds / exact_s)
            chosen = [first, *choices_after(runner, cache, after)]
            same[each] += [filled == exact for filled, exact in zip(chosen, exact_choices, strict=True)]
    return [
        {
            "kept": each,
            "time_ratio": statistics.median(ratios[each]),
            "quartiles": np.quantile(ratios[each], [0.25, 0.75]).tolist(),
            "prompts": len(ratios[each]),
            "prompt_tokens": int(corpus.answers_S[0]),
            "agreement": float(np.mean(same[each])),
            "interval": bounds(torch.tensor(same[each])),
            "positions": len(same[each]),
        }
        for each in prefill_layers
    ]


def best(rows: list[Row], agreement: float) -> Row | None:
    """The row with the largest coverage at this agreement."""
    return max((row for row in rows if row["agreement"] >= agreement), key=lambda row: row["coverage"], default=None)


def table(bundle: str, result: Row) -> Table:
    heads = ("scheme", "from", "device", "agreement", "of all", "cloud", "of all, fill", "cloud, fill", "B/token")
    page = Table(*heads, title=f"{bundle}: cut after layer {result['depth']}")
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
        cut = f"cut after layer {result['depth']}"
        for name, rows in result["curves"].items():
            style = {"marker": ".", "color": f"C{index}", "linestyle": "-" if name == "ours" else ":"}
            sure = [row for row in rows if row["coverage"]]
            x, y = [100 * row["coverage"] for row in sure], [100 * row["agreement"] for row in sure]
            left.plot(x, y, label=f"{name}, {cut}", **style)
            x, y = ([100 * row[f"{what}, exact"] for row in rows] for what in ("cloud", "agreement of all"))
            right.plot(x, y, label=f"{name}, {cut}", **style)
    left.set(xlabel="tokens decoded from exits, %", ylabel="of those equal to the full model's, %", ylim=(80, 100.5))
    right.set(
        xlabel="the cloud's computation, % of decoding all tokens itself",
        ylabel="all tokens equal to the full model's, %",
    )
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(file, dpi=110)


@dataclass(frozen=True)
class Texts:
    """Texts of the measurement: the model's answers to prompts, and passages of another domain."""

    answers: Corpus
    others: list[Corpus]
    other_name: str


def measure(folder: Path, checkpoint: Checkpoint, llama: Llama, texts: Texts, point: int | None) -> Row:
    """All figures of a bundle."""
    handoff = HandoffBundle.open(folder, checkpoint)
    teacher = run_teacher(llama, texts.answers, handoff.depths)
    exits = {depth: handoff.exit(index) for index, depth in enumerate(handoff.depths)}
    test = run_device(checkpoint, exits, teacher, range(len(teacher)))
    weight_LOH, bias_LO = handoff.kv_fill()
    fill = ApproximateKV(torch.from_numpy(weight_LOH), torch.from_numpy(bias_LO))
    exact = run_suffix(llama, test.teacher, handoff.depth)
    chosen = point_of(handoff.manifest, point)
    coded = CodedStates(llama, test.teacher, handoff.depth, handoff.state_codec)
    cloud = CloudSide(llama, handoff.depth, coded, chosen, fill)
    price, fp16_bytes = costs(checkpoint, handoff.depth), HALF_BYTES * checkpoint.config.hidden
    softmax_EN, done = test.features_ENF[:, :, 0].exp(), {"exact": exact}
    return {
        "depth": handoff.depth,
        "exits": handoff.depths,
        "answers": len(teacher),
        "positions": int(test.answer_N.sum()),
        "exit_agreement": test.right_EN[:, test.answer_N].float().mean(1).tolist(),
        "rows_agreement": float((exact.chosen_N == teacher.top_NK[:, 0])[test.answer_N].float().mean()),
        "points": point_rows(cloud, handoff, test, exact),
        "curves": {
            "ours": our_curve(exit_confidences(handoff, test), test, cloud, price),
            "CE-CoLLM": [
                threshold_row("CE-CoLLM", confidence, each, test, done, fp16_bytes, price)
                for confidence in CONFIDENCES
                for each in [decide(softmax_EN, test.right_EN, confidence)]
            ],
        },
        "other": {
            "text": texts.other_name,
            **other_domain(llama, checkpoint, handoff, fill, texts.others[0], chosen),
        },
        "prefill": {
            "text": texts.other_name,
            "rows": [row for corpus in texts.others for row in prefill_rows(checkpoint, handoff, corpus)],
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
@click.option("--every", default=4, show_default=True, type=click.IntRange(1), help="Use every N-th prompt, by length.")
@click.option("--passages", "count", default=40, show_default=True, type=click.IntRange(1), help="Of the other text.")
@click.option(
    "--prompt-tokens", "lengths", multiple=True, default=(256, 512), show_default=True, type=click.IntRange(1),
    help="How long prompts of the other text are.",
)  # fmt: skip
@click.option("--point", type=click.IntRange(0), help="Operating point of our scheme.  [default: as on a device]")
@click.option("--work", type=click.Path(path_type=Path), default=Path("runs/handoff"), show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), required=True)
@click.option("--plot", "plot_file", type=click.Path(path_type=Path))
def main(
    bundles: tuple[Path, ...], model: str, prompts: Path, other: Path, every: int, count: int, lengths: tuple[int, ...],
    point: int | None, work: Path, json_file: Path, plot_file: Path | None,
) -> None:  # fmt: skip
    """Measure exits, hidden states and KV fill of handoff bundles, with CE-CoLLM's scheme as the baseline."""
    work.mkdir(parents=True, exist_ok=True)
    checkpoint = Checkpoint.open(model)
    test_prompts = load_prompts(prompts, checkpoint.tokenizer, every)
    llama = Llama.load(checkpoint)
    _, answers = greedy_answers(work, llama, checkpoint.tokenizer.eos_ids, test_prompts)
    texts = Texts(answers, [passages(other, checkpoint.tokenizer, count, length) for length in lengths], other.name)
    results = {folder.name: measure(folder, checkpoint, llama, texts, point) for folder in bundles}
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
                f" {other.name}, {row['coverage']:.1%} from exits, {row['cloud, exact']:.1%} of the computation"
            )
        for row in result["points"]:
            console.print(
                f"{name}, point {row['point']}: {row['bytes']:.0f} B, {row['of_fp16']:.2f} of fp16,"
                f" {row['lost']:+.2%} of tokens lost, {row['lost_asked']:+.2%} of the {row['asked']:.0%} offloaded"
            )
        for row in result["prefill"]["rows"]:
            console.print(
                f"{name}, KV fill of {row['prompt_tokens']} tokens, {row['kept']} prefill layers:"
                f" {row['time_ratio']:.2f} of the time, {row['agreement']:.1%} agreement on {other.name}"
                f" (n={row['positions']})"
            )
    if plot_file:
        plot(results, plot_file)


if __name__ == "__main__":
    main()
