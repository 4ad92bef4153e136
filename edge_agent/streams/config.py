"""Settings of `edge-agent watch`, beside those of the agent for photos."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, SecretStr
from pydantic.dataclasses import dataclass

from isthmus.models.address import ListenAddress, PeerAddress
from isthmus.models.settings import Flag, Settings

Share = Annotated[float, Field(ge=0, le=1)]
TOPIC = r"^[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*$"


def web_address(url: SecretStr | None) -> SecretStr | None:
    if url is not None and not url.get_secret_value().startswith(("http://", "https://")):
        raise ValueError("expected http://… or https://…")
    return url


@dataclass(frozen=True)
class Reuse(Settings):
    """When a frame that changed little takes the last answer."""

    epsilon: Annotated[
        Share,
        Field(
            description="Certified share of frames that may take a last answer which differs from their own: it picks"
            " the threshold that `watch --calibrate` has certified. Without a calibration no answer is reused."
        ),
        Flag("reuse_epsilon"),
    ] = 0.05
    most_s: Annotated[
        float,
        Field(gt=0, le=3600, description="Milliseconds for which an answer is reused at most."),
        Flag("reuse_ms", 1000),
    ] = 2.0
    threshold: Annotated[
        float | None,
        Field(
            ge=0,
            description="Change below which the last answer is reused, in place of the certified threshold; nothing is"
            " promised then.",
        ),
        Flag("change_threshold"),
    ] = None


@dataclass(frozen=True)
class Mqtt(Settings):
    """A broker, and the topics below which it gets answers."""

    broker: Annotated[
        PeerAddress | None, Field(description="MQTT broker that gets the answers."), Flag("mqtt", metavar="HOST:PORT")
    ] = None
    user: Annotated[str | None, Field(description="User name at the broker."), Flag("mqtt_user")] = None
    password: Annotated[
        SecretStr | None,
        Field(description="Password at the broker; better in the environment or the file."),
        Flag("mqtt_password"),
    ] = None
    ca: Annotated[
        Path | None,
        Field(description="PEM file of the authority that signed the broker's certificate; turns TLS on."),
        Flag("mqtt_ca", is_file=True),
    ] = None
    topic: Annotated[
        str, Field(pattern=TOPIC, max_length=200, description="First part of the topics."), Flag("mqtt_topic")
    ] = "isthmus"
    discovery: Annotated[
        str,
        Field(pattern=TOPIC, max_length=200, description="Topic below which Home Assistant looks for devices."),
        Flag("mqtt_discovery"),
    ] = "homeassistant"


@dataclass(frozen=True)
class StreamConfig(Settings):
    """How frames are read, which of them are answered, and where the answers go."""

    fps: Annotated[
        float | None,
        Field(
            gt=0,
            le=1000,
            description="Frames a second of each camera that are looked at; others are `filtered`. Without it: all.",
        ),
    ] = None
    realtime: Annotated[bool, Field(description="Play video files at their own speed, as a camera would.")] = False
    when_full: Annotated[
        Literal["block", "drop_oldest", "drop_newest", "degrade"] | None,
        Field(
            description="When more frames come than are answered. block: the source waits. drop_oldest, drop_newest:"
            " waiting frames are left out. degrade: the device answers alone. Without it: drop_oldest for what is live,"
            " block for files."
        ),
    ] = None
    max_age_s: Annotated[
        float | None,
        Field(
            gt=0,
            le=3600,
            description="Milliseconds from reading a frame to its answer, after which it counts as `late` and only the"
            " results have it. Without it: none is late.",
        ),
        Flag("max_age_ms", 1000),
    ] = None
    reconnect_s: Annotated[
        float,
        Field(
            ge=0,
            le=3600,
            description="Longest wait before a camera that ended or failed is opened again; 0: it is not.",
        ),
    ] = 30.0
    reuse: Reuse = Reuse()
    results: Annotated[
        Path | None,
        Field(description="File to which one line of JSON a frame is added. Without it: standard output."),
    ] = None
    webhook: Annotated[
        SecretStr | None,
        AfterValidator(web_address),
        Field(description="URL to which each answered frame is posted as JSON; a secret, as it may hold a token."),
    ] = None
    frames_folder: Annotated[
        Path | None, Field(description="Folder of answered frames as JPEG files, with their answers drawn.")
    ] = None
    keep_frames: Annotated[
        int, Field(ge=1, le=1_000_000, description="Files of each camera that are kept there; older ones are deleted.")
    ] = 1000
    mqtt: Mqtt = Mqtt()
    view: Annotated[
        ListenAddress | None,
        Field(description="Address of the page and the HTTP API, with a live view of the cameras. Without it: none."),
        Flag("page_listen", metavar="HOST:PORT"),
    ] = None
    metrics: Annotated[
        ListenAddress | None,
        Field(description="Address of /metrics for Prometheus. Without it: none."),
        Flag("metrics_listen", metavar="HOST:PORT"),
    ] = None
