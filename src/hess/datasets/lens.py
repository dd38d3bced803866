"""Cameras with a little lens distortion, taken as pinhole cameras."""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from hess.errors import DatasetError

MAX_SHIFT = 0.02
"""Distortion may move no pixel by more than this share of the image diagonal."""

CAMERA_MODELS = {
    "SIMPLE_PINHOLE": ("f", "cx", "cy"),
    "PINHOLE": ("fx", "fy", "cx", "cy"),
    "SIMPLE_RADIAL": ("f", "cx", "cy", "k1"),
    "RADIAL": ("f", "cx", "cy", "k1", "k2"),
    "OPENCV": ("fx", "fy", "cx", "cy", "k1", "k2", "p1", "p2"),
    "FULL_OPENCV": ("fx", "fy", "cx", "cy", "k1", "k2", "p1", "p2", "k3", "k4", "k5", "k6"),
}
"""COLMAP's perspective camera models and their parameters, in the order of its files."""

_GRID = 33


def pinhole_intrinsics(
    parameters: Mapping[str, float], *, width: int, height: int, source: Path
) -> tuple[Tensor, float]:
    """Intrinsics of a camera whose distortion is small, leaving that out.

    Args:
        parameters: ``f`` or ``fx`` and ``fy``, ``cx``, ``cy`` in pixels (top-left pixel centre at
            (0.5, 0.5)) and OpenCV's coefficients k1 ... k6, p1, p2; 0 if not given.
        width, height: image size in pixels.
        source: the file, for messages.

    Returns:
        intrinsics float64 [3, 3], and by how many pixels distortion moves a pixel at most.

    Raises:
        DatasetError: a number is not finite, a size or focal length not positive, or distortion
            moves a pixel by more than 2 % of the image diagonal.
    """
    p = dict(parameters)
    fx, fy = p.get("fx", p.get("f", math.nan)), p.get("fy", p.get("f", math.nan))
    if not all(map(math.isfinite, [fx, fy, *p.values()])) or min(fx, fy, width, height) <= 0:
        raise DatasetError(
            f"{source}: expected a camera with a positive size and focal length and finite "
            f"parameters, found {width}x{height} pixels and {p}"
        )
    intrinsics = torch.tensor(
        [[fx, 0.0, p["cx"]], [0.0, fy, p["cy"]], [0.0, 0.0, 1.0]], dtype=torch.float64
    )
    shift = _largest_shift(p, intrinsics, width, height)
    share = shift / math.hypot(width, height)
    if not share <= MAX_SHIFT:
        raise DatasetError(
            f"{source}: expected photos nearly free of lens distortion, found one of up to "
            f"{shift:.0f} of {width}x{height} pixels; undistort them first, such as with "
            "`colmap image_undistorter`"
        )
    return intrinsics, shift


def _largest_shift(p: Mapping[str, float], intrinsics: Tensor, width: int, height: int) -> float:
    """How far distortion moves a pixel at most, in pixels (OpenCV's rational model)."""
    k1, k2, k3, k4, k5, k6 = (p.get(f"k{i}", 0.0) for i in range(1, 7))
    p1, p2 = p.get("p1", 0.0), p.get("p2", 0.0)
    columns = torch.linspace(0, width, _GRID, dtype=torch.float64)
    rows = torch.linspace(0, height, _GRID, dtype=torch.float64)[:, None]
    x = (columns - intrinsics[0, 2]) / intrinsics[0, 0]
    y = (rows - intrinsics[1, 2]) / intrinsics[1, 1]
    r2 = x**2 + y**2
    radial = (1 + r2 * (k1 + r2 * (k2 + r2 * k3))) / (1 + r2 * (k4 + r2 * (k5 + r2 * k6)))
    dx = x * (radial - 1) + 2 * p1 * x * y + p2 * (r2 + 2 * x**2)
    dy = y * (radial - 1) + 2 * p2 * x * y + p1 * (r2 + 2 * y**2)
    return float(torch.hypot(dx * intrinsics[0, 0], dy * intrinsics[1, 1]).max())
