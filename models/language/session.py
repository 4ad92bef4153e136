"""What device and cloud say to each other about one answer of a language model. Frozen values, no behaviour."""

from __future__ import annotations

from dataclasses import dataclass

from isthmus.models.language.sampling import GREEDY, Sampling

SESSION_BYTES = 16


@dataclass(frozen=True, slots=True)
class Opening:
    """A session of `start` + len(tokens) tokens, of which the cloud should hold the first `start`.

    `logprobs` None: none; n: of each committed token and of the n likeliest. `handoff`: fingerprint, or its first 8
    bytes, of the bundle whose hidden states rounds bring; then `tokens` is empty. A state that decides a token, or has
    done so, is coded at `rate`, those that others only attend to at `context_rate`.
    """

    model: bytes
    session: bytes
    start: int
    tokens: tuple[int, ...]
    crc32: int  # of all tokens of the session
    sampling: Sampling = GREEDY
    logprobs: int | None = None
    handoff: bytes = b""
    rate: int = 0
    context_rate: int = 0
    kept: int = 0  # layers of positions that decide nothing; the others' state is guessed in closed form; 0: all


@dataclass(frozen=True, slots=True)
class Round:
    """ "From position `base` the text goes on with `draft`." Then the cloud may decode `extend` tokens by itself.

    With `states`, one for each of the draft: from there the text is the draft, and `extend` 1 asks for what follows it,
    which the last state decides. `decided`: indices of states that have decided a token before.
    """

    base: int
    draft: tuple[int, ...] = ()
    extend: int = 0
    states: tuple[bytes, ...] = ()
    decided: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Natural logarithms at temperature 1: of the committed token, and (id, value) of the likeliest."""

    own: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Committed:
    """From position `base` the text is the first `accepted` of the draft, then `tokens`.

    `base` is the round's, and both count tokens too that were committed before the round came; `logprobs` are of the
    new ones alone, the last. Neither: the draft was stale, and `base` is the length of the text; or the text has ended.

    Of a round with states: its `base`, and in `tokens` what follows its draft, if that was asked for.
    """

    base: int
    accepted: int = 0
    tokens: tuple[int, ...] = ()
    extension: bool = False
    queue_s: float = 0.0
    compute_s: float = 0.0
    passes: int = 0
    held: int = 0
    logprobs: tuple[Logprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a service says of a language model it holds."""

    fingerprint: bytes
    name: str
    vocab: int
    context: int
    numerics: str
    handoffs: tuple[bytes, ...] = ()  # fingerprints of the hand-off bundles whose states it takes
