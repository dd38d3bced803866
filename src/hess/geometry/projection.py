"""Pinhole projection: depth maps to world points, and world points to pixels."""

import torch
from torch import Tensor

from hess.errors import LayoutError


def unproject_depth(depth: Tensor, intrinsics: Tensor, world_from_cam: Tensor) -> Tensor:
    """World point of every pixel; the centre of pixel (row i, column j) is (j + 0.5, i + 0.5).

    Differentiable in all three arguments, which share one dtype.

    Args:
        depth: [..., H, W], z-depth along the camera's optical axis, in the unit of the poses.
        intrinsics: [..., 3, 3] in pixels; a skew is honoured.
        world_from_cam: [..., 4, 4], OpenCV axes.

    Returns:
        points [..., H, W, 3] in world coordinates.

    Raises:
        LayoutError: the last dimensions of an argument are not as above.
    """
    _check_matrix("intrinsics", intrinsics, 3)
    _check_matrix("world_from_cam", world_from_cam, 4)
    if depth.ndim < 2:
        raise LayoutError(f"depth must have shape [..., H, W], found {tuple(depth.shape)}")
    height, width = depth.shape[-2:]
    rows = torch.arange(height, dtype=depth.dtype, device=depth.device) + 0.5
    columns = torch.arange(width, dtype=depth.dtype, device=depth.device) + 0.5
    v, u = torch.meshgrid(rows, columns, indexing="ij")
    fx, skew, cx = (intrinsics[..., 0, i, None, None] for i in range(3))
    fy, cy = intrinsics[..., 1, 1, None, None], intrinsics[..., 1, 2, None, None]
    y = (v - cy) / fy
    x = (u - cx - skew * y) / fx
    in_cam = torch.stack((x * depth, y * depth, depth.expand_as(x * depth)), dim=-1)
    rotation, center = world_from_cam[..., :3, :3], world_from_cam[..., :3, 3]
    return in_cam @ rotation.mT[..., None, :, :] + center[..., None, None, :]


def project(points: Tensor, intrinsics: Tensor, cam_from_world: Tensor) -> tuple[Tensor, Tensor]:
    """Pixel coordinates and z-depth of world points; the inverse of :func:`unproject_depth`.

    A point in the plane of the camera's centre has no pixel (infinite or NaN coordinates); a
    point behind the camera gets a negative depth. Callers mask with ``depth > 0``.

    Args:
        points: [..., M, 3] in world coordinates.
        intrinsics: [..., 3, 3] in pixels.
        cam_from_world: [..., 4, 4], OpenCV axes.

    Returns:
        pixels [..., M, 2] as (column, row), top-left pixel centre at (0.5, 0.5), and
        depth [..., M].

    Raises:
        LayoutError: the last dimensions of an argument are not as above.
    """
    _check_matrix("intrinsics", intrinsics, 3)
    _check_matrix("cam_from_world", cam_from_world, 4)
    if points.ndim < 2 or points.shape[-1] != 3:
        raise LayoutError(f"points must have shape [..., M, 3], found {tuple(points.shape)}")
    in_cam = points @ cam_from_world[..., :3, :3].mT + cam_from_world[..., None, :3, 3]
    homogeneous = in_cam @ intrinsics.mT
    return homogeneous[..., :2] / homogeneous[..., 2:], in_cam[..., 2]


def _check_matrix(name: str, matrix: Tensor, size: int) -> None:
    if matrix.ndim < 2 or tuple(matrix.shape[-2:]) != (size, size):
        raise LayoutError(
            f"{name} must have shape [..., {size}, {size}], found {tuple(matrix.shape)}"
        )
