from __future__ import annotations

import threading
from collections.abc import Iterator

from isthmus.edge_agent.language.request import GenerationRequest, Summary, Token
from tests.unit.edge_agent.http.openai.api import events, post
from tests.unit.edge_agent.language.scripted import ScriptedBackend


class Impossible(ScriptedBackend):
    """Gives every one of its tokens a probability of zero."""

    def generate(
        self, request: GenerationRequest, cancelled: threading.Event | None = None
    ) -> Iterator[Token | Summary]:
        for event in super().generate(request, cancelled):
            yield Token(event.id, event.source, float("-inf")) if isinstance(event, Token) else event


def test_a_chat_response() -> None:
    backend = ScriptedBackend("Héllo", sources=("draft", "cloud"))
    answer = post(backend).json()
    assert answer["id"].startswith("chatcmpl-")
    assert (answer["object"], answer["model"]) == ("chat.completion", "tiny:auto")
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Héllo", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert answer["usage"] == {
        "prompt_tokens": 19,
        "completion_tokens": 7,
        "total_tokens": 26,
        "prompt_tokens_details": {"cached_tokens": 1, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 4,
            "rejected_prediction_tokens": 2,
        },
    }
    assert answer["isthmus"] == {
        "arm": "auto",
        "why": "as scripted",
        "spans": [],
        "degraded": False,
        "rounds": 3,
        "bytes_up": 40,
        "bytes_down": 50,
        "rtt_ms": 25.0,
        "device": {"tokens": 0, "flops": 0, "repeated": 0},
        "cloud": {"tokens": 0, "flops": 0, "repeated": 0},
    }
    assert "isthmus" in answer["system_fingerprint"]


def test_chunks_of_a_chat_add_up_to_the_response() -> None:
    *chunks, done = events(ScriptedBackend("Hé!"))
    assert done == "[DONE]"
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": ""},
        {"content": "H"},
        {"content": "é"},
        {"content": "!"},
        {},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 4 + ["stop"]
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in chunks}) == 1
    assert not any("usage" in chunk for chunk in chunks)
    assert ["isthmus" in chunk for chunk in chunks] == [False] * 4 + [True]


def test_usage_is_a_chunk_of_its_own() -> None:
    *chunks, last, done = events(ScriptedBackend("ab"), stream_options={"include_usage": True})
    assert done == "[DONE]"
    assert [chunk["usage"] for chunk in chunks] == [None] * len(chunks)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 3
    assert last["isthmus"]["arm"] == "auto"
    assert not any("isthmus" in chunk for chunk in chunks)


def test_nothing_of_a_stop_string_is_sent() -> None:
    backend = ScriptedBackend("one STOP two", sources=("draft",))
    *chunks, _ = events(backend, stop=["STOP", "never"])
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "one "
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    answer = post(backend, stop="STOP").json()
    assert answer["choices"][0]["message"]["content"] == "one "
    assert answer["usage"]["completion_tokens"] == len("one STOP")
    assert answer["usage"]["completion_tokens_details"]["accepted_prediction_tokens"] == len("one STOP")
    assert answer["isthmus"]["bytes_up"] is None
    assert backend.closed.is_set()


def test_max_tokens_end_an_answer() -> None:
    answer = post(ScriptedBackend("Hello"), max_completion_tokens=2).json()
    assert (answer["choices"][0]["message"]["content"], answer["choices"][0]["finish_reason"]) == ("He", "length")


def test_a_broken_character_at_the_end_is_replaced() -> None:
    assert post(ScriptedBackend("aé"), max_tokens=2).json()["choices"][0]["message"]["content"] == "a\ufffd"


def test_several_choices() -> None:
    backend = ScriptedBackend("ab")
    answer = post(backend, n=3, seed=5).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert [one.sampling.seed for one in backend.requests] == [5, 6, 7]
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (19, 9)
    assert answer["isthmus"]["bytes_up"] == 120
    *chunks, _ = events(backend, n=2)
    assert [chunk["choices"][0]["index"] for chunk in chunks] == [0] * 4 + [1] * 4
    assert ["isthmus" in chunk for chunk in chunks] == [False] * 7 + [True]


