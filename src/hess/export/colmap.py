"""Cameras and points as a COLMAP sparse model."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hess.errors import DatasetError
from hess.export.colmap_folder import replaced_model
from hess.export.exportable import Exportable
from hess.export.point_cloud import color_bytes, even_sample
from hess.geometry.projection import project

MAX_POINTS = 50_000
DEPTH_TOLERANCE = 0.02
"""A view sees a point whose z-depth differs from its depth map by at most this share."""


def write_colmap(path: Path, recon: Exportable, *, drop_lowest: float) -> None:
    """Write ``cameras.bin``, ``images.bin``, ``points3D.bin``, ... into the folder ``path``.

    Every view has its own PINHOLE camera in pixels of the original photo; images bear the view
    names; ids count from 1 in the order of the views. Of the confident points at most 50,000 are
    kept, evenly spread. The folder appears, or replaces an older model, in one piece.

    A point is observed at the pixel it comes from, and in every other view where it falls inside
    the photo and agrees with the depth map within 2 %. There it is observed where it projects,
    shifted by as much as the view's own point at that pixel misses the pixel. So the reprojection
    errors are 0 where points and cameras agree, and tell how far they disagree.

    Raises:
        ConfigError: ``path`` exists and is something else than a COLMAP model.
        DatasetError: no confident point lies in front of the camera that saw it.
    """
    import pycolmap

    cam_from_world = torch.linalg.inv(recon.world_from_cam.double())
    chosen = _choose_pixels(recon, cam_from_world, drop_lowest)
    points = recon.world_points[chosen.unbind(-1)].double()
    colors = color_bytes(recon.images.movedim(1, -1)[chosen.unbind(-1)])

    model = pycolmap.Reconstruction()
    tracks: list[list[Any]] = [[] for _ in points]
    for view, name in enumerate(recon.view_names):
        index, keypoints = _observe(recon, view, cam_from_world[view], chosen, points)
        for number, point in enumerate(index.tolist()):
            tracks[point].append(pycolmap.TrackElement(view + 1, number))
        fit = recon.image_fits[view]
        camera = pycolmap.Camera(
            camera_id=view + 1,
            model="PINHOLE",
            width=fit.original_width,
            height=fit.original_height,
            params=recon.original_intrinsics[view].double()[[0, 1, 0, 1], [0, 1, 2, 2]].numpy(),
        )
        image = pycolmap.Image(
            image_id=view + 1, camera_id=view + 1, name=name, keypoints=keypoints.numpy()
        )
        pose = pycolmap.Rigid3d(cam_from_world[view, :3].numpy())
        _add_view(model, camera, image, pose)
    for point, track, color in zip(points.numpy(), tracks, colors.numpy(), strict=True):
        model.add_point3D(point, pycolmap.Track(track), color)
    model.update_point_3d_errors()
    with replaced_model(path) as folder:
        model.write(str(folder))


def _choose_pixels(recon: Exportable, cam_from_world: Tensor, drop_lowest: float) -> Tensor:
    """(view, row, column) of the pixels whose points go into the model: [M, 3]."""
    confident = recon.confident_pixels(drop_lowest=drop_lowest)
    flat = confident.flatten().nonzero().squeeze(-1)
    flat = flat[even_sample(len(flat), MAX_POINTS)]
    chosen = torch.stack(torch.unravel_index(flat, confident.shape), dim=-1)
    to_cam = cam_from_world[chosen[:, 0]]
    points = recon.world_points[chosen.unbind(-1)].double()
    z = (to_cam[:, 2, :3] * points).sum(-1) + to_cam[:, 2, 3]
    if not (z > 0).any():
        raise DatasetError(
            "a COLMAP model needs points in front of their cameras, found none: cameras and "
            "points of this reconstruction contradict each other; save .ply and .npz instead"
        )
    return chosen[z > 0]


def _observe(
    recon: Exportable, view: int, cam_from_world: Tensor, chosen: Tensor, points: Tensor
) -> tuple[Tensor, Tensor]:
    """Which of ``points`` [M, 3] this view sees [K], and where in the original photo [K, 2]."""
    fit, intrinsics = recon.image_fits[view], recon.original_intrinsics[view].double()
    projected, z = project(points, intrinsics, cam_from_world)
    own = chosen[:, 0] == view
    pixel = torch.where(own[:, None], chosen[:, [2, 1]], fit.pixels_to_model(projected).floor())
    limits = pixel.new_tensor(fit.shown)
    inside = ((pixel >= limits[:, 0]) & (pixel < limits[:, 1])).all(-1) & (z > 0)
    index = inside.nonzero().squeeze(-1)

    column, row = pixel[index].long().unbind(-1)
    depth = recon.depth[view, row, column].double()
    agrees = (z[index] - depth).abs() <= DEPTH_TOLERANCE * depth
    surface, surface_z = project(
        recon.world_points[view, row, column].double(), intrinsics, cam_from_world
    )
    centre = fit.pixels_to_original(pixel[index] + 0.5)
    observed = projected[index] + (centre - surface)
    size = observed.new_tensor([fit.original_width, fit.original_height])
    in_photo = ((observed >= 0) & (observed <= size)).all(-1)
    seen = own[index] | (agrees & in_photo & (surface_z > 0))
    return index[seen], observed[seen]


def _add_view(model: Any, camera: Any, image: Any, cam_from_world: Any) -> None:
    """Add an image taken alone, as a rig of one camera and a frame of one image."""
    import pycolmap

    rig = pycolmap.Rig(rig_id=camera.camera_id)
    rig.add_ref_sensor(camera.sensor_id)
    frame = pycolmap.Frame(
        frame_id=image.image_id, rig_id=rig.rig_id, rig_from_world=cam_from_world
    )
    frame.add_data_id(image.data_id)
    image.frame_id = frame.frame_id
    model.add_camera(camera)
    model.add_rig(rig)
    model.add_frame(frame)
    model.add_image(image)
    model.register_frame(frame.frame_id)
