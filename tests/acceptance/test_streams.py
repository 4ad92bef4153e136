"""`edge-agent watch` with Debian's mosquitto: what Home Assistant would see."""

from __future__ import annotations

import getpass
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from isthmus.models.vision.bundle import Bundle
from tests.bench.processes import ROOT, free_port
from tests.tiny_clip import scenes, write_clip

MOSQUITTO = shutil.which("mosquitto", path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin")
pytestmark = pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed: apt-get install mosquitto")


class Broker:
    """A real broker with a password, which may be killed and started again; what it sends is in `seen`."""

    def __init__(self, folder: Path) -> None:
        self.port, self.seen = free_port(), dict[str, Any]()
        passwords = folder / "passwords"
        subprocess.run(["mosquitto_passwd", "-b", "-c", str(passwords), "agent", "s3cret"], check=True)
        self._config = folder / "mosquitto.conf"
        self._config.write_text(
            f"user {getpass.getuser()}\nlistener {self.port} 127.0.0.1\nallow_anonymous false\n"
            f"password_file {passwords}\n"
        )
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen([str(MOSQUITTO), "-c", str(self._config)], stderr=subprocess.DEVNULL)
        self._client = paho.Client(CallbackAPIVersion.VERSION2)
        self._client.username_pw_set("agent", "s3cret")
        self._client.on_connect = lambda client, *_: client.subscribe("#", qos=1)
        self._client.on_message = lambda client, data, message: self.seen.update({message.topic: message.payload})
        self._client.connect_async("127.0.0.1", self.port)
        self._client.reconnect_delay_set(1, 1)
        self._client.loop_start()

    def kill(self) -> None:
        self._client.loop_stop()
        self._process.kill()
        self._process.wait()

    def json(self, topic: str) -> Any:
        return json.loads(self.seen[topic])


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    running = Broker(tmp_path)
    yield running
    running.kill()


def until(condition: Callable[[], bool], within_s: float = 40.0) -> None:
    deadline_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline_s, "the condition did not come true"
        time.sleep(0.02)


def agent(bundle: Bundle, clip: Path, broker: Broker, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "isthmus.edge_agent", "watch", f"front={clip}", "--bundle", str(bundle.folder)]
    command += ["--threads", "1", "--mqtt", f"127.0.0.1:{broker.port}", "--mqtt-user", "agent", "--mqtt-password"]
    return subprocess.Popen(
        [*command, "s3cret", *more], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_home_assistant_finds_a_camera_and_its_answers(tiny_bundle: Bundle, tmp_path: Path, broker: Broker) -> None:
    clip = write_clip(tmp_path / "clip.mp4", scenes(3, 3))
    running = agent(tiny_bundle, clip, broker, "--change-threshold", "0.5")
    out, errors = running.communicate(timeout=60)
    assert running.returncode == 0, errors
    assert "s3cret" not in out + errors
    lines = [json.loads(line) for line in out.splitlines()]
    until(lambda: broker.seen.get("isthmus/status") == b"offline")
    state = broker.json("isthmus/front")
    answered = [line for line in lines if line.get("outcome") == "answered"]
    assert state == answered[-1]
    (topic,) = [topic for topic in broker.seen if topic.startswith("homeassistant/sensor/isthmus_front_defect/")]
    found = broker.json(topic)
    assert found["state_topic"] == found["json_attributes_topic"] == "isthmus/front"
    assert found["value_template"] == "{{ value_json['answers']['defect']['label'] }}"
    assert found["availability_topic"] == "isthmus/status" and found["device"]["name"] == "front"


def test_a_killed_agent_is_offline_and_a_broker_that_comes_back_gets_all_again(
    tiny_bundle: Bundle, tmp_path: Path, broker: Broker
) -> None:
    clip = write_clip(tmp_path / "clip.mp4", scenes(*[1] * 400), rate=10)
    running = agent(tiny_bundle, clip, broker, "--realtime")
    until(lambda: "isthmus/front" in broker.seen)
    broker.kill()
    broker.seen.clear()
    broker.start()
    until(lambda: "isthmus/front" in broker.seen and any("config" in topic for topic in broker.seen))
    assert running.poll() is None and broker.seen["isthmus/status"] == b"online"
    running.kill()
    running.communicate()
    until(lambda: broker.seen["isthmus/status"] == b"offline")  # its last will
