"""Frames of a video as upright photos in a folder of their own."""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from hess.datasets.own_folder import renew_folder
from hess.datasets.photo_files import VIDEO_SUFFIXES
from hess.datasets.photos import Progress, spread_evenly
from hess.errors import ConfigError, DatasetError
from hess.files import atomic_write

if TYPE_CHECKING:
    from av import Packet, VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream

logger = logging.getLogger(__name__)

_JPEG_QUALITY = 95

# Signs of (a, b, c, d) in a display matrix, which shows the pixel (x, y) at (ax + cy, bx + dy).
_UPRIGHT = {
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,  # Pillow turns counter-clockwise
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}


def is_video(path: str | Path) -> bool:
    """Whether the suffix is one of ``VIDEO_SUFFIXES``."""
    return Path(path).suffix.lower() in VIDEO_SUFFIXES


def extract_frames(
    video: str | Path,
    folder: str | Path,
    *,
    fps: float | None = None,
    every: int | None = None,
    max_views: int | None = None,
    progress: Progress | None = None,
) -> list[Path]:
    """Write frames of a video as ``frame_<number>.jpg``, counted from 0 in order of display.

    Frames are upright by the video's rotation record. ``folder`` holds them alone: frames that
    an earlier call took, of this video or another, are replaced.

    Args:
        video: a file of one of ``VIDEO_SUFFIXES``.
        folder: made if missing; empty, or as an earlier call left it.
        fps: frames per second by their timestamps, above 0; gaps are not filled.
        every: every so many frames, from the first on. Without ``fps`` and ``every``: all frames.
        max_views: at most so many of these, spread evenly, the first and the last among them.
        progress: called with frames written, frames to write, and the name of the last file.

    Returns:
        Paths in order of display, at least one.

    Raises:
        ConfigError: a number is out of range, or both ``fps`` and ``every`` are given.
        DatasetError: the file is missing or no readable video, or ``folder`` holds something else.
    """
    if fps is not None and every is not None:
        raise ConfigError("fps and every exclude each other; choose one")
    if fps is not None and not (fps > 0 and math.isfinite(fps)):
        raise ConfigError(f"fps must be above 0 frames per second, found {fps}")
    if every is not None and every < 1:
        raise ConfigError(f"every must be at least 1 frame, found {every}")
    if max_views is not None and max_views < 1:
        raise ConfigError(f"max_views must be at least 1, found {max_views}")
    video, folder = Path(video).expanduser(), Path(folder).expanduser()

    timeline = _read_timeline(video)
    candidates = list(range(0, len(timeline.times), every or 1))
    if fps is not None:
        candidates = _by_time(timeline, fps)
    chosen = [candidates[i] for i in spread_evenly(len(candidates), max_views)]

    made_from = {"video": video.name, "fps": fps, "every": every, "max_views": max_views}
    renew_folder(folder, [_file_name(number) for number in chosen], made_from=made_from)
    written: list[Path] = []
    for number, image in _decode(video, chosen):
        path = folder / _file_name(number)
        with atomic_write(path) as file:
            image.save(file, "JPEG", quality=_JPEG_QUALITY)
        written.append(path)
        if progress is not None:
            progress(len(written), len(chosen), path.name)
    if not written:
        raise DatasetError(f"{video}: none of its frames could be decoded; convert it to MP4")
    if timeline.damage or len(written) < len(chosen):
        logger.warning(
            "%s: %s; went on with %d of %d frames",
            video,
            timeline.damage or "some frames are damaged",
            len(written),
            len(chosen),
        )
    return written


@dataclass(frozen=True, kw_only=True)
class _Timeline:
    """When the frames are shown, in seconds and ascending, and how exact that is.

    ``damage`` says what is wrong with the file, or is empty.
    """

    times: Sequence[float]
    tick: float
    damage: str


