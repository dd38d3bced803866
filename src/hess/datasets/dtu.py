"""DTU scans: photos with cameras in millimetres, and depth where the layout has it.

The layouts are NeuS's (its data/README) and both of MVSNet (:mod:`hess.datasets.dtu_mvsnet`). The
laser-scanned points are in :mod:`hess.datasets.dtu_official`.
"""

import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

from hess.datasets.dtu_cameras import photo_frame, scan_sequence, split_projection
from hess.datasets.dtu_mvsnet import read_mvsnet, read_mvsnet_training
from hess.datasets.frames import FrameSequence
from hess.datasets.layout import Layout, find_layout
from hess.datasets.photo_files import find_images
from hess.errors import DatasetError

_SPHERE_CAMERAS = "cameras_sphere.npz"


def _read_neus(path: Path) -> list[FrameSequence]:
    """``world_mat_<n>`` is the projection matrix of photo ``<n>``; object masks are not read."""
    source = path / _SPHERE_CAMERAS
    try:
        with np.load(source, allow_pickle=False) as arrays:
            cameras = {key: arrays[key] for key in arrays if key.startswith("world_mat_")}
    except (OSError, ValueError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise DatasetError(
            f"{source}: expected arrays world_mat_0, world_mat_1, ... found: {error}"
        ) from error
    frames = []
    for image in find_images(path / "image" if (path / "image").is_dir() else path):
        key = f"world_mat_{int(image.stem) if image.stem.isdecimal() else image.stem}"
        camera = cameras.get(key)
        if camera is None or camera.shape not in ((3, 4), (4, 4)) or camera.dtype.kind != "f":
            found = "none" if camera is None else f"{camera.dtype} {camera.shape}"
            raise DatasetError(
                f"{source}: expected a matrix {key} [4, 4] for {image.name}, found {found}; "
                "photos are named by their number, the first is 0"
            )
        intrinsics, pose = split_projection(torch.from_numpy(camera[:3]), source)
        frames.append(photo_frame(image, pose, intrinsics, source))
    return [scan_sequence(path.resolve().name, frames)]


DTU_LAYOUTS = (
    Layout(
        name="mvsnet-training",
        files="Cameras/train/*_cam.txt Rectified/scan*_train/ Depths/scan*_train/",
        matches=lambda path: (
            (path / "Cameras" / "train").is_dir() and (path / "Rectified").is_dir()
        ),
        read=read_mvsnet_training,
    ),
    Layout(
        name="mvsnet",
        files="images/ cams/*_cam.txt [depths/*.npy binary_masks/*.png]",
        matches=lambda path: (path / "images").is_dir() and any(path.glob("cams/*_cam.txt")),
        read=read_mvsnet,
    ),
    Layout(
        name="neus",
        files=f"image/ {_SPHERE_CAMERAS}",
        matches=lambda path: (path / _SPHERE_CAMERAS).is_file(),
        read=_read_neus,
    ),
)


def read_dtu(path: Path) -> list[FrameSequence]:
    """Scans of a DTU folder in any of :data:`DTU_LAYOUTS`; lengths in mm.

    Raises:
        DatasetError: no layout is recognised, or a file is missing or damaged.
    """
    found = find_layout(path, DTU_LAYOUTS) if path.is_dir() else None
    if found is None:
        known = "; ".join(f"{layout.name}: {layout.files}" for layout in DTU_LAYOUTS)
        raise DatasetError(f"{path}: expected one or several DTU scans ({known}), found neither")
    layout, scans = found
    return [sequence for scan in scans for sequence in layout.read(scan)]
