"""Pictures of a reconstruction: what went in, and the point cloud from two sides."""

import io
import math

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from hess.errors import DatasetError
from hess.reconstruction import Reconstruction
from hess.viz.contact_sheet import contact_sheet
from hess.viz.figure import figure_png
from hess.viz.pointcloud import CameraSet, render_points
from hess.viz.style import LIGHT, Theme
from hess.viz.viewpoint import two_viewpoints

Picture = NDArray[np.uint8]
CAMERA_COLOR = "#0072b2"
MAX_PHOTOS = 16
MAX_POINTS = 500_000


def preview(
    reconstruction: Reconstruction,
    true_depth: Tensor | None = None,
    *,
    drop_lowest: float = 0.2,
    theme: Theme = LIGHT,
) -> Picture:
    """Photos and depth on top, two views of the cloud with its cameras below: uint8 [H, W, 3].

    Of many views a few photos, evenly spread, and of many points an even grid of pixels is shown.

    Args:
        reconstruction: what to show.
        true_depth: [N, H, W], 0 where unknown; shown under the predicted depth.
        drop_lowest: share of the least confident points to leave out, 0 up to but not 1.
        theme: colours around the pictures.

    Raises:
        ConfigError: ``drop_lowest`` is out of range.
        DatasetError: no view has a finite camera and a finite point.
    """
    last = reconstruction.num_views - 1
    shown = np.linspace(0, last, min(last + 1, MAX_PHOTOS)).round().astype(int)
    depth_maps = {"predicted depth": reconstruction.depth.numpy()[shown]}
    if true_depth is not None:
        depth_maps["true depth"] = true_depth.numpy()[shown]
    photos = reconstruction.images.numpy()[shown]
    sheet_png = figure_png(contact_sheet(photos, depth_maps, theme=theme))
    sheet = Image.open(io.BytesIO(sheet_png)).convert("RGB")
    views = render_views(reconstruction, drop_lowest=drop_lowest, theme=theme)
    below = np.concatenate(views, axis=1)
    width = below.shape[1]
    sheet = sheet.resize((width, round(width * sheet.height / sheet.width)))
    return np.concatenate([np.asarray(sheet), below])


def render_views(
    reconstruction: Reconstruction, *, drop_lowest: float = 0.2, theme: Theme = LIGHT
) -> list[Picture]:
    """Two renderings uint8 [H, W, 3] of the most confident points, with camera frusta.

    Views whose camera is not finite are left out, with their points.

    Raises:
        ConfigError, DatasetError: see :func:`preview`.
    """
    poses = reconstruction.world_from_cam.double()
    finite = poses.isfinite().all((1, 2))
    step = math.ceil(math.sqrt(reconstruction.depth.numel() / MAX_POINTS))
    keep = torch.zeros(reconstruction.depth.shape, dtype=torch.bool)
    keep[finite, ::step, ::step] = True
    keep &= reconstruction.confident_pixels(drop_lowest=drop_lowest)
    if not keep.any():
        raise DatasetError(
            "a picture of the scene needs a view with a finite camera and finite points, found "
            f"{int(finite.sum())} finite cameras of {len(poses)}; load the model in a wider "
            "number format (dtype float32)"
        )
    points = reconstruction.world_points[keep].double().numpy()
    colors = (255 * reconstruction.images.movedim(1, -1)[keep]).byte().numpy()
    seen_from = poses[keep.nonzero()[:, 0], :3, 3].numpy()
    cameras = CameraSet(world_from_cam=poses[finite].numpy(), color=CAMERA_COLOR)
    return [
        render_points(
            points,
            colors,
            viewpoint,
            cameras=[cameras],
            seen_from=seen_from,
            theme=theme,
        )
        for viewpoint in two_viewpoints(points, cameras.world_from_cam)
    ]
