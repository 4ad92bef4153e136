"""An engine as a process that benchmarks and acceptance tests start, kill and start again."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import grpc
import httpx

from isthmus.protos.isthmus.v1 import isthmus_pb2 as pb
from isthmus.protos.isthmus.v1 import isthmus_pb2_grpc as pb_grpc
from tests.bench.processes import ROOT

START_S = 600.0  # an engine on a CPU takes a minute and a half, longer beside others


class EngineProcess:
    """A shell command that serves at `url` until it is killed; `{port}` in it stands for the port of the URL."""

    def __init__(self, command: str, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._command = shlex.split(command.replace("{port}", str(port)))
        self._process: subprocess.Popen[bytes] | None = None
        self._log = tempfile.NamedTemporaryFile(prefix="engine-", suffix=".log")  # noqa: SIM115

    def __enter__(self) -> EngineProcess:
        try:
            return self.start()
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *exception: object) -> None:
        self.kill()
        self._log.close()

    def start(self) -> EngineProcess:
        """Start it, and wait until it is healthy. Raises RuntimeError."""
        self._process = subprocess.Popen(
            self._command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )
        deadline_s = time.monotonic() + START_S
        while not self._healthy():
            if self._process.poll() is not None or time.monotonic() > deadline_s:
                log = Path(self._log.name).read_text(errors="replace")[-4000:]
                raise RuntimeError(f"the engine did not start: {shlex.join(self._command)}\n{log}")
            time.sleep(0.2)
        return self

    def kill(self) -> None:
        """Send SIGKILL to it and to every process that it started, and wait."""
        if self._process is None or self._process.poll() is not None:
            return
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _healthy(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", timeout=2, trust_env=False).status_code == 200
        except httpx.HTTPError:
            return False


def wait_described(target: str) -> None:
    """Wait until the cloud service has checked its engine, and lists its model. Raises RuntimeError."""
    deadline_s = time.monotonic() + START_S
    with grpc.insecure_channel(target) as channel:
        while not pb_grpc.IsthmusStub(channel).Describe(pb.DescribeRequest(), timeout=10).models:
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"the engine behind {target} cannot be used: see `cloud-service --check {target}`")
            time.sleep(0.2)