def test_log_probabilities_of_a_chat_are_sent_with_their_text() -> None:
    *chunks, _ = events(ScriptedBackend("é"), logprobs=True, top_logprobs=1)
    entries = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    top = [{"token": "a", "logprob": -0.5, "bytes": [97]}]
    assert entries[1]["content"] == [
        {"token": "\ufffd", "logprob": -0.5, "bytes": [0xC3], "top_logprobs": top},
        {"token": "\ufffd", "logprob": -0.5, "bytes": [0xA9], "top_logprobs": top},
    ]
    assert entries[0] is None and entries[2] is None
    content = post(ScriptedBackend("ab"), logprobs=True).json()["choices"][0]["logprobs"]["content"]
    assert [(entry["token"], entry["top_logprobs"]) for entry in content] == [("a", []), ("b", [])]


def test_a_log_probability_of_minus_infinity() -> None:
    entries = post(Impossible("a"), logprobs=True).json()["choices"][0]["logprobs"]["content"]
    assert [entry["logprob"] for entry in entries] == [-9999.0]


def test_a_completion_response() -> None:
    answer = post(ScriptedBackend("aé"), "/v1/completions", prompt=["x", "hi"], echo=True).json()
    assert answer["id"].startswith("cmpl-")
    assert answer["object"] == "text_completion"
    assert answer["choices"] == [
        {"index": 0, "text": "xaé", "logprobs": None, "finish_reason": "stop"},
        {"index": 1, "text": "hiaé", "logprobs": None, "finish_reason": "stop"},
    ]
    assert answer["usage"]["prompt_tokens"] == 3


def test_a_streamed_completion() -> None:
    *chunks, done = events(ScriptedBackend("ab"), "/v1/completions", echo=True)
    assert done == "[DONE]"
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["hi", "a", "b", ""]
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert [chunk["choices"][0]["text"] for chunk in events(ScriptedBackend("a"), "/v1/completions")[:-1]] == ["a", ""]


def test_log_probabilities_of_a_completion() -> None:
    expected = {
        "tokens": ["x", "\ufffd", "\ufffd", "y"],
        "token_logprobs": [-0.5] * 4,
        "top_logprobs": [{"a": -0.5, "b": -1.5, text: -0.5} for text in ("x", "\ufffd", "\ufffd", "y")],
        "text_offset": [0, 1, 1, 2],
    }
    assert post(ScriptedBackend("xéy"), "/v1/completions", logprobs=2).json()["choices"][0]["logprobs"] == expected
    *chunks, _ = events(ScriptedBackend("xéy"), "/v1/completions", logprobs=2)
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks[:-1]]
    assert {name: [one for part in parts for one in part[name]] for name in expected} == expected


def test_an_echoed_prompt_has_log_probabilities_too() -> None:
    fields = {"prompt": "hé", "echo": True, "logprobs": 1}
    choice = post(ScriptedBackend("a"), "/v1/completions", **fields).json()["choices"][0]
    assert choice["text"] == "héa"
    assert choice["logprobs"] == {
        "tokens": ["h", "\ufffd", "\ufffd", "a", ""],
        "token_logprobs": [None, -0.5, -0.5, -0.5, -0.5],
        "top_logprobs": [
            None,
            {"\ufffd": -0.5, "a": -0.5},
            {"\ufffd": -0.5, "a": -0.5},
            {"a": -0.5},
            {"": -0.5, "a": -0.5},
        ],
        "text_offset": [0, 1, 1, 2, 3],
    }
    *chunks, _ = events(ScriptedBackend("a"), "/v1/completions", **fields)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "héa"


def test_a_prompt_alone_can_be_scored() -> None:
    backend = ScriptedBackend("a", context=3)
    fields = {"prompt": ["abc", "de"], "echo": True, "logprobs": 0, "max_tokens": 0}
    answer = post(backend, "/v1/completions", **fields).json()
    assert [choice["text"] for choice in answer["choices"]] == ["abc", "de"]
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["length", "length"]
    assert answer["choices"][1]["logprobs"]["token_logprobs"] == [None, -0.5]
    assert answer["usage"]["completion_tokens"] == 0
    assert not backend.requests
    assert post(backend, "/v1/completions", max_tokens=0).json()["choices"][0]["text"] == ""
