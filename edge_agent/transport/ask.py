"""One question to a cloud, outside of any agent: whether it answers, and what it holds."""

from __future__ import annotations

import grpc

from isthmus.edge_agent.config import Tls
from isthmus.edge_agent.transport.channel import rpc_error
from isthmus.edge_agent.transport.cloud_stub import CloudStub
from isthmus.edge_agent.transport.tls_failures import explain_closed
from isthmus.models.errors import LinkDown
from isthmus.models.messages import ServiceInfo
from isthmus.protos import wire_describe
from isthmus.protos.isthmus.v1 import isthmus_pb2 as pb


def ask_cloud(target: str, tls: Tls | None, timeout_s: float) -> ServiceInfo:
    """What the cloud says of itself. Raises InvalidInput for files of `tls`, or what keeps it from answering."""
    stub = CloudStub(target, tls)
    try:
        return wire_describe.unpack_service(stub.Describe(pb.DescribeRequest(), timeout=timeout_s))
    except grpc.RpcError as failure:
        error = rpc_error(failure)
        if (words := explain_closed(str(error), target, tls)) is not None:
            raise LinkDown(words) from failure
        raise error from failure
    finally:
        stub.close()
