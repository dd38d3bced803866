"""Cameras as the transforms.json that nerfstudio reads."""

import json
import os
from pathlib import Path

import torch

from hess.export.exportable import Exportable
from hess.files import write_atomically

OPENCV_FROM_OPENGL = torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64))
"""Camera axes x right, y up, z backwards -> x right, y down, z forward; its own inverse."""


def write_transforms(path: Path, recon: Exportable, *, ply_file: str | None = None) -> None:
    """Write the cameras of all views as nerfstudio's ``transforms.json``, atomically.

    A frame has its own intrinsics in pixels of the original photo (top-left pixel centre at
    (0.5, 0.5)), no distortion, and ``transform_matrix``, world_from_cam with OpenGL camera axes
    (x right, y up, z backwards). The world is the reconstruction's. ``file_path`` is relative to
    the folder of ``path``; it is the view's name where the photo's place is unknown.

    ``ply_file``, relative to that folder too, names a point cloud in the same world (such as the
    .ply of the same reconstruction), from which Gaussian splats can start.
    """
    folder = path.resolve().parent
    poses = recon.world_from_cam.double() @ OPENCV_FROM_OPENGL
    frames = [
        {
            "file_path": name if photo is None else _relative(photo, folder),
            "w": fit.original_width,
            "h": fit.original_height,
            "fl_x": intrinsics[0, 0].item(),
            "fl_y": intrinsics[1, 1].item(),
            "cx": intrinsics[0, 2].item(),
            "cy": intrinsics[1, 2].item(),
            "transform_matrix": pose.tolist(),
        }
        for name, photo, fit, intrinsics, pose in zip(
            recon.view_names,
            recon.image_paths,
            recon.image_fits,
            recon.original_intrinsics,
            poses,
            strict=True,
        )
    ]
    cloud = {} if ply_file is None else {"ply_file_path": ply_file}
    text = json.dumps({"camera_model": "OPENCV", **cloud, "frames": frames}, indent=1)
    write_atomically(path, text.encode())


def _relative(photo: Path, folder: Path) -> str:
    return Path(os.path.relpath(photo.resolve(), folder)).as_posix()
