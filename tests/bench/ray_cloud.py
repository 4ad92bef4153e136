"""`cloud-service ray` as a process, with a cluster of its own, and the replicas that Ray starts for it."""

from __future__ import annotations

import os
import time
from pathlib import Path

import psutil

from tests.bench.processes import CloudProcess

NAME = "ray::ServeReplica:isthmus"
REPLACED_S = 60.0  # PyTorch is imported again


class RayProcess(CloudProcess):
    """A service whose photos are computed by `count` replicas."""

    def __init__(self, *bundles: Path, count: int, arguments: tuple[str, ...] = ()) -> None:
        super().__init__(*bundles, command=("ray",), arguments=("--replicas", str(count), *arguments))
        self.count = count

    def replicas(self) -> list[psutil.Process]:
        """Processes of replicas, by age; some may not serve yet."""
        assert self.process is not None
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if child.cmdline() and child.cmdline()[0].startswith(NAME):
                    found.append(child)
            except (psutil.NoSuchProcess, psutil.ZombieProcess):
                continue
        return sorted(found, key=lambda child: child.create_time())

    def pin(self) -> None:
        """Give each replica a core of its own, all its threads."""
        for core, replica in enumerate(self.replicas()):
            for thread in replica.threads():
                os.sched_setaffinity(thread.id, {core % (os.cpu_count() or 1)})

    def kill_replica(self, number: int) -> None:
        """SIGKILL one replica, and wait until another one serves in its place. Raises RuntimeError."""
        replicas = self.replicas()
        replicas[number % len(replicas)].kill()
        deadline_s = time.monotonic() + REPLACED_S
        below = False
        while not below or self.metric("replicas") < self.count:
            below = below or self.metric("replicas") < self.count
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"the replica was not replaced within {REPLACED_S:.0f} s:\n{self.read_log()}")
            time.sleep(0.1)
