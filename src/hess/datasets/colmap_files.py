"""The files of a COLMAP sparse model, binary or text.

They are read here and not by pycolmap, which ends the whole process on some damaged ones. Format:
colmap.github.io/format.html; rigs and frames add nothing that is needed.
"""

import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hess.errors import DatasetError

_STEMS = ("cameras", "images", "points3D")
# What the binary files call the camera models: their index here.
_MODEL_NUMBERS = (
    "SIMPLE_PINHOLE",
    "PINHOLE",
    "SIMPLE_RADIAL",
    "RADIAL",
    "OPENCV",
    "OPENCV_FISHEYE",
    "FULL_OPENCV",
    "FOV",
    "SIMPLE_RADIAL_FISHEYE",
    "RADIAL_FISHEYE",
    "THIN_PRISM_FISHEYE",
)
_NUM_PARAMETERS = (3, 4, 4, 5, 8, 8, 12, 5, 4, 5, 12)
_POINT_2D = np.dtype([("pixel", "<f8", 2), ("point", "<i8")])
_COUNT = re.compile(r"# Number of (\w+): (\d+)")


@dataclass(frozen=True, kw_only=True)
class ColmapCamera:
    """``parameters`` in the order of the camera model, pixels from the corner of the image."""

    id: int
    model: str
    width: int
    height: int
    parameters: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class ColmapImage:
    """A photo with cam_from_world as quaternion (w, x, y, z) and translation.

    ``points`` are the ids of the points that it sees.
    """

    name: str
    camera: int
    quaternion: tuple[float, ...]
    translation: tuple[float, ...]
    points: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class ColmapModel:
    """Cameras and points by their ids."""

    cameras: dict[int, ColmapCamera]
    images: tuple[ColmapImage, ...]
    points: dict[int, tuple[float, float, float]]


def model_files(folder: Path) -> list[Path]:
    """Those of the three files of a model that are there, all binary or else all text."""
    for suffix in (".bin", ".txt"):
        paths = [folder / f"{stem}{suffix}" for stem in _STEMS]
        if found := [path for path in paths if path.is_file()]:
            return found
    return []


def read_model(folder: Path) -> ColmapModel:
    """The model of a folder that has at least one of its files.

    Raises:
        DatasetError: a file is missing, damaged or cut off, or they do not belong together.
    """
    suffix = model_files(folder)[0].suffix
    cameras, images, points = (
        _records(folder / f"{stem}{suffix}", reader)
        for stem, reader in zip(_STEMS, _READERS[suffix], strict=True)
    )
    model = ColmapModel(
        cameras={camera.id: camera for camera in cameras},
        images=tuple(images),
        points=dict(points),
    )
    if not images:
        raise DatasetError(f"{folder}: expected a COLMAP model of photos, found none in it")
    for image in model.images:
        if image.camera not in model.cameras or not model.points.keys() >= set(image.points):
            raise DatasetError(
                f"{folder}: photo {image.name} refers to a camera or to points that are not in "
                "the model; its files belong to different models, export it again"
            )
    return model


def _records(path: Path, reader: Callable[[Path], Iterator[Any]]) -> list[Any]:
    try:
        return list(reader(path))
    except OSError as error:
        raise DatasetError(
            f"{path}: expected {', '.join(_STEMS)} of one COLMAP model, found: {error}; copy the "
            "whole model"
        ) from error
    except (ValueError, struct.error) as error:
        raise DatasetError(
            f"{path}: expected a file of a COLMAP model, found it damaged or cut off ({error}); "
            "export the model again"
        ) from error


# --- binary, little-endian ----------------------------------------------------------------------


class _Bytes:
    """Reads a file from its start to its end."""

    def __init__(self, path: Path) -> None:
        self.data, self.at = path.read_bytes(), 0

    def take(self, format: str) -> tuple[Any, ...]:
        start = self.skip(struct.calcsize("<" + format))
        return struct.unpack_from("<" + format, self.data, start)

    def skip(self, size: int) -> int:
        """Where the skipped part starts."""
        start = self.at
        if size > len(self.data) - start:
            raise ValueError(f"{size} bytes expected at {start} of {len(self.data)}")
        self.at += size
        return start


