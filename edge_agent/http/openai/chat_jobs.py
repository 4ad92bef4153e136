"""From the body of a chat to a Job: its messages, tools, format and prediction."""

from __future__ import annotations

from collections.abc import Sequence

from isthmus.edge_agent.http.openai.errors import ApiError
from isthmus.edge_agent.http.openai.formats import answer_grammar
from isthmus.edge_agent.http.openai.jobs import ChoiceSettings, Job, build_job, naming, requests_for
from isthmus.edge_agent.http.openai.model_names import select_model
from isthmus.edge_agent.http.openai.schema import ChatMessage, ChatRequest, parse_request
from isthmus.edge_agent.http.openai.tools import ToolUse, call_grammar, strict_grammar, tool_use
from isthmus.edge_agent.language.request import GenerationBackend
from isthmus.models.language.checkpoint.tokenizer import Message, Tokenizer
from isthmus.models.messages import Grammar


def chat_job(data: bytes, private: bool, backend: GenerationBackend) -> Job:
    """The job of a body of /v1/chat/completions. Raises ApiError."""
    return job_of_chat(parse_request(ChatRequest, data), private, backend)


def job_of_chat(body: ChatRequest, private: bool, backend: GenerationBackend) -> Job:
    """The job of a chat. Raises ApiError."""
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    model = select_model(body, private or body.private, backend)
    tokenizer = backend.tokenizer_for(model.arm)
    context = backend.arm_context(model.arm)
    tools = tool_use(body.tools, body.tool_choice, body.parallel_tool_calls)
    messages, functions = conversation(body.messages), tools.tools if tools else ()
    with naming("messages"):
        prompt = tokenizer.chat(messages, context, functions)
    settings = ChoiceSettings(
        model,
        max_tokens=body.max_completion_tokens or body.max_tokens or context,
        top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        context=context,
        tokenizer=tokenizer,
        grammar=chat_grammar(body, tools),
        prediction=predicted(body, tokenizer, context),
    )

    def encode(other: Tokenizer) -> Sequence[int]:
        return other.chat(messages, context, functions)

    requests = requests_for(body, tuple(prompt), settings, "messages", encode)
    return build_job("chat", body, settings, requests, ("",) * len(requests), tools=tools)


def conversation(messages: Sequence[ChatMessage]) -> list[Message]:
    """For the chat template. The result of a call has the name of the function that was called."""
    names = {call.id: call.function.name for message in messages for call in message.tool_calls}
    return [
        Message(each.role, each.content or "", each.calls, each.tool_call_id, names.get(each.tool_call_id, ""))
        for each in messages
    ]


def chat_grammar(body: ChatRequest, tools: ToolUse | None) -> Grammar | None:
    """Of an answer that has to be a call, or in a format. Raises ApiError 400 where it may be either."""
    answer = answer_grammar(body.response_format)
    if tools is None:
        return answer
    if tools.forced:
        return call_grammar(tools.callable)
    if answer is None:
        return strict_grammar(tools.callable) if tools.strict else None
    message = "response_format: not supported together with tools that the answer may call or not; state tool_choice"
    raise ApiError(400, message, param="response_format", code="unsupported_parameter")


def predicted(body: ChatRequest, tokenizer: Tokenizer, context: int) -> tuple[int, ...]:
    """Tokens of the prediction, without those before every text. Raises ApiError."""
    if body.prediction is None:
        return ()
    with naming("prediction"):
        tokenizer.check_length(body.prediction.content, context)
        return tuple(tokenizer.continuation(body.prediction.content))
