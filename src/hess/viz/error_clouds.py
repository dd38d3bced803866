"""Point clouds side by side, with what is wrong in green (paper, Fig. 1 and 5)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from hess.errors import ConfigError
from hess.viz.figure import new_figure
from hess.viz.pointcloud import Colors, render_points
from hess.viz.style import LIGHT, Theme
from hess.viz.viewpoint import Floats, Viewpoint

WRONG = (0, 176, 60)
"""Colour of points that are farther from the truth than allowed."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CloudPanel:
    """One cloud of a grid.

    Args:
        title: above it.
        points: [M, 3] in the world frame of its row.
        colors: uint8 [M, 3].
        seen_from: [M, 3], camera centre each point was seen from.
        viewpoint: where to look from; the same for clouds that are compared.
    """

    title: str
    points: Floats
    colors: Colors
    seen_from: Floats
    viewpoint: Viewpoint


def wrong_in_green(colors: Colors, distance: Floats, threshold: float) -> Colors:
    """Colours uint8 [M, 3], paled; green where the distance to the truth is above the threshold.

    Args:
        colors: uint8 [M, 3].
        distance: [M].
        threshold: above 0.

    Raises:
        ConfigError: the threshold is not above 0.
    """
    if not threshold > 0:
        raise ConfigError(f"the threshold of a wrong point must be above 0, found {threshold}")
    grey = colors.astype(float).mean(1, keepdims=True)
    paled = (0.35 * colors + 0.25 * grey + 0.4 * 235).astype(np.uint8)
    return np.where((distance > threshold)[:, None], np.array(WRONG, np.uint8), paled)


def from_the_cameras(points: Floats, world_from_cam: Floats) -> Viewpoint:
    """A view of what the cameras look at, from behind and above the middle one.

    Args:
        points: [M >= 1, 3] in world coordinates, finite.
        world_from_cam: [N >= 1, 4, 4], finite.
    """
    target = np.median(points, axis=0)
    centers = world_from_cam[:, :3, 3]
    middle = np.linalg.norm(centers - centers.mean(0), axis=1).argmin()
    up = -world_from_cam[middle, :3, 1]
    away = centers[middle] - target
    eye = target + 1.5 * away + 0.4 * np.linalg.norm(away) * up
    return Viewpoint(eye=eye, target=target, up=up, field_of_view=60.0)


def cloud_grid(rows: Sequence[Sequence[CloudPanel]], *, theme: Theme = LIGHT) -> Figure:
    """Pictures of clouds in rows and columns.

    Args:
        rows: as many panels in each.
        theme: colours around the data.

    Raises:
        ConfigError: no panels, or rows of different lengths.
        LayoutError: a cloud is empty or not finite.
    """
    lengths = {len(row) for row in rows}
    if len(lengths) != 1 or 0 in lengths:
        raise ConfigError(f"a grid of clouds needs rows of one length, found {sorted(lengths)}")
    (columns,) = lengths
    figure = new_figure(2.7 * columns, 2.3 * len(rows), theme)
    panels = figure.subplots(len(rows), columns, squeeze=False)
    for axes, panel in zip(panels.flat, (panel for row in rows for panel in row), strict=True):
        picture = render_points(
            panel.points,
            panel.colors,
            panel.viewpoint,
            seen_from=panel.seen_from,
            width=400,
            height=300,
            theme=theme,
        )
        axes.imshow(picture, interpolation="lanczos")
        axes.set_title(panel.title, fontsize=9, color=theme.text)
        axes.set_axis_off()
    return figure
