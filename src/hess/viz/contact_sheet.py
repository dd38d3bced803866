"""The input photos of a scene in rows, with depth maps below each photo."""

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from hess.errors import LayoutError
from hess.viz.figure import new_figure
from hess.viz.style import LIGHT, Theme

_PER_ROW = 8


def contact_sheet(
    images: ArrayLike,
    depth_maps: Mapping[str, ArrayLike] | None = None,
    *,
    theme: Theme = LIGHT,
) -> Figure:
    """Photos in rows of at most eight, depth maps under them: bright is near, empty is unknown.

    Each kind of depth map has one colour range (its 2nd to 98th percentile over all views), so
    views compare with each other; kinds of different scale look alike.

    Args:
        images: [N, 3, H, W] in [0, 1].
        depth_maps: name -> [N, H, W], 0 where unknown.
        theme: colours around the pictures.

    Raises:
        LayoutError: shapes do not fit.
    """
    photos = np.asarray(images, float)
    if photos.ndim != 4 or photos.shape[1] != 3 or not len(photos):
        raise LayoutError(f"images must have shape [N >= 1, 3, H, W], found {photos.shape}")
    kinds = {name: np.asarray(depth, float) for name, depth in (depth_maps or {}).items()}
    for name, depth in kinds.items():
        if depth.shape != (len(photos), *photos.shape[2:]):
            raise LayoutError(
                f"depth map {name!r} must have shape {(len(photos), *photos.shape[2:])}, "
                f"found {depth.shape}"
            )
    bands = -(-len(photos) // _PER_ROW)
    columns = -(-len(photos) // bands)
    rows = bands * (1 + len(kinds))
    height, width = photos.shape[2:]
    cell = 9.6 / columns
    figure = new_figure(columns * cell + 0.4, rows * (cell * height / width + 0.12) + 0.1, theme)
    axes = figure.subplots(rows, columns, squeeze=False)
    ranges = {name: _range(depth) for name, depth in kinds.items()}
    for axis in axes.flat:
        axis.set_axis_off()
    for view, photo in enumerate(photos):
        band, column = divmod(view, columns)
        row = band * (1 + len(kinds))
        axes[row, column].imshow(photo.transpose(1, 2, 0).clip(0, 1), interpolation="nearest")
        for offset, (name, depth) in enumerate(kinds.items(), start=1):
            low, high = ranges[name]
            known = np.ma.masked_less_equal(depth[view], 0)
            axes[row + offset, column].imshow(
                known, cmap="viridis_r", vmin=low, vmax=high, interpolation="nearest"
            )
    for row in range(rows):
        name = ("photos", *kinds)[row % (1 + len(kinds))]
        axes[row, 0].text(
            -0.06, 0.5, name, rotation=90, ha="right", va="center", fontsize=8, color=theme.muted,
            transform=axes[row, 0].transAxes,
        )  # fmt: skip
    return figure


def _range(depth: np.ndarray) -> tuple[float, float]:
    known = depth[depth > 0]
    if not len(known):
        return 0.0, 1.0
    return float(np.quantile(known, 0.02)), float(np.quantile(known, 0.98))
