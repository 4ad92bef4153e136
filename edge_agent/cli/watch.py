"""`edge-agent watch`: cameras, clips and folders, frame by frame."""

from __future__ import annotations

import json
import signal
import sys
from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING, Any

import click

from isthmus.edge_agent.cli.clouds import warn_of
from isthmus.edge_agent.cli.photos import open_photos_with_metrics
from isthmus.edge_agent.cli.settings import settings
from isthmus.edge_agent.streams.config import StreamConfig
from isthmus.models.address import parse_address
from isthmus.models.errors import InvalidInput
from isthmus.models.fail import fail, needing
from isthmus.models.options import Command, read

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from isthmus.edge_agent.streams.calibration import Certificate
    from isthmus.edge_agent.streams.sources import Source
    from isthmus.edge_agent.streams.watch import Watch
    from isthmus.edge_agent.vision.agent import EdgeAgent
    from isthmus.edge_agent.vision.metrics import EdgeMetrics

EXAMPLES = """\b
Examples:
  edge-agent watch clip.mp4 --cloud cloud:50051
  edge-agent watch --calibrate front=monday.mp4 --cloud cloud:50051
  edge-agent watch front=rtsp://10.0.0.7/stream back=/dev/video0 --cloud cloud:50051 --mqtt broker:1883 --fps 5
  edge-agent watch clip.mp4 --results clip.jsonl --resume"""


@click.command(cls=Command, epilog=EXAMPLES)
@click.argument("sources", nargs=-1, required=True, metavar="[NAME=]SOURCE...")
@click.option("--calibrate", is_flag=True, help="Certify, on these clips, which changes of each camera are overlooked.")
@click.option("--resume", is_flag=True, help="Go on after the last frame of each camera in --results.")
@click.option("--json", "as_json", is_flag=True, help="Print the result of --calibrate as JSON.")
@settings("Streams", "Cloud and device", "Photos")
def watch(sources: tuple[str, ...], calibrate: bool, resume: bool, as_json: bool) -> None:
    """Answer the frames of cameras, video files or folders of photos.

    SOURCE is a folder, a video file, rtsp://…, http://… (MJPEG) or /dev/video0. Each frame ends in one outcome and one
    line of the results: answered, reused (it changed too little), filtered, dropped, late or failed.
    """
    config = read(StreamConfig)
    if resume and config.results is None:
        raise click.UsageError("--resume goes on after the frames in --results, which is missing")
    with needing("edge,video"):
        from prometheus_client import CollectorRegistry

        from isthmus.edge_agent.streams.sources import parse_sources
    try:
        parsed = parse_sources(sources, config.realtime)
    except InvalidInput as error:
        fail(error)
    registry = CollectorRegistry()
    agent, metrics = open_photos_with_metrics(registry)
    with agent:
        warn_of(agent.replicas)
        try:
            if calibrate:
                certify_all(agent, parsed, config, as_json)
            else:
                watch_all((agent, metrics), parsed, config, registry, resume)
        except InvalidInput as error:
            fail(error)


def watch_all(
    photos: tuple[EdgeAgent, EdgeMetrics],
    sources: list[Source],
    config: StreamConfig,
    registry: CollectorRegistry,
    resume: bool,
) -> None:
    """Watch, and end the program with 1 if a camera ended early. Raises InvalidInput."""
    agent, _ = photos
    with needing("edge,video"):
        from isthmus.edge_agent.streams.metrics import SINKS, StreamMetrics
        from isthmus.edge_agent.streams.sinks.lines import last_frames
        from isthmus.edge_agent.streams.watch import Watch, summary

        watched = Watch(
            sources,
            config,
            StreamMetrics(registry, [source.name for source in sources], SINKS),
            model=agent.manifest.name,
            thresholds={source.name: threshold_of(agent, source.name, config) for source in sources},
            after=last_frames(config.results) if resume and config.results else {},
        )
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: watched.stop.set())
    with ExitStack() as stack:
        if config.metrics is not None:
            stack.callback(serve_metrics(config.metrics, registry))
        if config.view is not None:
            stack.enter_context(live_view(photos, watched, config.view, registry))
        watched.run(agent)
    for line in summary(watched.totals):
        click.echo(line, err=True)
    problems = [f"{camera.source.name}: {camera.problem}" for camera in watched.cameras if camera.problem]
    for problem in [watched.problem, *problems]:
        if problem:
            click.echo(f"error: {problem}", err=True)
    sys.exit(1 if watched.problem or problems else 0)


