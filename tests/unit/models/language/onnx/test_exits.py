"""Exits on the device: lazy layers, catching up, and confidence, over a tiny model of three layers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from isthmus.models.errors import BundleError, InvalidInput
from isthmus.models.language.checkpoint.checkpoint import Checkpoint
from isthmus.models.language.drafts import ModelDraft
from isthmus.models.language.handoff.bundle import HandoffBundle
from isthmus.models.language.onnx.decoder import OnnxDecoder
from isthmus.models.language.onnx.exits import ExitingDecoder, ExitWeights, OnnxExit
from isthmus.models.recipes.language.device_outputs import exit_tensors
from isthmus.models.recipes.language.exits import Exit
from isthmus.models.recipes.language.llama import Llama
from tests.bench.tiny_llama import write_tiny_llama
from tests.tiny_handoff import write_tiny_handoff

CONTEXT, NEVER, ALWAYS = 64, 2.0, 0.0
TEXT = np.random.default_rng(0).integers(3, 259, 40).tolist()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny", layers=3))


@pytest.fixture(scope="module")
def handoff(tmp_path_factory: pytest.TempPathFactory, checkpoint: Checkpoint) -> HandoffBundle:
    folder = tmp_path_factory.mktemp("handoffs") / "tiny"
    return HandoffBundle.open(write_tiny_handoff(folder, checkpoint, depth=2), checkpoint)


def cut(checkpoint: Checkpoint, handoff: HandoffBundle) -> tuple[OnnxDecoder, ExitingDecoder]:
    decoder = OnnxDecoder(checkpoint, CONTEXT, threads=1, cuts=handoff.depths)
    return decoder, ExitingDecoder(handoff, checkpoint, decoder, 1)


@pytest.fixture
def parts(checkpoint: Checkpoint, handoff: HandoffBundle) -> tuple[OnnxDecoder, ExitingDecoder]:
    return cut(checkpoint, handoff)


def test_a_cut_decoder_gives_the_logits_of_a_whole_one(checkpoint: Checkpoint, handoff: HandoffBundle) -> None:
    whole, cut_decoder = OnnxDecoder(checkpoint, CONTEXT, threads=1), cut(checkpoint, handoff)[0]
    np.testing.assert_allclose(cut_decoder.extend_all(TEXT[:9]), whole.extend_all(TEXT[:9]), atol=1e-5)
    cut_decoder.append(TEXT[9:12])
    cut_decoder.advance(0)  # the other parts are queued
    cut_decoder.append(TEXT[12:14])
    assert [cut_decoder.through(part) for part in range(3)] == [12, 9, 9] and cut_decoder.length == 14
    np.testing.assert_allclose(cut_decoder.extend(TEXT[14:15]), whole.extend(TEXT[9:15]), atol=1e-5)
    cut_decoder.append(TEXT[15:20])
    cut_decoder.advance(1)
    for decoder in (cut_decoder, whole):
        decoder.truncate(14)
    np.testing.assert_allclose(cut_decoder.extend(TEXT[20:22]), whole.extend(TEXT[20:22]), atol=1e-5)


def test_a_confident_first_exit_skips_the_layers_above(parts: tuple[OnnxDecoder, ExitingDecoder]) -> None:
    decoder, exits = parts
    first = exits.choose(TEXT[:10], ALWAYS)
    assert first.exit == 0 and [decoder.through(part) for part in range(3)] == [10, 0, 0]
    last = exits.choose(TEXT[:12], NEVER)
    assert last.exit == 1 and [decoder.through(part) for part in range(3)] == [12, 12, 0]


def test_skipped_layers_are_caught_up_exactly(checkpoint: Checkpoint, handoff: HandoffBundle) -> None:
    (_, lazy), (_, eager) = cut(checkpoint, handoff), cut(checkpoint, handoff)
    for length in range(5, 20):
        exact = eager.choose(TEXT[:length], NEVER)
        fast = lazy.choose(TEXT[:length], NEVER if length % 5 == 0 else ALWAYS)
        if fast.exit == 1:
            np.testing.assert_allclose(fast.logits_V, exact.logits_V, atol=1e-5)
            assert fast.likely == pytest.approx(exact.likely, abs=1e-4)
    np.testing.assert_allclose(lazy.hidden_states(TEXT[:19], 0), eager.hidden_states(TEXT[:19], 0), atol=1e-5)
    assert eager.hidden_states(TEXT[:19], 17).shape == (2, checkpoint.config.hidden)


def test_hidden_states_are_the_lower_layers_output(
    checkpoint: Checkpoint, handoff: HandoffBundle, parts: tuple[OnnxDecoder, ExitingDecoder]
) -> None:
    decoder = OnnxDecoder(checkpoint, CONTEXT, threads=1, cuts=(2,))
    decoder.append(TEXT[:12])
    parts[1].choose(TEXT[:12], ALWAYS)
    np.testing.assert_allclose(parts[1].hidden_states(TEXT[:12], 0), decoder.advance(0), atol=1e-5)


def test_an_exit_is_its_layer_after_its_map(checkpoint: Checkpoint, handoff: HandoffBundle) -> None:
    """The tiny exits are the model's own last layer, so after two layers of three they are the model."""
    logits_V = OnnxDecoder(checkpoint, CONTEXT, threads=1).extend(TEXT[:20])
    found = cut(checkpoint, handoff)[1].choose(TEXT[:20], NEVER)
    assert np.corrcoef(found.logits_V, logits_V)[0, 1] > 0.9  # up to the norm and quantisation


