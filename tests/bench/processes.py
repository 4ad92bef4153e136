"""Real processes for contract tests, demos and benchmarks: cloud service and agent, started as an operator does."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).resolve().parents[2]
START_S = 60.0  # includes importing PyTorch on a busy machine


def free_port() -> int:
    """A loopback port that is free at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class CloudProcess:
    """`python -m isthmus.cloud_service` on loopback. It may be killed and restarted; its ports stay the same."""

    def __init__(
        self,
        *bundles: Path,
        arguments: tuple[str, ...] = (),
        module: str = "isthmus.cloud_service",
        cpus: str = "",
        command: tuple[str, ...] = (),
    ) -> None:
        """`cpus` are the cores it may use, in the notation of taskset; empty for all. `command`: of the program's."""
        self.port, self.metrics_port = free_port(), free_port()
        taskset = ["taskset", "-c", cpus] if cpus else []
        self._arguments = [*taskset, sys.executable, "-m", module, *command]
        self._arguments += [
            "--listen",
            f"127.0.0.1:{self.port}",
            "--metrics",
            f"127.0.0.1:{self.metrics_port}",
            *arguments,
        ]
        for bundle in bundles:
            self._arguments += ["--bundle", str(bundle)]
        self.process: subprocess.Popen[bytes] | None = None
        self.log_text = ""  # set when it has ended
        self.log = tempfile.NamedTemporaryFile(prefix="cloud-", suffix=".log")  # noqa: SIM115

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    def __enter__(self) -> CloudProcess:
        try:
            return self.start()
        except BaseException:
            self.stop()
            raise

    def __exit__(self, *exception: object) -> None:
        self.stop()
        self.log_text = self.read_log()
        self.log.close()

    def start(self, wait: bool = True) -> CloudProcess:
        """Start it and, if `wait`, wait until its health status is SERVING. Raises RuntimeError."""
        self.process = subprocess.Popen(
            self._arguments, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log, env=dict(os.environ)
        )
        if wait:
            self.wait_serving()
        return self

    def wait_serving(self) -> None:
        """Wait until the health status is SERVING. Raises RuntimeError if it ends, or after START_S seconds."""
        deadline_s = time.monotonic() + START_S
        while time.monotonic() < deadline_s:
            if self.process is not None and self.process.poll() is not None:
                raise RuntimeError(f"the cloud ended with {self.process.returncode}:\n{self.read_log()}")
            if self.health() == health_pb2.HealthCheckResponse.SERVING:
                return
            time.sleep(0.1)
        raise RuntimeError(f"the cloud did not serve within {START_S:.0f} s:\n{self.read_log()}")

    def health(self) -> int | None:
        """The health status it reports, or None if it does not answer."""
        with grpc.insecure_channel(self.target) as channel:
            try:
                reply = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=1)
            except grpc.RpcError:
                return None
        return int(reply.status)

    def kill(self) -> None:
        """Send SIGKILL, and wait."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self, timeout_s: float = 30.0) -> int | None:
        """Send SIGTERM, wait up to `timeout_s`, then kill. Returns the exit status, None if it never started."""
        if self.process is None or self.process.poll() is not None:
            return self.process.returncode if self.process else None
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def metric(self, name: str, **labels: str) -> float:
        """The value of `isthmus_cloud_<name>`, summed over the labels that are not given. Raises KeyError."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=5) as reply:
            families = text_string_to_metric_families(reply.read().decode())
        samples = [sample for family in families for sample in family.samples if sample.name == f"isthmus_cloud_{name}"]
        if not samples:
            raise KeyError(f"the service exports no isthmus_cloud_{name}")
        return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())

    def read_log(self) -> str:
        return Path(self.log.name).read_text(encoding="utf-8", errors="replace")


class EdgeProcess:
    """`python -m isthmus.edge_agent run` on a loopback port."""

    def __init__(self, *arguments: str) -> None:
        self.url = f"http://127.0.0.1:{(port := free_port())}"
        self._arguments = [sys.executable, "-m", "isthmus.edge_agent", "run"]
        self._arguments += ["--listen", f"127.0.0.1:{port}", *arguments]
        self._log = tempfile.NamedTemporaryFile(prefix="edge-", suffix=".log")  # noqa: SIM115

    def __enter__(self) -> EdgeProcess:
        self.process = subprocess.Popen(
            self._arguments, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log
        )
        deadline_s = time.monotonic() + START_S
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > deadline_s:
                self.process.kill()
                raise RuntimeError(f"the agent does not serve:\n{self.read_log()}")
            time.sleep(0.05)
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._log.close()

    def read_log(self) -> str:
        return Path(self._log.name).read_text(encoding="utf-8", errors="replace")

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/healthz", timeout=1) as reply:
                return bool(reply.status == 200)
        except OSError:
            return False
