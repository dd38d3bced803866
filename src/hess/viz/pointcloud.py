"""Pictures of a coloured point cloud with camera frusta, rendered in software."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from hess.errors import LayoutError
from hess.viz.style import LIGHT, Theme
from hess.viz.viewpoint import Floats, Viewpoint

Colors = NDArray[np.uint8]

_SUPERSAMPLING = 2
_SPLATS_AT_ONCE = 4_000_000


@dataclass(frozen=True, kw_only=True)
class CameraSet:
    """Cameras to draw as frusta.

    Args:
        world_from_cam: [N, 4, 4], OpenCV axes.
        color: "#rrggbb".
    """

    world_from_cam: Floats
    color: str


def render_points(
    points: Floats,
    colors: Colors,
    viewpoint: Viewpoint,
    *,
    cameras: Sequence[CameraSet] = (),
    seen_from: Floats | None = None,
    point_size: float | None = None,
    width: int = 720,
    height: int = 540,
    theme: Theme = LIGHT,
) -> Colors:
    """Render a cloud: square splats with a depth buffer, edges darkened, frusta on top.

    Args:
        points: [M, 3], M >= 1, finite.
        colors: uint8 [M, 3].
        viewpoint: where to look from.
        cameras: sets of frusta.
        seen_from: [M, 3], camera centre each point was seen from. Points of which the viewpoint
            sees the back are left out, so that one looks into a room through its walls.
        point_size: side of a point in world units; None fits it to the density of the cloud, or
            with ``seen_from`` to the spacing of pixels at each point's distance.
        width, height: size of the picture in pixels.
        theme: gives the background.

    Returns:
        uint8 [height, width, 3].

    Raises:
        LayoutError: shapes or types are not as above, or a point is not finite.
    """
    points = np.asarray(points, float)
    if points.ndim != 2 or points.shape[1] != 3 or not len(points):
        raise LayoutError(f"points must have shape [M >= 1, 3], found {points.shape}")
    if colors.shape != points.shape or colors.dtype != np.uint8:
        raise LayoutError(
            f"colors must be uint8 {points.shape}, found {colors.dtype} {colors.shape}"
        )
    if not np.isfinite(points).all():
        raise LayoutError("points must be finite, found NaN or infinity; leave such points out")
    sizes = _point_sizes(points, point_size, seen_from)
    if seen_from is not None:
        facing = ((seen_from - points) * (viewpoint.eye - points)).sum(1) > 0
        points, colors, sizes = points[facing], colors[facing], sizes[facing]

    size = np.array([width, height]) * _SUPERSAMPLING
    focal = size[1] / 2 / math.tan(math.radians(viewpoint.field_of_view) / 2)
    shown, depth = _splat(points, colors, viewpoint, focal, size, sizes, theme)
    picture = Image.fromarray(_darken_edges(shown, depth))
    draw = ImageDraw.Draw(picture)
    scale = 0.035 * float(np.linalg.norm(viewpoint.eye - viewpoint.target))
    for camera_set in cameras:
        lines = _frustum_lines(camera_set.world_from_cam, viewpoint, focal, size, scale)
        # A rim in the page's colour keeps the lines visible on any texture.
        for color, line_width in ((theme.background, 4), (camera_set.color, 2)):
            for line in lines:
                draw.line(line, fill=color, width=line_width * _SUPERSAMPLING, joint="curve")
    return np.asarray(picture.resize((width, height), Image.Resampling.BOX))


def _point_sizes(points: Floats, point_size: float | None, seen_from: Floats | None) -> Floats:
    """Side of each point in world units [M]."""
    if point_size is not None:
        return np.full(len(points), point_size)
    if seen_from is not None:
        per_view = len(points) / len(np.unique(seen_from, axis=0))
        # A view spans about a radian; surfaces seen at a slant need the larger splats.
        return 1.6 * np.linalg.norm(points - seen_from, axis=1) / math.sqrt(per_view)
    extent = np.quantile(np.linalg.norm(points - np.median(points, axis=0), axis=1), 0.9)
    return np.full(len(points), 2.4 * float(extent) / math.sqrt(len(points)))


def _splat(
    points: Floats,
    colors: Colors,
    viewpoint: Viewpoint,
    focal: float,
    size: NDArray[np.integer],
    point_sizes: Floats,
    theme: Theme,
) -> tuple[Colors, Floats]:
    """Colour [H, W, 3] and depth [H, W] (infinite where empty); the nearest point wins."""
    matrix = viewpoint.cam_from_world
    in_cam = points @ matrix[:3, :3].T + matrix[:3, 3]
    order = np.argsort(-in_cam[:, 2], kind="stable")
    order = order[in_cam[order, 2] > 1e-6]
    in_cam, colors, z = in_cam[order], colors[order], in_cam[order, 2]
    corner = in_cam[:, :2] / z[:, None] * focal + size / 2
    side = np.clip(np.round(point_sizes[order] * focal / z), 1, 24).astype(int)
    corner = np.floor(corner - (side[:, None] - 1) / 2).astype(int)

    background = [int(theme.background[i : i + 2], 16) for i in (1, 3, 5)]
    picture = np.tile(np.array(background, np.uint8), (size[0] * size[1], 1))
    depth = np.full(size[0] * size[1], np.inf)
    steps = np.arange(side.max(initial=1))
    chunk = max(1, _SPLATS_AT_ONCE // len(steps) ** 2)
    # Far points first: of several writes to one pixel the last one, the nearest, stays.
    for start in range(0, len(z), chunk):
        part = slice(start, start + chunk)
        x, y = (corner[part, i, None] + steps for i in (0, 1))
        ok_x = (steps < side[part, None]) & (x >= 0) & (x < size[0])
        ok_y = (steps < side[part, None]) & (y >= 0) & (y < size[1])
        owner, row, column = np.nonzero(ok_y[:, :, None] & ok_x[:, None, :])
        pixel = y[owner, row] * size[0] + x[owner, column]
        picture[pixel], depth[pixel] = colors[part][owner], z[part][owner]
    return picture.reshape(size[1], size[0], 3), depth.reshape(size[1], size[0])


def _darken_edges(color: Colors, depth: Floats) -> Colors:
    """Eye-dome lighting: a pixel is darker the farther it lies behind its neighbours."""
    with np.errstate(divide="ignore"):
        log_depth = np.log(depth)
    filled = np.where(np.isfinite(log_depth), log_depth, 1e3)
    behind = np.zeros_like(depth)
    reach = 2 * _SUPERSAMPLING
    padded = np.pad(filled, reach, mode="edge")
    for dy, dx in ((0, 1), (1, 0), (0, -1), (-1, 0)):
        y, x = reach + dy * reach, reach + dx * reach
        neighbour = padded[y : y + depth.shape[0], x : x + depth.shape[1]]
        behind += np.clip(filled - neighbour, 0, 0.05)
    shade = np.where(np.isfinite(depth), np.exp(-5.0 * behind), 1.0)
    return (color * shade[..., None]).astype(np.uint8)


def _frustum_lines(
    world_from_cam: Floats,
    viewpoint: Viewpoint,
    focal: float,
    size: NDArray[np.integer],
    scale: float,
) -> list[list[tuple[float, float]]]:
    """Polylines in pixels; frusta that are not wholly in front of the viewpoint are left out."""
    corners = np.array(
        [[0, 0, 0], [-1, -0.75, 1.4], [1, -0.75, 1.4], [1, 0.75, 1.4], [-1, 0.75, 1.4]]
    )
    matrix = viewpoint.cam_from_world
    lines = []
    for pose in np.asarray(world_from_cam, float):
        world = (corners * scale / 2) @ pose[:3, :3].T + pose[:3, 3]
        in_cam = world @ matrix[:3, :3].T + matrix[:3, 3]
        if (in_cam[:, 2] <= 1e-6).any():
            continue
        xy = [tuple(p) for p in in_cam[:, :2] / in_cam[:, 2:] * focal + size / 2]
        lines += [[xy[i] for i in (1, 2, 3, 4, 1)]] + [[xy[0], xy[i]] for i in (1, 2, 3, 4)]
    return lines
