"""LiteLLM: a text, a tool and a stream. Arguments: the URL, the model."""

import json
import sys

import litellm

ASK = {"model": "openai/" + sys.argv[2], "api_base": sys.argv[1] + "/v1", "api_key": "none", "temperature": 0}
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 20}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}


def main() -> None:
    question = [{"role": "user", "content": "What is the weather in Paris?"}]
    text = litellm.completion(**ASK, messages=question, max_tokens=8)
    called = litellm.completion(**ASK, messages=question, tools=[TOOL], tool_choice="required").choices[0]
    stream = litellm.completion(**ASK, messages=question, tools=[TOOL], tool_choice="required", stream=True)
    whole = litellm.stream_chunk_builder(list(stream)).choices[0]
    form = {"type": "json_schema", "json_schema": {"name": "place", "schema": PARAMETERS, "strict": True}}
    placed = litellm.completion(**ASK, messages=question, response_format=form)
    try:
        litellm.completion(**ASK, messages=[{"role": "user", "content": "x " * 9000}])
        refused = ""
    except litellm.ContextWindowExceededError as error:
        refused = type(error).__name__
    found = {
        "text": text.choices[0].message.content,
        "call": json.loads(called.message.tool_calls[0].function.arguments),
        "finish": called.finish_reason,
        "streamed": json.loads(whole.message.tool_calls[0].function.arguments),
        "json_schema": json.loads(placed.choices[0].message.content),
        "too_long": refused,
    }
    print(json.dumps(found))


main()
