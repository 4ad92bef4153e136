"""What is watched: `[NAME=]SOURCE` -> a source -> its frames in order, decoded only when they are asked for.

    folder of photos, photo          not live, ends
    video file                       not live, ends; live where it is played at its own speed
    rtsp://, http:// (MJPEG), /dev/video0    live: an end is a failure

Everything but photos goes through PyAV. No message has a user name or a password of an address.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath
from typing import Any, Literal
from urllib.parse import urlsplit

import av
import av.error
from PIL import Image

from isthmus.edge_agent.vision.image_input import read_path
from isthmus.models.address import shown_url
from isthmus.models.errors import InvalidInput, IsthmusError, LinkDown
from isthmus.models.vision.images import open_image, to_rgb

Kind = Literal["folder", "video", "rtsp", "http", "device"]
PHOTOS = (".jpg", ".jpeg", ".png", ".webp", ".avif", ".heic", ".heif", ".bmp", ".gif", ".tif", ".tiff")
MAX_PIXELS = 64_000_000  # of a video frame: twice 8K
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")  # part of topics, labels and file names
PHOTO_S = 1.0  # between photos of a folder, which have no times
OPEN_S, READ_S = 10.0, 5.0  # for a camera to answer, and to give its next packet
ROUNDING_S = 1e-3  # of the times of frames
MOST_BROKEN = 250  # packets in a row that cannot be decoded
# What these may open: a playlist must not lead from a file to a host, or from a host to a file.
PROTOCOLS = {"video": "file", "http": "http,https,httpproxy,tcp,tls"}


@dataclass(frozen=True, slots=True)
class Shot:
    """One frame, not decoded to pixels yet. `at_s`: its time since the source's beginning."""

    at_s: float
    decode: Callable[[], Image.Image]  # raises InvalidInput


@dataclass(frozen=True, slots=True)
class Source:
    """One camera, clip or folder. `realtime`: a clip at its own speed."""

    name: str
    kind: Kind
    address: str
    realtime: bool = False

    @property
    def live(self) -> bool:
        """Whether frames come when they come."""
        return self.endless or (self.realtime and self.kind == "video")

    @property
    def endless(self) -> bool:
        """Whether its end is a failure, after which it is opened again."""
        return self.kind in ("rtsp", "http", "device")

    @property
    def shown(self) -> str:
        """The address without what may be secret."""
        return shown_url(self.address) if self.kind in ("rtsp", "http") else self.address

    def shots(self) -> Iterator[Shot]:
        """Opens it. Raises LinkDown for what may be there later, InvalidInput for what cannot be read."""
        if self.kind == "folder":
            return photos(Path(self.address))
        return paced(video(self)) if self.live and not self.endless else video(self)


class FrameRate:
    """Frames a second that are looked at; None for all."""

    def __init__(self, fps: float | None) -> None:
        self._fps, self._due_s = fps, 0.0

    def takes(self, at_s: float) -> bool:
        """Whether the frame of this time is looked at. Times rise."""
        if self._fps is None:
            return True
        if at_s < self._due_s - ROUNDING_S:
            return False
        self._due_s = max(self._due_s + 1 / self._fps, at_s)
        return True


def parse_source(text: str, realtime: bool = False) -> Source:
    """`[NAME=]SOURCE`. Raises InvalidInput that says what there is."""
    name, separator, address = text.partition("=")
    if not (separator and NAME.fullmatch(name)):
        name, address = "", text
    kind = kind_of(address)
    return Source(name or derived_name(address, kind), kind, address, realtime)


def parse_sources(texts: tuple[str, ...], realtime: bool = False) -> list[Source]:
    """Raises InvalidInput for one that is unknown, and for two of a name."""
    sources = [parse_source(text, realtime) for text in texts]
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise InvalidInput(
                f"two sources are named {name}: name them, as in front={sources[names.index(name)].shown}"
            )
    return sources


