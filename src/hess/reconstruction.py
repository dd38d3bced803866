"""From photos to cameras and points: one forward pass, kept with all that is needed to use it."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from hess.datasets.photos import LoadedImages, PhotoSource, find_images, load_images
from hess.datasets.scene import Scene
from hess.errors import ConfigError, DatasetError
from hess.export.point_cloud import PointCloud
from hess.export.save import save_reconstruction
from hess.geometry.fit_rules import FitRule
from hess.geometry.image_fit import ImageFit
from hess.geometry.projection import unproject_depth
from hess.models.base import Model


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """Cameras and dense points of N photos, in the model's own world frame and scale.

    All tensors are float32 on the CPU.

    Args:
        model_name: the model that made it.
        view_names: one per photo, no two alike.
        image_paths: where each photo is; None where that is unknown.
        image_fits: how each photo was brought to the model's input image.
        images: [N, 3, H, W] in [0, 1], the model's input.
        world_from_cam: [N, 4, 4], OpenCV axes.
        intrinsics: [N, 3, 3] in pixels of ``images``, top-left pixel centre at (0.5, 0.5).
        original_intrinsics: [N, 3, 3] in pixels of the original photos.
        depth: [N, H, W], z-depth.
        depth_confidence: [N, H, W] in [0, 1], see :meth:`Model.certainty`: for VGGT the sigmoid
            of the raw output, 1 - 1/c of its own confidence c.
        world_points: [N, H, W, 3].
        confidence: [N, H, W] in [0, 1], of ``world_points``, alike; for Pi3 the sigmoid of its
            logit.
        sparsification: statistics of the sparse attention it was made with (JSON values), or None
            if attention was dense or unrecorded.

    Raises:
        DatasetError: two of them disagree about the number or size of the views, or two views
            have one name.
    """

    model_name: str
    view_names: tuple[str, ...]
    image_paths: tuple[Path | None, ...]
    image_fits: tuple[ImageFit, ...]
    images: Tensor
    world_from_cam: Tensor
    intrinsics: Tensor
    original_intrinsics: Tensor
    depth: Tensor
    depth_confidence: Tensor
    world_points: Tensor
    confidence: Tensor
    sparsification: Mapping[str, object] | None = None

    def __post_init__(self) -> None:
        n, _, h, w = self.images.shape
        shapes = {
            "world_from_cam": (n, 4, 4),
            "intrinsics": (n, 3, 3),
            "original_intrinsics": (n, 3, 3),
            "depth": (n, h, w),
            "depth_confidence": (n, h, w),
            "world_points": (n, h, w, 3),
            "confidence": (n, h, w),
        }
        for name, shape in shapes.items():
            found = tuple(getattr(self, name).shape)
            if found != shape:
                raise DatasetError(
                    f"reconstruction of {n} images of {w}x{h} pixels: {name} must have shape "
                    f"{shape}, found {found}"
                )
        for name in ("view_names", "image_paths", "image_fits"):
            if len(getattr(self, name)) != n:
                raise DatasetError(
                    f"reconstruction of {n} images: found {len(getattr(self, name))} {name}"
                )
        name, count = Counter(self.view_names).most_common(1)[0]
        if count > 1:
            raise DatasetError(
                f"view names must differ, found {name!r} {count} times; rename the photos"
            )

    @property
    def num_views(self) -> int:
        return len(self.images)

    def confident_pixels(self, *, drop_lowest: float = 0.2) -> Tensor:
        """Which pixels have a point worth using: bool [N, H, W].

        Left out are pixels that show padding and not the photo, points or confidences that are
        not finite, and of the rest the least confident.

        Args:
            drop_lowest: share of the least confident points to leave out, 0 (none) up to but not
                including 1.

        Raises:
            ConfigError: ``drop_lowest`` is out of range.
            DatasetError: no pixel has a finite point.
        """
        if not 0 <= drop_lowest < 1:
            raise ConfigError(f"drop_lowest must be in [0, 1), found {drop_lowest}")
        usable = self.world_points.isfinite().all(-1) & self.confidence.isfinite()
        for view, fit in zip(usable, self.image_fits, strict=True):
            (left, right), (top, bottom) = fit.shown
            view[:top] = view[bottom:] = False
            view[:, :left] = view[:, right:] = False
        confidence = self.confidence[usable]
        if not len(confidence):
            raise DatasetError(
                f"{self.model_name} gave no finite point for these {self.num_views} photos; "
                "load it in a wider number format (dtype float32)"
            )
        num_dropped = int(drop_lowest * len(confidence))
        if num_dropped:
            threshold = confidence.kthvalue(num_dropped).values
            tied = confidence == threshold
            num_tied = num_dropped - int((confidence < threshold).sum())
            # Of equally confident points the first ones go.
            tied &= tied.cumsum(0, dtype=torch.int32) <= num_tied
            usable[usable.clone()] = (confidence >= threshold) & ~tied
        return usable

    def point_cloud(
        self, *, drop_lowest: float = 0.2, voxel_size: float | None = None
    ) -> PointCloud:
        """Points, colours and confidences of the confident pixels, in their order.

        Args:
            drop_lowest: see :meth:`confident_pixels`.
            voxel_size: side of cubes, in the unit of the points, each of which gives one point,
                the mean of all in it; None keeps every point.

        Raises:
            ConfigError: a parameter is out of range.
            DatasetError: no pixel has a finite point.
        """
        keep = self.confident_pixels(drop_lowest=drop_lowest)
        cloud = PointCloud(
            points=self.world_points[keep],
            colors=self.images.movedim(1, -1)[keep],
            confidence=self.confidence[keep],
        )
        return cloud if voxel_size is None else cloud.one_per_voxel(voxel_size)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Everything as arrays under the field names; ``metadata`` is a JSON string."""
        tensors = {k: v.numpy() for k, v in vars(self).items() if isinstance(v, Tensor)}
        metadata = {
            "model_name": self.model_name,
            "view_names": self.view_names,
            "image_paths": [None if path is None else str(path) for path in self.image_paths],
            "image_fits": [asdict(fit) for fit in self.image_fits],
            "sparsification": None if self.sparsification is None else dict(self.sparsification),
        }
        return {**tensors, "metadata": np.array(json.dumps(metadata))}

    def save(
        self,
        path: str | Path,
        *,
        drop_lowest: float = 0.2,
        voxel_size: float | None = None,
        ply_file: str | None = None,
    ) -> None:
        """Write a file or COLMAP folder; see :func:`hess.export.save_reconstruction`."""
        save_reconstruction(
            self, path, drop_lowest=drop_lowest, voxel_size=voxel_size, ply_file=ply_file
        )


