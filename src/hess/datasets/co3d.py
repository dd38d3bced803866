"""CO3Dv2: sequences with PyTorch3D cameras and float16 depth, read from its annotation files.

Format: facebookresearch/co3d, co3d/dataset/data_types.py; cameras: PyTorch3D,
renderer/camera_conversions.py.
"""

import gzip
import json
import logging
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hess.datasets.decoding import DECODE_ERRORS
from hess.datasets.frames import Frame, FrameSequence, rigid_pose
from hess.datasets.photo_files import natural_key
from hess.datasets.rgbd import read_png16
from hess.errors import DatasetError
from hess.geometry.image_fit import ImageFit
from hess.geometry.poses import invert_pose, pose_from

logger = logging.getLogger(__name__)

ANNOTATIONS = "frame_annotations.jgz"
DEFAULT_SET_LIST = "fewview_dev"


def opencv_camera(viewpoint: dict[str, Any], *, width: int, height: int) -> tuple[Tensor, Tensor]:
    """Camera of a CO3D ``viewpoint`` annotation in OpenCV axes and pixels.

    PyTorch3D maps row vectors by ``X_cam = X_world R + T`` with x left, y up, z forward. In
    ``ndc_isotropic`` one unit is half the shorter side on both axes; in ``ndc_norm_image_bounds``
    (also when the format is missing) half the side of each axis. The origin is the image centre.

    Returns:
        cam_from_world float64 [4, 4] (not yet re-orthonormalised) and intrinsics float64 [3, 3]
        with the top-left pixel centre at (0.5, 0.5).

    Raises:
        KeyError, TypeError, ValueError: the annotation lacks or garbles a value.
    """
    flip = torch.tensor([-1.0, -1.0, 1.0], dtype=torch.float64)
    matrix, vector = (np.array(viewpoint[key], dtype=np.float64) for key in ("R", "T"))
    rotation = torch.from_numpy(matrix.reshape(3, 3)).T * flip[:, None]
    translation = torch.from_numpy(vector.reshape(3)) * flip

    intrinsics_format = viewpoint.get("intrinsics_format") or "ndc_norm_image_bounds"
    if intrinsics_format == "ndc_isotropic":
        unit_x = unit_y = min(width, height) / 2
    elif intrinsics_format == "ndc_norm_image_bounds":
        unit_x, unit_y = width / 2, height / 2
    else:
        raise ValueError(
            f"intrinsics_format {intrinsics_format!r}, not ndc_isotropic or ndc_norm_image_bounds"
        )
    (fx, fy), (px, py) = viewpoint["focal_length"], viewpoint["principal_point"]
    intrinsics = torch.tensor(
        [
            [fx * unit_x, 0.0, width / 2 - px * unit_x],
            [0.0, fy * unit_y, height / 2 - py * unit_y],
            [0.0, 0.0, 1.0],
        ],
        dtype=torch.float64,
    )
    return pose_from(rotation, translation), intrinsics


@contextmanager
def _parsing(path: Path, what: str) -> Iterator[None]:
    """Turns what damaged or foreign JSON raises inside the block into a DatasetError."""
    try:
        yield
    except DatasetError:
        raise
    except KeyError as error:
        raise DatasetError(
            f"{path}: expected {what} of CO3Dv2, found one without {error}; download the "
            "category's annotations again"
        ) from error
    except (
        OSError,
        EOFError,
        zlib.error,
        ArithmeticError,
        AttributeError,
        TypeError,
        ValueError,
    ) as error:
        raise DatasetError(
            f"{path}: expected {what} of CO3Dv2, found: {error}; download the category's "
            "annotations again"
        ) from error


def _read_json(path: Path) -> Any:
    raw = path.read_bytes()
    return json.loads(gzip.decompress(raw) if path.suffix == ".jgz" else raw)


def _read_list(path: Path) -> list[Any]:
    content = _read_json(path)
    if not isinstance(content, list):
        raise ValueError(f"no list but {str(content)[:80]}")
    return content


def _download(path: Path, folder: str) -> Path:
    """``path``, if it is there."""
    if not path.is_file():
        raise DatasetError(f"{path}: missing; download the {folder} of this CO3D sequence")
    return path


def _read_depth(
    path: Path, mask_path: Path | None, scale: float, width: int, height: int
) -> Tensor:
    """Depth at the size of the photo: float32 [height, width], 0 where unknown or masked out."""
    bits = read_png16(_download(path, "depths/"))
    values = bits.view(np.float16).astype(np.float32) * np.float32(scale)
    known = np.isfinite(values) & (values > 0)
    if mask_path is not None:
        try:
            with Image.open(_download(mask_path, "depth_masks/"), formats=("PNG",)) as image:
                mask = np.array(image)
        except (Image.DecompressionBombError, *DECODE_ERRORS) as error:
            raise DatasetError(
                f"{mask_path}: expected a depth mask, found: {error}; download depth_masks/"
            ) from error
        if mask.shape != values.shape:
            raise DatasetError(
                f"{mask_path}: expected the size of its depth map {values.shape} (rows, "
                f"columns), found {mask.shape}"
            )
        known &= mask > 0
    fit = ImageFit(
        original_width=values.shape[1],
        original_height=values.shape[0],
        scale_x=width / values.shape[1],
        scale_y=height / values.shape[0],
        offset_x=0.0,
        offset_y=0.0,
        width=width,
        height=height,
    )
    return fit.depth_to_model(torch.from_numpy(np.where(known, values, np.float32(0))))


