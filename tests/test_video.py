"""Frames of little videos made here, each of which shows its number as its shade of grey."""

import json
import logging
import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from hess.datasets import load_photos
from hess.datasets.video import extract_frames, is_video
from hess.errors import ConfigError, DatasetError
from hess.geometry.fit_rules import square_crop

SHADES = 6  # grey levels between neighbouring frames; compression moves less than half of it


def write_video(
    path: Path,
    pictures: Sequence[np.ndarray] | int = 30,
    *,
    codec: str = "mpeg4",
    times_ms: Sequence[int] | None = None,
    options: dict[str, str] | None = None,
) -> Path:
    """A video of 30 frames per second, or shown at these times."""
    if isinstance(pictures, int):
        pictures = [np.full((48, 64, 3), SHADES * n, np.uint8) for n in range(pictures)]
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=30)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt, stream.bit_rate = "yuv420p", 4_000_000
        if times_ms is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for index, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if times_ms is not None:
                frame.pts, frame.time_base = times_ms[index], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def shown(paths: Sequence[Path]) -> list[int]:
    """Frame numbers by what the pictures show, which must be what their names say."""
    numbers = [round(np.asarray(Image.open(path)).mean() / SHADES) for path in paths]
    assert [path.name for path in paths] == [f"frame_{number:06d}.jpg" for number in numbers]
    return numbers


@pytest.mark.parametrize("name", ["a.mp4", "a.avi", "a.mkv", "a.mov"])
def test_which_frames_are_taken(name: str, tmp_path: Path) -> None:
    video = write_video(tmp_path / name)
    assert is_video(video)

    def taken(**options: float) -> list[int]:
        folder = tmp_path / f"frames {options}"
        return shown(extract_frames(video, folder, **options))

    assert taken() == list(range(30))
    assert taken(every=7) == [0, 7, 14, 21, 28]
    assert taken(fps=10) == list(range(0, 30, 3))
    assert taken(fps=15) == list(range(0, 30, 2))  # Matroska rounds 66.7 ms to 67
    assert taken(fps=1000) == list(range(30))
    assert taken(max_views=3) == [0, 14, 29]
    assert taken(max_views=1) == [0]
    assert taken(every=2, max_views=4) == [0, 8, 18, 28]
    assert taken(fps=10, max_views=4) == [0, 9, 18, 27]


def test_frames_per_second_go_by_time(tmp_path: Path) -> None:
    times = [0, 10, 20, 30, 500, 510, 1000, 1010, 3000, 3240, 3260]
    video = write_video(tmp_path / "a.mp4", len(times), times_ms=times)
    # Every quarter of a second that has a frame gives its first; the long gap gives none.
    assert shown(extract_frames(video, tmp_path / "f", fps=4)) == [0, 4, 6, 8, 10]


def test_b_frames_come_in_order_of_display(tmp_path: Path) -> None:
    # A second of 20 frames, then one of 10.
    times = [*range(0, 1000, 50), *range(1000, 2000, 100)]
    video = write_video(tmp_path / "a.mp4", len(times), codec="libx264", times_ms=times)
    with av.open(str(video)) as container:
        stored = [packet.pts for packet in container.demux(video=0) if packet.size]
    assert stored != sorted(stored)
    assert shown(extract_frames(video, tmp_path / "f", every=4)) == list(range(0, 30, 4))
    by_time = shown(extract_frames(video, tmp_path / "g", fps=5))
    assert by_time == [*range(0, 20, 4), *range(20, 30, 2)]


# How a display matrix (a, b, c, d) shows the corners stored as red, green, blue, white.
TURNS = {
    (1, 0, 0, 1): ["red", "green", "blue", "white"],
    (0, 1, -1, 0): ["blue", "red", "white", "green"],  # a quarter clockwise, as phones record
    (-1, 0, 0, -1): ["white", "blue", "green", "red"],
    (0, -1, 1, 0): ["green", "white", "red", "blue"],
    (-1, 0, 0, 1): ["green", "red", "white", "blue"],
    (1, 0, 0, -1): ["blue", "white", "red", "green"],
    (0, 1, 1, 0): ["red", "blue", "green", "white"],
    (0, -1, -1, 0): ["white", "green", "blue", "red"],
}
CORNERS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255,) * 3}