def test_an_exit_of_two_layers_is_the_last_two(checkpoint: Checkpoint, handoff: HandoffBundle) -> None:
    """After one layer of three, with the identity as its map, it is the model."""
    exit_, model = Exit(checkpoint.config, 1, 2), Llama.load(checkpoint, torch.float32)
    exit_.map.weight.data, exit_.map.bias.data = torch.eye(checkpoint.config.hidden), torch.zeros_like(exit_.map.bias)
    exit_.norm_H.data = model.norm_H.data
    for own, theirs in zip(exit_.layers, list(model.layers)[1:], strict=True):
        own.load_state_dict(theirs.state_dict())
    weights = ExitWeights(exit_tensors(exit_, checkpoint), checkpoint)
    name = "self_attn.k_proj.weight"
    np.testing.assert_array_equal(weights.tensor(f"model.layers.0.{name}"), checkpoint.tensor(f"model.layers.1.{name}"))
    decoder = OnnxDecoder(checkpoint, CONTEXT, threads=1, cuts=(1,))
    expected_V = decoder.extend(TEXT[:20])
    decoder.truncate(0)
    decoder.append(TEXT[:20])
    head = {name: array for name, array in handoff.exit(0).items() if name.startswith("judge.")}
    upper = OnnxExit({**exit_tensors(exit_, checkpoint), **head}, checkpoint, decoder, 1)
    found_V, _ = upper(decoder.advance(0), decoder.ids)
    assert np.corrcoef(found_V, expected_V)[0, 1] > 0.99


def test_hidden_states_are_those_of_the_text_that_is_named(checkpoint: Checkpoint, handoff: HandoffBundle) -> None:
    """Another answer may have used the exits since."""
    (_, used), (_, fresh) = cut(checkpoint, handoff), cut(checkpoint, handoff)
    used.choose(TEXT[:15], ALWAYS)
    used.choose(TEXT[5:9], ALWAYS)
    fresh.choose(TEXT[:15], NEVER)
    np.testing.assert_allclose(used.hidden_states(TEXT[:15], 3), fresh.hidden_states(TEXT[:15], 3), atol=1e-5)


def test_a_fork_has_a_text_of_its_own(parts: tuple[OnnxDecoder, ExitingDecoder]) -> None:
    decoder, exits = parts
    first = exits.choose(TEXT[:10], NEVER)
    other = exits.fork(decoder.fork())
    apart = other.choose(TEXT[12:20], NEVER)
    again, fresh = exits.choose(TEXT[:10], NEVER), other.choose(TEXT[12:20], NEVER)
    np.testing.assert_allclose(again.logits_V, first.logits_V, atol=1e-5)
    np.testing.assert_allclose(fresh.logits_V, apart.logits_V, atol=1e-5)
    assert decoder.ids == TEXT[:10]


