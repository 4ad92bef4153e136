"""An agent for prompts from the command's settings, or the end of the program with one line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field
from pydantic.dataclasses import dataclass

from isthmus.edge_agent.config import LanguageConfig
from isthmus.edge_agent.language.request import Arm
from isthmus.models.errors import IsthmusError
from isthmus.models.fail import fail, needing
from isthmus.models.settings import Settings

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from isthmus.edge_agent.language.agent import LanguageAgent


@dataclass(frozen=True)
class ChatConfig(Settings):
    """A chat in the terminal."""

    arm: Annotated[
        Arm,
        Field(
            description="How answers are made. auto: the router chooses, token by token. edge: by the device. cloud: by"
            " the cloud. verify: drafted by the device, checked by the cloud. handoff: easy tokens by the device."
        ),
    ] = "auto"
    system: Annotated[str, Field(description="System message: what the model reads before the first question.")] = ""
    max_tokens: Annotated[
        int | None, Field(ge=1, description="Longest answer. Without it: what the context leaves.")
    ] = None
    temperature: Annotated[float, Field(ge=0, le=2, description="Sampling temperature; 0 is greedy.")] = 0.0
    seed: Annotated[int, Field(ge=0, description="Seed of the sampling.")] = 0


def open_prompts(config: LanguageConfig, registry: CollectorRegistry | None = None) -> LanguageAgent:
    with needing("edge,llm"):
        from isthmus.edge_agent.language.agent import LanguageAgent
        from isthmus.edge_agent.language.metrics import LanguageMetrics
    try:
        return LanguageAgent(config, LanguageMetrics(registry) if registry is not None else None)
    except (IsthmusError, OSError) as error:
        fail(error)


def open_routes(agent: Any) -> list[Any]:
    """HTTP routes of an agent for prompts."""
    from isthmus.edge_agent.http.openai.routes import routes

    return list(routes(agent))
