"""Names of models: a model is the checkpoint by an arm, so that `model` selects the arm.

tiny, auto, tiny:auto    the arm is chosen for each request, in mid-answer too
edge, tiny:edge, …       this arm
auto-q0.9                auto, with this quality: the share of tokens that are to equal the cloud model's choice
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
CLOUD_ARMS = ("cloud", "verify", "handoff")  # always send the prompt, or what is computed from it


@dataclass(frozen=True, slots=True)
class SelectedModel:
    """What a model name selects. `name` is the canonical one; `quality` None: the one that is configured."""

    name: str
    arm: Arm
    quality: float | None


def available_models(backend: GenerationBackend) -> dict[str, Arm]:
    """Model names, with the arm that each selects now."""
    arms: dict[str, Arm] = {arm: arm for arm in backend.arms()}
    return {backend.name: "auto", **arms, **{f"{backend.name}:{name}": arm for name, arm in arms.items()}}


def select_model(request: BaseRequest, private: bool, backend: GenerationBackend) -> SelectedModel:
    """Raises ApiError 404 for an unknown name, and 400 where the request is private and the arm needs the cloud."""
    name, quality = request.model, request.quality
    if private and name.removeprefix(f"{backend.name}:") in CLOUD_ARMS:
        message = f"model {name} sends data to the cloud, but the request is private"
        raise ApiError(400, message, param="model")
    available = available_models(backend)
    if match := WITH_QUALITY.fullmatch(name):
        name, quality = match[1], float(match[2])
    if name not in available or (match and available[name] != "auto"):
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
