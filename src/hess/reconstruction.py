"""From photos to cameras and points: one forward pass, kept with all that is needed to use it."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hess.datasets.photos import PhotoSource, find_images, load_images
from hess.datasets.scene import Scene
from hess.errors import ConfigError, DatasetError
from hess.export.save import save_reconstruction
from hess.geometry.image_fit import FitRule, ImageFit
from hess.models.base import Model


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """Cameras and dense points of N photos, in the model's own world frame and scale.

    All tensors are float32 on the CPU.

    Args:
        model_name: the model that made it.
        view_names: one per photo.
        image_fits: how each photo was brought to the model's input image.
        images: [N, 3, H, W] in [0, 1], the model's input.
        world_from_cam: [N, 4, 4], OpenCV axes.
        intrinsics: [N, 3, 3] in pixels of ``images``, top-left pixel centre at (0.5, 0.5).
        original_intrinsics: [N, 3, 3] in pixels of the original photos.
        depth: [N, H, W], z-depth.
        depth_confidence: [N, H, W].
        world_points: [N, H, W, 3].
        confidence: [N, H, W], of ``world_points``; its meaning is the model's.
        sparsification: statistics of the sparse attention it was made with (JSON values), or None
            if attention was dense or unrecorded.

    Raises:
        DatasetError: two of them disagree about the number or size of the views.
    """

    model_name: str
    view_names: tuple[str, ...]
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
        if len(self.view_names) != n or len(self.image_fits) != n:
            raise DatasetError(
                f"reconstruction of {n} images: found {len(self.view_names)} view names and "
                f"{len(self.image_fits)} image fits"
            )

    @property
    def num_views(self) -> int:
        return len(self.images)

    def point_cloud(self, *, drop_lowest: float = 0.2) -> tuple[Tensor, Tensor]:
        """World points and colours of all views; points that are not finite are left out.

        Args:
            drop_lowest: share of the least confident points to leave out, 0 (none) up to but not
                including 1.

        Returns:
            points [M, 3] and colours [M, 3] in [0, 1].

        Raises:
            ConfigError: ``drop_lowest`` is out of range.
        """
        if not 0 <= drop_lowest < 1:
            raise ConfigError(f"drop_lowest must be in [0, 1), found {drop_lowest}")
        points = self.world_points.reshape(-1, 3)
        colors = self.images.permute(0, 2, 3, 1).reshape(-1, 3)
        confidence = self.confidence.reshape(-1)
        finite = points.isfinite().all(-1) & confidence.isfinite()
        points, colors, confidence = points[finite], colors[finite], confidence[finite]
        num_dropped = int(drop_lowest * len(points))
        # In the order of the pixels, and of equally confident points the first ones go.
        keep = confidence.argsort(stable=True)[num_dropped:].sort().values
        return points[keep], colors[keep]

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Everything as arrays under the field names; ``metadata`` is a JSON string."""
        tensors = {k: v.numpy() for k, v in vars(self).items() if isinstance(v, Tensor)}
        metadata = {
            "model_name": self.model_name,
            "view_names": self.view_names,
            "image_fits": [asdict(fit) for fit in self.image_fits],
            "sparsification": None if self.sparsification is None else dict(self.sparsification),
        }
        return {**tensors, "metadata": np.array(json.dumps(metadata))}

    def save(self, path: str | Path, *, drop_lowest: float = 0.2) -> None:
        """Write a .ply or .npz; see :func:`hess.export.save_reconstruction`."""
        save_reconstruction(self, path, drop_lowest=drop_lowest)


def reconstruct(
    model: Model,
    source: PhotoSource | Scene,
    *,
    fit: FitRule | None = None,
    strict: bool = False,
) -> Reconstruction:
    """Predict cameras and points of photos with one forward pass, on the model's device.

    The model runs in evaluation mode; whether it was training is restored.

    Args:
        model: any model of this package, sparsified or not.
        source: photos (see :func:`hess.datasets.photos.find_images`), or a scene that is at the
            model's input size already.
        fit: how photos are brought to the model's size; None takes the centre square at the size
            the model was trained for. Not for a scene.
        strict: raise on an unreadable photo instead of skipping it with a warning.

    Raises:
        ConfigError: ``fit`` is given for a scene.
        DatasetError: no photo is usable, or one is unreadable (``strict``).
    """
    if isinstance(source, Scene):
        if fit is not None:
            raise ConfigError(
                "a scene is at its final size already, found a fit as well; "
                "open its data set with that fit instead"
            )
        images = source.images
        height, width = images.shape[-2:]
        fits = (ImageFit.identity(width, height),) * len(images)
        names = source.view_names or tuple(str(view) for view in range(len(images)))
    else:
        rule = model.image_rule if fit is None else fit
        loaded = load_images(find_images(source), image_fit=rule, strict=strict)
        images, fits = loaded.images, loaded.fits
        names = tuple(path.name for path in loaded.paths)

    parameter = next(model.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            predictions = model(images.unsqueeze(0).to(device))
    finally:
        model.train(was_training)

    def result(tensor: Tensor) -> Tensor:
        # Cloned outside inference mode: a normal tensor that autograd accepts.
        return tensor[0].detach().to("cpu", torch.float32).clone()

    intrinsics = result(predictions.intrinsics)
    return Reconstruction(
        model_name=model.model_name,
        view_names=names,
        image_fits=fits,
        images=images,
        world_from_cam=result(predictions.world_from_cam),
        intrinsics=intrinsics,
        original_intrinsics=torch.stack(
            [
                image_fit.intrinsics_to_original(matrix)
                for image_fit, matrix in zip(fits, intrinsics, strict=True)
            ]
        ),
        depth=result(predictions.depth),
        depth_confidence=result(predictions.depth_confidence),
        world_points=result(predictions.world_points),
        confidence=result(predictions.point_confidence),
    )
