"""An agent for prompts from the command's settings, or the end of the program with one line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from isthmus.edge_agent.config import HttpConfig, LanguageConfig
from isthmus.models.errors import IsthmusError
from isthmus.models.fail import fail, needing

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from isthmus.edge_agent.language.agent import LanguageAgent


def open_prompts(config: LanguageConfig, registry: CollectorRegistry | None = None) -> LanguageAgent:
    with needing("edge,llm"):
        from isthmus.edge_agent.language.agent import LanguageAgent
        from isthmus.edge_agent.language.metrics import LanguageMetrics
    try:
        return LanguageAgent(config, LanguageMetrics(registry) if registry is not None else None)
    except (IsthmusError, OSError) as error:
        fail(error)


def open_routes(agent: LanguageAgent, http: HttpConfig) -> list[Any]:
    """HTTP routes of an agent for prompts."""
    from isthmus.edge_agent.http.openai.routes import routes
    from isthmus.edge_agent.http.openai.state import Limits

    limits = Limits(http.max_requests, agent.config.max_answers, client_timeout_s=http.client_timeout_s)
    return list(routes(agent, limits))
