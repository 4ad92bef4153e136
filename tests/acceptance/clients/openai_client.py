"""OpenAI's client: a tool, whole, streamed, asynchronous; structured output; responses. Arguments: URL and model."""

import asyncio
import json
import sys

import openai
from pydantic import BaseModel, Field

URL = sys.argv[1] + "/v1"
QUESTION = [{"role": "user", "content": "What is the weather in Paris?"}]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 20}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "get_weather", "description": "Weather.", "parameters": PARAMETERS}}
ASK = {"model": sys.argv[2], "messages": QUESTION, "tools": [WEATHER], "tool_choice": "required", "temperature": 0}


class City(BaseModel):
    capital: bool
    population: int = Field(ge=0, le=99_999_999)


def whole(client: openai.OpenAI) -> dict[str, object]:
    choice = client.chat.completions.create(**ASK).choices[0]
    call = choice.message.tool_calls[0]
    result = {"role": "tool", "tool_call_id": call.id, "content": "22 degrees, sunny"}
    messages = [*QUESTION, choice.message, result]
    answer = client.chat.completions.create(model=sys.argv[2], messages=messages, tools=[WEATHER], max_tokens=40)
    return {
        "finish": choice.finish_reason,
        "name": call.function.name,
        "arguments": json.loads(call.function.arguments),
        "answer": answer.choices[0].message.content,
    }


def streamed(client: openai.OpenAI) -> dict[str, object]:
    with client.chat.completions.stream(**ASK) as stream:
        for _ in stream:
            pass
        call = stream.get_final_completion().choices[0].message.tool_calls[0]
    return {"name": call.function.name, "arguments": json.loads(call.function.arguments)}


async def asynchronous() -> dict[str, object]:
    async with openai.AsyncOpenAI(base_url=URL, api_key="none") as client:
        choice = (await client.chat.completions.create(**ASK)).choices[0]
        return json.loads(choice.message.tool_calls[0].function.arguments)


def parsed(client: openai.OpenAI) -> dict[str, object]:
    question = [{"role": "user", "content": "Describe Paris."}]
    completion = client.chat.completions.parse(
        model=sys.argv[2], messages=question, response_format=City, temperature=0
    )
    return completion.choices[0].message.parsed.model_dump()


def responses(client: openai.OpenAI) -> dict[str, object]:
    tool = {"type": "function", **WEATHER["function"]}
    asked = {"model": sys.argv[2], "input": "What is the weather in Paris?", "temperature": 0}
    text = client.responses.create(model=sys.argv[2], input="Name a river.", max_output_tokens=8)
    call = client.responses.create(**asked, tools=[tool], tool_choice="required").output[0]
    form = client.responses.parse(model=sys.argv[2], input="Describe Paris.", text_format=City, temperature=0)
    with client.responses.stream(model=sys.argv[2], input="Describe Paris.", text_format=City, temperature=0) as stream:
        kinds = [event.type for event in stream]
        last = stream.get_final_response()
    return {
        "text": text.output_text,
        "call": [call.type, call.name, json.loads(call.arguments)],
        "parsed": form.output_parsed.model_dump(),
        "events": [kinds[0], kinds[-1]],
        "streamed": last.output_text,
    }


def main() -> None:
    with openai.OpenAI(base_url=URL, api_key="none", max_retries=0) as client:
        found = {"whole": whole(client), "streamed": streamed(client), "parsed": parsed(client)}
        print(json.dumps({**found, "async": asyncio.run(asynchronous()), "responses": responses(client)}))


main()
