"""What dialects send and read, without a network. Answers of vLLM and SGLang are as those servers send them."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from isthmus.cloud_service.language.engines.dialect import Call, read_models
from isthmus.cloud_service.language.engines.openai import LongestTokens, OpenAiProbe, TextDialect, split_characters
from isthmus.cloud_service.language.engines.protocol import Choice, EngineIdentity
from isthmus.cloud_service.language.engines.sglang import SglangDialect
from isthmus.cloud_service.language.engines.vllm import VllmDialect
from isthmus.models.errors import EngineDown, EngineFault
from isthmus.models.messages import GREEDY, Grammar, Logprobs, Sampling
from tests.unit.cloud_service.language.engines.relayed import tiny_tokenizer

VLLM, SGLANG = VllmDialect(259, (0, 2)), SglangDialect(259, (0, 2))


def event(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


def vllm_choice(**fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": "o", "finish_reason": None, "token_ids": [95], **fields}]}


def test_vllm_is_asked_for_ids_and_for_nothing_that_the_checkpoint_recommends() -> None:
    call, _ = VLLM.stream_call("m", (5, 6), Sampling(0.5, 0.9, seed=3), 7, 2)
    assert call.path == "/v1/completions"
    assert call.body == {
        "model": "m", "prompt": [5, 6], "max_tokens": 7, "temperature": 0.5, "top_p": 0.9, "seed": 3, "stream": True,
        "return_token_ids": True, "ignore_eos": True, "stop_token_ids": [0, 2], "skip_special_tokens": False,
        "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
        "logprobs": 2, "return_tokens_as_token_ids": True,
    }  # fmt: skip
    scored = VLLM.score_call("m", (5, 6), 1, None).body
    assert scored is not None
    assert (scored["prompt_logprobs"], scored["max_tokens"], scored["temperature"]) == (2, 1, 0.0)
    assert "stream" not in scored
    assert "skip_reading_prefix_cache" not in scored  # vLLM 0.32 on a CPU loses its engine over it


def test_vllm_streams_tokens_with_log_probabilities() -> None:
    _, reader = VLLM.stream_call("m", (5,), GREEDY, 4, 2)
    found = {
        "tokens": ["token_id:95"], "token_logprobs": [-2.5],
        "top_logprobs": [{"token_id:95": -2.5, "token_id:89": -2.6}],
    }  # fmt: skip
    assert reader.read(event(**vllm_choice(logprobs=found))) == [Choice(95, Logprobs(-2.5, ((95, -2.5), (89, -2.6))))]
    assert not reader.finished
    assert reader.read(event(choices=[], usage={})) == []
    _, reader = VLLM.stream_call("m", (5,), GREEDY, 4, None)
    assert reader.read(event(**vllm_choice(token_ids=[7, 8], finish_reason="length"))) == [Choice(7), Choice(8)]
    assert reader.finished
    assert reader.read(b"[DONE]") == []


def test_vllm_scores_from_the_start_and_equal_tokens_go_to_the_lowest_id() -> None:
    rows = [
        None,
        {"6": {"logprob": -9.0, "rank": 99}, "29": {"logprob": -0.9, "rank": 1}, "28": {"logprob": -2.0, "rank": 2}},
        {"7": {"logprob": -1.25, "rank": 2}, "30": {"logprob": -1.0, "rank": 1}, "12": {"logprob": -1.0, "rank": 2}},
    ]
    answer = vllm_choice(prompt_logprobs=rows, token_ids=[41])
    assert VLLM.read_scores(answer, (5, 6, 7), 1, None) == [Choice(29), Choice(12), Choice(41)]
    assert VLLM.read_scores(answer, (5, 6, 7), 2, None) == [Choice(12), Choice(41)]


def test_log_probabilities_of_a_text_are_those_of_its_own_tokens() -> None:
    rows = [None, {"6": {"logprob": -9.0}, "29": {"logprob": -0.9}, "28": {"logprob": -2.0}}, {"7": {"logprob": -1.0}}]
    answer = vllm_choice(prompt_logprobs=rows, token_ids=[41])
    expected = [Logprobs(-9.0, ((29, -0.9), (28, -2.0))), Logprobs(-1.0, ((7, -1.0),))]
    assert VLLM.read_prompt(answer, (5, 6, 7), 1, 2) == expected
    assert VLLM.read_prompt(answer, (5, 6, 7), 2, 0) == [Logprobs(-1.0)]
    with pytest.raises(EngineFault, match="no log-probability of the text's token 8"):
        VLLM.read_prompt(answer, (5, 6, 8), 2, 0)
    own = [[None, 5, None], [-9.0, 6, None], [-1.0, 7, None]]
    top = [None, [[-0.9, 29, None], [-2.0, 28, None]], [[-1.0, 7, None]]]
    meta = {"input_token_logprobs": own, "input_top_logprobs": top}
    assert SGLANG.read_prompt({"meta_info": meta}, (5, 6, 7), 1, 2) == expected
    with pytest.raises(EngineFault, match="of another text"):
        SGLANG.read_prompt({"meta_info": meta}, (5, 6, 8), 1, 2)


def test_ids_of_another_tokenizer_are_read_to_be_compared() -> None:
    assert VLLM.read_tokens(vllm_choice(prompt_token_ids=[5000, 1])) == [5000, 1]
    rows = [[None, 5000, None], [-1.0, 1, None]]
    assert SGLANG.read_tokens({"meta_info": {"input_token_logprobs": rows}}) == [5000, 1]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"token_ids": [259]}, "outside of the vocabulary"),
        ({"token_ids": [-1]}, "outside of the vocabulary"),
        ({"token_ids": [True]}, "outside of the vocabulary"),
        ({"token_ids": None}, "no list of tokens"),
        ({"logprobs": None}, "no log-probabilities"),
        ({"logprobs": {"token_logprobs": [], "top_logprobs": [{}]}}, "0 log-probabilities of tokens, expected 1"),
        ({"logprobs": {"token_logprobs": [float("nan")], "top_logprobs": [{}]}}, "'nan' as a log-probability"),
        ({"logprobs": {"token_logprobs": [0.5], "top_logprobs": [{}]}}, "'0.5' as a log-probability"),
        ({"logprobs": {"token_logprobs": ["x"], "top_logprobs": [{}]}}, "'x' as a log-probability"),
        ({"logprobs": {"token_logprobs": [-1], "top_logprobs": [{"token_id:x": -1}]}}, "outside of the vocabulary"),
        ({"logprobs": {"token_logprobs": [-(10**400)], "top_logprobs": [{}]}}, "'-1000.*as a log-probability"),
        ({"finish_reason": "abort"}, "gave up"),
    ],
)
def test_what_vllm_cannot_mean_is_a_fault(fields: dict[str, Any], words: str) -> None:
    _, reader = VLLM.stream_call("m", (5,), GREEDY, 4, 0)
    with pytest.raises(EngineFault, match=words):
        reader.read(event(**vllm_choice(**fields)))


@pytest.mark.parametrize("raw", [b"{", b"[]", b"\xff", b'{"error": "out of memory"}', b"{}", b'{"choices": [1, 2]}'])
def test_what_is_no_event_is_a_fault(raw: bytes) -> None:
    for dialect in (VLLM, SGLANG):
        _, reader = dialect.stream_call("m", (5,), GREEDY, 4, None)
        with pytest.raises(EngineFault):
            reader.read(raw)


def test_sglang_scores_only_what_follows_the_start() -> None:
    call = SGLANG.score_call("m", (5, 6, 7, 8), 3, None)
    assert call.path == "/generate"
    assert call.body is not None
    assert (call.body["logprob_start_len"], call.body["top_logprobs_num"]) == (2, 2)
    rows = [None, [[-0.5, 40, None], [-0.5, 33, None]]]
    meta = {"completion_tokens": 1, "input_top_logprobs": rows}
    answer = {"output_ids": [9], "meta_info": meta}
    assert SGLANG.read_scores(answer, (5, 6, 7, 8), 3, None) == [Choice(33), Choice(9)]
    with pytest.raises(EngineFault, match="2 lists of likely tokens, expected 3"):
        SGLANG.read_scores(answer, (5, 6, 7, 8), 2, None)


@pytest.mark.parametrize("repeated", [True, False])
def test_sglang_streams_all_tokens_or_the_new_ones(repeated: bool) -> None:
    _, reader = SGLANG.stream_call("m", (5,), GREEDY, 4, None)
    for count in (1, 2, 3):
        ids = [10, 11, 12][:count] if repeated else [9 + count]
        reason = {"type": "length", "length": 3} if count == 3 else None
        found = reader.read(event(output_ids=ids, meta_info={"completion_tokens": count, "finish_reason": reason}))
        assert found == [Choice(9 + count)]
    assert reader.finished
    with pytest.raises(EngineFault, match="does not count"):
        reader.read(event(output_ids=[], meta_info={"completion_tokens": 1}))


@pytest.mark.parametrize(
    ("cards", "name", "words"),
    [
        ([], None, "the engine holds none: name the model with --engine-model"),
        ([{"id": "a"}, {"id": "b"}], None, "the engine holds a, b: name the model"),
        ([{"id": "a"}], "b", "does not hold the model b, it holds a"),
        ([{"id": "a\ud800"}, {"id": "a\nb"}, {"id": ""}, {"id": "a" * 513}, {"id": 1}], None, "the engine holds none:"),
    ],
)
def test_a_model_that_is_not_clear_is_named(cards: list[Any], name: str | None, words: str) -> None:
    with pytest.raises(EngineDown, match=words):
        read_models({"data": cards}, name)


def test_the_only_model_is_used() -> None:
    assert read_models({"data": [{"id": "a", "max_model_len": 99}]}, None) == EngineIdentity("a", 99)
    assert read_models({"data": [{"id": "a"}, {"id": "b", "max_model_len": -1}]}, "b") == EngineIdentity("b", 0)


def test_the_probe_of_a_compatible_server_finds_out_what_it_can_do() -> None:
    probe = OpenAiProbe(tiny_tokenizer())
    call = probe.call("m")
    assert call.body is not None
    ids = call.body["prompt"]
    rows = [None, *[{"40": {"logprob": -1.0}}] * (len(ids) - 1)]
    both = probe.dialect(vllm_choice(prompt_logprobs=rows, token_ids=[9]))
    assert (both.scores, both.logprobs, both.ping) == (True, True, Call("/v1/models"))
    assert not probe.dialect(vllm_choice(token_ids=[9])).scores
    for answer in (None, {"choices": [{"text": "x"}]}):
        text = probe.dialect(answer)
        assert (text.scores, text.logprobs) == (False, False)


def test_a_text_server_gets_text_with_special_tokens_and_its_text_becomes_ids() -> None:
    tokenizer = tiny_tokenizer()
    dialect = TextDialect(tokenizer)
    ids = tokenizer.encode("<|im_start|>user\nhé")
    call, reader = dialect.stream_call("m", ids, GREEDY, 9, None)
    assert call.body is not None
    assert call.body["prompt"] == "<|im_start|>user\nhé"
    found = reader.read(event(choices=[{"text": " é!", "finish_reason": None}]))
    assert [choice.token for choice in found] == tokenizer.encode(" é!")
    assert reader.read(event(choices=[{"text": "", "finish_reason": "stop"}])) == [Choice(0)]


def test_a_character_that_was_begun_is_gone_on_with() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer.encode("hé")
    call, reader = TextDialect(tokenizer).stream_call("m", ids[:-1], GREEDY, 9, None)
    assert call.body is not None
    assert call.body["prompt"] == "h"
    assert reader.read(event(choices=[{"text": "é", "finish_reason": None}])) == [Choice(ids[-1])]
    _, reader = TextDialect(tokenizer).stream_call("m", ids[:-1], GREEDY, 9, None)
    with pytest.raises(EngineFault, match="another character"):
        reader.read(event(choices=[{"text": "x", "finish_reason": None}]))


def test_tokens_of_a_text_are_the_longest() -> None:
    tokens = LongestTokens(tiny_tokenizer())
    assert tokens.longest == 1
    assert tokens.ids_of("aé".encode()) == tiny_tokenizer().encode("aé")


@pytest.mark.parametrize(
    ("raw", "text", "rest"),
    [
        (b"", "", b""),
        (b"abc", "abc", b""),
        ("é".encode(), "é", b""),
        ("aé".encode()[:-1], "a", b"\xc3"),
        ("😀".encode()[:3], "", "😀".encode()[:3]),
        (b"a\xff", "a\ufffd", b""),
        (b"a\x80\x80", "a\ufffd\ufffd", b""),
    ],
)
def test_a_character_that_is_only_begun_is_cut_off(raw: bytes, text: str, rest: bytes) -> None:
    assert split_characters(raw) == (text, rest)


SCHEMA = '{"type": "null"}'
MASKED = Sampling(logit_bias=((5, -1.5),), frequency_penalty=0.5, presence_penalty=-0.25)
GRAMMARS = [Grammar("regex", "a+"), Grammar("json_schema", SCHEMA), Grammar("json_object")]


def masked(grammar: Grammar | None = None) -> Sampling:
    return replace(MASKED, grammar=grammar)


@pytest.mark.parametrize("grammar", GRAMMARS)
def test_engines_are_told_of_grammars_biases_and_penalties(grammar: Grammar) -> None:
    penalties = {"logit_bias": {"5": -1.5}, "frequency_penalty": 0.5, "presence_penalty": -0.25}
    vllm = VLLM.stream_call("m", (5,), masked(grammar), 7, None)[0].body
    assert vllm is not None and vllm.items() >= penalties.items()
    assert vllm["structured_outputs"] == {
        "regex": {"regex": "a+"}, "json_schema": {"json": SCHEMA}, "json_object": {"json_object": True}
    }[grammar.kind]  # fmt: skip
    sglang = SGLANG.stream_call("m", (5,), masked(grammar), 7, None)[0].body
    assert sglang is not None and sglang["sampling_params"].items() >= penalties.items()
    found = {name: sglang["sampling_params"].get(name) for name in ("regex", "json_schema")}
    assert (
        found
        == {
            "regex": {"regex": "a+", "json_schema": None},
            "json_schema": {"regex": None, "json_schema": SCHEMA},
            "json_object": {"regex": None, "json_schema": '{"type": "object"}'},
        }[grammar.kind]
    )


def test_a_server_of_completions_is_told_of_biases_and_penalties_alone() -> None:
    dialect = TextDialect(tiny_tokenizer())
    body = dialect.stream_call("m", (5,), masked(), 7, None)[0].body
    assert body is not None and body["logit_bias"] == {"5": -1.5} and body["presence_penalty"] == -0.25
    assert dialect.processors == ("logit_bias", "penalties")
    plain = dialect.stream_call("m", (5,), GREEDY, 7, None)[0].body
    assert plain is not None and not plain.keys() & {"logit_bias", "frequency_penalty", "presence_penalty"}
