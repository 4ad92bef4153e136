"""Replicas as a deployment of Ray Serve, which starts, replaces, adds and removes them. Only this module imports Ray.

    forwarder -> handle: of two replicas at random, the one with the shorter queue -> a process on any node

Whoever reaches a Ray cluster can run code on it. One that is started here listens on loopback, as far as Ray can, and
demands a token everywhere (`cli` says how); Serve's own proxies stay off: devices come in by the gRPC service.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
import torch
from prometheus_client import CollectorRegistry
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException

from isthmus.cloud_service.config import CloudConfig, RayConfig
from isthmus.cloud_service.vision.forwarder import Forwarder, ReplicaAnswer, ReplicaLost
from isthmus.cloud_service.vision.groups import Groups
from isthmus.cloud_service.vision.predictor import info_of
from isthmus.cloud_service.vision.replica import Replica
from isthmus.models.errors import InvalidInput, Overloaded, ServiceError
from isthmus.models.messages import CloudRequest
from isthmus.models.vision.bundle import Bundle

APP, DEPLOYMENT = "isthmus", "photos"
OBJECT_STORE_BYTES = 256 << 20  # for payloads above 100 kB on their way; Ray's default is a third of the memory
# Of a replica's process. Its decoders start in process groups, which uvloop cannot do; for the others see `cli`.
REPLICA_ENVIRONMENT = {"RAY_USE_UVLOOP": "0", "GOMP_SPINCOUNT": "0", "MKL_CBWR": "AUTO,STRICT"}
HEALTH_S, HUNG_S = 2.0, 10.0  # between checks of a replica; without an answer for so long it is replaced
CALLS = 2  # to each replica before requests share them: it decodes one group while it computes another
COUNT_S, SILENT_S = 3.0, 30.0  # between counts of replicas; without one for so long the cluster is gone
RETRY_S = 1.0  # until there may be a replica, when none runs and too many wait for one

log = logging.getLogger("isthmus.cloud")


class RayReplicas:
    """`Replicas` that a handle of Ray Serve reaches. Ray's errors are translated here."""

    def __init__(self, handle: Any, count: int) -> None:
        """`count`: how many run now."""
        self._call = handle.predict
        self._groups = Groups(self._predict, lambda: CALLS * max(self._counted[1], 1))
        self._counted = (time.monotonic(), count)
        # A daemon: a call to a cluster that has ended never returns.
        threading.Thread(target=self._keep_counting, name="replicas", daemon=True).start()

    async def ask(self, request: CloudRequest, peer: str, alone: bool) -> ReplicaAnswer:
        if alone:
            (answer,) = await self._predict([(request, peer)])
            return answer
        return await self._groups.ask((request, peer))

    async def _predict(self, requests: Sequence[tuple[CloudRequest, str]]) -> Sequence[ReplicaAnswer]:
        response = self._call.remote(requests)
        try:
            answers: Sequence[ReplicaAnswer] = await response
        except asyncio.CancelledError:
            response.cancel()
            raise
        except BackPressureError as error:
            raise Overloaded("no replica has room for this input", RETRY_S) from error
        except DeploymentUnavailableError as error:
            raise ServiceError("no replica could be started") from error
        except RayTaskError as error:
            log.error("a replica failed: %s", error)
            raise ServiceError("the replica failed on this input") from error
        except (RayError, RayServeException) as error:
            raise ReplicaLost(str(error)) from error
        return answers

    def count(self) -> int:
        counted_s, count = self._counted
        if time.monotonic() - counted_s > SILENT_S:
            raise ServiceError(f"Ray has not answered for {SILENT_S:.0f} s")
        return count

    def _keep_counting(self) -> None:
        while True:
            with contextlib.suppress(RayError, RayServeException, KeyError):
                deployment = serve.status().applications[APP].deployments[DEPLOYMENT]
                self._counted = (time.monotonic(), int(deployment.replica_states.get("RUNNING", 0)))
            time.sleep(COUNT_S)


