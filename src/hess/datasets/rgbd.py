"""RGB-D captures on disk: three folder layouts, all read as sequences of posed depth frames."""

import zlib
from functools import partial
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hess.datasets.decoding import DECODE_ERRORS
from hess.datasets.frames import Frame, FrameSequence, rigid_pose
from hess.datasets.layout import Layout
from hess.datasets.photo_files import find_images
from hess.datasets.recordings import nearest_surface
from hess.errors import DatasetError
from hess.geometry.poses import pose_from
from hess.geometry.projection import project, unproject_depth

_NO_DEPTH = 65535

# Kinect of 7-Scenes. Focal lengths and the shift of the colour camera were measured on
# "redkitchen" (depth reprojection, photometric correlation); the data set publishes only 585.
_SEVEN_SCENES_SIZE = (640, 480)
_SEVEN_SCENES_DEPTH_FOCAL = 585.0
_SEVEN_SCENES_COLOUR_FOCAL = 525.0
_SEVEN_SCENES_COLOUR_FROM_DEPTH = (-0.0256, 0.0, 0.0)


def read_png16(path: Path) -> np.ndarray:
    """Values of a single-channel 16-bit PNG: uint16 [H, W].

    Raises:
        DatasetError: the file is missing, damaged, or not a single-channel 16-bit PNG.
    """
    try:
        with Image.open(path, formats=("PNG",)) as image:
            mode, values = image.mode, np.array(image)
    except (Image.DecompressionBombError, *DECODE_ERRORS) as error:
        raise DatasetError(f"{path}: expected a 16-bit depth PNG, found: {error}") from error
    if not mode.startswith("I"):
        raise DatasetError(f"{path}: expected a single-channel 16-bit PNG, found mode {mode}")
    return values.astype(np.uint16)


def read_depth_mm(path: Path) -> Tensor:
    """Depth in metres of a 16-bit PNG in millimetres: float32 [H, W]; 0 and 65535 become 0."""
    millimetres = read_png16(path).astype(np.float32)
    millimetres[millimetres == _NO_DEPTH] = 0
    return torch.from_numpy(millimetres / 1000)


def register_depth(
    depth: Tensor,
    *,
    depth_intrinsics: Tensor,
    target_intrinsics: Tensor,
    target_from_depth: Tensor,
    width: int,
    height: int,
) -> Tensor:
    """The depth map as another camera sees it.

    Every known pixel is carried to the nearest pixel of the target; the nearest surface wins;
    holes stay unknown.

    Args:
        depth: [h, w], z-depth of the depth camera, 0 where unknown.
        depth_intrinsics, target_intrinsics: float64 [3, 3].
        target_from_depth: float64 [4, 4], maps the depth camera's axes to the target's.
        width, height: size of the target image.

    Returns:
        float32 [height, width], z-depth of the target camera, 0 where unknown.
    """
    points = unproject_depth(depth.double(), depth_intrinsics, torch.eye(4).double())[depth > 0]
    pixels, z = project(points, target_intrinsics, target_from_depth)
    return nearest_surface(pixels, z, width=width, height=height)


def _read_numbers(path: Path, shape: tuple[int, int]) -> Tensor:
    """Matrix of a text file, float64; a shape of -1 rows takes any number of them."""
    rows = "a row" if shape[0] == -1 else f"{shape[0]} rows"
    try:
        lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines()]
        values = np.array([line for line in lines if line], dtype=np.float64)
        if values.ndim != 2 or values.shape[1] != shape[1] or shape[0] not in (-1, len(values)):
            raise ValueError(f"shape {values.shape}")
    except (OSError, ValueError) as error:
        raise DatasetError(
            f"{path}: expected {rows} of {shape[1]} numbers, found: {error}; restore the file"
        ) from error
    return torch.from_numpy(values)


def _pinhole(focal: float, width: int, height: int) -> Tensor:
    """Intrinsics with the principal point in the middle of the image: float64 [3, 3]."""
    return torch.tensor(
        [[focal, 0.0, width / 2], [0.0, focal, height / 2], [0.0, 0.0, 1.0]], dtype=torch.float64
    )


def _from_integer_centres(intrinsics: Tensor) -> Tensor:
    """Intrinsics for which pixel centres are whole numbers (OpenCV), taken to ours at +0.5."""
    shift = torch.zeros(3, 3, dtype=torch.float64)
    shift[:2, 2] = 0.5
    return intrinsics.double() + shift


def _read_folder(path: Path) -> list[FrameSequence]:
    """``images/``, ``depth/`` (16-bit PNG in mm, same stems, registered), ``K.txt`` (OpenCV, for
    the size of the images) and ``poses.txt`` (one row-major camera-to-world matrix in metres per
    line, in the order of the images)."""
    images = find_images(path / "images")
    intrinsics = _from_integer_centres(_read_numbers(path / "K.txt", (3, 3)))
    poses = _read_numbers(path / "poses.txt", (-1, 16)).reshape(-1, 4, 4)
    if len(poses) != len(images):
        raise DatasetError(
            f"{path / 'poses.txt'}: expected one line per image, found {len(poses)} lines for "
            f"{len(images)} images in {path / 'images'}"
        )
    frames = []
    for image, pose in zip(images, poses, strict=True):
        depth = path / "depth" / f"{image.stem}.png"
        if not depth.is_file():
            raise DatasetError(f"{depth}: missing; every image needs a depth map of its name")
        frames.append(
            Frame(
                image_path=image,
                world_from_cam=rigid_pose(pose, path / "poses.txt"),
                intrinsics=intrinsics,
                read_depth=partial(read_depth_mm, depth),
            )
        )
    return [FrameSequence(name=path.resolve().name, frames=tuple(frames), unit="m")]


