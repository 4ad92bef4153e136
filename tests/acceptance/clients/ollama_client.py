"""Ollama's client: a chat, a stream, a tool's schema, a format, and the models. Arguments: the URL, the model."""

import json
import sys

import ollama

SCHEMA = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 20}}, "required": ["city"]}


def main() -> None:
    client = ollama.Client(host=sys.argv[1])
    question = [{"role": "user", "content": "Name a river."}]
    options = {"temperature": 0, "num_predict": 8}
    stream = client.chat(sys.argv[2], question, stream=True, options=options)
    found = {
        "chat": client.chat(sys.argv[2], question, options=options).message.content,
        "streamed": "".join(part.message.content for part in stream),
        "generate": client.generate(sys.argv[2], "Name a river.", options=options).response,
        "format": json.loads(
            client.chat(sys.argv[2], question, format=SCHEMA, options={"temperature": 0}).message.content
        ),
        "models": [model.model for model in client.list().models],
    }
    try:
        client.chat("llama3", question)
    except ollama.ResponseError as error:
        found["missing"] = error.status_code
    print(json.dumps(found))


main()
