"""Frames of recorded sequences: photos on disk with whatever is known of them."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hess.errors import DatasetError
from hess.geometry.poses import pose_from

logger = logging.getLogger(__name__)

_MAX_SHEAR = 0.05


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One photo of a sequence and what is known of it.

    Args:
        image_path: the photo.
        world_from_cam: float64 [4, 4], OpenCV axes, or None.
        intrinsics: float64 [3, 3] in pixels of the photo, top-left pixel centre at (0.5, 0.5),
            or None.
        image_size: (width, height) of the photo that its intrinsics are for; None if the layout
            does not say.
        resizable: a photo of another size is a resized copy, to which the intrinsics are scaled;
            otherwise it is an error.
        distortion: by how many pixels a lens distortion that the intrinsics leave out moves a
            pixel at most.
        read_depth: reads float32 [H, W], z-depth registered to the photo, 0 where unknown; None
            when the frame has none.
        points: float64 [M, 3], world points that this photo is known to show; they become a
            sparse depth map at the size of the model.
    """

    image_path: Path
    world_from_cam: Tensor | None = None
    intrinsics: Tensor | None = None
    image_size: tuple[int, int] | None = None
    resizable: bool = False
    distortion: float = 0.0
    read_depth: Callable[[], Tensor] | None = None
    points: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class FrameSequence:
    """Frames of one place in the order of recording; others as in :class:`Scene`."""

    name: str
    frames: tuple[Frame, ...]
    unit: str = "arbitrary"
    category: str | None = None


def rigid_pose(matrix: Tensor, source: Path) -> Tensor:
    """Pose [4, 4] with its rotation made exactly orthonormal (nearest rotation, by SVD).

    Raises:
        DatasetError: ``matrix`` has no rotation even roughly, or is not finite.
    """
    rotation, translation = matrix[:3, :3].double(), matrix[:3, 3].double()
    gram = rotation @ rotation.T
    orthogonal = torch.allclose(gram, torch.eye(3, dtype=torch.float64), rtol=0, atol=_MAX_SHEAR)
    if not matrix.isfinite().all() or not orthogonal or torch.linalg.det(rotation) < 0:
        raise DatasetError(
            f"{source}: expected a camera-to-world pose with a right-handed rotation, found "
            f"{matrix.tolist()}; remove frames without tracking"
        )
    u, _, vh = torch.linalg.svd(rotation)
    return pose_from(u @ vh, translation)


def usable_frames(frames: Sequence[Frame], source: Path) -> tuple[Frame, ...]:
    """Frames whose photo is there; warns of those that are not, and of lens distortion.

    Raises:
        DatasetError: no photo is there.
    """
    there = tuple(frame for frame in frames if frame.image_path.is_file())
    missing = [frame.image_path for frame in frames if not frame.image_path.is_file()]
    if not there:
        raise DatasetError(
            f"{source}: expected the {len(frames)} photos that it lists, found none of them, such "
            f"as {', '.join(map(str, missing[:1])) or 'none'}; put them there"
        )
    if missing:
        logger.warning(
            "%s: %d of %d photos are missing, such as %s; went on with the others",
            source,
            len(missing),
            len(frames),
            missing[0],
        )
    worst = max(there, key=lambda frame: frame.distortion)
    if worst.distortion > 1:
        logger.warning(
            "%s: lens distortion of up to %.1f pixels (of photos of %s) is left out",
            source,
            worst.distortion,
            worst.image_size,
        )
    return there
