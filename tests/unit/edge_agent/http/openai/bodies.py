"""Jobs from bodies that a test changes in some fields."""

from __future__ import annotations

import json
from typing import Any

from isthmus.edge_agent.http.openai.chat_jobs import chat_job
from isthmus.edge_agent.http.openai.completion_jobs import completion_job
from isthmus.edge_agent.http.openai.jobs import Job
from tests.unit.edge_agent.language.scripted import ScriptedBackend

BACKEND = ScriptedBackend()
HI = [{"role": "user", "content": "hi"}]


def chat(header: bool = False, backend: ScriptedBackend = BACKEND, **fields: Any) -> Job:
    body = {"model": "auto", "messages": HI, **fields}
    return chat_job(json.dumps(body).encode(), header, backend)


def completion(header: bool = False, backend: ScriptedBackend = BACKEND, **fields: Any) -> Job:
    body = {"model": "auto", "prompt": "hi", **fields}
    return completion_job(json.dumps(body).encode(), header, backend)
