"""Settings of what may be spent, and of what it is weighed by: parts of the agents' configurations."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from isthmus.edge_agent.policy.budgets import AMOUNTS, PERIODS, Budget
from isthmus.edge_agent.policy.prices import PRESETS, Objective, Weights
from isthmus.models.settings import Flag, Settings


@dataclass(frozen=True)
class Budgets(Settings):
    """Hard limits of what photos, prompts, probes and audits send in any hour and in any day."""

    bytes_hour: Annotated[
        float | None,
        Field(gt=0, description="Most bytes sent and received in any hour, as whole messages. Without it: any."),
        Flag("budget_bytes_per_hour"),
    ] = None
    bytes_day: Annotated[
        float | None,
        Field(gt=0, description="Most bytes sent and received in any day, as whole messages. Without it: any."),
        Flag("budget_bytes_per_day"),
    ] = None
    usd_hour: Annotated[
        float | None,
        Field(gt=0, description="Most US dollars spent on the link and the cloud in any hour. Without it: any."),
        Flag("budget_usd_per_hour"),
    ] = None
    usd_day: Annotated[
        float | None,
        Field(gt=0, description="Most US dollars spent on the link and the cloud in any day. Without it: any."),
        Flag("budget_usd_per_day"),
    ] = None
    joules_hour: Annotated[
        float | None,
        Field(gt=0, description="Most modelled joules of sending and waiting in any hour. Without it: any."),
        Flag("budget_joules_per_hour"),
    ] = None
    joules_day: Annotated[
        float | None,
        Field(gt=0, description="Most modelled joules of sending and waiting in any day. Without it: any."),
        Flag("budget_joules_per_day"),
    ] = None
    calls_hour: Annotated[
        int | None,
        Field(ge=1, description="Most calls of a cloud in any hour. Without it: any."),
        Flag("budget_calls_per_hour"),
    ] = None
    calls_day: Annotated[
        int | None,
        Field(ge=1, description="Most calls of a cloud in any day. Without it: any."),
        Flag("budget_calls_per_day"),
    ] = None

    @property
    def budgets(self) -> tuple[Budget, ...]:
        """Those that are set."""
        limits = (
            (amount, period_s, getattr(self, f"{amount}_{PERIODS[period_s]}"))
            for amount in AMOUNTS
            for period_s in PERIODS
        )
        return tuple(Budget(amount, limit, period_s) for amount, period_s, limit in limits if limit is not None)


@dataclass(frozen=True)
class OwnWeights(Settings):
    """Weights in place of the objective's own, on one scale."""

    seconds: Annotated[
        float | None,
        Field(ge=0, description="What a second costs the router, in place of the objective's own weight."),
        Flag("weight_second"),
    ] = None
    usd: Annotated[
        float | None,
        Field(ge=0, description="What a US dollar costs the router, in place of the objective's own weight."),
        Flag("weight_usd"),
    ] = None
    joules: Annotated[
        float | None,
        Field(ge=0, description="What a modelled joule costs the router, in place of the objective's own weight."),
        Flag("weight_joule"),
    ] = None
    quality: Annotated[
        float | None,
        Field(
            ge=0,
            description="What a point of agreement with the cloud's model is worth to the router, in place of the"
            " objective's own weight.",
        ),
        Flag("weight_point", 0.01),
    ] = None

    def over(self, objective: Objective) -> Weights:
        """The objective's weights, with these in their place."""
        own = {name: value for name in Weights._fields if (value := getattr(self, name)) is not None}
        return PRESETS[objective]._replace(**own)