def kind_of(address: str) -> Kind:
    scheme = urlsplit(address).scheme if "://" in address else ""
    if scheme in ("rtsp", "rtsps"):
        return "rtsp"
    if scheme in ("http", "https"):
        return "http"
    path = Path(address)
    if not scheme and re.fullmatch(r"/dev/video\d+", address):
        return "device"
    if not scheme and path.is_dir():
        return "folder"
    if not scheme and path.is_file():
        return "folder" if path.suffix.lower() in PHOTOS else "video"
    raise InvalidInput(
        f"source {shown_url(address)!r:.120} does not exist,"
        " expected a folder, a file, rtsp://…, http://… or /dev/video0"
    )


def derived_name(address: str, kind: Kind) -> str:
    """The host of an address, or the name of a file without its ending."""
    plain = urlsplit(address).hostname or "" if kind in ("rtsp", "http") else PurePath(address).stem
    return re.sub(r"[^A-Za-z0-9_-]", "-", plain)[:64] or "camera"


def photos(place: Path) -> Iterator[Shot]:
    """A photo, or those of a folder in the order of their names."""
    try:
        files = sorted(place.iterdir()) if place.is_dir() else [place]
    except OSError as error:
        raise InvalidInput(f"{place}: {error.strerror}") from error
    for index, file in enumerate(file for file in files if file.suffix.lower() in PHOTOS):
        yield Shot(index * PHOTO_S, partial(read_photo, file))


def read_photo(file: Path) -> Image.Image:
    return open_image(read_path(file))


def paced(shots: Iterator[Shot]) -> Iterator[Shot]:
    """Each at its time."""
    started_s = time.monotonic()
    for shot in shots:
        time.sleep(max(0.0, started_s + shot.at_s - time.monotonic()))
        yield shot


def video(source: Source) -> Iterator[Shot]:
    """Frames of the first video stream."""
    try:
        with av.open(source.address, **opening(source)) as container:
            if not container.streams.video:
                raise InvalidInput(f"{source.shown}: has no video")
            check_size(container.streams.video[0].width, container.streams.video[0].height)
            yield from decoded(container, source)
    except (av.error.FFmpegError, OSError) as error:
        raise failure(source, error) from error


def opening(source: Source) -> dict[str, Any]:
    """Arguments of `av.open`."""
    options = {"protocol_whitelist": PROTOCOLS[source.kind]} if source.kind in PROTOCOLS else {}
    if source.kind == "rtsp":
        options["rtsp_transport"] = "tcp"  # what UDP loses are broken frames
    form = "v4l2" if source.kind == "device" else None
    return {"format": form, "options": options, "timeout": (OPEN_S, READ_S)}


def decoded(container: Any, source: Source) -> Iterator[Shot]:
    """Live frames have the time at which they came, others that of the file."""
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    rate, started_s, broken, count = float(stream.average_rate or 25), time.monotonic(), 0, 0
    first_s: float | None = None
    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except av.error.InvalidDataError:
            broken += 1
            if broken > MOST_BROKEN:
                raise
            yield Shot(time.monotonic() - started_s if source.endless else count / rate, broken_frame)
            count += 1
            continue
        for frame in frames:
            if first_s is None and frame.time is not None:
                first_s = frame.time
            media_s = count / rate if frame.time is None or first_s is None else frame.time - first_s
            broken, count = 0, count + 1
            yield Shot(time.monotonic() - started_s if source.endless else media_s, partial(picture, frame))


def check_size(width: int, height: int) -> None:
    if not 0 < width * height <= MAX_PIXELS:
        raise InvalidInput(f"the video has {width}x{height} pixels, expected 1 to {MAX_PIXELS} of a frame")


def broken_frame() -> Image.Image:
    raise InvalidInput("the frame is broken: its data cannot be decoded")


def picture(frame: Any) -> Image.Image:
    """RGB pixels of a decoded frame. Raises InvalidInput if they are too many."""
    check_size(frame.width, frame.height)
    try:
        return to_rgb(frame.to_image())
    except (av.error.FFmpegError, ValueError) as error:
        raise InvalidInput("the frame is broken: it has no pixels that can be converted") from error


def failure(source: Source, error: Exception) -> IsthmusError:
    """PyAV's messages name the address with its password: only the reason is used."""
    reason = getattr(error, "strerror", None) or type(error).__name__
    kind = LinkDown if source.endless else InvalidInput
    return kind(f"{source.shown}: {reason}")
