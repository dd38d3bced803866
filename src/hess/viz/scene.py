"""Pictures of a reconstruction: what went in, and the point cloud from two sides."""

import io
import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from hess.reconstruction import Reconstruction
from hess.viz.contact_sheet import contact_sheet
from hess.viz.figure import figure_png
from hess.viz.pointcloud import CameraSet, render_points
from hess.viz.style import LIGHT, Theme
from hess.viz.viewpoint import two_viewpoints

Picture = NDArray[np.uint8]
CAMERA_COLOR = "#0072b2"
SHARE_SHOWN = 0.8
"""Of all points, the most confident ones."""
MAX_PHOTOS = 16
MAX_POINTS = 500_000


def preview(
    reconstruction: Reconstruction, true_depth: Tensor | None = None, *, theme: Theme = LIGHT
) -> Picture:
    """Photos and depth on top, two views of the cloud with its cameras below: uint8 [H, W, 3].

    Of many views a few photos, evenly spread, and of many points an even grid of pixels is shown.

    Args:
        reconstruction: what to show.
        true_depth: [N, H, W], 0 where unknown; shown under the predicted depth.
        theme: colours around the pictures.
    """
    last = reconstruction.num_views - 1
    shown = np.linspace(0, last, min(last + 1, MAX_PHOTOS)).round().astype(int)
    depth_maps = {"predicted depth": reconstruction.depth.numpy()[shown]}
    if true_depth is not None:
        depth_maps["true depth"] = true_depth.numpy()[shown]
    photos = reconstruction.images.numpy()[shown]
    sheet_png = figure_png(contact_sheet(photos, depth_maps, theme=theme))
    sheet = Image.open(io.BytesIO(sheet_png)).convert("RGB")
    views = np.concatenate(render_views(reconstruction, theme=theme), axis=1)
    width = views.shape[1]
    sheet = sheet.resize((width, round(width * sheet.height / sheet.width)))
    return np.concatenate([np.asarray(sheet), views])


def render_views(reconstruction: Reconstruction, *, theme: Theme = LIGHT) -> list[Picture]:
    """Two renderings uint8 [H, W, 3] of the most confident points, with camera frusta."""
    poses = reconstruction.world_from_cam.double().numpy()
    step = math.ceil(math.sqrt(reconstruction.depth.numel() / MAX_POINTS))
    points = reconstruction.world_points[:, ::step, ::step].flatten(1, 2).double().numpy()
    seen_from = np.broadcast_to(poses[:, None, :3, 3], points.shape)
    confident = reconstruction.confident_pixels(drop_lowest=1 - SHARE_SHOWN)
    keep = confident[:, ::step, ::step].flatten().numpy()
    points, seen_from = points.reshape(-1, 3)[keep], seen_from.reshape(-1, 3)[keep]
    colors = reconstruction.images[:, :, ::step, ::step].permute(0, 2, 3, 1)
    colors = colors.reshape(-1, 3).numpy()[keep]
    cameras = [CameraSet(world_from_cam=poses, color=CAMERA_COLOR)]
    return [
        render_points(
            points,
            (255 * colors).astype(np.uint8),
            viewpoint,
            cameras=cameras,
            seen_from=seen_from,
            theme=theme,
        )
        for viewpoint in two_viewpoints(points, poses)
    ]