@pytest.mark.parametrize("common", [3, 9, 10])
def test_another_text_keeps_what_it_shares(checkpoint: Checkpoint, handoff: HandoffBundle, common: int) -> None:
    other = [*TEXT[:common], *TEXT[20:30]]
    (_, used), (_, fresh) = cut(checkpoint, handoff), cut(checkpoint, handoff)
    used.choose(TEXT[:10], ALWAYS)
    found, expected = used.choose(other, NEVER), fresh.choose(other, NEVER)
    np.testing.assert_allclose(found.logits_V, expected.logits_V, atol=1e-5)
    np.testing.assert_allclose(used.hidden_states(other, 0), fresh.hidden_states(other, 0), atol=1e-5)


def test_a_repeated_text_gives_the_same_choice(parts: tuple[OnnxDecoder, ExitingDecoder]) -> None:
    first = parts[1].choose(TEXT[:10], NEVER)
    np.testing.assert_allclose(parts[1].choose(TEXT[:10], NEVER).logits_V, first.logits_V, atol=1e-5)


def test_the_same_decoder_serves_whole_answers_in_between(checkpoint: Checkpoint, handoff: HandoffBundle) -> None:
    (decoder, exits), (_, fresh) = cut(checkpoint, handoff), cut(checkpoint, handoff)
    draft = ModelDraft(decoder)
    exits.choose(TEXT[:10], ALWAYS)
    whole_V = draft.logits(TEXT[:14])
    np.testing.assert_allclose(whole_V, OnnxDecoder(checkpoint, CONTEXT, threads=1).extend(TEXT[:14]), atol=1e-5)
    found = exits.choose(TEXT[:16], NEVER)
    np.testing.assert_allclose(found.logits_V, fresh.choose(TEXT[:16], NEVER).logits_V, atol=1e-5)
    np.testing.assert_array_equal(draft.logits(TEXT[:14]), whole_V)


def test_a_text_beyond_the_context_is_refused_and_harms_nothing(parts: tuple[OnnxDecoder, ExitingDecoder]) -> None:
    before = parts[1].choose(TEXT[:10], NEVER)
    with pytest.raises(InvalidInput, match="at most 64"):
        parts[1].choose([*TEXT[:10], *TEXT, *TEXT], NEVER)
    np.testing.assert_allclose(parts[1].choose(TEXT[:10], NEVER).logits_V, before.logits_V, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("map.bias", (63,)),
        ("map.weight.scale", (64, 3)),
        ("model.layers.0.self_attn.k_proj.weight.codes", (32, 2, 15)),
        ("map.weight.codes", (64, 1, 9)),
    ],
)
def test_broken_tensors_are_refused(
    checkpoint: Checkpoint, handoff: HandoffBundle, name: str, shape: tuple[int, ...]
) -> None:
    tensors = handoff.exit(0)
    broken = {**tensors, name: np.zeros(shape, tensors[name].dtype)}
    whole = name.removesuffix(".scale").removesuffix(".codes")
    with pytest.raises(BundleError, match="tensor"):
        ExitWeights(broken, checkpoint).tensor(whole)
    del broken["map.bias"]
    with pytest.raises(BundleError, match="map.bias is missing"):
        ExitWeights(broken, checkpoint).tensor("map.bias")


@pytest.mark.parametrize("layers", [[], [1], [0, 2], [0, 1, 2, 3], [0, 999]])
def test_layers_that_do_not_follow_each_other_or_are_too_many_are_refused(
    checkpoint: Checkpoint, layers: list[int]
) -> None:
    tensors = {f"model.layers.{index}.input_layernorm.weight": np.ones(64, np.float32) for index in layers}
    with pytest.raises(BundleError, match="expected 1 to 3 layers, numbered from 0"):
        ExitWeights(tensors, checkpoint)


def test_another_cut_is_refused(checkpoint: Checkpoint, handoff: HandoffBundle, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"cut at \(\), the exits are at \(1, 2\)"):
        ExitingDecoder(handoff, checkpoint, OnnxDecoder(checkpoint, CONTEXT, threads=1), 1)
