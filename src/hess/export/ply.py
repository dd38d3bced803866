"""Point clouds as binary PLY."""

from pathlib import Path

import numpy as np
from torch import Tensor

from hess.errors import LayoutError
from hess.files import atomic_write


def write_ply(path: Path, *, points: Tensor, colors: Tensor) -> None:
    """Write a coloured point cloud as binary little-endian PLY, atomically.

    Args:
        path: the file to make or replace.
        points: [M, 3], written as float32.
        colors: [M, 3] in [0, 1], written as 8-bit red, green, blue.

    Raises:
        LayoutError: the shapes are not as above.
    """
    from plyfile import PlyData, PlyElement

    if points.ndim != 2 or points.shape[1] != 3 or points.shape != colors.shape:
        raise LayoutError(
            "expected points and colors of one shape [M, 3], found "
            f"{tuple(points.shape)} and {tuple(colors.shape)}"
        )
    fields = [(axis, "<f4") for axis in "xyz"] + [(c, "u1") for c in ("red", "green", "blue")]
    vertices = np.empty(len(points), dtype=fields)
    rgb = (colors * 255).round().clamp(0, 255).byte()
    for column, axis in enumerate("xyz"):
        vertices[axis] = points[:, column].numpy()
    for column, name in enumerate(("red", "green", "blue")):
        vertices[name] = rgb[:, column].numpy()
    with atomic_write(path) as file:
        PlyData([PlyElement.describe(vertices, "vertex")], byte_order="<").write(file)
