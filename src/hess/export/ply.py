"""Point clouds as binary PLY."""

from pathlib import Path

import numpy as np

from hess.export.point_cloud import PointCloud, color_bytes
from hess.files import atomic_write


def write_ply(path: Path, cloud: PointCloud) -> None:
    """Write a point cloud as binary little-endian PLY, atomically.

    A vertex has x, y, z (float32), red, green, blue (8 bits) and confidence (float32, 0 to 1).
    """
    from plyfile import PlyData, PlyElement

    rgb = color_bytes(cloud.colors)
    columns = {
        **dict(zip("xyz", cloud.points.float().unbind(-1), strict=True)),
        **dict(zip(("red", "green", "blue"), rgb.unbind(-1), strict=True)),
        "confidence": cloud.confidence.float(),
    }
    arrays = {name: column.numpy() for name, column in columns.items()}
    fields = [(name, array.dtype.newbyteorder("<")) for name, array in arrays.items()]
    vertices = np.empty(len(cloud), dtype=fields)
    for name, array in arrays.items():
        vertices[name] = array
    with atomic_write(path) as file:
        PlyData([PlyElement.describe(vertices, "vertex")], byte_order="<").write(file)