def _read_seven_scenes(path: Path) -> list[FrameSequence]:
    """``frame-*.color.*``, ``frame-*.depth.png`` (mm) and ``frame-*.pose.txt`` (camera-to-world).

    Pose and depth are those of the depth camera; both are moved to the colour camera.
    """
    width, height = _SEVEN_SCENES_SIZE
    depth_intrinsics = _pinhole(_SEVEN_SCENES_DEPTH_FOCAL, width, height)
    colour_intrinsics = _pinhole(_SEVEN_SCENES_COLOUR_FOCAL, width, height)
    shift = torch.tensor(_SEVEN_SCENES_COLOUR_FROM_DEPTH, dtype=torch.float64)
    colour_from_depth = pose_from(torch.eye(3, dtype=torch.float64), shift)
    depth_from_colour = pose_from(torch.eye(3, dtype=torch.float64), -shift)

    def read_depth(depth_path: Path) -> Tensor:
        return register_depth(
            read_depth_mm(depth_path),
            depth_intrinsics=depth_intrinsics,
            target_intrinsics=colour_intrinsics,
            target_from_depth=colour_from_depth,
            width=width,
            height=height,
        )

    calibration = path / "camera-intrinsics.txt"
    if calibration.is_file():
        found = _read_numbers(calibration, (3, 3))
        if not torch.allclose(found, depth_intrinsics, atol=1.0):
            raise DatasetError(
                f"{calibration}: expected the depth camera of 7-Scenes (f 585, c 320 240), found "
                f"{found.tolist()}; bring other sensors into the images/ depth/ K.txt poses.txt "
                "layout, with depth registered to colour"
            )
    frames = []
    for image in find_images(path):
        frame = image.name.split(".")[0]
        depth, pose = path / f"{frame}.depth.png", path / f"{frame}.pose.txt"
        if not depth.is_file():
            raise DatasetError(f"{depth}: missing; every colour image needs a depth map")
        world_from_depth = rigid_pose(_read_numbers(pose, (4, 4)), pose)
        frames.append(
            Frame(
                image_path=image,
                world_from_cam=world_from_depth @ depth_from_colour,
                intrinsics=colour_intrinsics,
                image_size=_SEVEN_SCENES_SIZE,
                read_depth=partial(read_depth, depth),
            )
        )
    return [FrameSequence(name=path.resolve().name, frames=tuple(frames), unit="m")]


def _read_condition(path: Path) -> list[FrameSequence]:
    """``rgb/`` and ``condition.npz`` with ``intrinsics`` [N,3,3] (OpenCV), ``poses`` [N,4,4]
    (camera-to-world) and ``depths`` [N,H,W] (z-depth, 0 where unknown), as Pi3's examples."""
    source = path / "condition.npz"
    images = find_images(path / "rgb")
    try:
        with np.load(source, allow_pickle=False) as arrays:
            tensors = [torch.from_numpy(arrays[k]) for k in ("intrinsics", "poses", "depths")]
    except (OSError, ValueError, TypeError, KeyError, EOFError, BadZipFile, zlib.error) as error:
        raise DatasetError(
            f"{source}: expected arrays intrinsics, poses and depths, found: {error}"
        ) from error
    intrinsics, poses, depths = tensors
    n = len(images)
    found = [tuple(t.shape) for t in tensors]
    if found[:2] != [(n, 3, 3), (n, 4, 4)] or depths.ndim != 3 or len(depths) != n:
        raise DatasetError(
            f"{source}: expected intrinsics [{n}, 3, 3], poses [{n}, 4, 4] and depths "
            f"[{n}, H, W] for the {n} photos in {path / 'rgb'}, found {found}"
        )

    def read_depth(view: int) -> Tensor:
        depth = depths[view].float()
        return torch.where(depth.isfinite() & (depth > 0), depth, 0.0)

    frames = tuple(
        Frame(
            image_path=image,
            world_from_cam=rigid_pose(poses[view], source),
            intrinsics=_from_integer_centres(intrinsics[view]),
            read_depth=partial(read_depth, view),
        )
        for view, image in enumerate(images)
    )
    return [FrameSequence(name=path.resolve().name, frames=frames)]


RGBD_LAYOUTS = (
    Layout(
        name="rgbd-folder",
        files="images/ depth/ K.txt poses.txt",
        matches=lambda path: (path / "images").is_dir() and (path / "depth").is_dir(),
        read=_read_folder,
    ),
    Layout(
        name="7-scenes",
        files="frame-*.color.png frame-*.depth.png frame-*.pose.txt",
        matches=lambda path: any(path.glob("frame-*.color.*")),
        read=_read_seven_scenes,
    ),
    Layout(
        name="pi3-condition",
        files="rgb/ condition.npz",
        matches=lambda path: (path / "condition.npz").is_file(),
        read=_read_condition,
    ),
)
