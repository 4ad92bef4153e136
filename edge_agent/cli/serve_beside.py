"""The page and the HTTP API beside another command, in a thread of their own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.types import ASGIApp

from isthmus.edge_agent.cli.serve import Server
from isthmus.edge_agent.config import HttpConfig
from isthmus.models.address import Address
from isthmus.models.errors import InvalidInput

START_S = 10.0


@contextmanager
def served(app: ASGIApp, http: HttpConfig) -> Iterator[Address]:
    """Serve while the context is open; gives the bound address. Raises InvalidInput if it cannot be bound."""
    bound: list[Address] = []
    opened = threading.Event()

    def announce(address: Address) -> None:
        bound.append(address)
        opened.set()

    def run() -> None:
        try:
            server.run()
        except SystemExit:  # uvicorn's way to say that the address is taken
            pass
        finally:
            opened.set()

    server = Server(app, http, announce)
    thread = threading.Thread(target=run, name="isthmus-page", daemon=True)
    thread.start()
    opened.wait(START_S)
    if not bound:
        raise InvalidInput(f"--page-listen {http.listen}: the address cannot be used")
    try:
        yield bound[0]
    finally:
        server.should_exit = True
        thread.join(START_S)
