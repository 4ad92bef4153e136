"""Which parts an arm gets, and that an answer shares and leaves them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from isthmus.edge_agent.config import LanguageConfig
from isthmus.edge_agent.language.arms.auto import AutoArm
from isthmus.edge_agent.language.arms.handoff import HandoffArm
from isthmus.edge_agent.language.arms.local import LocalArm
from isthmus.edge_agent.language.arms.remote import RemoteArm
from isthmus.edge_agent.language.arms.verify import VerifyArm
from isthmus.edge_agent.language.generation import Generation, Resources
from isthmus.edge_agent.language.local_model import LocalModel
from isthmus.edge_agent.language.replicas import Replicas
from isthmus.edge_agent.language.request import GenerationRequest
from isthmus.edge_agent.language.router import Router
from isthmus.edge_agent.policy.arms import Arm
from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.language.drafts import LookupDraft
from isthmus.models.language.onnx.decoder import OnnxDecoder
from tests.bench.tiny_llama import write_tiny_llama
from tests.unit.edge_agent.language.scripted_cloud import ENDS, Brain, Cloud, bound

CONTEXT = 32


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> OnnxDecoder:
    folder: Path = write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")
    return OnnxDecoder(Checkpoint.open(folder), CONTEXT, threads=1)


@pytest.fixture
def cloud() -> Cloud:
    return Cloud(Brain(1))


@pytest.fixture
def generation(decoder: OnnxDecoder, cloud: Cloud) -> Iterator[Any]:
    """`generation(tokens, **config)`: an answer to a prompt of so many tokens."""
    made: list[Generation] = []

    def make(tokens: int = 5, **settings: Any) -> Generation:
        config = LanguageConfig(model="tiny", clouds=("a:1",), **settings)
        router = Router(config)
        local = LocalModel(decoder, None, router.local)
        replicas = Replicas([cloud], bound(), 0.05)  # type: ignore[list-item]
        settings_of_handoff: Any = None
        no_grammars: Any = None
        resources = Resources(config, local, b"v" * 32, replicas, router, settings_of_handoff, no_grammars)
        made.append(Generation(resources, GenerationRequest((1,) * tokens, 4, "auto"), ENDS))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.mark.parametrize(
    ("name", "kind"), [("edge", LocalArm), ("cloud", RemoteArm), ("verify", VerifyArm), ("auto", AutoArm)]
)
def test_a_name_stands_for_its_arm(generation: Any, name: Arm, kind: type) -> None:
    assert isinstance(generation().arm(name), kind)


def test_handoff_has_a_session_of_its_own_kind(generation: Any) -> None:
    made = generation()
    bundle: Any = type("Bundle", (), {"fingerprint": b"handoff!", "depth": 1})
    object.__setattr__(made._resources, "handoff", (bundle, None))
    assert isinstance(made.arm("handoff"), HandoffArm) and set(made._sessions) == {b"handoff!"}
    made.arm("cloud")
    assert set(made._sessions) == {b"handoff!", b""}


def test_a_text_too_long_to_draft_for_is_left_to_the_cloud(generation: Any) -> None:
    assert isinstance(generation(CONTEXT).arm("verify"), RemoteArm)
    assert isinstance(generation(CONTEXT - 1).arm("verify"), VerifyArm)
    lookup = generation(CONTEXT, draft="lookup").arm("verify")
    assert isinstance(lookup, VerifyArm) and isinstance(lookup._draft, LookupDraft)


def test_arms_of_one_answer_share_its_session(generation: Any) -> None:
    made = generation()
    assert made.arm("cloud")._session is made.arm("verify")._session is made.arm("auto")._query._session


def test_the_device_goes_on_alone_only_if_it_may_and_can(generation: Any) -> None:
    alone, waiting = generation(), generation(on_loss="wait")
    assert waiting._fallback() is None
    fallback = alone._fallback()
    assert fallback([1] * CONTEXT).source == "edge" and fallback([1] * (CONTEXT + 1)) is None


def test_closing_it_leaves_the_local_model_and_is_harmless_twice(generation: Any, decoder: OnnxDecoder) -> None:
    made = generation()
    list(made.arm("edge").tokens())
    model = made._resources.local
    assert any(cache.owner is not None for cache in model._caches)
    made.close()
    made.close()
    assert all(cache.owner is None for cache in model._caches)
