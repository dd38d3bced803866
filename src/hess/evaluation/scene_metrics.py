"""All metrics of one prediction of one scene, against ground truth that is prepared once."""

import torch
from torch import Tensor

from hess.datasets.scene import Scene
from hess.errors import AlignmentError, DatasetError
from hess.evaluation.point_metrics import GroundTruthPoints, point_metrics
from hess.evaluation.pose_metrics import auc, pair_errors, trajectory_error
from hess.evaluation.protocol import Protocol

SceneMetrics = dict[str, float | str | None]
"""Metric name -> value; None when the scene lacks the ground truth for it. Where the protocol's
mean is not over scenes, also what it needs of the scene: its "num_pairs" and "category"."""


class SceneTruth:
    """Ground truth of one scene: cameras, and points with their k-d tree where there is depth.

    Points are left out when the protocol measures none.

    Args:
        scene: must have poses; depth is optional.
        protocol: what will be measured.

    Raises:
        DatasetError: no poses, another number of views or another unit than the protocol's, or
            no category where its mean is over categories.
        AlignmentError: a true point is not finite.
    """

    def __init__(self, scene: Scene, protocol: Protocol) -> None:
        if scene.world_from_cam is None:
            raise DatasetError(
                f"scene {scene.name!r} has no camera poses, so nothing can be measured on it; "
                "use a data set with poses"
            )
        if protocol.views is not None and scene.num_views != protocol.views:
            raise DatasetError(
                f"protocol {protocol.name!r} needs scenes of {protocol.views} views, scene "
                f"{scene.name!r} has {scene.num_views}; choose the views or another protocol"
            )
        if protocol.unit is not None and scene.unit != protocol.unit:
            raise DatasetError(
                f"protocol {protocol.name!r} needs lengths in {protocol.unit!r}, scene "
                f"{scene.name!r} is in {scene.unit!r}"
            )
        if protocol.mean == "categories" and scene.category is None:
            raise DatasetError(
                f"protocol {protocol.name!r} takes the mean over categories, scene {scene.name!r} "
                "has none; use CO3Dv2 or another protocol"
            )
        self.name = scene.name
        self.category = scene.category
        self.unit = scene.unit
        self.world_from_cam = scene.world_from_cam.cpu().double()
        self.points: GroundTruthPoints | None = None
        if scene.has_points and protocol.point_alignment is not None:
            points, valid = scene.point_map()
            stride = protocol.point_stride
            if bool(valid[:, ::stride, ::stride].any()):
                self.points = GroundTruthPoints(points, valid, stride, normals=protocol.normals)


def scene_metrics(
    world_from_cam: Tensor, world_points: Tensor, truth: SceneTruth, protocol: Protocol
) -> SceneMetrics:
    """Metrics of a prediction: ``protocol.metrics`` by name, and what their mean needs.

    Args:
        world_from_cam: predicted poses [N, 4, 4], any frame and scale.
        world_points: predicted point map [N, H, W, 3] in the same frame and scale.

    Raises:
        LayoutError: shapes differ from the truth's.
        AlignmentError: the prediction is not finite or degenerate, or the truth is degenerate.
    """
    world_from_cam = world_from_cam.detach().cpu().double()
    if not bool(torch.isfinite(world_from_cam).all()):
        raise AlignmentError("the predicted cameras hold NaN or infinity")
    rotation, translation = pair_errors(world_from_cam, truth.world_from_cam, protocol.pair_order)
    worst = torch.maximum(rotation, translation)
    metrics: SceneMetrics = {f"auc_{t}": float(auc(worst, t)) for t in protocol.auc_thresholds}
    trajectory = trajectory_error(world_from_cam, truth.world_from_cam)
    metrics |= {"ate_rmse": trajectory.rmse, "ate_relative": trajectory.relative}
    if protocol.mean != "scenes":
        metrics |= {"num_pairs": worst.shape[-1], "category": truth.category}
    if truth.points is None or protocol.point_alignment is None:
        return metrics | dict.fromkeys(protocol.point_metrics)
    points = point_metrics(
        world_points, truth.points, protocol.point_alignment, normals=protocol.normals
    )
    cloud = points.cloud
    metrics |= {
        "accuracy": cloud.accuracy,
        "accuracy_median": cloud.accuracy_median,
        "completeness": cloud.completeness,
        "completeness_median": cloud.completeness_median,
        "chamfer_mean": cloud.chamfer_mean,
        "point_error": points.point_error,
    }
    if protocol.normals:
        metrics["normal_consistency"] = points.normal_consistency
    return metrics
