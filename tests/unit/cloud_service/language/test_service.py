from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client import CollectorRegistry

from isthmus.cloud_service.byte_budget import ByteBudget
from isthmus.cloud_service.config import CloudConfig
from isthmus.cloud_service.language import service as service_module
from isthmus.cloud_service.language.service import LanguageService, load, open_decoder, open_handoffs
from isthmus.models.errors import BundleError, EngineDown, InvalidInput, UnknownBundle
from isthmus.models.language.torch.decoder import Decoder
from isthmus.models.language.torch.paged_decoder import PagedDecoder, record_nothing
from isthmus.models.messages import ModelInfo, Opening, TokenizerInfo
from isthmus.models.torch_device import CPU
from tests.one_device import META
from tests.tiny_handoff import write_tiny_handoff
from tests.unit.cloud_service.language.tiny import tiny_model


def test_handoffs_are_of_the_models_that_are_served(tmp_path: Path) -> None:
    one, two = (tiny_model(tmp_path / name, seed) for seed, name in enumerate(("one", "two")))
    folders = [write_tiny_handoff(tmp_path / f"to-{model.name}", model) for model in (two, one)]
    found = open_handoffs(folders, [one, two])
    assert {name: [each.manifest.base for each in handoffs] for name, handoffs in found.items()} == {
        model.fingerprint: [model.fingerprint.hex()] for model in (one, two)
    }
    assert open_handoffs([], [one]) == {one.fingerprint: []}
    deeper = write_tiny_handoff(tmp_path / "deeper", one, depth=1, seed=1)
    assert len(open_handoffs([*folders, deeper], [one, two])[one.fingerprint]) == 2
    with pytest.raises(BundleError, match=f"belongs to the model {two.fingerprint.hex()[:12]}…, served are one"):
        open_handoffs(folders, [one])
    with pytest.raises(BundleError, match="served are none"):
        open_handoffs(folders, [])
    with pytest.raises(BundleError, match="this handoff bundle of one is named twice"):
        open_handoffs([*folders, folders[1]], [one, two])
    with pytest.raises(BundleError, match="no such bundle folder"):
        open_handoffs([tmp_path / "nothing"], [one])


TOKENIZER = TokenizerInfo(bytes(32), 1, bytes(32))


class ScriptedEngine:
    """Runs until drained, or until `failure` is raised."""

    def __init__(self, fingerprint: bytes = bytes(32), failure: Exception | None = None) -> None:
        self.info = ModelInfo(fingerprint, "scripted", 259, 64, "bitwise", TOKENIZER, (0,), ("cloud",))
        self.problem = ""
        self.failure = failure
        self._drained = asyncio.Event()

    async def run(self) -> None:
        if self.failure is not None:
            raise self.failure
        await self._drained.wait()

    def drain(self) -> None:
        self._drained.set()


def service(*engines: Any) -> LanguageService:
    return LanguageService(engines)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_service_runs_until_it_is_drained(count: int) -> None:
    async def play() -> None:
        language = service(*(ScriptedEngine() for _ in range(count)))
        running = asyncio.create_task(language.run())
        await asyncio.sleep(0.02)
        assert not running.done()
        language.drain()
        await asyncio.wait_for(running, 10)

    asyncio.run(play())


def test_an_engine_that_fails_ends_the_service_at_once() -> None:
    async def play() -> None:
        with pytest.raises(RuntimeError, match="a bug"):
            await asyncio.wait_for(service(ScriptedEngine(), ScriptedEngine(failure=RuntimeError("a bug"))).run(), 10)

    asyncio.run(play())


def test_handlers_find_engines_by_the_first_bytes_of_their_fingerprint() -> None:
    async def play() -> None:
        language = service(ScriptedEngine(bytes(range(32))))
        with pytest.raises(UnknownBundle, match=f"there is {bytes(range(8)).hex()}$"):
            await language.new_handler("peer").handle(Opening(bytes(8), bytes(16), 0, (), 0))

    asyncio.run(play())


def test_a_model_that_may_be_that_of_a_lost_engine_is_elsewhere() -> None:
    async def play() -> None:
        lost: Any = ScriptedEngine()
        lost.info, lost.problem = None, "the engine does not answer"
        language = LanguageService([ScriptedEngine(bytes(range(32)))], [lost])  # type: ignore[list-item]
        assert [info.fingerprint for info in language.models] == [bytes(range(32))]
        assert language.problems == ("the engine does not answer",)
        with pytest.raises(EngineDown, match="does not answer"):
            await language.new_handler("peer").handle(Opening(bytes(8), bytes(16), 0, (), 0))

    asyncio.run(play())


def test_models_are_loaded_with_their_handoffs(tmp_path: Path) -> None:
    one, two = (tiny_model(tmp_path / name, seed) for seed, name in enumerate(("one", "two")))
    config = CloudConfig(
        models=(str(tmp_path / "one"), str(tmp_path / "two")),
        handoffs=(write_tiny_handoff(tmp_path / "handoff", two),),
        dtype="float32",
        width=4,
    )
    language = load(config, CollectorRegistry(), ByteBudget(1 << 20))
    found = [(info.name, info.fingerprint, info.precision, len(info.handoffs)) for info in language.models]
    assert found == [("one", one.fingerprint, "float32/4", 0), ("two", two.fingerprint, "float32/4", 1)]


class Card:
    total_memory = 24 << 30


def test_a_model_that_does_not_fit_into_the_devices_memory_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_weights(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    tiny_model(tmp_path / "large", 0)
    monkeypatch.setattr(Decoder, "load", load_weights)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Card)
    config = CloudConfig(models=(str(tmp_path / "large"),), context_bytes=4 << 30)
    line = "the weights of large in bfloat16 and --context-mb 4096 do not fit into the 24576 MiB of cuda:1"
    with pytest.raises(InvalidInput, match=f"^{line}$"):
        load(config, CollectorRegistry(), ByteBudget(1 << 20), torch.device("cuda", 1))


def test_on_a_device_a_model_has_all_memory_of_its_caches_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_module, "graphs_on", lambda device: record_nothing)
    config = CloudConfig(dtype="float32", width=4, context_bytes=1 << 20)
    decoder = open_decoder(tiny_model(tmp_path / "one", 0), config, META)
    assert isinstance(decoder, PagedDecoder) and decoder.precision == "float32/4/meta"
    blocks_BKTD = decoder._pool.keys_BKTD
    assert blocks_BKTD.device == META and config.context_bytes <= 2 * blocks_BKTD.nbytes < 2 * config.context_bytes
    assert type(open_decoder(tiny_model(tmp_path / "two", 0), config, CPU)) is Decoder


def test_without_models_nothing_is_served() -> None:
    assert load(CloudConfig(), CollectorRegistry(), ByteBudget(1 << 20)).models == ()
