"""Middlebury multi-view sets (temple, dino): photos with one table of cameras.

Format: vision.middlebury.edu/mview/data.
"""

from pathlib import Path

import torch

from hess.datasets.frames import Frame, FrameSequence, rigid_pose, usable_frames
from hess.datasets.layout import Layout
from hess.datasets.photo_files import natural_key
from hess.errors import DatasetError
from hess.geometry.poses import invert_pose, pose_from

_SIZE = (640, 480)
_NUMBERS = 9 + 9 + 3


def read_middlebury(path: Path) -> list[FrameSequence]:
    """Photos of ``*_par.txt``, whose lines are a file name and K, R, t of P = K [R | t].

    Lengths are in metres, as the calibrated gantry gives them. Missing photos are left out with a
    warning.

    Raises:
        DatasetError: the table is damaged or no photo is there.
    """
    source = sorted(path.glob("*_par.txt"))[0]
    try:
        count, *lines = filter(str.strip, source.read_text(encoding="utf-8").splitlines())
        rows = [line.split() for line in lines]
        numbers = torch.tensor([[float(x) for x in row[1:]] for row in rows], dtype=torch.float64)
        if int(count) != len(rows) or numbers.shape[1:] != (_NUMBERS,):
            raise ValueError(f"{len(rows)} lines after a count of {count}")
    except (OSError, ValueError) as error:
        raise DatasetError(
            f"{source}: expected the number of photos and a line for each with its name and "
            f"{_NUMBERS} numbers (K, R, t), found: {error}; download the file again"
        ) from error
    frames = []
    for (name, *_), row in zip(rows, numbers, strict=True):
        intrinsics = row[:9].reshape(3, 3).clone()
        if not (intrinsics[0, 0] > 0 and intrinsics[1, 1] > 0 and intrinsics.isfinite().all()):
            raise DatasetError(f"{source}: expected positive focal lengths for {name}")
        intrinsics[:2, 2] += 0.5  # there, the centre of the top-left pixel is (0, 0)
        cam_from_world = pose_from(row[9:18].reshape(3, 3), row[18:])
        frames.append(
            Frame(
                image_path=path / name,
                world_from_cam=invert_pose(rigid_pose(cam_from_world, source)),
                intrinsics=intrinsics,
                image_size=_SIZE,
            )
        )
    frames.sort(key=lambda frame: natural_key(frame.image_path.name))
    return [
        FrameSequence(name=path.resolve().name, frames=usable_frames(frames, source), unit="m")
    ]


MIDDLEBURY = Layout(
    name="middlebury",
    files="*_par.txt *.png",
    matches=lambda path: any(path.glob("*_par.txt")),
    read=read_middlebury,
)
