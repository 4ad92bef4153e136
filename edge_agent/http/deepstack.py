"""Detections as DeepStack's API has them, so that Frigate, Blue Iris and Home Assistant use the agent unchanged.

    POST /v1/vision/detection, a multipart form: `image`, and `min_confidence` from 0 to 1, or in per cent
    {"success": true, "predictions": [{"label", "confidence", "x_min", "y_min", "x_max", "y_max"}], "duration": ms}

Source: DeepStack's documentation of object detection, and the clients of CodeProject.AI, which have both forms of
`min_confidence`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse, Response

from isthmus.edge_agent.vision.task_answers import Detections
from isthmus.models.errors import InvalidInput


def least_confidence(fields: Mapping[str, str]) -> float:
    """What the form asks for; without it every box of the bundle's. Raises InvalidInput."""
    text = fields.get("min_confidence", "0")
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 100:
        raise InvalidInput(f"min_confidence is {text[:20]!r}, expected 0 to 1, or 0 to 100 in per cent")
    return value / 100 if value > 1 else value


def answered(found: Detections, least: float, seconds: float) -> dict[str, Any]:
    """The body of an answer."""
    boxes = zip(found.names, found.scores.tolist(), found.boxes.round().astype(int).tolist(), strict=True)
    predictions = [
        {"label": label, "confidence": score, "x_min": left, "y_min": top, "x_max": right, "y_max": bottom}
        for label, score, (left, top, right, bottom) in boxes
        if score >= least
    ]
    return {"success": True, "predictions": predictions, "count": len(predictions), "duration": round(1000 * seconds)}


def failed(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    """The body of a request that was refused or failed."""
    content = {"success": False, "error": message, "code": status, "duration": 0}
    return JSONResponse(content, status, dict(headers or {}))
