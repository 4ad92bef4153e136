"""Whether an agent may still be used: it ends with `close`, and belongs to the process that made it.

After a fork the child lacks the threads of gRPC and ONNX Runtime, so that what it inherits can only hang.
"""

from __future__ import annotations

import os

from isthmus.models.errors import AgentClosed


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
