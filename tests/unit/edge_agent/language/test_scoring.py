"""Log probabilities of a prompt are those of its tokens, each after the ones before it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from isthmus.edge_agent import GenerationRequest, LanguageAgent, LanguageConfig
from isthmus.edge_agent.language import local_model
from isthmus.edge_agent.language.local_model import LocalModel
from isthmus.edge_agent.language.scoring import score_locally
from isthmus.edge_agent.policy.speculation import SpeculationStats
from isthmus.models.errors import AgentClosed, ContextExceeded, InvalidInput
from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.language.onnx.decoder import OnnxDecoder
from isthmus.models.language.sampling import log_softmax
from tests.bench.tiny_llama import write_tiny_llama

CONTEXT = 32
PROMPT = tuple(range(65, 85))
REQUEST = GenerationRequest(PROMPT, 1, "edge", top_logprobs=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny", layers=2, scale=0.3)


def test_scores_in_pieces_are_those_token_by_token(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_model, "PIECE_TOKENS", 7)
    decoder = OnnxDecoder(Checkpoint.open(folder), CONTEXT, threads=1)
    model = LocalModel(decoder, None, SpeculationStats(), caches=1)
    session, other = model.session(), model.session()
    first, *tokens = score_locally(session, REQUEST)
    assert [token.id for token in (first, *tokens)] == list(PROMPT)
    assert (first.logprob, first.top) == (None, ())
    other.logits([70, 71, 72])  # another answer takes the only cache
    assert [token.logprob for token in score_locally(session, REQUEST)[1:]] == pytest.approx(
        [token.logprob for token in tokens], abs=1e-5
    )
    for length, token in enumerate(tokens, 1):
        decoder.truncate(0)
        expected_V = log_softmax(decoder.extend(PROMPT[:length]))
        assert token.logprob == pytest.approx(expected_V[PROMPT[length]], abs=0.2 * expected_V.std())  # 8 bits
        assert len(token.top) == 2
    with pytest.raises(ContextExceeded):
        score_locally(session, replace(REQUEST, prompt=(65,) * (CONTEXT + 1)))


def test_an_agent_scores_by_its_device(folder: Path) -> None:
    with LanguageAgent(LanguageConfig(str(folder), context=CONTEXT, threads=1)) as agent:
        assert len(agent.score(REQUEST)) == len(PROMPT)
        assert len(agent.score(replace(REQUEST, arm="auto", prompt=(65,), top_logprobs=None))) == 1
        for wrong in (
            {"arm": "cloud"},
            {"arm": "handoff"},
            {"prompt": ()},
            {"prompt": (65, 10**6)},
            {"vocabulary": b"other"},
        ):
            with pytest.raises(InvalidInput):
                agent.score(replace(REQUEST, **wrong))  # type: ignore[arg-type]
    with pytest.raises(AgentClosed):
        agent.score(REQUEST)
