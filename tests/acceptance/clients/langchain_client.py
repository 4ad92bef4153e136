"""LangChain: bind_tools and with_structured_output, whole and streamed. Arguments: the URL, the model."""

import json
import sys

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field


@tool
def get_weather(city: str) -> str:
    """Weather of a city."""
    return f"sunny in {city}"


class City(BaseModel):
    """A city."""

    capital: bool
    population: int = Field(ge=0, le=99_999_999)
    note: str = Field(max_length=20)


def main() -> None:
    model = ChatOpenAI(base_url=sys.argv[1] + "/v1", api_key="none", model=sys.argv[2], temperature=0, max_tokens=120)
    bound = model.bind_tools([get_weather], tool_choice="get_weather")
    question = HumanMessage("What is the weather in Paris?")
    said = bound.invoke([question])
    call = said.tool_calls[0]
    result = ToolMessage(get_weather.invoke(call["args"]), tool_call_id=call["id"])
    chunks = list(bound.stream([question]))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole = whole + chunk
    found = {
        "call": [call["name"], call["args"]],
        "streamed": [whole.tool_calls[0]["name"], whole.tool_calls[0]["args"]],
        "answer": model.bind_tools([get_weather]).invoke([question, said, result]).content,
    }
    for method in ("json_schema", "function_calling"):
        structured = model.with_structured_output(City, method=method)
        found[method] = structured.invoke("Describe Paris.").model_dump()
        found[f"{method}_streamed"] = list(structured.stream("Describe Paris."))[-1].model_dump()
    print(json.dumps(found))


main()
