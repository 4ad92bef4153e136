"""The code and the prose use the field's words: private names and phrases of the past do not come back."""

from __future__ import annotations

import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

SOURCE = ("edge_agent", "cloud_service", "protos", "models")
PROSE = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs", "cloud_service/monitoring", "compose.yaml", "Makefile")

# Identifiers that stood for a term of the field, and the term. Identifiers alone: as English words some are harmless.
NAMES = {
    "AnswerText": "Detokenizer",
    "Ask": "GenerationRequest",
    "Asks": "GenerationRequest",
    "AnyText": "AnySequence",
    "Behind": "SuffixRunner",
    "CloudAnswer": "CloudReply, RemoteSession",
    "Collaboration": "VerifyArm",
    "Contexts": "KVBudget, ContextModel",
    "Conversation": "GenerateStream",
    "Doubts": "ConfidenceStats",
    "Growing": "AnswerSequence",
    "HandoffText": "HandoffSequence",
    "Handover": "HandoffArm",
    "House": "ApiState",
    "Judge": "ConfidenceHead",
    "Judging": "ConfidenceTraining",
    "Lattice": "Checkerboard",
    "Measured": "MeasuredLatency",
    "Offer": "ArmEstimate",
    "Option": "RouteEstimate",
    "Own": "LocalEstimate",
    "Pace": "LatencyModel",
    "Passed": "StepResult",
    "Pins": "Overrides",
    "Point": "OperatingPoint",
    "Points": "OperatingPoints",
    "Seat": "SessionHandle",
    "Shared": "HandoffEstimate",
    "Short": "PrefixRunner",
    "Talk": "GenerateHandler",
    "Tally": "GenerationStats",
    "Tempo": "SpeculationStats",
    "Visit": "RequestState",
    "Want": "Candidate",
    "Wanted": "InferenceRequest",
    "Whole": "FullRunner",
    "Wish": "RoutingGoal",
    "Work": "ScheduledWork, QueuedInput",
    "doubts": "confidence statistics",
    "echoes": "n-gram repeats; echoed prompts",
    "evidence": "features",
    "handover": "handoff",
    "heard": "on_reply",
    "heir": "compatible session",
    "house": "API state",
    "judge": "confidence head",
    "kept": "prefill_layers",
    "lattice": "checkerboard",
    "page": "format_answer",
    "pace": "latency model",
    "reckoned_s": "predicted_s",
    "seat": "session handle",
    "take_over": "KV-cache reuse",
    "tally": "generation statistics",
    "tempo": "speculation statistics",
    "told": "stream_events",
    "took": "record_latency",
    "visit": "request state",
    "wanted": "inference request",
    "whence": "describe_route",
    "wish": "routing goal",
}

# Phrases, anywhere in source or prose.
PHRASES = {
    r"hand-?offs?\b(?<!handoff)(?<!handoffs)": "handoff",
    r"hand(ed)? over\b": "handoff; passed on",
    r"\breckon": "predict",
    r"\bwhence\b": "from which",
    r"\bso manyth\b|\bmanyth\b": "every N-th",
    r"\bin the house\b|\bhouse is full\b": "admitted",
    r"\bwho is at work\b|\bwho waits longest\b": "running sequences are not preempted",
    r"\bjudges?\b": "confidence head",
    r"\bechoes\b": "n-gram repeats",
    r"\b(device's|its|own|8-bit|4-bit) cop(y|ies)\b": "local model",
    r"\b(layers|rows|tokens) behind\b": "upper layers; after",
    r"\bbehind (the|a|its|their|each|every|it|them|layer|layers|another|that)\b": "after",
    r"\ba question for\b": "remote token query",
    r"\bas far as anybody knows\b": "expected",
    r"\blattice\b": "checkerboard",
    r"\btalks?\b": "stream",
}

# Where a word is right all the same, and why.
ALLOWED: dict[str, str] = {
    r"^edge_agent/http/app\.py: .*\bhttp\.page\b": "the package of the page at /",
    r"^models/options\.py: .*\bclick\.Option\b": "a class of click",
    r"^protos/wire_session\.py: .*\bkept\b": "a field of the wire",
    r"^docs/benchmarks/index\.md: .*\bjudge of tokens\b": "quotes the legend of a picture that was measured before",
    r"^models/(language/handoff|recipes/language)/\w+\.py: .*\bjudge\b": "a manifest key and stored tensors",
}


def source_files() -> Iterator[Path]:
    for folder in SOURCE:
        yield from (path for path in sorted((ROOT / folder).rglob("*.py")) if "_pb2" not in path.name)


def prose_files() -> Iterator[Path]:
    for name in PROSE:
        path = ROOT / name
        if path.is_file():
            yield path
        elif path.is_dir():
            yield from (each for each in sorted(path.rglob("*")) if each.suffix in (".md", ".yml", ".yaml", ".json"))


def identifiers(path: Path) -> Iterator[tuple[int, str]]:
    for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline):
        if token.type == tokenize.NAME:
            yield token.start[0], token.string


def is_allowed(path: Path, line: str) -> bool:
    name = str(path.relative_to(ROOT))
    return any(re.search(pattern, f"{name}: {line}") for pattern in ALLOWED)


@pytest.mark.parametrize("path", list(source_files()), ids=lambda path: str(path.relative_to(ROOT)))
def test_identifiers_are_the_fields(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    found = [
        f"{path.relative_to(ROOT)}:{number}: {name}, expected {NAMES[name]}"
        for number, name in identifiers(path)
        if name in NAMES and not is_allowed(path, lines[number - 1])
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("path", [*source_files(), *prose_files()], ids=lambda path: str(path.relative_to(ROOT)))
def test_phrases_are_the_fields(path: Path) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {match.group(0)!r}, expected {term}"
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        for pattern, term in PHRASES.items()
        if (match := re.search(pattern, line, re.IGNORECASE)) and not is_allowed(path, line)
    ]
    assert not found, "\n".join(found)


def test_an_old_word_would_be_found(tmp_path: Path) -> None:
    """Or the tests above could not fail."""
    for pattern, sample in (
        (r"hand-?offs?\b(?<!handoff)(?<!handoffs)", "a hand-off"),
        (r"\breckon", "it was reckoned"),
        (r"\bbehind (the|a|its|their|each|every|it|them|layer|layers|another|that)\b", "behind layer 20"),
    ):
        assert pattern in PHRASES and re.search(pattern, sample)
    assert not re.search(next(iter(PHRASES)), "a handoff, two handoffs")
