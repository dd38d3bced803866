"""CO3Dv2: sequences with PyTorch3D cameras and float16 depth, read from its annotation files.

Format: facebookresearch/co3d, co3d/dataset/data_types.py; cameras: PyTorch3D,
renderer/camera_conversions.py.
"""

import gzip
import json
import zlib
from collections import defaultdict
from collections.abc import Sequence
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

ANNOTATIONS = "frame_annotations.jgz"


def opencv_camera(viewpoint: dict[str, Any], *, width: int, height: int) -> tuple[Tensor, Tensor]:
    """Camera of a CO3D ``viewpoint`` annotation in OpenCV axes and pixels.

    PyTorch3D maps row vectors by ``X_cam = X_world R + T`` with x left, y up, z forward. In
    ``ndc_isotropic`` one unit is half the shorter side on both axes; in ``ndc_norm_image_bounds``
    (also when the format is missing) half the side of each axis. The origin is the image centre.

    Returns:
        cam_from_world float64 [4, 4] (not yet re-orthonormalised) and intrinsics float64 [3, 3]
        with the top-left pixel centre at (0.5, 0.5).

    Raises:
        DatasetError: the intrinsics format is unknown.
    """
    flip = torch.tensor([-1.0, -1.0, 1.0], dtype=torch.float64)
    rotation = torch.tensor(viewpoint["R"], dtype=torch.float64).T * flip[:, None]
    translation = torch.tensor(viewpoint["T"], dtype=torch.float64) * flip

    intrinsics_format = viewpoint.get("intrinsics_format") or "ndc_norm_image_bounds"
    if intrinsics_format == "ndc_isotropic":
        unit_x = unit_y = min(width, height) / 2
    elif intrinsics_format == "ndc_norm_image_bounds":
        unit_x, unit_y = width / 2, height / 2
    else:
        raise DatasetError(
            "expected intrinsics_format ndc_isotropic or ndc_norm_image_bounds, "
            f"found {intrinsics_format!r}"
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


def _read_json(path: Path) -> Any:
    try:
        raw = path.read_bytes()
        return json.loads(gzip.decompress(raw) if path.suffix == ".jgz" else raw)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise DatasetError(
            f"{path}: expected a CO3Dv2 annotation file, found: {error}; download the category's "
            "annotations again"
        ) from error


def _read_depth(root: Path, depth: dict[str, Any], width: int, height: int) -> Tensor:
    """Depth at the size of the photo: float32 [height, width], 0 where unknown or masked out."""
    bits = read_png16(root / depth["path"])
    values = bits.view(np.float16).astype(np.float32) * depth["scale_adjustment"]
    known = np.isfinite(values) & (values > 0)
    if depth.get("mask_path"):
        mask_path = root / depth["mask_path"]
        try:
            with Image.open(mask_path, formats=("PNG",)) as image:
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
    height, width = annotation["image"]["size"]
    cam_from_world, intrinsics = opencv_camera(annotation["viewpoint"], width=width, height=height)
    depth = annotation.get("depth")
    return Frame(
        image_path=root / annotation["image"]["path"],
        world_from_cam=invert_pose(rigid_pose(cam_from_world, source)),
        intrinsics=intrinsics,
        image_size=(width, height),
        read_depth=None if depth is None else partial(_read_depth, root, depth, width, height),
    )


def _read_category(
    root: Path, category: str, *, set_list: str, split: str, min_viewpoint_quality: float
) -> list[FrameSequence]:
    folder = root / category
    list_path = folder / "set_lists" / f"set_lists_{set_list}.json"
    if not list_path.is_file():
        others = ", ".join(sorted(p.stem for p in list_path.parent.glob("*.json"))) or "none"
        raise DatasetError(
            f"{list_path}: missing; set lists found in this category: {others}; download the "
            "category's set_lists or name one that is there"
        )
    splits = _read_json(list_path)
    if split not in splits:
        raise DatasetError(f"{list_path}: expected a split of {sorted(splits)}, found {split!r}")
    wanted = {(sequence, number) for sequence, number, _ in splits[split]}
    poor = {
        annotation["sequence_name"]
        for annotation in _read_json(folder / "sequence_annotations.jgz")
        if (score := annotation.get("viewpoint_quality_score")) is not None
        and score <= min_viewpoint_quality
    }
    source = folder / ANNOTATIONS
    frames: dict[str, list[tuple[int, Frame]]] = defaultdict(list)
    for annotation in _read_json(source):
        try:
            key = (annotation["sequence_name"], annotation["frame_number"])
            # Frames whose camera is withheld (the hidden test targets) are of no use.
            if key in wanted and key[0] not in poor and annotation["viewpoint"] is not None:
                frames[key[0]].append((key[1], _frame(root, annotation, source)))
        except DatasetError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise DatasetError(
                f"{source}: expected CO3Dv2 frame annotations, found one that lacks or garbles "
                f"{error}: {str(annotation)[:200]}"
            ) from error
    return [
        FrameSequence(
            name=f"{category}/{name}",
            frames=tuple(frame for _, frame in sorted(numbered, key=lambda item: item[0])),
        )
        for name, numbered in sorted(frames.items(), key=lambda item: natural_key(item[0]))
    ]


def read_co3d(
    root: Path,
    *,
    set_list: str = "fewview_dev",
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
    if (root / ANNOTATIONS).is_file():
        root, categories = root.resolve().parent, [root.resolve().name]
    if categories is None:
        categories = sorted(path.parent.name for path in root.glob(f"*/{ANNOTATIONS}"))
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
            f"{root}: expected CO3Dv2 sequences with a viewpoint quality above "
            f"{min_viewpoint_quality} in split {split!r} of {set_list!r} of categories "
            f"{list(categories)}, found none"
        )
    return sequences