def _frame(root: Path, annotation: dict[str, Any], source: Path) -> Frame:
    height, width = map(int, annotation["image"]["size"])
    cam_from_world, intrinsics = opencv_camera(annotation["viewpoint"], width=width, height=height)
    if not (intrinsics.isfinite().all() and (intrinsics.diagonal() > 0).all()):
        raise ValueError(f"a camera that is not finite: {annotation['viewpoint']}")
    depth = annotation.get("depth")
    read_depth = None
    if depth is not None and depth["path"]:
        read_depth = partial(
            _read_depth,
            root / depth["path"],
            root / depth["mask_path"] if depth.get("mask_path") else None,
            float(depth["scale_adjustment"]),
            width,
            height,
        )
    return Frame(
        image_path=root / annotation["image"]["path"],
        world_from_cam=invert_pose(rigid_pose(cam_from_world, source)),
        intrinsics=intrinsics,
        image_size=(width, height),
        read_depth=read_depth,
    )


def _read_wanted(folder: Path, set_list: str, split: str) -> set[tuple[str, int]]:
    """(sequence, frame number) of all frames in one split of a set list."""
    path = folder / "set_lists" / f"set_lists_{set_list}.json"
    if not path.is_file():
        names = sorted(p.stem.removeprefix("set_lists_") for p in path.parent.glob("*.json"))
        raise DatasetError(
            f"{path}: missing; set lists of this category: {', '.join(names) or 'none'}; name one "
            f"of them as {folder.parent}:NAME/train, or download the category's set_lists"
        )
    with _parsing(path, "a set list"):
        splits = dict(_read_json(path))
        if split in splits:
            return {(str(sequence), int(number)) for sequence, number, _ in splits[split]}
    raise DatasetError(f"{path}: expected a split of {sorted(splits)}, found {split!r}")


def _read_category(
    root: Path, category: str, *, set_list: str, split: str, min_viewpoint_quality: float
) -> list[FrameSequence]:
    folder = root / category
    wanted = _read_wanted(folder, set_list, split)
    source = folder / "sequence_annotations.jgz"
    with _parsing(source, "sequence annotations"):
        quality = {
            a["sequence_name"]: a.get("viewpoint_quality_score") for a in _read_list(source)
        }
        poor = {
            name
            for name, score in quality.items()
            if score is not None and float(score) <= min_viewpoint_quality
        }
    source = folder / ANNOTATIONS
    frames: dict[str, list[tuple[int, Frame]]] = defaultdict(list)
    with _parsing(source, "frame annotations"):
        for annotation in _read_list(source):
            name, number = annotation["sequence_name"], annotation["frame_number"]
            # Frames whose camera or photo is withheld (hidden test targets) are of no use.
            shown = annotation["viewpoint"] is not None and annotation["image"]["path"]
            if (name, number) in wanted and name not in poor and shown:
                frames[name].append((number, _frame(root, annotation, source)))
    sequences = []
    for name, numbered in sorted(frames.items(), key=lambda item: natural_key(item[0])):
        ordered = tuple(frame for _, frame in sorted(numbered, key=lambda item: item[0]))
        if ordered[0].image_path.parent.is_dir():
            sequences.append(
                FrameSequence(name=f"{category}/{name}", frames=ordered, category=category)
            )
    if absent := len(frames) - len(sequences):
        logger.warning(
            "%s: photos of %d of %d sequences are not there; download the rest of the category "
            "to use them",
            folder,
            absent,
            len(frames),
        )
    return sequences


def is_co3d(path: Path) -> bool:
    """Whether a folder holds CO3Dv2 categories, or is one."""
    return bool(_categories(path)) or _is_category(path)


def _is_category(path: Path) -> bool:
    return (path / ANNOTATIONS).is_file() or any(path.glob("set_lists/set_lists_*.json"))


def _categories(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.is_dir() and _is_category(path))


def read_co3d(
    root: Path,
    *,
    set_list: str = DEFAULT_SET_LIST,
    split: str = "train",
    categories: Sequence[str] | None = None,
    min_viewpoint_quality: float = 0.5,
) -> list[FrameSequence]:
    """Sequences of a CO3Dv2 tree; lengths are in the arbitrary unit of each reconstruction.

    Args:
        root: the folder that holds the categories, or one category folder.
        set_list: which ``set_lists_<name>.json``.
        split: "train", "val" or "test" of that set list.
        categories: folder names; None takes all that are there.
        min_viewpoint_quality: sequences whose score is not above it are left out (as VGGT does);
            those without a score stay.

    Raises:
        DatasetError: a file is missing or damaged, or no sequence is left.
    """
    if _is_category(root):
        root, categories = root.resolve().parent, [root.resolve().name]
    if categories is None:
        categories = _categories(root)
    sequences = [
        sequence
        for category in categories
        for sequence in _read_category(
            root,
            category,
            set_list=set_list,
            split=split,
            min_viewpoint_quality=min_viewpoint_quality,
        )
    ]
    if not sequences:
        raise DatasetError(
            f"{root}: expected photos of CO3Dv2 sequences with a viewpoint quality above "
            f"{min_viewpoint_quality} in split {split!r} of {set_list!r} of categories "
            f"{list(categories)}, found none; choose another part or download more of it"
        )
    return sequences