@pytest.mark.parametrize("matrix", TURNS)
def test_frames_are_upright(matrix: tuple[int, int, int, int], tmp_path: Path) -> None:
    picture = np.zeros((48, 96, 3), np.uint8)
    for colour, row, column in zip(CORNERS.values(), (0, 0, 24, 24), (0, 48, 0, 48), strict=True):
        picture[row : row + 24, column : column + 48] = colour
    video = write_video(tmp_path / "a.mp4", [picture] * 2)
    # The matrix stands in the track header of an MP4 file, 44 bytes behind the name of the box.
    data = bytearray(video.read_bytes())
    at = data.index(b"tkhd") + 44
    assert struct.unpack_from(">9i", data, at) == (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    a, b, c, d = (x << 16 for x in matrix)
    struct.pack_into(">9i", data, at, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    video.write_bytes(data)

    (frame,) = extract_frames(video, tmp_path / "f", max_views=1)
    image = Image.open(frame).convert("RGB")
    assert image.size == ((96, 48) if a or d else (48, 96))
    w, h = image.size
    spots = [(x * w // 4, y * h // 4) for y in (1, 3) for x in (1, 3)]
    for spot, colour in zip(spots, TURNS[matrix], strict=True):
        assert image.getpixel(spot) == pytest.approx(CORNERS[colour], abs=12)


def test_frames_are_photos_in_order(tmp_path: Path) -> None:
    video, steps = write_video(tmp_path / "a.mp4"), []
    frames = extract_frames(
        video, tmp_path / "f", every=10, progress=lambda *step: steps.append(step)
    )
    assert steps == [(n + 1, 3, frame.name) for n, frame in enumerate(frames)]
    scene = load_photos(tmp_path / "f", image_fit=square_crop(8))
    assert scene.view_names == tuple(frame.name for frame in frames)


def test_a_folder_holds_frames_of_one_video_only(tmp_path: Path) -> None:
    video, folder = write_video(tmp_path / "a.mp4"), tmp_path / "f"
    first = extract_frames(video, folder, every=10)
    first[1].write_bytes(b"spoilt")
    again = extract_frames(video, folder, every=10)
    assert shown(again) == [0, 10, 20]
    assert sorted(folder.glob("*.jpg")) == again
    assert json.loads((folder / "made_by_hess.json").read_text())["video"] == "a.mp4"

    other = write_video(tmp_path / "b.mp4", 12)
    for source, options in ((video, {"fps": 15}), (other, {"every": 10}), (video, {"every": 10})):
        last = extract_frames(source, folder, **options)
        assert sorted(folder.glob("*.jpg")) == last
    assert shown(last) == [0, 10, 20]


@pytest.mark.parametrize("name", ["holiday.jpg", "frame_000001.jpg", "more/frame_000000.jpg"])
def test_somebody_elses_files_are_never_replaced(name: str, tmp_path: Path) -> None:
    video, folder = write_video(tmp_path / "a.mp4"), tmp_path / "f"
    for ours in ([], extract_frames(video, tmp_path / "g", every=10)):
        if ours:
            folder = ours[0].parent
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"mine")
        with pytest.raises(DatasetError, match=f"{name}, which is not from hess"):
            extract_frames(video, folder, every=5)
        assert (folder / name).read_bytes() == b"mine"
        assert not ours or shown(ours) == [0, 10, 20]


# Container, how it is written, and where it is cut: within a frame or between two.
CUTS = [
    ("a.mp4", {"movflags": "faststart"}, "within"),
    ("a.mp4", {"movflags": "faststart"}, "between"),
    ("a.mp4", {"movflags": "frag_keyframe+empty_moov"}, "within"),
    ("a.avi", {}, "within"),
    ("a.mkv", {}, "within"),
    ("a.mkv", {}, "between"),
]


@pytest.mark.parametrize(("name", "options", "where"), CUTS)
def test_a_video_that_is_cut_off_gives_what_is_there(
    name: str,
    options: dict[str, str],
    where: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (30, 48, 64, 3), dtype=np.uint8)
    video = write_video(tmp_path / name, list(noise), options=options)
    with caplog.at_level(logging.WARNING):
        assert len(extract_frames(video, tmp_path / "whole")) == 30
    assert not caplog.text
    with av.open(str(video)) as container:
        starts = [packet.pos for packet in container.demux(video=0) if packet.size]
    cut = starts[15] + (100 if where == "within" else 0)
    video.write_bytes(video.read_bytes()[:cut])
    with caplog.at_level(logging.WARNING):
        frames = extract_frames(video, tmp_path / "cut")
    assert 14 <= len(frames) <= 16
    assert "cut off" in caplog.text
    assert name in caplog.text
    for frame in frames:
        Image.open(frame).load()


def write_sound(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def test_what_is_no_video_is_refused(tmp_path: Path) -> None:
    cut = write_video(tmp_path / "cut.mp4")  # its table of contents is at the end
    cut.write_bytes(cut.read_bytes()[:-300])
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "empty.mkv").write_bytes(b"")
    write_sound(tmp_path / "sound.mp4")
    (tmp_path / "notes.txt").write_text("ffmpeg would show this text")
    for name in ("cut.mp4", "text.mp4", "empty.mkv", "sound.mp4", "notes.txt", "missing.mp4"):
        with pytest.raises(DatasetError, match=name):
            extract_frames(tmp_path / name, tmp_path / "f")
    assert not (tmp_path / "f").exists()


@pytest.mark.parametrize(
    "options",
    [{"fps": 2, "every": 2}, {"fps": 0}, {"fps": float("nan")}, {"every": 0}, {"max_views": 0}],
)
def test_bad_numbers_are_refused(options: dict[str, float], tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        extract_frames(write_video(tmp_path / "a.mp4", 3), tmp_path / "f", **options)
    assert not (tmp_path / "f").exists()
