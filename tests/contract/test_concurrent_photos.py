"""Many threads with one agent: their own queue, here and in the cloud, is not taken for a lost cloud."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from PIL import Image

from isthmus.edge_agent import EdgeAgent
from isthmus.models.vision.bundle import Bundle
from tests.bench.processes import CloudProcess

THREADS, PHOTOS = 16, 160
NewAgent = Callable[..., EdgeAgent]


def test_no_photo_is_degraded_where_there_is_time(cloud: CloudProcess, new_agent: NewAgent, photo: Image.Image) -> None:
    agent = new_agent(cloud.target, mode="split", min_agreement=0.0, deadline_s=30.0)
    with ThreadPoolExecutor(THREADS) as threads:
        answers = list(threads.map(lambda _: agent.infer(photo), range(PHOTOS)))
    assert [answer.route for answer in answers] == ["split"] * PHOTOS
    assert [link.state for link in agent.replicas] == ["closed"]


def test_a_cloud_without_room_stays_connected(tiny_bundle: Bundle, new_agent: NewAgent, photo: Image.Image) -> None:
    with CloudProcess(tiny_bundle.folder, arguments=("--threads", "1", "--queue-limit", "1")) as cloud:
        agent = new_agent(cloud.target, mode="split", min_agreement=0.0, deadline_s=30.0)
        (link,) = agent.replicas
        assert agent.infer(photo).route == "split"

        def state_after(_: int) -> str:
            agent.infer(photo)
            return link.state

        with ThreadPoolExecutor(THREADS) as threads:
            states = set(threads.map(state_after, range(PHOTOS)))
        assert states == {"closed"}
        assert [agent.infer(photo).route for _ in range(3)] == ["split"] * 3
