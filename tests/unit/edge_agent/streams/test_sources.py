"""Folders, video files and MJPEG are read frame by frame; what cannot be read is one error without a password."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest

from isthmus.edge_agent.streams.sources import FrameRate, Shot, paced, parse_source, parse_sources
from isthmus.models.errors import InvalidInput, LinkDown
from tests.tiny_clip import mjpeg_server, scenes, write_clip


def test_a_clip_has_its_frames_and_their_times(tmp_path: Path) -> None:
    source = parse_source(str(write_clip(tmp_path / "front door.mp4", scenes(3, 2))))
    shots = [(shot.at_s, shot.decode()) for shot in source.shots()]
    assert (source.name, source.kind, source.live) == ("front-door", "video", False)
    assert [at_s for at_s, _ in shots] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert all((image.mode, image.size) == ("RGB", (96, 64)) for _, image in shots)


def test_a_folder_gives_photos_in_order_and_a_broken_one_fails_alone(tmp_path: Path) -> None:
    for index, photo in enumerate(scenes(1, 1)):
        photo.save(tmp_path / f"{index}.png")
    (tmp_path / "2.jpg").write_bytes(b"no photo")
    (tmp_path / "notes.txt").write_text("not looked at")
    shots = list(parse_source(f"hall={tmp_path}").shots())
    assert [shot.at_s for shot in shots] == [0.0, 1.0, 2.0]
    assert [shot.decode().size for shot in shots[:2]] == [(96, 64)] * 2
    with pytest.raises(InvalidInput):
        shots[2].decode()


def test_mjpeg_is_read_to_its_end(tmp_path: Path) -> None:
    with mjpeg_server(scenes(2, 2)) as url:
        source = parse_source(f"yard={url}")
        assert source.live and source.endless
        sizes = []
        with suppress(LinkDown):  # without a last boundary, as when a camera loses its power
            for shot in source.shots():
                sizes.append(shot.decode().size)
        assert sizes == [(96, 64)] * 4


def test_no_error_has_a_password() -> None:
    with mjpeg_server(scenes(1), password="secret") as url:
        pass
    source = parse_source(url)
    assert source.name == "127-0-0-1" and "secret" not in source.shown
    with pytest.raises(LinkDown) as caught:
        list(source.shots())
    assert "secret" not in str(caught.value) and "refused" in str(caught.value)
    with pytest.raises(InvalidInput) as unknown:
        parse_source("ftp://user:secret@host/clip.mp4")
    assert "secret" not in str(unknown.value)


@pytest.mark.parametrize(
    ("address", "kind"),
    [("rtsp://10.0.0.7/one", "rtsp"), ("https://cam.example/x", "http"), ("/dev/video0", "device")],
)
def test_addresses_say_what_they_are(address: str, kind: str) -> None:
    assert parse_source(address).kind == kind


def test_names_are_given_or_derived_and_unique(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_clip(tmp_path / folder / "cam.mp4", scenes(1))
    texts = (str(tmp_path / "a/cam.mp4"), str(tmp_path / "b/cam.mp4"))
    with pytest.raises(InvalidInput, match="two sources are named cam"):
        parse_sources(texts)
    assert [source.name for source in parse_sources((f"left={texts[0]}", texts[1]))] == ["left", "cam"]


@pytest.mark.parametrize("content", [b"", b"no video at all" * 100, b"\x00" * 4096])
def test_a_file_that_is_no_video_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(content)
    with pytest.raises(InvalidInput, match=r"clip\.mp4"):
        list(parse_source(str(path)).shots())


def test_a_file_opens_no_other_host(tmp_path: Path) -> None:
    """A playlist that names a server is refused before anything is asked of that server."""
    with mjpeg_server(scenes(1)) as url:
        path = tmp_path / "clip.m3u8"
        path.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{url}\n#EXT-X-ENDLIST\n")
        with pytest.raises(InvalidInput):
            list(parse_source(str(path)).shots())


def test_a_clip_that_is_cut_gives_what_it_has(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.avi", scenes(*[1] * 30))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    shots = list(parse_source(str(path)).shots())
    assert 10 < len(shots) < 30


def test_pace_keeps_the_average() -> None:
    frame_rate = FrameRate(10)
    assert sum(frame_rate.takes(index / 25) for index in range(250)) == 100
    assert all(FrameRate(None).takes(0.0) for _ in range(3))
    assert sum(FrameRate(30).takes(index / 25) for index in range(1)) == 1


def test_a_clip_at_its_own_speed_is_live(tmp_path: Path) -> None:
    source = parse_source(str(write_clip(tmp_path / "clip.mp4", scenes(3), rate=50)), realtime=True)
    assert source.live and not source.endless and len(list(source.shots())) == 3
    assert len(list(paced(iter([Shot(0.0, scenes), Shot(0.001, scenes)])))) == 2  # type: ignore[arg-type]
