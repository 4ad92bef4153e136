"""Names of models: a model is the checkpoint by an arm, so that `model` selects the arm.

tiny, auto, tiny:auto    the arm is chosen for each request, in mid-answer too; an alias such as smollm2 is like tiny
edge, tiny:edge, …       this arm
auto-q0.9                auto, with this quality: the share of tokens that are to equal the cloud model's choice
cascade-q0.9             cascade, with this quality: the share of answers that are to be acceptable
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from isthmus.edge_agent.http.openai.errors import ApiError
from isthmus.edge_agent.http.openai.schema import BaseRequest
from isthmus.edge_agent.language.request import GenerationBackend
from isthmus.edge_agent.policy.arms import Arm

WITH_QUALITY = re.compile(r"(.+)-q(0(?:\.[0-9]{1,6})?|1(?:\.0{1,6})?)")
AUTO: Arm = "auto"
CLOUD_ARMS: tuple[Arm, ...] = ("cloud", "verify", "handoff", "cascade")
ROUTED_ARMS: tuple[Arm, ...] = ("auto", "cascade")  # which have a quality


@dataclass(frozen=True, slots=True)
class SelectedModel:
    """What a model name selects. `name` is the canonical one; `quality` None: the one that is configured."""

    name: str
    arm: Arm
    quality: float | None


def available_models(backend: GenerationBackend) -> dict[str, Arm]:
    """Model names, with the arm that each selects now."""
    arms: dict[str, Arm] = {arm: arm for arm in backend.arms()}
    names = (backend.name, *backend.aliases)
    qualified = {f"{name}:{arm}": arm for name in names for arm in arms.values()}
    return {**dict.fromkeys(names, AUTO), **arms, **qualified}


def select_model(request: BaseRequest, private: bool, backend: GenerationBackend) -> SelectedModel:
    """A private request is answered by `edge`, whatever arm it names. Raises ApiError 404 for an unknown name."""
    name, quality = request.model, request.quality
    available = available_models(backend)
    if private:  # arms that need a cloud are names also where there is none now
        prefixes = ("", *(f"{each}:" for each in (backend.name, *backend.aliases)))
        available |= {prefix + arm: arm for arm in CLOUD_ARMS for prefix in prefixes}
    if match := WITH_QUALITY.fullmatch(name):
        name, quality = match[1], float(match[2])
    if name not in available or (match and available[name] not in ROUTED_ARMS):
        raise unknown_model(request.model, available)
    arm = "edge" if private else available[name]
    return SelectedModel(f"{backend.name}:{arm}", arm, quality)


def unknown_model(name: str, available: Iterable[str]) -> ApiError:
    message = f"the model {name[:100]!r} does not exist or is not available now; available are {', '.join(available)}"
    return ApiError(404, message, param="model", code="model_not_found")


def model_list(backend: GenerationBackend, created: int) -> dict[str, Any]:
    """Body of GET /v1/models. `created` is a Unix time in seconds."""
    return {"object": "list", "data": [model_object(name, created) for name in available_models(backend)]}


def model_object(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "isthmus"}
