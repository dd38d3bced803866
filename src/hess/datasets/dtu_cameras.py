"""What the layouts of DTU share: cameras as projection matrices and text, frames made of them."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hess.datasets.decoding import read_size
from hess.datasets.frames import Frame, FrameSequence, rigid_pose
from hess.errors import DatasetError
from hess.geometry.poses import invert_pose, pose_from


def scan_number(name: str) -> int | None:
    """Number of the DTU scan that a folder, sequence or scene is named after ("scan24/0": 24)."""
    found = re.search(r"scan_?(\d+)", name)
    return int(found[1]) if found else None


def split_projection(projection: Tensor, source: Path) -> tuple[Tensor, Tensor]:
    """Camera of a projection matrix [3, 4], which is known up to a factor of either sign.

    Returns:
        intrinsics float64 [3, 3] in the same pixel coordinates, with positive focal lengths and a
        last element of 1, and cam_from_world float64 [4, 4].

    Raises:
        DatasetError: the matrix, read from ``source``, is no finite camera.
    """
    from scipy.linalg import rq

    matrix = projection.double().numpy()
    if not np.isfinite(matrix).all() or np.linalg.matrix_rank(matrix[:, :3]) < 3:
        raise DatasetError(
            f"{source}: expected a projection matrix of rank 3, found {matrix.tolist()}"
        )
    if np.linalg.det(matrix[:, :3]) < 0:
        matrix = -matrix
    upper, rotation = rq(matrix[:, :3])
    signs = np.sign(np.diag(upper))
    upper, rotation = upper * signs, signs[:, None] * rotation
    pose = pose_from(
        torch.from_numpy(rotation), torch.from_numpy(np.linalg.solve(upper, matrix[:, 3]))
    )
    return torch.from_numpy(upper / upper[2, 2]), pose


def read_cam_txt(path: Path) -> tuple[Tensor, Tensor]:
    """cam_from_world [4, 4] and intrinsics [3, 3] of a ``*_cam.txt``, float64, as they stand.

    Raises:
        DatasetError: the file is missing or holds no such matrices.
    """
    try:
        words = path.read_text().split()
        extrinsic, intrinsic = words.index("extrinsic") + 1, words.index("intrinsic") + 1
        pose = np.array(words[extrinsic : extrinsic + 16], dtype=np.float64).reshape(4, 4)
        camera = np.array(words[intrinsic : intrinsic + 9], dtype=np.float64).reshape(3, 3)
    except (OSError, ValueError) as error:
        raise DatasetError(
            f"{path}: expected a 4x4 matrix after 'extrinsic' and a 3x3 one after 'intrinsic', "
            f"found: {error}"
        ) from error
    if not (np.isfinite(camera).all() and camera[0, 0] > 0 and camera[1, 1] > 0):
        raise DatasetError(f"{path}: expected focal lengths above 0, found {camera.tolist()}")
    return torch.from_numpy(pose), torch.from_numpy(camera)


def photo_frame(
    image: Path,
    cam_from_world: Tensor,
    intrinsics: Tensor,
    source: Path,
    read_depth: Callable[[], Tensor] | None = None,
) -> Frame:
    """Frame of a layout that does not say for which photo size its cameras are.

    Args:
        cam_from_world: [4, 4].
        intrinsics: [3, 3]; the centre of the top-left pixel is (0, 0).
        source: where the camera was read.

    Raises:
        DatasetError: the photo is unreadable or clearly of another size, or the pose is no pose.
    """
    intrinsics = intrinsics.clone()
    intrinsics[:2, 2] += 0.5
    width, height = read_size(image)
    x, y = intrinsics[0, 2].item(), intrinsics[1, 2].item()
    if not (width / 4 < x < width * 3 / 4 and height / 4 < y < height * 3 / 4):
        raise DatasetError(
            f"{image}: its camera in {source.name} has its principal point at ({x:.0f}, {y:.0f}), "
            f"so it is for photos of about {2 * x:.0f}x{2 * y:.0f} pixels, found {width}x{height};"
            " use the photos that the cameras were made for"
        )
    return Frame(
        image_path=image,
        world_from_cam=invert_pose(rigid_pose(cam_from_world, source)),
        intrinsics=intrinsics,
        image_size=(width, height),
        read_depth=read_depth,
    )


def scan_sequence(name: str, frames: list[Frame]) -> FrameSequence:
    """Frames of one scan, in mm when it is named as DTU's are.

    Other scenes come in the same layouts, but in lengths of their own.
    """
    unit = "arbitrary" if scan_number(name) is None else "mm"
    return FrameSequence(name=name, frames=tuple(frames), unit=unit)