@contextmanager
def cluster(config: RayConfig) -> Iterator[None]:
    """A connection to the cluster at an address, or a cluster of this machine, which ends with it.

    Raises InvalidInput or ServiceError.
    """
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)  # a dead replica is a warning for each request
    shared: dict[str, Any] = {"configure_logging": False, "log_to_driver": False}
    try:
        if config.address is not None:
            ray.init(config.address, **shared)
            yield
            return
        os.umask(0o077)  # the token is for this user alone
        with tempfile.TemporaryDirectory(prefix="isthmus-ray-") as private:  # Ray opens its own folder to everybody
            folder = os.path.join(private, "ray")
            context = ray.init("local", object_store_memory=OBJECT_STORE_BYTES, _temp_dir=folder, **shared)
            log.info("Ray's dashboard is on http://%s; `ray get-auth-token` prints its token", context.dashboard_url)
            yield
            ray.shutdown()
    except (ConnectionError, RayError) as error:
        where = f"at {config.address}" if config.address else "on this machine"
        raise InvalidInput(f"cannot reach a Ray cluster {where}: {first_line(error)}") from error
    finally:
        ray.shutdown()


def load(config: CloudConfig, registry: CollectorRegistry, device: torch.device, replicas: RayConfig) -> Forwarder:
    """Deploy replicas that hold the bundles of the configuration, and wait for them. Needs a `cluster`.

    Replicas of an earlier service are replaced one by one. Raises BundleError, InvalidInput or ServiceError.
    """
    bundles = [info_of(Bundle.open(folder)) for folder in config.bundles]
    cores = max(config.threads, 1)
    if replicas.address is None and (have := int(ray.cluster_resources().get("CPU", 0))) < replicas.replicas * cores:
        needed = f"{replicas.replicas} replicas of {cores} cores"
        raise InvalidInput(f"--replicas: this machine has {have} cores, which is too few for {needed}")
    held = CloudConfig(
        bundles=tuple(folder.absolute() for folder in config.bundles),
        threads=config.threads,
        batch=config.batch,
        queue_limit=config.queue_limit,
        device=config.device.partition(":")[0],  # which one of a node is Ray's business
        drain_s=config.drain_s,
    )
    serve.start(proxy_location="Disabled", logging_config=QUIET)
    log.info("starting %d replicas", replicas.replicas)
    try:
        handle = serve.run(deployment(held, replicas, cores).bind(held), name=APP, route_prefix=None)
    except (RuntimeError, RayError, RayServeException) as error:
        raise ServiceError(f"the replicas do not start: {first_line(error)}") from error
    return Forwarder(bundles, RayReplicas(handle, replicas.replicas), registry)


QUIET = {"log_level": "WARNING", "enable_access_log": False}


def deployment(config: CloudConfig, replicas: RayConfig, cores: int) -> Any:
    """How many replicas, and how much each takes. A replica's own queue refuses first: it is fair to devices."""
    most = max(replicas.max_replicas, replicas.replicas)
    scale = {
        "min_replicas": replicas.replicas,
        "initial_replicas": replicas.replicas,
        "max_replicas": most,
        "target_ongoing_requests": config.batch.max_size,
    }
    return serve.deployment(
        name=DEPLOYMENT,
        **({"autoscaling_config": scale} if most > replicas.replicas else {"num_replicas": replicas.replicas}),
        ray_actor_options={
            "num_cpus": cores,
            "num_gpus": int(config.device == "cuda"),
            "runtime_env": {"env_vars": REPLICA_ENVIRONMENT},
        },
        max_ongoing_requests=2 * config.queue_limit,
        max_queued_requests=config.queue_limit,
        health_check_period_s=HEALTH_S,
        health_check_timeout_s=HUNG_S,
        graceful_shutdown_timeout_s=config.drain_s,
        logging_config=QUIET,
    )(Replica)


def first_line(error: Exception) -> str:
    """What Ray says, without its advice."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