def _read_timeline(video: Path) -> _Timeline:
    """Reads the packets of the file without decoding them."""
    ticks: list[int] = []
    packets = corrupt = 0
    with _opened(video) as (container, stream):
        for packet in _packets(container, stream):
            packets += 1
            corrupt += packet.is_corrupt
            if packet.is_discard:  # needed to decode others, never shown
                continue
            shown = packet.dts if packet.pts is None else packet.pts
            if shown is None:
                raise DatasetError(f"{video}: its frames have no timestamps; convert it to MP4")
            ticks.append(shown)
        tick, promised = float(stream.time_base or 0), stream.frames
        start, length = ((x or 0) / 1e6 for x in (container.start_time, container.duration))
    if not ticks:
        raise DatasetError(f"{video}: expected a video, found no frame in it")
    times = [tick * shown for shown in sorted(ticks)]
    interval = (times[-1] - times[0]) / max(1, len(times) - 1)
    last = times[-1] - start
    damage = ""
    if corrupt or packets < promised:
        damage = "the file is cut off or damaged"
    elif not promised and last + interval < 0.9 * length:
        damage = f"its last frame is at {last:.1f} of {length:.1f} s, so it may be cut off"
    return _Timeline(times=times, tick=tick, damage=damage)


def _by_time(timeline: _Timeline, fps: float) -> list[int]:
    """The first frame in each interval of 1 / fps seconds that has one."""
    chosen: list[int] = []
    next_interval = 0
    for index, time in enumerate(timeline.times):
        # Timestamps are rounded to the tick, so a frame may seem up to half of one early.
        interval = math.floor((time - timeline.times[0] + timeline.tick / 2) * fps)
        if interval >= next_interval:
            chosen.append(index)
            next_interval = interval + 1
    return chosen


def _file_name(number: int) -> str:
    return f"frame_{number:06d}.jpg"


def _decode(video: Path, numbers: Sequence[int]) -> Iterator[tuple[int, Image.Image]]:
    """These frames, ascending, with their numbers; damaged ones are left out."""
    from av.error import InvalidDataError

    wanted = set(numbers)
    number = 0
    with _opened(video) as (container, stream):
        stream.thread_type = "AUTO"
        for packet in _packets(container, stream, flush=True):
            try:
                frames = packet.decode()
            except InvalidDataError:
                continue
            for frame in frames:
                if number in wanted and not frame.is_corrupt:
                    yield number, _upright(frame)
                number += 1
            if number > numbers[-1]:
                return


def _upright(frame: "VideoFrame") -> Image.Image:
    image: Image.Image = frame.to_image()
    side_data: Mapping[str, Any] = frame.side_data
    if "DISPLAYMATRIX" not in side_data:
        return image
    matrix = np.frombuffer(side_data["DISPLAYMATRIX"], dtype=np.int32).reshape(3, 3) / 2**16
    a, b, c, d = np.sign(matrix[:2, :2].round()).ravel().tolist()
    turn = _UPRIGHT.get((a, b, c, d))
    return image if turn is None else image.transpose(turn)


@contextmanager
def _opened(video: Path) -> Iterator[tuple["InputContainer", "VideoStream"]]:
    """The file and its first stream of moving pictures."""
    import av
    from av.stream import Disposition

    if not video.is_file() or not is_video(video):
        raise DatasetError(
            f"{video}: expected a video file ({' '.join(VIDEO_SUFFIXES)}), found "
            f"{'another format' if video.is_file() else 'no such file'}"
        )
    try:
        container = av.open(str(video))
    except av.FFmpegError as error:
        raise DatasetError(
            f"{video}: expected a video, could not read it ({error.strerror}); a recording that "
            "was cut off often has no table of contents, convert or record it again"
        ) from error
    with container:
        streams = [
            stream
            for stream in container.streams.video
            if not stream.disposition & Disposition.attached_pic  # the cover of a song
        ]
        if not streams:
            raise DatasetError(f"{video}: expected a video, found no pictures in it")
        yield container, streams[0]


def _packets(
    container: "InputContainer", stream: "VideoStream", *, flush: bool = False
) -> Iterator["Packet"]:
    """Compressed frames up to the first one that cannot be read.

    ``flush`` adds the empty packet that lets a decoder give its last frames.
    """
    from av.error import FFmpegError

    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
        except FFmpegError:
            return
        if packet is None:
            return
        if packet.size or flush:
            yield packet
