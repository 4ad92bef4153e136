"""instructor: a model of pydantic by tools, by JSON schema, and piece by piece. Arguments: the URL, the model."""

import json
import sys

import instructor
import openai
from pydantic import BaseModel, Field


class City(BaseModel):
    capital: bool
    population: int = Field(ge=0, le=99_999_999)
    note: str = Field(max_length=20)


def main() -> None:
    client = openai.OpenAI(base_url=sys.argv[1] + "/v1", api_key="none")
    ask = {"model": sys.argv[2], "messages": [{"role": "user", "content": "Describe Paris."}], "temperature": 0}
    found = {}
    for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
        made = instructor.from_openai(client, mode=mode)
        found[mode.value] = made.chat.completions.create(response_model=City, max_retries=0, **ask).model_dump()
    made = instructor.from_openai(client, mode=instructor.Mode.TOOLS)
    partial = list(made.chat.completions.create_partial(response_model=City, max_retries=0, **ask))
    print(json.dumps({**found, "partial": partial[-1].model_dump()}))


main()