def reconstruct(
    model: Model,
    source: PhotoSource | LoadedImages | Scene,
    *,
    fit: FitRule | None = None,
    points: Literal["point_head", "depth"] | None = None,
    strict: bool = False,
    max_views: int | None = None,
) -> Reconstruction:
    """Predict cameras and points of photos with one forward pass, on the model's device.

    The model runs in evaluation mode; whether it was training is restored.

    Args:
        model: any model of this package, sparsified or not.
        source: photos (see :func:`hess.datasets.photos.find_images`); or photos loaded already,
            or a scene, both of which are at the model's input size.
        fit: how photos are brought to the model's size; None takes the model's own rule.
        points: where world points come from: the "point_head", or the "depth" maps taken to the
            world by the predicted cameras; None takes what the model recommends.
        strict: raise on an unreadable photo instead of skipping it with a warning.
        max_views: of more photos this many are used, spread evenly; None uses all.

    Raises:
        ConfigError: ``points`` is unknown, or ``fit`` or ``max_views`` is given for images that
            are loaded already.
        DatasetError: no photo is usable, or one is unreadable (``strict``).
    """
    points = model.cloud_from if points is None else points
    if points not in ("point_head", "depth"):
        raise ConfigError(f"points must be 'point_head', 'depth' or None, found {points!r}")
    if not isinstance(source, Scene | LoadedImages):
        source = load_images(
            find_images(source),
            image_fit=model.image_rule if fit is None else fit,
            strict=strict,
            max_views=max_views,
        )
    elif fit is not None or max_views is not None:
        raise ConfigError(
            "a scene and loaded images are at their final size and number already, found fit or "
            "max_views as well; open or load them with these instead"
        )
    names, paths, fits = _photos_of(source)

    parameter = next(model.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    was_training = model.training
    model.eval()
    try:
        # Not inference_mode, whose tensors would have to be copied before autograd accepts them.
        with torch.no_grad():
            predictions = model(source.images.unsqueeze(0).to(device))
    finally:
        model.train(was_training)

    def result(tensor: Tensor) -> Tensor:
        return tensor[0].detach().to("cpu", torch.float32).contiguous()

    intrinsics, poses = result(predictions.intrinsics), result(predictions.world_from_cam)
    depth = result(predictions.depth)
    depth_confidence = result(model.certainty(predictions.depth_confidence))
    if points == "depth":
        confidence = depth_confidence
        world_points = torch.empty(*depth.shape, 3)
        for view in range(len(depth)):
            world_points[view] = unproject_depth(depth[view], intrinsics[view], poses[view])
    else:
        confidence = result(model.certainty(predictions.point_confidence))
        world_points = result(predictions.world_points)
    return Reconstruction(
        model_name=model.model_name,
        view_names=names,
        image_paths=paths,
        image_fits=fits,
        images=source.images,
        world_from_cam=poses,
        intrinsics=intrinsics,
        original_intrinsics=torch.stack(
            [
                image_fit.intrinsics_to_original(matrix)
                for image_fit, matrix in zip(fits, intrinsics, strict=True)
            ]
        ),
        depth=depth,
        depth_confidence=depth_confidence,
        world_points=world_points,
        confidence=confidence,
    )


def _photos_of(
    source: Scene | LoadedImages,
) -> tuple[tuple[str, ...], tuple[Path | None, ...], tuple[ImageFit, ...]]:
    """Names, places and fits of the photos."""
    if isinstance(source, LoadedImages):
        return source.names, source.paths, source.fits
    count, _, height, width = source.images.shape
    return (
        source.view_names or tuple(str(view) for view in range(count)),
        source.image_paths or (None,) * count,
        source.image_fits or (ImageFit.identity(width, height),) * count,
    )
