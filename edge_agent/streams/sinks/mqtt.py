"""Answers to an MQTT broker, and cameras as devices that Home Assistant finds by itself.

TOPIC/CAMERA           the last answered frame, as JSON, retained
TOPIC/status           online, or offline after the end, however it came (last will); retained
DISCOVERY/sensor/…     one sensor a task: the label, or the number of boxes; the answer as attributes; retained
"""

from __future__ import annotations

import json
import re
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode

from isthmus.edge_agent.streams.config import Mqtt
from isthmus.models.address import parse_address
from isthmus.models.errors import InvalidInput, LinkDown

MOST_WAITING = 256  # messages while the broker is away
KEEP_ALIVE_S = 30
FIRST_S, LAST_S = 1, 60  # before it is connected to again
CLOSE_S = 5.0


class MqttSink:
    """Connects in the background, and again whenever the connection is lost. Raises InvalidInput for a bad `ca`."""

    def __init__(self, broker: str, config: Mqtt, model: str) -> None:
        """`model`: the bundle's name, for the device's page in Home Assistant."""
        self._broker, self._config, self._model = broker, config, model
        self._announced: set[str] = set()
        self._status = f"{config.topic}/status"
        self._client = paho.Client(CallbackAPIVersion.VERSION2)
        if config.user is not None:
            password = config.password.get_secret_value() if config.password else None
            self._client.username_pw_set(config.user, password)
        if config.ca is not None:
            try:
                self._client.tls_set(str(config.ca))
            except (OSError, ValueError) as error:
                raise InvalidInput(f"the broker's authority {config.ca} cannot be used: {error}") from error
        self._client.max_queued_messages_set(MOST_WAITING)
        self._client.reconnect_delay_set(FIRST_S, LAST_S)
        self._client.will_set(self._status, "offline", qos=1, retain=True)
        self._client.on_connect = self._connected
        address = parse_address(broker)
        self._client.connect_async(address.host, address.port, KEEP_ALIVE_S)
        self._client.loop_start()

    def __call__(self, line: dict[str, Any]) -> None:
        """One answered frame. Raises LinkDown if no more messages may wait."""
        camera = line["camera"]
        for task, answer in line["answers"].items():
            if (name := f"{camera}/{task}") not in self._announced:
                self._publish(*self._discovery(camera, task, answer))
                self._announced.add(name)
        self._publish(f"{self._config.topic}/{camera}", line)

    def close(self) -> None:
        """Say that it ended, after what waits."""
        if self._client.is_connected():
            sent = self._client.publish(self._status, "offline", qos=1, retain=True)
            sent.wait_for_publish(CLOSE_S)
        self._client.disconnect()
        self._client.loop_stop()

    def _connected(self, *_: Any) -> None:
        """The broker may have lost what it retained: devices are announced again."""
        self._announced.clear()
        self._client.publish(self._status, "online", qos=1, retain=True)

    def _publish(self, topic: str, content: dict[str, Any]) -> None:
        sent = self._client.publish(topic, json.dumps(content), qos=1, retain=True)
        if sent.rc not in (MQTTErrorCode.MQTT_ERR_SUCCESS, MQTTErrorCode.MQTT_ERR_NO_CONN):  # it waits without one
            raise LinkDown(f"{self._broker}: {paho.error_string(sent.rc)}")

    def _discovery(self, camera: str, task: str, answer: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """Topic and content, as Home Assistant's MQTT integration reads them."""
        unique = re.sub(r"[^A-Za-z0-9_-]", "_", f"{self._config.topic}_{camera}_{task}")
        value = f"value_json['answers'][{task!r}]"
        value += (
            "['label']" if "label" in answer else "['detections'] | count" if "detections" in answer else "['kind']"
        )
        topic = f"{self._config.topic}/{camera}"
        return f"{self._config.discovery}/sensor/{unique}/config", {
            "name": task,
            "unique_id": unique,
            "state_topic": topic,
            "value_template": "{{ " + value + " }}",
            "json_attributes_topic": topic,
            "availability_topic": self._status,
            "device": {
                "identifiers": [f"{self._config.topic}_{camera}"],
                "name": camera,
                "manufacturer": "Isthmus",
                "model": self._model,
            },
        }
