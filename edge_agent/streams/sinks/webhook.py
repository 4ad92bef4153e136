"""Posts answers as JSON to a URL, whose user, password and query are in no message."""

from __future__ import annotations

from typing import Any

import httpx

from isthmus.models.address import shown_url
from isthmus.models.errors import LinkDown

TIMEOUT_S = 5.0


class Webhook:
    """One connection that is kept. Redirects are not followed."""

    def __init__(self, url: str, transport: httpx.BaseTransport | None = None) -> None:
        self._url = url
        self._client = httpx.Client(timeout=TIMEOUT_S, transport=transport)

    def __call__(self, line: dict[str, Any]) -> None:
        """Raises LinkDown unless it is accepted."""
        try:
            status = self._client.post(self._url, json=line).status_code
        except httpx.HTTPError as error:
            raise LinkDown(f"{shown_url(self._url)}: {type(error).__name__}") from error
        if not 200 <= status < 300:
            raise LinkDown(f"{shown_url(self._url)} answers {status}")
