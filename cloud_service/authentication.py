"""Who makes a gRPC call, and that only those who may reach a method do: every one of them but the health check.

The health check says whether the service serves and nothing else; balancers ask without credentials.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeAlias

import grpc

from isthmus.cloud_service.access import Access, Device, read_access
from isthmus.models.errors import InvalidInput
from isthmus.protos import status
from isthmus.protos.certificates import stamp

OPEN_TO_ALL = "/grpc.health.v1.Health/"
POLL_S = 2.0  # between two looks at the file of devices

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]

log = logging.getLogger("isthmus.cloud")


def device_of(context: Context, access: Access) -> Device:
    """Who makes a call. Without certificates and tokens: its connection.

    An address would prove nothing, and all devices behind one router or proxy share it.
    """
    if not access.needed:
        return Device(context.peer())
    authorization = str(dict(context.invocation_metadata() or ()).get("authorization", ""))
    return access.device(context.peer(), context.auth_context(), authorization)


class Authentication(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Aborts calls of whom `access` refuses, and counts them by reason."""

    def __init__(self, access: Access, count: Callable[[str], None]) -> None:
        self._access, self._count = access, count

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        handler = await continuation(details)
        if handler is None or not self._access.needed or details.method.startswith(OPEN_TO_ALL):
            return handler
        return self._guarded(handler)

    def _guarded(self, handler: grpc.RpcMethodHandler) -> grpc.RpcMethodHandler:
        kind = "_".join(("unary", "stream")[each] for each in (handler.request_streaming, handler.response_streaming))
        behaviour = getattr(handler, kind)

        async def single(request: Any, context: Context) -> Any:
            await self._admit(context)
            return await behaviour(request, context)

        async def several(request: Any, context: Context) -> AsyncIterator[Any]:
            await self._admit(context)
            async with contextlib.aclosing(behaviour(request, context)) as responses:
                async for response in responses:
                    yield response

        make = getattr(grpc, f"{kind}_rpc_method_handler")
        guarded = several if handler.response_streaming else single
        return make(guarded, handler.request_deserializer, handler.response_serializer)

    async def _admit(self, context: Context) -> None:
        refusal = self._access.refusal(device_of(context, self._access))
        if refusal is not None:
            error, reason = refusal
            self._count(reason)
            await context.abort(*status.of_error(error))


async def follow(access: Access, changed: Callable[[], None]) -> None:
    """Until cancelled, read the file of devices again when it changes; `changed` is called then.

    A file that cannot be used changes nothing, and is logged once.
    """
    if access.path is None:
        return
    seen = stamp((access.path,))
    while True:
        await asyncio.sleep(POLL_S)
        if (found := stamp((access.path,))) == seen:
            continue
        seen = found
        try:
            access.use(await asyncio.to_thread(read_access, access.path))
        except InvalidInput as error:
            log.warning("the changed file of devices is not used: %s", error)
            continue
        log.info("the changed file of devices is used")
        changed()
