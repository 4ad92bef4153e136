"""Which model of a cloud an agent means, that replicas hold one, and when it is another."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from isthmus.edge_agent.language import cloud_model as module
from isthmus.edge_agent.language.cloud_model import CloudModel, ReplicaMatch, label
from isthmus.edge_agent.language.tokenizer_cache import TokenizerCache
from isthmus.models.errors import InvalidReply, LinkDown, UnknownBundle
from isthmus.models.messages import ModelInfo, ServiceInfo, TokenizerInfo
from tests.unit.edge_agent.language.fake_cloud import model_info
from tests.unit.edge_agent.language.scripted import byte_tokenizer

TOKENIZER = byte_tokenizer()
BIG = model_info(TOKENIZER, "big")
OTHER = model_info(TOKENIZER, "other")
FOREIGN = replace(OTHER, name="foreign", tokenizer=replace(OTHER.tokenizer, vocabulary=b"f" * 32))


def service(*models: ModelInfo) -> ServiceInfo:
    return ServiceInfo("0", 3, (), models)


def never(info: TokenizerInfo) -> bytes:
    raise AssertionError("the device has this tokenizer")


def send(info: TokenizerInfo) -> bytes:
    return TOKENIZER.to_bytes()


def cloud_model(name: str | None = None, own: Any = None, folder: Path = Path("/dev/null/tokenizers")) -> CloudModel:
    return CloudModel(name, own, TokenizerCache(folder))


def own(fingerprint: bytes = b"mine") -> Any:
    return SimpleNamespace(tokenizer=TOKENIZER, fingerprint=fingerprint)


def test_the_only_model_is_the_one() -> None:
    made = cloud_model(own=own())
    assert made.info is None
    made.check("a", service(BIG), never)
    assert made.info == BIG and made.bound is not None and made.bound.tokenizer is TOKENIZER


def test_of_several_the_named_one_is_meant() -> None:
    made = cloud_model("other", own())
    made.check("a", service(BIG, OTHER), never)
    assert made.info == OTHER


@pytest.mark.parametrize(
    ("name", "models", "words"),
    [
        ("nope", (BIG, OTHER), "holds no language model 'nope', it holds big, other"),
        (None, (BIG, OTHER), "holds several language models, name one by --cloud-model: big, other"),
        (None, (), "the cloud holds no language model$"),
        ("big", (), "the cloud holds no language model$"),
    ],
)
def test_where_none_or_several_could_be_meant_one_line_says_so(
    name: str | None, models: tuple[ModelInfo, ...], words: str
) -> None:
    made = cloud_model(name)
    with pytest.raises(UnknownBundle, match=words) as caught:
        made.check("a", service(*models), send)
    assert made.bound is None and made.problems == {"a": str(caught.value)}


def test_why_the_cloud_holds_none_is_said_in_one_line() -> None:
    lost = ServiceInfo("0", 3, (), (), ("the engine is\x1b[2J\ngone", "another"))
    with pytest.raises(UnknownBundle, match=r"^the cloud holds no language model now: the engine is\?\[2J\?gone$"):
        cloud_model().check("a", lost, never)


def test_the_devices_vocabulary_and_then_its_weights_choose() -> None:
    made = cloud_model(own=own())
    made.check("a", service(FOREIGN, BIG), never)
    assert made.info == BIG
    made = cloud_model(own=own(OTHER.fingerprint))
    made.check("a", service(FOREIGN, BIG, OTHER), never)
    assert made.info == OTHER


def test_what_it_has_decided_for_stays_when_a_cloud_holds_more() -> None:
    made = cloud_model(own=own())
    made.check("a", service(BIG), never)
    made.check("a", service(OTHER, BIG), never)
    assert made.info == BIG


def test_replicas_hold_one_model_and_another_is_named_beside_it() -> None:
    made = cloud_model(own=own())
    made.check("a", service(BIG), never)
    with pytest.raises(UnknownBundle, match="holds other 6f74686572.., and cloud a big 62696720.*the same model"):
        made.check("b", service(OTHER), never)
    assert made.info == BIG and list(made.problems) == ["b"]
    made.check("b", service(BIG), never)
    assert made.problems == {}


def test_when_no_replica_holds_it_any_more_the_next_one_decides() -> None:
    """A rolling update of two."""
    made = cloud_model(own=own())
    made.check("a", service(BIG), never)
    made.check("b", service(BIG), never)
    made.lost("a")
    with pytest.raises(UnknownBundle):
        made.check("a", service(OTHER), never)
    assert made.info == BIG, "b still holds it"
    made.lost("b")
    made.check("a", service(OTHER), never)
    made.check("b", service(OTHER), never)
    assert made.info == OTHER


def test_one_replica_alone_may_change_its_mind() -> None:
    made = cloud_model(own=own())
    made.check("a", service(BIG), never)
    made.check("a", service(replace(BIG, arms=("cloud",))), never)
    assert made.info is not None and made.info.arms == ("cloud",)
    made.check("a", service(OTHER), never)
    assert made.info == OTHER


def test_a_tokenizer_is_fetched_once_for_all_replicas(tmp_path: Path) -> None:
    made, fetches = cloud_model(folder=tmp_path), []

    def fetch(info: TokenizerInfo) -> bytes:
        fetches.append(info)
        return TOKENIZER.to_bytes()

    for target in ("a", "b", "a"):
        made.check(target, service(BIG), fetch)
    assert fetches == [BIG.tokenizer]
    assert made.bound is not None and made.bound.tokenizer.vocabulary == TOKENIZER.vocabulary
    cloud_model(folder=tmp_path).check("a", service(BIG), never)


def test_a_tokenizer_with_more_ids_than_the_model_is_refused() -> None:
    made = cloud_model(own=own())
    with pytest.raises(InvalidReply, match="the tokenizer of big has 257 tokens, the model 100"):
        made.check("a", service(replace(BIG, vocab=100)), never)
    assert made.bound is None


def test_an_unusable_tokenizer_is_not_fetched_at_every_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s, fetches = 0.0, 0
    monkeypatch.setattr(module.time, "monotonic", lambda: now_s)
    match = ReplicaMatch(cloud_model(), "a")

    def fetch(info: TokenizerInfo) -> bytes:
        nonlocal fetches
        fetches += 1
        raise InvalidReply("not what it declares")

    for now_s in (0.0, 2.0, module.REFETCH_S - 1, module.REFETCH_S + 1, module.REFETCH_S + 3):  # noqa: B007
        with pytest.raises(InvalidReply, match="not what it declares"):
            match.check(service(BIG), fetch)
    assert fetches == 2


def test_a_link_that_broke_while_it_came_is_tried_again_at_once() -> None:
    match = ReplicaMatch(cloud_model(), "a")

    def broken(info: TokenizerInfo) -> bytes:
        raise LinkDown("gone")

    with pytest.raises(LinkDown):
        match.check(service(BIG), broken)
    match.check(service(BIG), send)


def test_a_name_from_outside_is_one_printable_line() -> None:
    assert label(replace(BIG, name="a\x1b[31m\nb" + "c" * 200)) == "a?[31m?b" + "c" * 92
