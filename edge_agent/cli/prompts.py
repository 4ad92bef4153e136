"""An agent for prompts from the command's settings, or the end of the program with one line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from isthmus.edge_agent.cli.clouds import describe_clouds
from isthmus.edge_agent.config import HttpConfig, LanguageConfig
from isthmus.models.errors import IsthmusError
from isthmus.models.fail import fail, needing

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from isthmus.edge_agent.language.agent import LanguageAgent
    from isthmus.edge_agent.policy.arms import Arm
    from isthmus.models.language.checkpoint.tokenizer import Tokenizer

SMOLLM2 = "smollm2"  # answers where neither a model nor a cloud is named


def open_prompts(config: LanguageConfig, registry: CollectorRegistry | None = None) -> LanguageAgent:
    with needing("edge,llm"):
        from isthmus.edge_agent.language.agent import LanguageAgent
        from isthmus.edge_agent.language.metrics import LanguageMetrics
    try:
        return LanguageAgent(config, LanguageMetrics(registry) if registry is not None else None)
    except (IsthmusError, OSError) as error:
        fail(error)


def warn(agent: LanguageAgent) -> None:
    """A line for each cloud that answers, and cannot be used."""
    for target, problem in agent.replicas.cloud.problems.items():
        click.echo(f"warning: cloud {target}: {problem}", err=True)


def tokenizer_of(agent: LanguageAgent, arm: Arm) -> Tokenizer:
    """What encodes prompts; without a model on the device it comes from a cloud, which is waited for."""
    if not agent.ready and not agent.replicas.cloud.problems:
        click.echo(f"waiting for a cloud: {describe_clouds(agent.replicas)}", err=True)
    try:
        return agent.tokenizer_for(arm)
    except IsthmusError as error:
        fail(error)


def describe_models(agent: LanguageAgent) -> str:
    """The device's model, and the cloud's where that is another."""
    cloud = agent.cloud_name
    if not agent.has_model:
        return f"{agent.name} in the cloud"
    return agent.name if cloud in (None, agent.name) else f"{agent.name} on the device, {cloud} in the cloud"


def open_routes(agent: LanguageAgent, http: HttpConfig) -> list[Any]:
    """HTTP routes of an agent for prompts."""
    from isthmus.edge_agent.http.openai.routes import routes
    from isthmus.edge_agent.http.openai.state import Limits

    limits = Limits(http.max_requests, agent.config.max_answers, client_timeout_s=http.client_timeout_s)
    return list(routes(agent, limits))
