"""Names and shapes that a configuration calls for, and values of configurations that are refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from isthmus.models.errors import BundleError
from isthmus.models.language.architecture import LlamaConfig, RopeScaling
from isthmus.models.language.checkpoint.weights import (
    check_config,
    check_shapes,
    layer_shapes,
    positive_integer,
    positive_number,
    tensor_shapes,
)

CONFIG = LlamaConfig(
    layers=2, hidden=8, heads=4, kv_heads=2, head_dim=2, ffn=16, vocab=30, context=64, rope_theta=1e4, norm_eps=1e-5,
    tied=True,
)  # fmt: skip


def test_shapes_of_a_layer() -> None:
    shapes = layer_shapes(CONFIG)
    assert len(shapes) == 9
    assert shapes["self_attn.q_proj.weight"] == (8, 8) and shapes["self_attn.v_proj.weight"] == (4, 8)
    assert shapes["mlp.down_proj.weight"] == (8, 16)
    qwen2 = layer_shapes(replace(CONFIG, qkv_bias=True))
    assert {name: qwen2[name] for name in qwen2.keys() - shapes.keys()} == {
        "self_attn.q_proj.bias": (8,),
        "self_attn.k_proj.bias": (4,),
        "self_attn.v_proj.bias": (4,),
    }
    qwen3 = layer_shapes(replace(CONFIG, qk_norm=True))
    assert {name: qwen3[name] for name in qwen3.keys() - shapes.keys()} == {
        "self_attn.q_norm.weight": (2,),
        "self_attn.k_norm.weight": (2,),
    }


def test_tensors_come_in_the_order_of_the_forward_pass() -> None:
    names = list(tensor_shapes(CONFIG))
    assert names[0] == "model.embed_tokens.weight" and names[-1] == "model.norm.weight" and len(names) == 20
    untied = tensor_shapes(replace(CONFIG, tied=False))
    assert list(untied) == [*names, "lm_head.weight"] and untied["lm_head.weight"] == (30, 8)


def test_tensors_that_do_not_fit_are_refused() -> None:
    shapes = tensor_shapes(CONFIG)
    check_shapes(shapes, CONFIG, "here")
    check_shapes({**shapes, "lm_head.weight": (30, 8)}, CONFIG, "here")  # a copy of the tied embedding
    missing = {name: shape for name, shape in shapes.items() if name != "model.norm.weight"}
    with pytest.raises(BundleError, match=r"here: tensor model\.norm\.weight is missing, expected with shape \(8,\)"):
        check_shapes(missing, CONFIG, "here")
    with pytest.raises(BundleError, match=r"model\.norm\.weight has shape \(9,\), the configuration says \(8,\)"):
        check_shapes({**shapes, "model.norm.weight": (9,)}, CONFIG, "here")
    with pytest.raises(BundleError, match="tensor extra is not part of a Llama"):
        check_shapes({**shapes, "extra": (1,)}, CONFIG, "here")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"heads": 3}, "3 heads cannot share 2 key-value heads evenly"),
        ({"head_dim": 3}, "head size is 3, rotary embeddings need it even"),
        ({"rope_scaling": RopeScaling(8.0, 4.0, 4.0, 8192)}, "low_freq_factor below high_freq_factor"),
    ],
)
def test_inconsistent_configurations_are_refused(changes: dict[str, Any], words: str) -> None:
    assert check_config(CONFIG, "here") is CONFIG
    with pytest.raises(BundleError, match=f"here: .*{words}"):
        check_config(replace(CONFIG, **changes), "here")


@pytest.mark.parametrize("value", [0, -1, 11, True, 1.0, "1", [1]])
def test_integers_out_of_range_are_refused(value: Any) -> None:
    assert positive_integer({"key": 10}, "key", 10) == 10 and positive_integer({}, "key", 10, 3) == 3
    with pytest.raises(BundleError, match="key is .*, expected an integer from 1 to 10"):
        positive_integer({"key": value}, "key", 10)
    with pytest.raises(BundleError, match="key is missing"):
        positive_integer({}, "key", 10)


@pytest.mark.parametrize("value", [0, -0.5, float("inf"), float("nan"), True, "1"])
def test_numbers_that_are_not_positive_are_refused(value: Any) -> None:
    assert positive_number({"key": 2}, "key") == 2.0 and positive_number({}, "key", 0.5) == 0.5
    with pytest.raises(BundleError, match="key is .*, expected a finite number above 0"):
        positive_number({"key": value}, "key")
    with pytest.raises(BundleError, match="key is missing"):
        positive_number({}, "key")
