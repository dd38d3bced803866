"""A model's two errors on a scene, as every calibration takes them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hess.attention.layout import TokenLayout
from hess.datasets.scene import Scene
from hess.errors import ConfigError, DatasetError
from hess.geometry.alignment import AlignmentResult, align_points, most_confident
from hess.geometry.nearest import NearestNeighbors
from hess.geometry.poses import camera_centers
from hess.geometry.sim3 import Sim3, umeyama
from hess.models.base import Model, Predictions
from hess.sensitivity.errors import (
    PointError,
    camera_error,
    check_inlier_rule,
    point_error,
    scene_scale,
)


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig:
    """How a calibration takes errors; the paper fixes epsilon and ICP, the rest is ours.

    Args:
        inlier_threshold: epsilon of Eq. 3, > 0.
        inlier_on: whether it bounds the "squared_distance" (Eq. 3) or the "distance" (App. B.2).
        normalize_scale: divide ground truth by the mean distance of its points to the first
            camera, so that epsilon means the same in any unit. Scenes without depth divide by
            the mean distance of their cameras to the first.
        point_stride: use every n-th pixel row and column of the prediction, >= 1.
        confidence_keep: share of most confident pixels that Umeyama's pairs keep, in (0, 1].
        icp: whether to refine the alignment by ICP.

    Raises:
        ConfigError: a value is out of range.
    """

    inlier_threshold: float = 0.05
    inlier_on: str = "squared_distance"
    normalize_scale: bool = True
    point_stride: int = 1
    confidence_keep: float = 0.9
    icp: bool = True

    def __post_init__(self) -> None:
        check_inlier_rule(self.inlier_threshold, self.inlier_on)
        if self.point_stride < 1:
            raise ConfigError(f"point_stride must be >= 1, found {self.point_stride}")
        if not 0.0 < self.confidence_keep <= 1.0:
            raise ConfigError(f"confidence_keep must be in (0, 1], found {self.confidence_keep}")


@dataclass(frozen=True, kw_only=True)
class SceneErrors:
    """The errors of one forward pass, differentiable in the predictions.

    Args:
        layout: token order of the scene.
        camera: Eq. 2, scalar.
        point: Eq. 3-4; None when the scene has no depth.
        alignment: on points; None likewise, the cameras were aligned instead.
        world_from_pred: the alignment in force.
    """

    layout: TokenLayout
    camera: Tensor
    point: PointError | None
    alignment: AlignmentResult | None
    world_from_pred: Sim3


def scene_errors(model: Model, scene: Scene, config: CalibrationConfig) -> SceneErrors:
    """Run ``model`` once, align its prediction and take both errors.

    Gradients are recorded if they are on.

    Raises:
        DatasetError: the scene has no poses.
        AlignmentError: prediction and ground truth cannot be aligned.
    """
    if scene.world_from_cam is None:
        raise DatasetError(f"scene {scene.name!r} has no poses; calibration needs ground truth")
    device = next(model.parameters()).device
    images = scene.images.unsqueeze(0).to(device)
    layout = model.token_layout(images)
    with torch.autocast(device.type, enabled=False):
        predictions = model(images)
    pred_centers = camera_centers(predictions.world_from_cam[0])
    gt_centers = camera_centers(scene.world_from_cam).double()

    point: PointError | None = None
    alignment: AlignmentResult | None = None
    if scene.has_points:
        gt_centers, point, alignment = _align_on_points(scene, gt_centers, predictions, config)
        world_from_pred = alignment.world_from_pred
    else:
        if config.normalize_scale:
            gt_centers = gt_centers / scene_scale(gt_centers[1:], gt_centers[0])
        world_from_pred = umeyama(pred_centers, gt_centers)
    return SceneErrors(
        layout=layout,
        camera=camera_error(pred_centers, gt_centers, world_from_pred),
        point=point,
        alignment=alignment,
        world_from_pred=world_from_pred,
    )


def _align_on_points(
    scene: Scene, gt_centers: Tensor, predictions: Predictions, config: CalibrationConfig
) -> tuple[Tensor, PointError, AlignmentResult]:
    """Normalised ground-truth centres, the point error and the alignment it rests on."""
    gt_points, valid = scene.point_map()
    gt_points = gt_points.double()
    if config.normalize_scale:
        scale = scene_scale(gt_points[valid], gt_centers[0])
        gt_points, gt_centers = gt_points / scale, gt_centers / scale
    gt_cloud = gt_points[valid]

    # Every pixel of the ground truth stays a target; the stride thins the prediction only.
    step = config.point_stride
    pred_points = predictions.world_points[0, :, ::step, ::step]
    paired = valid[:, ::step, ::step]
    on_device = paired.to(pred_points.device)
    confidence = predictions.point_confidence[0, :, ::step, ::step][on_device]
    kept = most_confident(confidence, config.confidence_keep)
    pred_pairs = pred_points.detach()[on_device][kept]
    gt_pairs = gt_points[:, ::step, ::step][paired][kept.cpu()]

    pred_cloud = pred_points.flatten(0, 2)
    alignment = align_points(pred_cloud.detach(), gt_cloud, pred_pairs, gt_pairs, icp=config.icp)
    point = point_error(
        pred_cloud,
        NearestNeighbors(gt_cloud),
        alignment.world_from_pred,
        inlier_threshold=config.inlier_threshold,
        inlier_on=config.inlier_on,
        unit="mean point distance" if config.normalize_scale else scene.unit,
    )
    return gt_centers, point, alignment
