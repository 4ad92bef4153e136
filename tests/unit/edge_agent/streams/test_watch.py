"""Several cameras at once: one account, and sinks that get answered frames."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from isthmus.edge_agent.streams.config import Reuse, StreamConfig
from isthmus.edge_agent.streams.metrics import StreamMetrics
from isthmus.edge_agent.streams.sources import parse_sources
from isthmus.edge_agent.streams.watch import Watch, summary
from isthmus.models.errors import InvalidInput
from tests.tiny_clip import scenes, write_clip


class Agent:
    """Answers one frame after the other."""

    def infer_many(self, photos: Any, *, when_full: Any) -> Any:
        return (Answer() for _ in photos)


class Answer:
    def as_dict(self) -> dict[str, Any]:
        task = {"label": "cat", "index": 0, "probabilities": [0.75, 0.25]}
        return {**task, "answers": {"object": task}, "degraded": False, "bytes_up": 10, "why": "fake"}


def opened(folder: Path, **changed: Any) -> tuple[Watch, CollectorRegistry]:
    clips = (write_clip(folder / "left.mp4", scenes(2, 1)), write_clip(folder / "right.mp4", scenes(1, 1)))
    config = StreamConfig(**{"results": folder / "results.jsonl", "reuse": Reuse(threshold=0.5), **changed})
    registry = CollectorRegistry()
    sources = parse_sources(tuple(str(clip) for clip in clips))
    metrics = StreamMetrics(registry, ["left", "right"])
    thresholds = {"left": 0.5, "right": None}
    return Watch(sources, config, metrics, model="tiny", thresholds=thresholds, after={}), registry


def test_two_clips_are_watched_and_each_frame_is_a_line_a_count_and_a_part_of_the_sum(tmp_path: Path) -> None:
    watch, registry = opened(tmp_path, frames_folder=tmp_path / "pictures")
    watch.run(Agent())
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    left, right = ([line for line in lines if line["camera"] == camera] for camera in ("left", "right"))
    assert [line.get("event") or line["outcome"] for line in left] == ["start", "answered", "reused", "answered", "end"]
    assert [line.get("event") or line["outcome"] for line in right] == ["start", "answered", "answered", "end"]
    assert left[1]["answers"] == {"object": {"label": "cat", "index": 0, "confidence": 0.75}}
    assert "probabilities" not in json.dumps(lines)
    assert left[-1]["frames"] == 3 and left[-1]["uploads"] == 2 and left[-1]["bytes_up"] == 20
    counted = registry.get_sample_value
    name = "isthmus_edge_stream_frames_total"
    assert counted(name, {"camera": "left", "outcome": "reused"}) == 1
    assert counted(name, {"camera": "right", "outcome": "answered"}) == 2
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == [
        f"{camera}-0000000{index}.jpg" for camera, index in (("left", 0), ("left", 2), ("right", 0), ("right", 1))
    ]
    assert summary(watch.totals)[0] == "left: 3 frames: 2 answered, 1 reused; 2 uploads of 20 B"


def test_without_room_for_results_all_ends_with_one_problem(tmp_path: Path) -> None:
    watch, _ = opened(tmp_path, results=Path("/dev/full"))
    watch.run(Agent())
    assert watch.problem is not None and "No space left" in watch.problem


def test_a_folder_that_cannot_be_made_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInput, match="file"):
        opened(tmp_path, frames_folder=tmp_path / "file" / "pictures")