def live_view(
    photos: tuple[EdgeAgent, EdgeMetrics], watched: Watch, listen: str, registry: CollectorRegistry
) -> AbstractContextManager[Any]:
    """The page and the HTTP API while it is open. Raises InvalidInput if the address is taken."""
    from isthmus.edge_agent.cli.serve_beside import served
    from isthmus.edge_agent.config import HttpConfig
    from isthmus.edge_agent.http.app import create_app

    http = HttpConfig(listen=listen)
    return served(create_app(registry, photos, http=http, streams=watched.view), http)


def serve_metrics(listen: str, registry: CollectorRegistry) -> Any:
    """Returns what ends it. Raises InvalidInput if the address is taken."""
    from prometheus_client import start_http_server

    address = parse_address(listen)
    try:
        server, _ = start_http_server(address.port, address.host, registry)
    except OSError as error:
        raise InvalidInput(f"--metrics-listen {listen}: {error.strerror}") from error
    return server.shutdown


def threshold_of(agent: EdgeAgent, camera: str, config: StreamConfig) -> float | None:
    """Of the gate: as given, or certified; None, with a line that says why, where no answer may be reused."""
    from isthmus.edge_agent.streams.calibration import choose, load, state_path

    if config.reuse.threshold is not None:
        return config.reuse.threshold
    known = load(state_path(), agent.manifest.fingerprint, camera)
    found = choose(known, config.reuse.epsilon, config.reuse.most_s)
    if found is None:
        lacking = f"least certified is {known[0].epsilon:.3f}" if known else "it is not calibrated"
        click.echo(f"{camera}: no answer is reused at --reuse-epsilon {config.reuse.epsilon}: {lacking}", err=True)
    return found.threshold if found else None


def certify_all(agent: EdgeAgent, sources: list[Source], config: StreamConfig, as_json: bool) -> None:
    """Answer every frame of the clips, and save what they certify. Raises InvalidInput."""
    from isthmus.edge_agent.streams.calibrate import seen_by
    from isthmus.edge_agent.streams.calibration import certify, choose, save, state_path

    for source in sources:
        if source.live:
            raise InvalidInput(f"{source.name}: a calibration needs a clip or a folder, not a camera")
        frames = seen_by(agent, source, config)
        found = certify(frames, config.reuse.most_s)
        save(state_path(), agent.manifest.fingerprint, source.name, found)
        chosen = choose(found, config.reuse.epsilon, config.reuse.most_s)
        click.echo(
            json.dumps(as_result(source, found, chosen)) if as_json else described(source, found, chosen, config)
        )


def as_result(source: Source, found: list[Certificate], chosen: Certificate | None) -> dict[str, Any]:
    from dataclasses import asdict

    certificates = [asdict(each) for each in found]
    return {"camera": source.name, "chosen": chosen and asdict(chosen), "certificates": certificates}


def described(source: Source, found: list[Certificate], chosen: Certificate | None, config: StreamConfig) -> str:
    """One line for people."""
    size = f"{source.name}: {found[0].frames} frames, {found[0].blocks} blocks of {config.reuse.most_s:g} s"
    if chosen is None:
        return f"{size}: too few to certify {config.reuse.epsilon:g}; the least is {found[0].epsilon:.3f}"
    return (
        f"{size}: below a change of {chosen.threshold:g} the last answer is reused, for {chosen.reused:.1%} of frames;"
        f" {chosen.differing:.2%} differ from their own; certified: at most {chosen.epsilon:.2%}, with confidence 90%"
    )
