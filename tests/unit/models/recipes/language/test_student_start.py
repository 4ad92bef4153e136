"""Which layers are kept, and what the closed form repairs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from isthmus.models.errors import InvalidInput
from isthmus.models.recipes.language.corpus import Corpus
from isthmus.models.recipes.language.llama import Llama
from isthmus.models.recipes.language.student_start import causal_attention, influence, kept_layers, start
from isthmus.models.recipes.language.teacher import TeacherOutputs, run_teacher


def test_both_ends_are_kept_and_between_them_the_most_influential() -> None:
    influence_L = [0.1] * 12
    influence_L[4], influence_L[7], influence_L[9] = 0.3, 0.2, 0.5
    assert kept_layers(influence_L, 7) == [0, 1, 2, 4, 9, 10, 11]  # groups 2 to 3, 4 to 6, 7 to 9
    assert kept_layers(influence_L, 4) == [0, 1, 10, 11]
    assert len(set(kept_layers(influence_L, 11))) == 11
    for count in (3, 12):
        with pytest.raises(InvalidInput, match="expected 4 to 11"):
            kept_layers(influence_L, count)


def test_influence_is_how_much_a_layer_turns_the_states() -> None:
    states = {
        0: torch.tensor([[9.0, 9], [1, 0]]),
        1: torch.tensor([[9.0, 9], [2, 0]]),
        2: torch.tensor([[9.0, 9], [0, 1]]),
    }
    none = torch.zeros(2, 1)
    outputs = TeacherOutputs(states, none, none, none[:, 0], (2,), (2,))
    assert influence(outputs) == pytest.approx([0, 1])


def test_attention_is_that_of_the_teacher(model: Llama) -> None:
    x_BTH = torch.randn(2, 9, model.config.hidden, generator=torch.Generator().manual_seed(0))
    layer = model.layers[0]
    with torch.inference_mode():
        own = layer.after_attention(x_BTH, causal_attention(layer, x_BTH))
        torch.testing.assert_close(own, layer(x_BTH)[0], rtol=1e-4, atol=1e-4)


def test_the_closed_form_comes_nearer_to_the_teachers_states(model: Llama, corpus: Corpus) -> None:
    rng = np.random.default_rng(1)
    texts = Corpus.from_sequences([(rng.integers(3, 259, 60).tolist(), 60) for _ in range(40)])
    outputs = run_teacher(model, texts, range(4), torch.float32)
    held_out = run_teacher(model, corpus, range(4), torch.float32)
    errors = []
    for some in (None, outputs):
        student = start(model, [0, 2], some)
        with torch.inference_mode():
            x_BTH = student.embed(held_out.select(1).ids_N[None])
            for layer in student.layers:
                x_BTH = layer(x_BTH)[0]
        errors.append(float((x_BTH[0] - held_out.select(1).states[3])[1:].square().mean()))
    assert errors[1] < 0.9 * errors[0]
    kept_all = start(model, [0, 1, 2], outputs)
    with torch.inference_mode():
        x_BTH = kept_all.embed(held_out.select(1).ids_N[None])
        for layer in kept_all.layers:
            x_BTH = layer(x_BTH)[0]
    torch.testing.assert_close(x_BTH[0, 1:], held_out.select(1).states[3][1:], rtol=1e-2, atol=1e-2)
