"""How far one prediction of a scene has moved from another."""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from hess.errors import AlignmentError
from hess.geometry.poses import camera_centers
from hess.geometry.sim3 import umeyama


@dataclass(frozen=True, kw_only=True)
class Drift:
    """Mean displacements after the best similarity, as shares of the scene's size.

    The size is the mean distance of the points to their centre. A turn by an angle moves what is
    one size away by as many sizes as the angle has radians, so angles compare with lengths.

    Args:
        points: of the points.
        positions: of the camera centres.
        rotations: of the cameras' orientations, in radians.
    """

    points: float
    positions: float
    rotations: float

    @property
    def largest(self) -> float:
        """The largest of the three."""
        return max(self.points, self.positions, self.rotations)

    def as_dict(self) -> dict[str, float]:
        """All of them and the largest."""
        return asdict(self) | {"largest": self.largest}


def drift(poses: Tensor, points: Tensor, moved_poses: Tensor, moved_points: Tensor) -> Drift:
    """Drift of a second prediction of the same photos from a first.

    Both are aligned on all pairs of points: a similarity of the whole scene is no drift.

    Args:
        poses, moved_poses: world_from_cam [N, 4, 4].
        points, moved_points: of the same pixels, [..., 3].

    Raises:
        AlignmentError: shapes differ, something is not finite, or the points lie on a line.
    """
    if poses.shape != moved_poses.shape or points.shape != moved_points.shape:
        raise AlignmentError(
            f"two predictions of the same photos are needed, found poses {list(poses.shape)} and "
            f"{list(moved_poses.shape)}, points {list(points.shape)} and "
            f"{list(moved_points.shape)}"
        )
    points, moved_points = (x.double().cpu().reshape(-1, 3) for x in (points, moved_points))
    poses, moved_poses = poses.double().cpu(), moved_poses.double().cpu()
    if not all(bool(x.isfinite().all()) for x in (points, moved_points, poses, moved_poses)):
        raise AlignmentError("a prediction holds NaN or infinity, so its drift is unknown")
    first_from_moved = umeyama(moved_points, points)
    size = _mean_length(points - points.mean(0))
    moved_poses = first_from_moved.apply_to_poses(moved_poses)
    turns = poses[:, :3, :3].mT @ moved_poses[:, :3, :3]
    # |R - 1| = 2 sqrt(2) sin(angle / 2); the arc cosine of the trace is blind to small angles.
    chord = (turns - torch.eye(3, dtype=turns.dtype)).flatten(1).norm(dim=1)
    angles = 2 * torch.asin((chord / 8**0.5).clamp(max=1.0))
    return Drift(
        points=_mean_length(first_from_moved.apply(moved_points) - points) / size,
        positions=_mean_length(camera_centers(moved_poses) - camera_centers(poses)) / size,
        rotations=angles.mean().item(),
    )


def _mean_length(vectors: Tensor) -> float:
    return vectors.norm(dim=-1).mean().item()
