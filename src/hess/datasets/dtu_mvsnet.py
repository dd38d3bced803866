"""DTU as MVSNet lays it out, for testing and for training.

Formats: YoYo000/MVSNet, README; the ``depths/`` and ``binary_masks/`` of the test layout are those
that Spann3R (docs/data_preprocess.md) renders and Pi3 evaluates on.
"""

import re
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hess.datasets.decoding import DECODE_ERRORS
from hess.datasets.dtu_cameras import photo_frame, read_cam_txt, scan_sequence
from hess.datasets.frames import Frame, FrameSequence, rigid_pose
from hess.datasets.photo_files import find_images, natural_key
from hess.errors import DatasetError
from hess.geometry.image_fit import ImageFit
from hess.geometry.poses import invert_pose

_MASK_EROSION = 10  # pixels; the rims of rendered depth are not to be trusted
_TRAINING_SIZE = (640, 512)  # of photos; cameras and depth maps are for a quarter of it
_TRAINING_LIGHT = 3  # of seven; the one all test sets use
_PFM_HEADER = re.compile(rb"Pf\s+(\d+)\s+(\d+)\s+([-+.\deE]+)\s")


# --- for testing: images/ and cams/, and depths/ and binary_masks/ where there are ---------------


def read_mvsnet(path: Path) -> list[FrameSequence]:
    """The one scan of a folder in the test layout.

    Raises:
        DatasetError: a file is missing or damaged, or cameras are not for photos of this size.
    """
    frames = []
    for image in find_images(path / "images"):
        source = path / "cams" / f"{image.stem}_cam.txt"
        pose, intrinsics = read_cam_txt(source)
        read_depth = None
        if (path / "depths").is_dir():
            depth, mask = (
                _existing(path / folder / f"{image.stem}{suffix}")
                for folder, suffix in (("depths", ".npy"), ("binary_masks", ".png"))
            )
            read_depth = partial(_read_rendered_depth, depth, mask)
        frames.append(photo_frame(image, pose, intrinsics, source, read_depth))
    return [scan_sequence(path.resolve().name, frames)]


def _read_rendered_depth(path: Path, mask_path: Path) -> Tensor:
    """Depth of a ``.npy`` file in mm, unknown outside and near the rim of its mask."""
    from scipy.ndimage import minimum_filter

    try:
        depth = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DatasetError(f"{path}: expected a depth map, found: {error}") from error
    if not isinstance(depth, np.ndarray) or depth.dtype.kind != "f" or depth.ndim != 2:
        found = (depth.dtype, depth.shape) if isinstance(depth, np.ndarray) else "an archive"
        raise DatasetError(f"{path}: expected a depth map [H, W] of floats, found {found}")
    if depth.size == 0:
        raise DatasetError(f"{path}: expected a depth map, found an empty one")
    depth = depth.astype(np.float32)
    mask = _resized(torch.from_numpy(_read_mask(mask_path)), depth.shape[1], depth.shape[0])
    inner = minimum_filter(mask.numpy(), size=_MASK_EROSION, mode="constant", cval=True)
    return _known_depth(depth, inner)


# --- for training: Cameras/train/, Rectified/ and Depths/ ----------------------------------------


def read_mvsnet_training(path: Path) -> list[FrameSequence]:
    """All scans of the training data, with all lamps on.

    Which of its 4x4 photo pixels a depth belongs to is not published; it is taken for all.

    Raises:
        DatasetError: a file is missing or damaged.
    """
    folders = sorted(
        (p for p in (path / "Rectified").iterdir() if p.is_dir()),
        key=lambda p: natural_key(p.name),
    )
    if not folders:
        raise DatasetError(f"{path / 'Rectified'}: expected a folder per scan, found none")
    return [
        scan_sequence(folder.name.removesuffix("_train"), _training_frames(path, folder))
        for folder in folders
    ]


def _training_frames(path: Path, folder: Path) -> list[Frame]:
    frames = []
    for image in sorted(folder.glob(f"rect_[0-9][0-9][0-9]_{_TRAINING_LIGHT}_r5000.png")):
        view = int(image.name.split("_")[1]) - 1
        source = path / "Cameras" / "train" / f"{view:08d}_cam.txt"
        pose, quarter = read_cam_txt(source)
        # Photos are the originals halved and cut, so that pixel x of the full calibration lies at
        # (x + 0.5) / 2 from the left edge; the published principal point is x / 8 less the cut.
        intrinsics = quarter * torch.tensor([[4.0], [4.0], [1.0]])
        intrinsics[:2, 2] += 0.25
        depths = path / "Depths" / folder.name
        depth = _existing(depths / f"depth_map_{view:04d}.pfm")
        mask = _existing(depths / f"depth_visual_{view:04d}.png")
        frames.append(
            Frame(
                image_path=image,
                world_from_cam=invert_pose(rigid_pose(pose, source)),
                intrinsics=intrinsics,
                image_size=_TRAINING_SIZE,
                read_depth=partial(_read_training_depth, depth, mask),
            )
        )
    if not frames:
        raise DatasetError(
            f"{folder}: expected photos rect_001_{_TRAINING_LIGHT}_r5000.png and on (all lamps "
            "on), found none; unpack the MVSNet training data again"
        )
    return frames


def _read_training_depth(path: Path, mask_path: Path) -> Tensor:
    depth, mask = read_pfm(path), _read_mask(mask_path)
    if mask.shape != depth.shape:
        raise DatasetError(
            f"{mask_path}: expected the size of its depth map {depth.shape} (rows, columns), "
            f"found {mask.shape}"
        )
    return _resized(_known_depth(depth, mask), *_TRAINING_SIZE)


def read_pfm(path: Path) -> np.ndarray:
    """Values of a single-channel portable float map: float32 [H, W], top row first.

    Raises:
        DatasetError: the file is missing, cut off, or no such map.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DatasetError(f"{path}: expected a depth map, found: {error}") from error
    header = _PFM_HEADER.match(raw)
    payload = raw[header.end() :] if header else b""
    width, height = (int(header[1]), int(header[2])) if header else (0, 0)
    if header is None or len(payload) != 4 * width * height or not payload:
        raise DatasetError(
            f"{path}: expected a single-channel PFM file, found {len(raw)} bytes that start with "
            f"{raw[:20]!r}"
        )
    values = np.frombuffer(payload, "<f4" if header[3].startswith(b"-") else ">f4")
    return values.reshape(height, width)[::-1].astype(np.float32)


# --- files of both ------------------------------------------------------------------------------


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise DatasetError(f"{path}: missing; every photo needs a depth map and its mask")
    return path


def _read_mask(path: Path) -> np.ndarray:
    try:
        with Image.open(path, formats=("PNG",)) as image:
            return np.array(image.convert("L")) > 127
    except (Image.DecompressionBombError, *DECODE_ERRORS) as error:
        raise DatasetError(f"{path}: expected a mask, found: {error}") from error


def _known_depth(depth: np.ndarray, mask: np.ndarray) -> Tensor:
    known = mask & np.isfinite(depth) & (depth > 0)
    return torch.from_numpy(np.where(known, depth, np.float32(0)))


def _resized(image: Tensor, width: int, height: int) -> Tensor:
    """The map [h, w] at another size by nearest pixel."""
    fit = ImageFit(
        original_width=image.shape[1],
        original_height=image.shape[0],
        scale_x=width / image.shape[1],
        scale_y=height / image.shape[0],
        offset_x=0.0,
        offset_y=0.0,
        width=width,
        height=height,
    )
    return fit.depth_to_model(image)