def _binary_cameras(path: Path) -> Iterator[ColmapCamera]:
    file = _Bytes(path)
    for _ in range(*file.take("Q")):
        number, model, width, height = file.take("iiQQ")
        if not 0 <= model < len(_MODEL_NUMBERS):
            raise ValueError(f"camera model {model} is unknown")
        yield ColmapCamera(
            id=number,
            model=_MODEL_NUMBERS[model],
            width=width,
            height=height,
            parameters=file.take(f"{_NUM_PARAMETERS[model]}d"),
        )


def _binary_images(path: Path) -> Iterator[ColmapImage]:
    file = _Bytes(path)
    for _ in range(*file.take("Q")):
        _, *pose, camera = file.take("i7di")
        end = file.data.index(b"\0", file.at)
        name = file.data[file.at : end].decode()
        file.at = end + 1
        (count,) = file.take("Q")
        start = file.skip(count * _POINT_2D.itemsize)
        seen = np.frombuffer(file.data, _POINT_2D, count, start)["point"]
        yield _image(name, camera, pose, seen.tolist())


def _binary_points(path: Path) -> Iterator[tuple[int, tuple[float, ...]]]:
    file = _Bytes(path)
    for _ in range(*file.take("Q")):
        number, x, y, z, _, _, _, _, track = file.take("Q3d3BdQ")
        file.skip(8 * track)
        yield number, (x, y, z)


def _image(name: str, camera: int, pose: list[float], seen: list[int]) -> ColmapImage:
    points = tuple(point for point in seen if point >= 0)  # -1 is a keypoint without a point
    return ColmapImage(
        name=name,
        camera=camera,
        quaternion=tuple(pose[:4]),
        translation=tuple(pose[4:]),
        points=points,
    )


# --- text ---------------------------------------------------------------------------------------


def _lines(path: Path) -> list[str]:
    """Lines but for comments, of which one may state how many things there are."""
    lines = path.read_text(encoding="utf-8").split("\n")
    content = [line for line in lines if not line.startswith("#")]
    for what, count in (found.groups() for line in lines[:5] if (found := _COUNT.match(line))):
        found_count = len(content) // (2 if what == "images" else 1)
        if found_count < int(count):
            raise ValueError(f"it states {count} {what} and has {found_count}")
    return content


def _text_cameras(path: Path) -> Iterator[ColmapCamera]:
    for line in filter(str.strip, _lines(path)):
        number, model, width, height, *parameters = line.split()
        yield ColmapCamera(
            id=int(number),
            model=model,
            width=int(width),
            height=int(height),
            parameters=tuple(float(word) for word in parameters),
        )


def _text_images(path: Path) -> Iterator[ColmapImage]:
    lines = iter(_lines(path))
    for line in lines:
        if not line.strip():
            continue
        _, qw, qx, qy, qz, tx, ty, tz, camera, name = line.split(maxsplit=9)
        pose = [float(word) for word in (qw, qx, qy, qz, tx, ty, tz)]
        # Triples of x, y and point; an empty line where no keypoint was found.
        seen = [int(word) for word in next(lines, "").split()[2::3]]
        yield _image(name.strip(), int(camera), pose, seen)


def _text_points(path: Path) -> Iterator[tuple[int, tuple[float, ...]]]:
    for line in filter(str.strip, _lines(path)):
        number, x, y, z = line.split(maxsplit=4)[:4]
        yield int(number), (float(x), float(y), float(z))


_READERS: dict[str, tuple[Callable[[Path], Iterator[Any]], ...]] = {
    ".bin": (_binary_cameras, _binary_images, _binary_points),
    ".txt": (_text_cameras, _text_images, _text_points),
}
