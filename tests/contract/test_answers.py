"""The same photo, answered every way, by a device and a cloud in different processes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from PIL import Image

from edge_agent import EdgeAgent
from edge_agent.config import WholeImage
from models.bundle import Bundle
from models.types import CloudRequest, Codec, Payload
from models.vision.head import Head
from models.vision.images import encode_image, open_image, preprocess
from models.vision.tail import Tail
from protos import limits, wire
from protos.isthmus.v1 import isthmus_pb2 as pb
from protos.isthmus.v1 import isthmus_pb2_grpc as pb_grpc
from tests.bench.processes import CloudProcess

NewAgent = Callable[..., EdgeAgent]
ImageForm = Literal["jpeg", "png", "webp"]


def test_split_answer_is_the_local_computation(
    cloud: CloudProcess, new_agent: NewAgent, tiny_bundle: Bundle, photo: Image.Image
) -> None:
    answer = new_agent(cloud.target, mode="split").infer(photo)
    head, codec = Head(tiny_bundle, 1), tiny_bundle.codec()
    features_CHW = preprocess(photo, tiny_bundle.manifest.preprocessing)
    for index in range(head.exits):
        features_CHW, _ = head.segment(index, features_CHW)
    assert answer.rate is not None
    integers_CHW = codec.quantise(head.encode(features_CHW), answer.rate)
    expected_BK = Tail(tiny_bundle).answer_latents([codec.dequantise(integers_CHW, answer.rate)], [answer.rate])
    np.testing.assert_allclose(answer.probabilities, expected_BK[0], atol=1e-5)
    assert answer.route == "split" and not answer.degraded
    framing = answer.bytes_up - len(codec.encode(integers_CHW, answer.rate)) - 5  # gRPC's own prefix
    assert 0 < framing <= limits.MAX_FRAMING_BYTES


@pytest.mark.parametrize("form", ["jpeg", "png", "webp"])
def test_whole_image_answer_is_the_unsplit_model(
    cloud: CloudProcess, new_agent: NewAgent, tiny_bundle: Bundle, photo: Image.Image, form: ImageForm
) -> None:
    answer = new_agent(cloud.target, mode="offload", whole_image=WholeImage(form, 60)).infer(photo)
    arrived = photo if form == "png" else open_image(encode_image(photo, form, 60))
    expected_BK = Tail(tiny_bundle).answer_images([preprocess(arrived, tiny_bundle.manifest.preprocessing)])
    assert answer.route == "offload" and not answer.degraded
    np.testing.assert_allclose(answer.probabilities, expected_BK[0], atol=1e-5)


def test_unary_and_stream_agree(cloud: CloudProcess, tiny_bundle: Bundle) -> None:
    codec = tiny_bundle.codec()
    integers_CHW = codec.quantise(np.ones(codec.shape_CHW, np.float32), 1)
    payload = Payload(Codec.FACTORIZED, 1, codec.encode(integers_CHW, 1))
    message = wire.pack_request(CloudRequest(7, tiny_bundle.fingerprint, 10.0, payload))
    with grpc.insecure_channel(cloud.target) as channel:
        stub = pb_grpc.IsthmusStub(channel)  # type: ignore[no-untyped-call]
        alone = stub.Infer(message, timeout=10)
        (streamed,) = stub.InferStream(iter([message]), timeout=10)
    assert alone.request_id == streamed.request_id == 7
    assert alone.probabilities == streamed.probabilities


def test_many_at_once_get_their_own_answers(cloud: CloudProcess, new_agent: NewAgent, photo: Image.Image) -> None:
    agent = new_agent(cloud.target, mode="split", deadline_s=30.0)
    photos = [photo.rotate(90 * turn) for turn in range(4)] * 8
    alone = [agent.infer(turned).probabilities for turned in photos[:4]]
    with ThreadPoolExecutor(16) as threads:
        together = list(threads.map(agent.infer, photos))
    assert not any(answer.degraded for answer in together)
    for index, answer in enumerate(together):
        np.testing.assert_allclose(answer.probabilities, alone[index % 4], atol=1e-5)


def test_several_bundles_are_addressed_by_fingerprint(
    tiny_bundle: Bundle, elpv_bundle: Bundle, new_agent: NewAgent, photo: Image.Image
) -> None:
    with CloudProcess(tiny_bundle.folder, elpv_bundle.folder, arguments=("--threads", "1")) as both:
        small = new_agent(both.target, mode="offload", deadline_s=10.0).infer(photo)
        large = new_agent(both.target, bundle=elpv_bundle.folder, mode="offload", deadline_s=10.0).infer(photo)
    assert small.label in tiny_bundle.manifest.labels and large.label in elpv_bundle.manifest.labels
    assert not small.degraded and not large.degraded


def test_a_cloud_without_the_bundle_is_named_and_does_no_harm(
    cloud: CloudProcess, elpv_bundle: Bundle, new_agent: NewAgent, photo: Image.Image
) -> None:
    agent = new_agent(cloud.target, bundle=elpv_bundle.folder, epsilon=0.0)  # no exit is certified: the cloud is wanted
    answer = agent.infer(photo)
    assert answer.route == "fallback" and answer.degraded
    assert elpv_bundle.fingerprint.hex()[:12] in answer.why and "tiny" in answer.why


def test_health_and_reflection(cloud: CloudProcess) -> None:
    assert cloud.health() == health_pb2.HealthCheckResponse.SERVING
    with grpc.insecure_channel(cloud.target) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        (reply,) = stub.ServerReflectionInfo(iter([request]), timeout=5)
    names = {service.name for service in reply.list_services_response.service}
    assert {"isthmus.v1.Isthmus", "grpc.health.v1.Health"} <= names


def test_describe_tells_what_is_held(cloud: CloudProcess, tiny_bundle: Bundle) -> None:
    with grpc.insecure_channel(cloud.target) as channel:
        stub = pb_grpc.IsthmusStub(channel)  # type: ignore[no-untyped-call]
        reply = stub.Describe(pb.DescribeRequest(), timeout=5)
    (held,) = reply.bundles
    assert (held.name, held.labels, held.rates) == ("tiny", 2, 2)
    assert held.fingerprint == tiny_bundle.fingerprint and reply.wire_version == limits.WIRE_VERSION
