"""Whether an agent may still be used: it ends with `close`, and belongs to the process that made it.

After a fork the child lacks the threads of gRPC and ONNX Runtime, so that what it inherits can only hang.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import CancelledError
from typing import TypeVar

from isthmus.models.errors import AgentClosed

Item = TypeVar("Item")


class Lifetime:
    """Begins now, in this process."""

    def __init__(self) -> None:
        self._process = os.getpid()
        self.closed = False

    @property
    def inherited(self) -> bool:
        """Whether this process was forked after it began."""
        return os.getpid() != self._process

    def check(self) -> None:
        """Raises AgentClosed after the end, and in another process."""
        if self.inherited:
            raise AgentClosed("the agent was made before a fork, expected one that is made in each process")
        if self.closed:
            raise AgentClosed("the agent was closed before this request")

    def until_closed(self, items: Iterator[Item]) -> Iterator[Item]:
        """The items. Raises AgentClosed for what threads that the end has stopped say of it."""
        try:
            yield from items
        except (RuntimeError, CancelledError):
            self.check()
            raise
