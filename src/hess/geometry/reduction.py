"""Thins a point cloud to a least distance between its points."""

import numpy as np
import torch
from torch import Tensor

from hess.errors import AlignmentError, ConfigError, LayoutError

_FIRST_CHUNK = 256


def reduce_cloud(points: Tensor, radius: float, generator: torch.Generator) -> Tensor:
    """Which points stay when, in random order, each drops all later ones within ``radius``.

    No two of the kept points are within ``radius`` of each other, and every dropped one is within
    ``radius`` of a kept one.

    Args:
        points: [M, 3], finite.
        radius: > 0.
        generator: draws the order; on the CPU.

    Returns:
        int64 indices of the kept points, in the order drawn.

    Raises:
        AlignmentError: a point is not finite.
        ConfigError: the radius is not positive.
        LayoutError: ``points`` is not [M, 3].
    """
    from scipy.spatial import cKDTree

    if not radius > 0:
        raise ConfigError(f"the reduction distance must be above 0, found {radius}")
    if points.ndim != 2 or points.shape[1] != 3:
        raise LayoutError(f"points must have shape [M, 3], found {tuple(points.shape)}")
    array = points.detach().cpu().double().numpy()
    if not np.isfinite(array).all():
        raise AlignmentError("points must be finite, found NaN or infinity; mask them out first")
    order = torch.randperm(len(array), generator=generator).numpy()
    kept = order[:0]
    start, stop = 0, _FIRST_CHUNK
    # Chunks double, so few trees are built, and most of a dense cloud is dropped by what was kept
    # before its own many pairs are listed.
    while start < len(order):
        chunk = order[start:stop]
        if len(kept):
            bound = np.nextafter(radius, np.inf)  # the search leaves its bound out
            distance, _ = cKDTree(array[kept]).query(array[chunk], distance_upper_bound=bound)
            chunk = chunk[np.isinf(distance)]
        dropped = np.zeros(len(chunk), dtype=bool)
        pairs = cKDTree(array[chunk]).query_pairs(radius, output_type="ndarray")
        for first, second in pairs[np.argsort(pairs[:, 0], kind="stable")].tolist():
            if not dropped[first]:
                dropped[second] = True
        kept = np.concatenate([kept, chunk[~dropped]])
        start, stop = stop, 2 * stop
    return torch.from_numpy(kept)
