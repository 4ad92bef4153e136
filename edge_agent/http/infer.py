"""HTTP endpoints for photos. Knows nothing about models or the link beyond EdgeAgent.

POST /v1/infer    body: an image file, or a multipart form with one -> the answer as JSON; ?deadline_ms=
                  ?task= names a task, repeatable; ?tap= ?width= ?rate= force a split at that operating point
                  ?private=1, or the header X-Isthmus-Private: nothing leaves the device
                  ?explain=1: with every way that was considered
POST /v1/vision/detection   boxes in the form that DeepStack's clients expect, with a bundle that detects
GET  /v1/status   bundle, whether the cloud answers, link estimates
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, TypeAlias

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from isthmus.edge_agent.config import MAX_DEADLINE_S, MIN_DEADLINE_S, HttpConfig
from isthmus.edge_agent.http.admission import AdmissionSlots
from isthmus.edge_agent.http.deepstack import answered, failed, least_confidence
from isthmus.edge_agent.http.disconnect import while_connected
from isthmus.edge_agent.http.forms import Form, read_form
from isthmus.edge_agent.http.guard import CLIENT_LEFT, problem
from isthmus.edge_agent.http.privacy import is_private, is_true
from isthmus.edge_agent.http.uploads import UploadRefused, Uploads
from isthmus.edge_agent.policy.breaker import WORDS
from isthmus.edge_agent.vision.agent import EdgeAgent
from isthmus.edge_agent.vision.metrics import EdgeMetrics
from isthmus.edge_agent.vision.result import Answer
from isthmus.edge_agent.vision.task_answers import Detections
from isthmus.models.errors import InvalidInput, Overloaded
from isthmus.models.settings import MAX_SHOWN, nearest
from isthmus.protos.limits import MAX_IMAGE_BYTES

MAX_COMPUTING = 4  # requests in threads at once; ONNX Runtime uses every core for each
PARAMETERS = ("deadline_ms", "task", "tap", "width", "rate", "private", "explain")
MAX_BODY_BYTES = 4 * MAX_IMAGE_BYTES  # an original from a camera; it is made smaller before it is sent on
Arguments: TypeAlias = dict[str, Any]  # of EdgeAgent.infer
MAX_HELD_BYTES = 8 * MAX_BODY_BYTES  # of all bodies together, arriving, waiting and being answered


class InferApi:
    """Handlers over one agent, with a limited number of admission slots."""

    def __init__(self, agent: EdgeAgent, metrics: EdgeMetrics, http: HttpConfig) -> None:
        self._agent = agent
        self._metrics = metrics
        self._slots = AdmissionSlots(http.max_requests)
        self._uploads = Uploads(MAX_BODY_BYTES, MAX_HELD_BYTES, http.client_timeout_s)
        self._computing = asyncio.Semaphore(MAX_COMPUTING)

    @property
    def routes(self) -> list[Route]:
        return [
            Route("/v1/infer", self.infer, methods=["POST"]),
            Route("/v1/vision/detection", self.detection, methods=["POST"]),
        ]

    def update_metrics(self) -> None:
        """Export the current state of the links and the budgets."""
        self._metrics.replicas(self._agent.replicas)
        self._metrics.budgets(self._agent.ledger)

    async def infer(self, request: Request) -> Response:
        """POST /v1/infer."""
        return await self._serve(request, query, self._infer, problem)

    async def detection(self, request: Request) -> Response:
        """POST /v1/vision/detection."""
        manifest = self._agent.manifest
        task = next((each.name for each in manifest.tasks if each.kind == "detect"), None)
        if task is None:
            return failed(404, f"bundle {manifest.name} has no task that detects")
        return await self._serve(request, privacy, partial(self._detect, task), failed)

    async def _serve(
        self,
        request: Request,
        parse: Callable[[Request], Arguments],
        respond: Callable[[Form, Arguments, float], Awaitable[Response]],
        refuse: Callable[[int, str, dict[str, str] | None], Response],
    ) -> Response:
        """One photo of a client that may leave; `refuse` is an error in the words of the API."""
        received_s = time.monotonic()
        try:
            arguments = parse(request)
            self._slots.check()
            async with self._uploads.body(request) as body, while_connected(request.receive):
                if not body:
                    raise InvalidInput("the body is empty, expected an image file or a multipart form with one")
                with self._slots.hold():
                    form = await run_in_threadpool(read_form, body, request.headers.get("content-type", ""))
                    return await respond(form, arguments, received_s)
        except UploadRefused as error:
            return refuse(error.status, str(error), {"Retry-After": "1"} if error.status == 503 else None)
        except InvalidInput as error:
            self._metrics.refused()
            return refuse(400, str(error), None)
        except Overloaded as error:
            return refuse(503, str(error), {"Retry-After": "1"})
        except ClientDisconnect:
            pass
        return Response(status_code=CLIENT_LEFT)

    async def _infer(self, form: Form, arguments: Arguments, received_s: float) -> Response:
        return JSONResponse((await self._answer(form.file, arguments, received_s)).as_dict())

    async def _detect(self, task: str, form: Form, arguments: Arguments, received_s: float) -> Response:
        least = least_confidence(form.fields)
        found = (await self._answer(form.file, {**arguments, "tasks": [task]}, received_s)).answers.get(task)
        if not isinstance(found, Detections):
            return failed(503, "no cloud answered, and the device has no exit", {"Retry-After": "1"})
        return JSONResponse(answered(found, least, time.monotonic() - received_s))

    async def _answer(self, photo: bytes, arguments: Arguments, received_s: float) -> Answer:
        async with self._computing:
            if "deadline_s" in arguments:  # the upload and the wait for a thread count
                left_s = arguments["deadline_s"] - (time.monotonic() - received_s)
                arguments["deadline_s"] = max(left_s, MIN_DEADLINE_S)
            return await run_in_threadpool(partial(self._agent.infer, photo, **arguments))

    def status(self) -> dict[str, Any]:
        """What /v1/status says of photos."""
        manifest, link, replicas = self._agent.manifest, self._agent.replicas.current, self._agent.replicas
        estimate = link.estimate if link else None
        taps = {
            tap.name: {"widths": [w.width for w in tap.widths], "rates": len(tap.widths[0].rates)}
            for tap in manifest.taps
        }
        return {
            "bundle": {
                "name": manifest.name,
                "fingerprint": manifest.fingerprint,
                "tasks": {task.name: task.labels for task in manifest.tasks},
                "kinds": {task.name: task.kind for task in manifest.tasks},
                "taps": taps,
            },
            "mode": self._agent.config.mode,
            "objective": self._agent.config.objective,
            "profile": self._agent.profile.name,
            "budgets": [
                {
                    "amount": each.budget.amount,
                    "period_s": each.budget.period_s,
                    "limit": each.budget.limit,
                    "left": max(each.level, 0.0),
                }
                for each in self._agent.ledger.buckets()
            ],
            "exit_confidence": threshold if (threshold := self._agent.goal.exit_confidence) <= 1 else None,
            "exit_confidences": [each if each <= 1 else None for each in self._agent.exit_rule.confidences],
            "certificates_void": self._agent.certificates_void,
            "cloud": WORDS[link.state] if link else None,
            "cloud_problem": link.refusal if link else None,
            "clouds": [
                {"address": each.target, "state": WORDS[each.state], "problem": each.refusal} for each in replicas
            ],
            "link": {"rtt_s": estimate.rtt_s, "bytes_per_s": estimate.bytes_per_s} if estimate else None,
        }


def privacy(request: Request) -> Arguments:
    """What a request without a query says."""
    return {"private": True} if is_private(request.headers) else {}


def query(request: Request) -> Arguments:
    """The query as arguments of `EdgeAgent.infer`, which checks names itself. Raises InvalidInput."""
    given = request.query_params
    for name in given:
        if name not in PARAMETERS:
            raise InvalidInput(f"unknown query parameter {ascii(name)[:MAX_SHOWN]}{nearest(name, PARAMETERS)}")
    arguments: Arguments = {"tasks": given.getlist("task") or None, "tap": given.get("tap")}
    if "deadline_ms" in given:
        arguments["deadline_s"] = (
            number(given["deadline_ms"], "deadline_ms", 1000 * MIN_DEADLINE_S, 1000 * MAX_DEADLINE_S) / 1000
        )
    if "width" in given:
        arguments["width"] = number(given["width"], "width", 0, 1)
    if "rate" in given:
        if not (rate := given["rate"]).isdecimal() or len(rate) > 9:
            raise InvalidInput(f"rate is {rate[:20]!r}, expected a whole number")
        arguments["rate"] = int(rate)
    arguments |= {name: True for name in ("private", "explain") if is_true(given.get(name, ""))}
    return arguments | privacy(request)


def number(text: str, name: str, least: float, most: float) -> float:
    """`text` as a number. Raises InvalidInput unless it is one within these bounds."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not least <= value <= most:
        raise InvalidInput(f"{name} is {text[:20]!r}, expected {least:g} to {most:g}")
    return value
