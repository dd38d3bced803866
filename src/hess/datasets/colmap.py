"""COLMAP sparse models: posed photos, and the points that each of them sees."""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hess.datasets.colmap_files import ColmapCamera, ColmapImage, model_files, read_model
from hess.datasets.frames import Frame, FrameSequence, rigid_pose, usable_frames
from hess.datasets.layout import Layout
from hess.datasets.lens import CAMERA_MODELS, pinhole_intrinsics
from hess.datasets.photo_files import natural_key
from hess.errors import DatasetError
from hess.geometry.poses import invert_pose, pose_from, quaternion_to_matrix

logger = logging.getLogger(__name__)


def read_colmap(path: Path) -> list[FrameSequence]:
    """Photos of a COLMAP sparse model, in natural order of their names.

    Lengths are in the arbitrary unit of the model. Each photo sees the points of its own tracks.
    Photos that were resized after the reconstruction get their camera scaled; missing ones are
    left out with a warning.

    Args:
        path: a folder with ``cameras``, ``images`` and ``points3D`` (``.bin`` or ``.txt``) in
            itself, in ``sparse/`` or in ``sparse/0/``; of several models the largest is taken,
            with a warning. The photos are beside the model or up to two folders above, or in
            ``images/`` there.

    Raises:
        DatasetError: a file is missing or damaged, no photo is there, or a lens distorts strongly.
    """
    models = [(read_model(folder), folder) for folder in _model_folders(path)]
    model, folder = max(models, key=lambda item: len(item[0].images))
    if len(models) > 1:
        logger.warning(
            "%s: found %d models that are not connected, took the largest, %s",
            path,
            len(models),
            folder.name,
        )
    photos = _photo_folder(folder.resolve(), [image.name for image in model.images])
    used = {image.camera for image in model.images}
    cameras = {number: _frame_camera(model.cameras[number], folder) for number in used}
    frames = []
    for image in sorted(model.images, key=lambda image: natural_key(image.name)):
        points = torch.tensor([model.points[i] for i in image.points], dtype=torch.float64)
        frames.append(
            Frame(
                image_path=photos / image.name,
                world_from_cam=_world_from_cam(image, folder),
                points=points.reshape(-1, 3),
                resizable=True,
                **cameras[image.camera],
            )
        )
    return [FrameSequence(name=path.resolve().name, frames=usable_frames(frames, folder))]


def _model_folders(path: Path) -> list[Path]:
    """Folders of models, also of incomplete ones."""
    sparse = path / "sparse"
    below = sorted(sparse.iterdir(), key=lambda p: natural_key(p.name)) if sparse.is_dir() else []
    # A folder of another kind may hold an images.txt; in sparse/ one file says what is meant.
    complete = [path] if len(model_files(path)) == 3 else []
    return complete + [folder for folder in (sparse, *below) if model_files(folder)]


def _photo_folder(model: Path, names: list[str]) -> Path:
    for root in (model, *model.parents[:2]):
        for folder in (root / "images", root):
            if any((folder / name).is_file() for name in names):
                return folder
    raise DatasetError(
        f"{model}: expected the {len(names)} photos of this model, such as "
        f"{names[0]}, found none of them in images/ beside the model or up to two folders above; "
        "put them there"
    )


def _frame_camera(camera: ColmapCamera, source: Path) -> dict[str, Any]:
    """What a :class:`Frame` says of its camera."""
    names = CAMERA_MODELS.get(camera.model, ())
    if len(names) != len(camera.parameters):
        raise DatasetError(
            f"{source}: expected a camera model of {', '.join(CAMERA_MODELS)}, found "
            f"{camera.model} with {len(camera.parameters)} parameters; undistort the photos "
            "first, such as with `colmap image_undistorter`"
        )
    intrinsics, distortion = pinhole_intrinsics(
        dict(zip(names, camera.parameters, strict=True)),
        width=camera.width,
        height=camera.height,
        source=source,
    )
    size = (camera.width, camera.height)
    return {"intrinsics": intrinsics, "image_size": size, "distortion": distortion}


def _world_from_cam(image: ColmapImage, source: Path) -> Tensor:
    w, x, y, z = image.quaternion
    rotation = quaternion_to_matrix(torch.tensor([x, y, z, w], dtype=torch.float64))
    translation = torch.tensor(image.translation, dtype=torch.float64)
    return invert_pose(rigid_pose(pose_from(rotation, translation), source))


COLMAP = Layout(
    name="colmap",
    files="images/ sparse/0/{cameras,images,points3D}.{bin,txt}",
    matches=lambda path: bool(_model_folders(path)),
    read=read_colmap,
)
