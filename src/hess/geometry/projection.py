"""Pinhole projection: depth maps to points, points to pixels, and the camera of a point map."""

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
    u, v = _pixel_centres(depth)
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


@torch.no_grad()
def intrinsics_from_points(points: Tensor, weights: Tensor) -> Tensor:
    """Intrinsics of the pinhole camera that sees ``points`` at their pixels; no gradients.

    The principal point is taken as the image centre. Each pixel then asks for its own focal
    lengths, (u - cx) z/x and (v - cy) z/y; the result is their median, in which a pixel counts by
    its weight and its distance |u - cx| or |v - cy| from the centre, where it tells most. Up to
    half of that may be wrong without harm. Pixels that no positive focal length can explain have
    no say: not finite, behind the camera, or on the other side of its axis.

    Args:
        points: [..., H, W, 3], the point of every pixel in the camera's frame, OpenCV axes.
        weights: [..., H, W], 0 or more; how far each pixel is to be trusted.

    Returns:
        [..., 3, 3] in pixels, top-left pixel centre at (0.5, 0.5). A focal length is NaN where
        no pixel has a say.

    Raises:
        LayoutError: the shapes are not as above.
    """
    if points.ndim < 3 or points.shape[-1] != 3 or weights.shape != points.shape[:-1]:
        raise LayoutError(
            "expected points [..., H, W, 3] and weights [..., H, W], found "
            f"{tuple(points.shape)} and {tuple(weights.shape)}"
        )
    height, width = weights.shape[-2:]
    u, v = _pixel_centres(weights)
    x, y, z = points.unbind(-1)
    intrinsics = torch.eye(3, dtype=z.dtype, device=z.device).repeat(*z.shape[:-2], 1, 1)
    for axis, offset, across in ((0, u - width / 2, x), (1, v - height / 2, y)):
        focal = offset * z / across
        mass = weights * offset.abs()
        has_say = (z > 0) & (focal > 0) & focal.isfinite() & (mass > 0)
        intrinsics[..., axis, axis] = _weighted_median(
            focal.where(has_say, torch.inf), mass.where(has_say, 0)
        )
    intrinsics[..., 0, 2], intrinsics[..., 1, 2] = width / 2, height / 2
    return intrinsics


def _weighted_median(values: Tensor, mass: Tensor) -> Tensor:
    """Median over the last two dimensions; NaN where there is no mass."""
    ordered, order = values.flatten(-2).sort(dim=-1)
    below = mass.flatten(-2).gather(-1, order).cumsum(-1)
    middle = torch.searchsorted(below, below[..., -1:] / 2)
    median = ordered.gather(-1, middle).squeeze(-1)
    return median.where(median.isfinite(), torch.nan)


def _pixel_centres(image: Tensor) -> tuple[Tensor, Tensor]:
    """Columns and rows of the pixel centres of ``image`` [..., H, W], each [H, W]."""
    rows, columns = (
        torch.arange(size, dtype=image.dtype, device=image.device) + 0.5
        for size in image.shape[-2:]
    )
    v, u = torch.meshgrid(rows, columns, indexing="ij")
    return u, v


def _check_matrix(name: str, matrix: Tensor, size: int) -> None:
    if matrix.ndim < 2 or tuple(matrix.shape[-2:]) != (size, size):
        raise LayoutError(
            f"{name} must have shape [..., {size}, {size}], found {tuple(matrix.shape)}"
        )
