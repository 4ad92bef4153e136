"""The same photo over every route, with device and cloud in different processes."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from PIL import Image

from isthmus.edge_agent import EdgeAgent
from isthmus.edge_agent.config import WholeImage
from isthmus.models.messages import CloudRequest, Codec, Payload
from isthmus.models.vision.bundle import Bundle
from isthmus.models.vision.head import Head
from isthmus.models.vision.images import encode_image, open_image, preprocess
from isthmus.models.vision.tail import Tail
from isthmus.protos import limits, wire
from isthmus.protos.isthmus.v1 import isthmus_pb2 as pb
from isthmus.protos.isthmus.v1 import isthmus_pb2_grpc as pb_grpc
from tests.bench.processes import ROOT, CloudProcess, EdgeProcess
from tests.tiny_bundle import TAPS, TINY

NewAgent = Callable[..., EdgeAgent]
ImageForm = Literal["jpeg", "png", "webp"]


POINTS = [("light", 0.5, 0), ("light", 0.5, 2), ("light", 1.0, 1), ("deep", 1.0, 1)]


@pytest.mark.parametrize(("tap", "width", "rate"), POINTS)
@pytest.mark.parametrize("tasks", [("defect",), ("colour", "defect")])
def test_split_answer_equals_the_local_computation(
    cloud: CloudProcess,
    new_agent: NewAgent,
    tiny_bundle: Bundle,
    photo: Image.Image,
    tap: str,
    width: float,
    rate: int,
    tasks: tuple[str, ...],
) -> None:
    answer = new_agent(cloud.target).infer(photo, tasks=tasks, tap=tap, width=width, rate=rate)
    index = TAPS.index(tap)
    head, codec = Head(tiny_bundle, 1), tiny_bundle.codec(index)
    x_CHW = preprocess(photo, tiny_bundle.manifest.preprocessing)
    for segment in range(TINY.taps[index].after):
        x_CHW, _ = head.segment(segment, x_CHW)
    integers_CHW = codec.quantise(head.encode(index, x_CHW, TINY.taps[index].widths.index(width)), rate)
    expected = Tail(tiny_bundle).latents_to_tasks(index, [codec.dequantise(integers_CHW, rate)], [rate], (0, 1))
    for name in tasks:
        expected_1K = expected[("defect", "colour").index(name)]
        np.testing.assert_allclose(answer.answers[name].probabilities, expected_1K[0], atol=1e-5)
    assert (answer.tap, answer.width, answer.rate) == (tap, width, rate)
    assert list(answer.answers) == list(tasks) and answer.label == answer.answers[tasks[0]].label
    assert answer.route == "split" and not answer.degraded and answer.missing == ()
    framing = answer.bytes_up - len(codec.encode(integers_CHW, rate)) - 5  # gRPC's prefix
    assert 0 < framing <= limits.MAX_FRAMING_BYTES


def test_points_and_tasks_change_from_request_to_request_over_http(
    cloud: CloudProcess, tiny_bundle: Bundle, photo: Image.Image
) -> None:
    """One agent and one stream: each request is encoded and answered as its query says."""
    arguments = ("--bundle", str(tiny_bundle.folder), "--cloud", cloud.target, "--threads", "1")
    with EdgeProcess(*arguments) as agent:
        for tap, width, rate in POINTS * 2:
            query = f"tap={tap}&width={width}&rate={rate}&task=defect&task=colour&deadline_ms=10000"
            request = urllib.request.Request(f"{agent.url}/v1/infer?{query}", encode_image(photo, "png", 0))
            with urllib.request.urlopen(request, timeout=20) as reply:
                answer = json.load(reply)
            assert (answer["tap"], answer["width"], answer["rate"], answer["route"]) == (tap, width, rate, "split")
            assert list(answer["answers"]) == ["defect", "colour"] and answer["missing"] == []


def test_points_and_tasks_are_chosen_on_the_command_line(
    cloud: CloudProcess, tiny_bundle: Bundle, photo: Image.Image, tmp_path: Path
) -> None:
    photo.save(tmp_path / "photo.png")
    command = [sys.executable, "-m", "isthmus.edge_agent", "infer", str(tmp_path / "photo.png"), "--json"]
    command += ["--bundle", str(tiny_bundle.folder), "--cloud", cloud.target, "--deadline-ms", "10000"]
    command += ["--tap", "light", "--width", "0.5", "--rate", "2", "--task", "colour"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    answer = json.loads(result.stdout)
    assert (answer["tap"], answer["width"], answer["rate"]) == ("light", 0.5, 2)
    assert answer["label"] in ("red", "green", "blue") and not answer["degraded"]


def test_the_cloud_counts_inputs_by_tap_and_task(tiny_bundle: Bundle, new_agent: NewAgent, photo: Image.Image) -> None:
    with CloudProcess(tiny_bundle.folder, arguments=("--threads", "1")) as own:
        agent = new_agent(own.target, deadline_s=10.0)
        agent.infer(photo, tap="light")
        agent.infer(photo, tap="deep", tasks=["defect", "colour"])
        assert [own.metric("inputs_total", tap=tap) for tap in ("light", "deep", "(image)")] == [1, 1, 0]
        assert [own.metric("task_answers_total", task=task) for task in ("defect", "colour")] == [2, 1]


@pytest.mark.parametrize("form", ["jpeg", "png", "webp"])
def test_whole_image_answer_equals_the_unsplit_model(
    cloud: CloudProcess, new_agent: NewAgent, tiny_bundle: Bundle, photo: Image.Image, form: ImageForm
) -> None:
    answer = new_agent(cloud.target, mode="offload", whole_image=WholeImage(form, 60)).infer(photo)
    arrived = photo if form == "png" else open_image(encode_image(photo, form, 60))
    expected_BK = Tail(tiny_bundle).answer_images([preprocess(arrived, tiny_bundle.manifest.preprocessing)])
    assert answer.route == "offload" and not answer.degraded
    np.testing.assert_allclose(answer.probabilities, expected_BK[0], atol=1e-5)


def test_unary_and_stream_agree(cloud: CloudProcess, tiny_bundle: Bundle) -> None:
    codec = tiny_bundle.codec(1)
    integers_CHW = codec.quantise(np.ones(codec.shape_CHW, np.float32), 1)
    payload = Payload(Codec.BOTTLENECK, 1, 1, codec.encode(integers_CHW, 1))
    message = wire.pack_request(CloudRequest(7, tiny_bundle.fingerprint, 10.0, payload, (0, 1)))
    with grpc.insecure_channel(cloud.target) as channel:
        stub = pb_grpc.IsthmusStub(channel)  # type: ignore[no-untyped-call]
        alone = stub.Infer(message, timeout=10)
        (streamed,) = stub.InferStream(iter([message]), timeout=10)
    assert alone.request_id == streamed.request_id == 7
    assert alone.probabilities == streamed.probabilities


def test_concurrent_requests_of_all_kinds_get_their_own_answers(
    cloud: CloudProcess, new_agent: NewAgent, photo: Image.Image
) -> None:
    agent = new_agent(cloud.target, deadline_s=30.0)
    points = [{"tap": tap, "width": width, "rate": rate} for tap, width, rate in POINTS]
    arguments = [
        {**point, "tasks": tasks} for point in points for tasks in (["defect"], ["colour"], ["defect", "colour"])
    ]
    alone = [agent.infer(photo, **each) for each in arguments]
    with ThreadPoolExecutor(16) as threads:
        together = list(threads.map(lambda each: agent.infer(photo, **each), arguments * 4))
    for answer, expected in zip(together, alone * 4, strict=True):
        assert (answer.route, answer.tap, answer.width, answer.rate) == (
            "split",
            expected.tap,
            expected.width,
            expected.rate,
        )
        assert answer.answers.keys() == expected.answers.keys()
        for name, task in answer.answers.items():
            np.testing.assert_allclose(task.probabilities, expected.answers[name].probabilities, atol=1e-5)


def test_concurrent_requests_get_their_own_answers(
    cloud: CloudProcess, new_agent: NewAgent, photo: Image.Image
) -> None:
    agent = new_agent(cloud.target, mode="split", deadline_s=30.0, min_agreement=0.97)  # one point meets it
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
    assert small.label in tiny_bundle.manifest.tasks[0].labels and large.label in elpv_bundle.manifest.tasks[0].labels
    assert not small.degraded and not large.degraded


def test_a_cloud_without_the_bundle_is_named_and_the_device_answers(
    cloud: CloudProcess, elpv_bundle: Bundle, new_agent: NewAgent, photo: Image.Image
) -> None:
    agent = new_agent(cloud.target, bundle=elpv_bundle.folder, epsilon=0.0)  # no exit is certified: the cloud is needed
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


def test_describe_lists_the_bundles(cloud: CloudProcess, tiny_bundle: Bundle) -> None:
    with grpc.insecure_channel(cloud.target) as channel:
        stub = pb_grpc.IsthmusStub(channel)  # type: ignore[no-untyped-call]
        reply = stub.Describe(pb.DescribeRequest(), timeout=5)
    (held,) = reply.bundles
    assert (held.name, held.fingerprint) == ("tiny", tiny_bundle.fingerprint)
    assert [(task.name, task.labels) for task in held.tasks] == [("defect", 2), ("colour", 3)]
    assert [(tap.name, tap.rates) for tap in held.taps] == [("light", 3), ("deep", 2)]
    assert reply.wire_version == limits.WIRE_VERSION
