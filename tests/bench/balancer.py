"""Debian's haproxy with the configuration that we ship, before two replicas on this machine."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from tests.bench.processes import ROOT, free_port

CONFIGURATION = ROOT / "cloud_service" / "balancer" / "haproxy.cfg"
START_S = 10.0


class Haproxy:
    """One process; `target` is its address. Raises RuntimeError where haproxy is not installed or does not start."""

    def __init__(self, first: str, second: str, prefix: tuple[str, ...] = ()) -> None:
        """Addresses of the replicas; `prefix` is a command that starts another, such as nice."""
        self.target, self.metrics = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
        self._replicas, self._prefix = (first, second), prefix
        self._log = tempfile.NamedTemporaryFile(prefix="haproxy-", suffix=".log")  # noqa: SIM115

    def __enter__(self) -> Haproxy:
        program = shutil.which("haproxy", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
        if program is None:
            raise RuntimeError("haproxy is not installed, expected Debian's: apt-get install haproxy")
        names = {"BALANCER_LISTEN": self.target, "BALANCER_METRICS": self.metrics}
        names |= dict(zip(("REPLICA_1", "REPLICA_2"), self._replicas, strict=True))
        command = [*self._prefix, program, "-db", "-f", str(CONFIGURATION)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log, env={**os.environ, **names}
        )
        until_s = time.monotonic() + START_S
        while not self._accepts():
            if self.process.poll() is not None or time.monotonic() > until_s:
                raise RuntimeError(f"haproxy does not serve:\n{self.read_log()}")
            time.sleep(0.02)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            error.add_note(f"haproxy's log:\n{self.read_log()}")
        self.process.terminate()
        self.process.wait(10)
        self._log.close()

    def in_use(self) -> list[str]:
        """Names of the replicas that requests are sent to."""
        return self._servers("haproxy_server_status", state="UP")

    def busy(self) -> list[str]:
        """Names of the replicas that have streams."""
        return self._servers("haproxy_server_current_sessions")

    def read_log(self) -> str:
        return Path(self._log.name).read_text(encoding="utf-8", errors="replace")

    def _servers(self, metric: str, **labels: str) -> list[str]:
        """Those whose `metric` is above 0."""
        with urllib.request.urlopen(f"http://{self.metrics}/metrics", timeout=5) as reply:
            families = text_string_to_metric_families(reply.read().decode())
        samples = [sample for family in families for sample in family.samples if sample.name == metric]
        return [s.labels["server"] for s in samples if s.value and labels.items() <= s.labels.items()]

    def _accepts(self) -> bool:
        host, port = self.target.rsplit(":", 1)
        try:
            socket.create_connection((host, int(port)), 1).close()
        except OSError:
            return False
        return True
