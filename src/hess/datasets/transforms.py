"""transforms.json of nerfstudio, instant-ngp and NeRF's Blender scenes."""

import json
import math
from pathlib import Path
from typing import Any

import torch

from hess.datasets.decoding import read_size
from hess.datasets.frames import Frame, FrameSequence, rigid_pose, usable_frames
from hess.datasets.layout import Layout
from hess.datasets.lens import pinhole_intrinsics
from hess.datasets.photo_files import SUFFIXES, natural_key
from hess.errors import DatasetError

_NAMES = ("transforms.json", "transforms_train.json")
_PERSPECTIVE = ("OPENCV", "PINHOLE", "SIMPLE_PINHOLE")
_COEFFICIENTS = ("k1", "k2", "k3", "p1", "p2")
# Camera axes x right, y up, z backwards -> x right, y down, z forward.
_OPENGL_FROM_OPENCV = torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64))


def read_transforms(path: Path) -> list[FrameSequence]:
    """Photos listed in ``transforms.json`` or ``transforms_train.json``, in natural order.

    Intrinsics stand at the top or in each frame, as ``fl_x``, ``fl_y``, ``cx``, ``cy``, ``w``,
    ``h`` in pixels or as ``camera_angle_x`` in radians. Photos of another size than they are for
    get them scaled; missing photos are left out with a warning. Depth maps are not read.

    Raises:
        DatasetError: the file is damaged or incomplete, no photo is there, or the lens distorts
            strongly.
    """
    source = next(path / name for name in _NAMES if (path / name).is_file())
    try:
        content = json.loads(source.read_text(encoding="utf-8"))
        shared = {key: value for key, value in content.items() if key != "frames"}
        listed = [{**shared, **frame} for frame in content["frames"]]
        named = sorted(((f["file_path"], f) for f in listed), key=lambda f: natural_key(f[0]))
        # A photo that is missing tells no size, and nothing of it is needed.
        frames = [_frame(_photo(path, name), frame, source) for name, frame in named]
    except DatasetError:
        raise
    except KeyError as error:
        raise DatasetError(
            f"{source}: expected frames with file_path, transform_matrix and a focal length "
            f"(fl_x or camera_angle_x), found none of the name {error}"
        ) from error
    except (OSError, ArithmeticError, AttributeError, TypeError, ValueError) as error:
        raise DatasetError(
            f"{source}: expected cameras as nerfstudio writes them, found: {error}; write the "
            "file again, or move it away to use the photos alone"
        ) from error
    return [FrameSequence(name=path.resolve().name, frames=usable_frames(frames, source))]


def _photo(folder: Path, name: str) -> Path:
    """The photo of a ``file_path``, which Blender writes without suffix."""
    path = folder / name
    candidates = [path, *(path.with_name(path.name + suffix) for suffix in SUFFIXES)]
    return next((candidate for candidate in candidates if candidate.is_file()), path)


def _frame(photo: Path, frame: dict[str, Any], source: Path) -> Frame:
    pose = torch.tensor(frame["transform_matrix"], dtype=torch.float64)
    if tuple(pose.shape) not in ((4, 4), (3, 4)):
        raise ValueError(f"a transform_matrix of shape {tuple(pose.shape)}")
    world_from_cam = rigid_pose(pose, source) @ _OPENGL_FROM_OPENCV
    if not photo.is_file():
        return Frame(image_path=photo)

    model = frame.get("camera_model", "OPENCV")
    if model not in _PERSPECTIVE or frame.get("is_fisheye") or frame.get("k4"):
        raise DatasetError(
            f"{source}: expected perspective cameras ({', '.join(_PERSPECTIVE)}, no k4), found "
            f"camera_model {model}; undistort the photos first"
        )
    size = (int(frame["w"]), int(frame["h"])) if "w" in frame else read_size(photo)
    width, height = size
    if "fl_x" in frame:
        fx = float(frame["fl_x"])
    else:
        fx = 0.5 * width / math.tan(0.5 * float(frame["camera_angle_x"]))
    lens = {
        "fx": fx,
        "fy": float(frame.get("fl_y", fx)),
        "cx": float(frame.get("cx", width / 2)),
        "cy": float(frame.get("cy", height / 2)),
        **{key: float(frame.get(key, 0)) for key in _COEFFICIENTS},
    }
    intrinsics, distortion = pinhole_intrinsics(lens, width=width, height=height, source=source)
    return Frame(
        image_path=photo,
        world_from_cam=world_from_cam,
        intrinsics=intrinsics,
        image_size=size,
        resizable=True,
        distortion=distortion,
    )


TRANSFORMS = Layout(
    name="transforms",
    files="transforms.json images/",
    matches=lambda path: any((path / name).is_file() for name in _NAMES),
    read=read_transforms,
)
