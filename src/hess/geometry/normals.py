"""Surface normals of a point map, from the neighbours of every pixel."""

import torch
from torch import Tensor

from hess.errors import LayoutError


def point_map_normals(points: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Unit normals of a point map: the cross product of its central differences.

    A pixel has a normal when it and its four neighbours are valid and do not lie on one line;
    those on the border have none. The difference along the columns is crossed with that along the
    rows, so that a surface seen by a camera with OpenCV axes has normals that point away from it.
    Across the edge of an object the normal is that of the step.

    Args:
        points: [..., H, W, 3].
        valid: bool [..., H, W], which points are known.

    Returns:
        normals [..., H, W, 3] of length 1, 0 where there is none, and bool [..., H, W], which
        pixels have one.

    Raises:
        LayoutError: the shapes are not as above.
    """
    if points.ndim < 3 or points.shape[-1] != 3 or valid.shape != points.shape[:-1]:
        raise LayoutError(
            "expected points [..., H, W, 3] and valid [..., H, W], found "
            f"{tuple(points.shape)} and {tuple(valid.shape)}"
        )
    normals, known = torch.zeros_like(points), torch.zeros_like(valid)
    along_columns = points[..., 1:-1, 2:, :] - points[..., 1:-1, :-2, :]
    along_rows = points[..., 2:, 1:-1, :] - points[..., :-2, 1:-1, :]
    cross = torch.linalg.cross(along_columns, along_rows)
    length = torch.linalg.vector_norm(cross, dim=-1)
    inner = valid[..., 1:-1, 1:-1] & (length > 0) & length.isfinite()
    inner = inner & valid[..., 1:-1, 2:] & valid[..., 1:-1, :-2]
    inner = inner & valid[..., 2:, 1:-1] & valid[..., :-2, 1:-1]
    normals[..., 1:-1, 1:-1, :] = torch.where(inner[..., None], cross / length[..., None], 0)
    known[..., 1:-1, 1:-1] = inner
    return normals, known
