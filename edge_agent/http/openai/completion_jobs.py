"""From the body of a completion to a Job: prompts as text or token ids, echoed or not."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from isthmus.edge_agent.http.openai.errors import ApiError
from isthmus.edge_agent.http.openai.jobs import ChoiceSettings, Job, build_job, naming, requests_for
from isthmus.edge_agent.http.openai.model_names import select_model
from isthmus.edge_agent.http.openai.schema import CompletionRequest, parse_request
from isthmus.edge_agent.language.request import GenerationBackend, GenerationRequest
from isthmus.models.language.checkpoint.tokenizer import Tokenizer

MAX_CHOICES = 128  # of all prompts of a request together: they are generated one after the other
DEFAULT_COMPLETION_TOKENS = 16


def completion_job(data: bytes, private: bool, backend: GenerationBackend) -> Job:
    """The job of a body of /v1/completions. Raises ApiError."""
    return job_of_completion(parse_request(CompletionRequest, data), private, backend)


def job_of_completion(body: CompletionRequest, private: bool, backend: GenerationBackend) -> Job:
    """The job of a completion. Raises ApiError."""
    check_completion(body)
    model = select_model(body, private or body.private, backend)
    tokenizer, context = backend.tokenizer_for(model.arm), backend.arm_context(model.arm)
    max_tokens = DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    settings = ChoiceSettings(model, max_tokens, body.logprobs, context, tokenizer)
    scores = body.echo and body.logprobs is not None
    requests: list[GenerationRequest] = []
    echoed_prompts: list[str] = []
    for prompt in body.prompt:
        ids = encode_prompt(prompt, tokenizer, context)
        text = prompt if isinstance(prompt, str) else tokenizer.decode(ids)
        requests += requests_for(body, ids, settings, "prompt", partial(encoded, text))
        echoed_prompts += [text if body.echo and not scores else ""] * body.n
    return build_job("completion", body, settings, requests, echoed_prompts, scores_prompts=scores)


def encoded(text: str, tokenizer: Tokenizer) -> Sequence[int]:
    """A text by any tokenizer."""
    return tokenizer.encode(text)


def check_completion(body: CompletionRequest) -> None:
    """Raises ApiError 400 for fields that are valid each, but not together."""
    if body.best_of > body.n:
        raise ApiError(400, f"best_of is {body.best_of}, expected at most n ({body.n})", param="best_of")
    if len(body.prompt) * body.n > MAX_CHOICES:
        message = f"{len(body.prompt)} prompts with n = {body.n} have more than {MAX_CHOICES} choices"
        raise ApiError(400, message, param="prompt")


def encode_prompt(prompt: str | Sequence[int], tokenizer: Tokenizer, context: int) -> tuple[int, ...]:
    """The ids of a prompt, which may be given as ids. Raises ApiError for an id outside of the vocabulary."""
    if isinstance(prompt, str):
        with naming("prompt"):
            tokenizer.check_length(prompt, context)
            return tuple(tokenizer.encode(prompt))
    size = tokenizer.size
    wrong = next((id for id in prompt if not 0 <= id < size), None)
    if wrong is not None:
        raise ApiError(400, f"prompt: token id {str(wrong)[:20]}, expected 0 to {size - 1}", param="prompt")
    return tuple(prompt)
